"""Arithmetics of float64 that tell what rounding may do to a program: it moves results, or lets them overflow.

In: a graph's nodes and their operands, through `evaluate`. Out: values in float64, `Rounding`'s each off by one unit of
the type that the program gives it, `Edges`' NaN where chance decides whether they overflow.
"""

from collections.abc import Sequence
from typing import Any, Final, final

import torch

from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise
from superopt.ir.ops.registry import Op, OpKind
from superopt.ir.types import DType
from superopt.verify.inputs import PERIOD
from superopt.verify.memory import empty
from superopt.verify.reference import DTYPES, TorchDomain

SLACK_ULPS = 16.0
"""Errors below this many units in the last place of the output's scale are never held against it."""

_SUMS: Final = (contraction.MATMUL, contraction.REDUCE_SUM)
_ROUNDING: Final = (OpKind.ELEMENTWISE, OpKind.REDUCTION, OpKind.CONTRACTION)
_EXACT: Final = (
    elementwise.NEG,
    elementwise.ABS,
    elementwise.SIGN,
    elementwise.FLOOR,
    elementwise.CEIL,
    elementwise.ROUND,
    elementwise.TRUNC,
    elementwise.MAXIMUM,
    elementwise.MINIMUM,
    elementwise.WHERE,
    contraction.REDUCE_MAX,
    contraction.REDUCE_MIN,
)
"""Ops whose results are operands or whole numbers: they do not round."""


@final
class Rounding:
    """Float64 arithmetic in which every result is off by one unit of the type that the program gives it.

    Monte Carlo arithmetic (Parker, "Monte Carlo arithmetic: how to gamble with your floating point",
    2000): how far that moves a program's result is what rounding may do to it, whatever kernel runs
    it. Without it a candidate would be held against the original's luck: equal rows give eager
    PyTorch equal scores, whose rounding errors cancel in a softmax. With `sign` -1 every result is off
    the other way.
    """

    def __init__(self, device: torch.device | str, seed: int, sign: float = 1.0) -> None:
        self._exact = TorchDomain(torch.float64, device)
        self._source = torch.Generator().manual_seed(seed)
        drawn = torch.randint(0, 2, (PERIOD,), generator=self._source, dtype=torch.float64)
        self._signs = ((drawn * 2.0 - 1.0) * sign).repeat(2).to(device)
        self._factors: dict[DType, torch.Tensor] = {}

    def has_rule(self, op: Op) -> bool:
        """Composites are expanded: each of their steps rounds."""
        return False

    def apply(self, node: Node, args: Sequence[Any]) -> Any:
        """Return the exact value of a node, moved where working precision would round it."""
        if node.op is contraction.MATMUL and args[0].is_floating_point():
            # every product rounds before it is summed
            args = (self.moved(args[0], node.inputs[0].tensor.dtype), *args[1:])
        value = self._exact.apply(node, args)
        if node.op.kind not in _ROUNDING or node.op in _EXACT or not value.is_floating_point():
            return value
        own = value.is_contiguous() and not any(_shares(value, a) for a in args)
        return self.moved(value, node.tensor.dtype, value if own else None)

    def all_moved(self, graph: Graph, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inputs of a graph, each number moved by one unit of its type."""
        return [
            self.moved(x, n.tensor.dtype) if x.is_floating_point() else x
            for n, x in zip(graph.inputs, inputs, strict=True)
        ]

    def moved(
        self, value: torch.Tensor, dtype: DType, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return `value` in float64, each number moved up or down by one unit of `dtype`.

        The result is written to `out` where one is given; that may be `value`, where nobody else has it.
        """
        if dtype not in self._factors:
            self._factors[dtype] = 1.0 + self._signs * torch.finfo(DTYPES[dtype]).eps
        # nodes of one shape get different signs: each starts elsewhere in their cycle
        start = int(torch.randint(0, PERIOD, (), generator=self._source))
        cycle = self._factors[dtype][start : start + PERIOD]
        result = out
        if result is None:
            result = empty(value.shape, torch.float64, value.device)
        parts = zip(
            torch.split(value.reshape(-1), PERIOD),
            torch.split(result.view(-1), PERIOD),
            strict=True,
        )
        for given, moved in parts:
            if given.dtype is not moved.dtype:
                given = moved.copy_(given)  # three times as fast as a product of two types
            torch.mul(given, cycle[: len(given)], out=moved)
        return result


@final
class Edges:
    """Float64 arithmetic in which results are NaN where chance decides whether they overflow.

    A result does that is nearly the largest number of its type: rounding decides. A sum does if it fits the type that
    it is summed in, and its terms' magnitudes together do not: in one order the original stays finite by luck, in
    another one a kernel does not. What is nearer to 0 than all numbers of its type is 0.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._exact = TorchDomain(torch.float64, device)

    def has_rule(self, op: Op) -> bool:
        """Composites are expanded: there are sums in them."""
        return False

    def apply(self, node: Node, args: Sequence[Any]) -> Any:
        """Return the exact value of a node; NaN where it is at the edge of overflow."""
        value = self._exact.apply(node, args)
        if node.op.kind not in _ROUNDING or not value.is_floating_point():
            return value
        held = torch.finfo(DTYPES[node.tensor.dtype])
        if node.op not in _EXACT:
            near = _near_largest(value, node)
            if node.op.kind is OpKind.ELEMENTWISE:
                # the largest number may be there to stay, as a mask
                for operand, given in zip(node.inputs, args, strict=True):
                    if given.is_floating_point():
                        near = near & ~_near_largest(given, operand)
            value = value.masked_fill(near, float("nan"))
        value = value.masked_fill(value.abs() < held.tiny * held.eps / 2, 0.0)
        if node.op not in _SUMS:
            return value
        magnitude = self._exact.apply(node, [a.abs() for a in args])
        summed_in = torch.promote_types(DTYPES[node.tensor.dtype], torch.float32)
        largest = torch.finfo(summed_in).max
        return value.masked_fill((magnitude > largest) & (value.abs() <= largest), float("nan"))


def _near_largest(value: torch.Tensor, node: Node) -> torch.Tensor:
    held = torch.finfo(DTYPES[node.tensor.dtype])
    return (value.abs() / held.max - 1.0).abs() < SLACK_ULPS * held.eps


def _shares(value: torch.Tensor, argument: Any) -> bool:
    """Say whether a result may lie in the memory of an argument, a tensor or a tuple of them."""
    if isinstance(argument, tuple):
        return any(_shares(value, a) for a in argument)
    held = value.untyped_storage().data_ptr()
    return isinstance(argument, torch.Tensor) and argument.untyped_storage().data_ptr() == held
