"""The table of lifting rules, one per ATen overload, and what rules share.

A rule takes the call and the overload's arguments in the order of its schema (defaults filled in;
tensors are IR nodes) and returns a node, or a tuple of nodes for several results. It raises
`Decline` for arguments that it does not cover; the call then becomes an opaque node.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, final

import torch

from superopt.ir import build as b
from superopt.ir.node import Node
from superopt.ir.types import DType, TensorType
from superopt.verify.reference import DTYPES, IR_DTYPES

Scalar = bool | int | float
Operand = Node | Scalar


class Decline(Exception):
    """A rule does not cover these arguments: keep the operator opaque."""


@final
@dataclass(frozen=True, slots=True)
class Call:
    """One operator call: the types of its results, and which of them are read."""

    target: torch._ops.OpOverload
    results: tuple[TensorType, ...]
    used: frozenset[int]

    @property
    def dtype(self) -> DType:
        """Element type of the first result."""
        return self.results[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return self.results[0].shape


LiftRule = Callable[..., Any]
RULES: dict[torch._ops.OpOverload, LiftRule] = {}


RuleFunction = TypeVar("RuleFunction", bound=LiftRule)


def rule(*targets: torch._ops.OpOverload) -> Callable[[RuleFunction], RuleFunction]:
    """Decorate a rule with the overloads that it lifts."""

    def add(function: RuleFunction) -> RuleFunction:
        for target in targets:
            assert target not in RULES, f"two lifting rules for {target}"
            RULES[target] = function
        return function

    return add


def _category(dtype: torch.dtype) -> int:
    if dtype.is_complex:
        return 3
    if dtype.is_floating_point:
        return 2
    return 0 if dtype is torch.bool else 1


def _combine(higher: torch.dtype | None, lower: torch.dtype | None) -> torch.dtype | None:
    # at::native combine_categories: tensors with dims outrank those without, these outrank numbers
    if higher is None or lower is None:
        return higher or lower
    return torch.promote_types(higher, lower) if _category(lower) > _category(higher) else higher


def common_dtype(*operands: Operand) -> DType:
    """Return the element type that PyTorch computes in, by its promotion rules."""
    groups: list[torch.dtype | None] = [None, None, None]
    for operand in operands:
        if isinstance(operand, Node):
            place, dtype = int(operand.tensor.rank == 0), DTYPES[operand.tensor.dtype]
        elif isinstance(operand, bool):
            place, dtype = 2, torch.bool
        else:
            place = 2
            dtype = torch.int64 if isinstance(operand, int) else torch.get_default_dtype()
        known = groups[place]
        groups[place] = dtype if known is None else torch.promote_types(known, dtype)
    result = _combine(groups[0], _combine(groups[1], groups[2]))
    assert result is not None, "promotion of no operands"
    return IR_DTYPES[result]


def as_dtype(operand: Operand, dtype: DType) -> Node:
    """Return a tensor cast to `dtype`, a number as a constant of it."""
    if isinstance(operand, Node):
        return to(operand, dtype)
    if not isinstance(operand, bool | int | float):
        raise Decline(f"{operand!r} is not a number")
    if dtype.is_integer and isinstance(operand, float) and not operand.is_integer():
        raise Decline("a fraction does not become an integer")
    return b.constant(operand, dtype)


def nearest(value: Scalar, dtype: DType) -> Scalar:
    """Return the number of a type of 16 bits that a number becomes in a tensor of that type.

    Kernels compute in float32 and would take it as it is. Steps show that: 0.1 is not below 0.1, and
    remainders are others.
    """
    if dtype.wide is dtype:
        return value
    return float(torch.tensor(value, dtype=DTYPES[dtype]))


def rounded(operand: Operand, dtype: DType) -> Node:
    """Return a tensor cast to `dtype`, a number as PyTorch has it where it makes a tensor of it."""
    return as_dtype(operand if isinstance(operand, Node) else nearest(operand, dtype), dtype)


def to(x: Node, dtype: DType) -> Node:
    """Cast as PyTorch does; anything that is not zero is true."""
    return b.cast(x, dtype)


def converted(x: Node, dtype: DType) -> Node:
    """Cast where the program says so: its roundings to 16 bits are kept, whose error it may want to know."""
    return b.cast(x, dtype, rounds=dtype.is_half and x.tensor.dtype is not DType.BOOL)


def axes_of(x: Node, dims: int | Sequence[int] | None) -> tuple[int, ...]:
    """Return dims of PyTorch as axes from the end; None or an empty list means all."""
    rank = x.tensor.rank
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(-rank, 0))
    if rank == 0:
        return ()
    listed = (dims,) if isinstance(dims, int) else tuple(dims)
    return tuple(sorted({d % rank - rank for d in listed}))


def one_axis(x: Node, dim: int) -> int:
    """Return one dim as an axis from the end."""
    rank = x.tensor.rank
    if rank == 0:
        raise Decline("a tensor without dims has no axis")
    return dim % rank - rank
