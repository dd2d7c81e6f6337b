"""Structural primitives: they move elements and compute nothing."""

from dataclasses import dataclass
from math import prod
from typing import final

from superopt.ir.errors import GraphError
from superopt.ir.ops.contraction import AxisAttrs, ReduceAttrs
from superopt.ir.ops.registry import Op, OpKind, declare
from superopt.ir.ops.shapes import check_axis, same_dtype, tensor
from superopt.ir.types import Dim, TensorType, Type


@final
@dataclass(frozen=True, slots=True)
class ShapeAttrs:
    """Shape of the result."""

    shape: tuple[Dim, ...]


@final
@dataclass(frozen=True, slots=True)
class PermuteAttrs:
    """Result dim i is operand dim `perm[i]` (from the front)."""

    perm: tuple[int, ...]


@final
@dataclass(frozen=True, slots=True)
class SliceAttrs:
    """Elements start, start+step, … < stop of one axis (from the end)."""

    axis: int
    start: int
    stop: int
    step: int = 1


@final
@dataclass(frozen=True, slots=True)
class PadAttrs:
    """Elements of `value` put before and after along one axis (from the end)."""

    axis: int
    before: int
    after: int
    value: float


def _reshape(types: tuple[Type, ...], attrs: ShapeAttrs) -> Type:
    x = tensor(types[0])
    if prod(x.shape) != prod(attrs.shape):
        raise GraphError(f"{prod(x.shape)} elements do not fill shape {attrs.shape}")
    return x.with_shape(attrs.shape)


def _broadcast(types: tuple[Type, ...], attrs: ShapeAttrs) -> Type:
    x = tensor(types[0])
    if x.rank != len(attrs.shape):
        raise GraphError(f"rank {x.rank} does not broadcast to {attrs.shape}; reshape first")
    if any(a not in (1, b) for a, b in zip(x.shape, attrs.shape, strict=True)):
        raise GraphError(f"{x.shape} does not broadcast to {attrs.shape}")
    return x.with_shape(attrs.shape)


def _permute(types: tuple[Type, ...], attrs: PermuteAttrs) -> Type:
    x = tensor(types[0])
    if sorted(attrs.perm) != list(range(x.rank)):
        raise GraphError(f"{attrs.perm} is not a permutation of {x.rank} dims")
    return x.with_shape(tuple(x.shape[p] for p in attrs.perm))


def _slice(types: tuple[Type, ...], attrs: SliceAttrs) -> Type:
    x = tensor(types[0])
    axis = check_axis(attrs.axis, x.rank)
    if not (0 <= attrs.start <= attrs.stop <= x.shape[axis] and attrs.step >= 1):
        raise GraphError(f"slice {attrs.start}:{attrs.stop}:{attrs.step} of {x.shape[axis]}")
    size = -(-(attrs.stop - attrs.start) // attrs.step)
    return x.with_shape((*x.shape[:axis], size, *x.shape[axis + 1 :]))


def _concat(types: tuple[Type, ...], attrs: AxisAttrs) -> Type:
    parts = [tensor(t) for t in types]
    if not parts:
        raise GraphError("concat needs at least one operand")
    axis = check_axis(attrs.axis, parts[0].rank)
    rests = {(*t.shape[:axis], *t.shape[axis + 1 :]) for t in parts}
    if len(rests) > 1 or len({t.rank for t in parts}) > 1:
        raise GraphError("operands differ in a dim that is not concatenated")
    size = sum(t.shape[axis] for t in parts)
    shape = (*parts[0].shape[:axis], size, *parts[0].shape[axis + 1 :])
    return TensorType(shape, same_dtype(parts))


def _pad(types: tuple[Type, ...], attrs: PadAttrs) -> Type:
    x = tensor(types[0])
    axis = check_axis(attrs.axis, x.rank)
    if attrs.before < 0 or attrs.after < 0:
        raise GraphError("pad widths are not negative; slice instead")
    size = x.shape[axis] + attrs.before + attrs.after
    return x.with_shape((*x.shape[:axis], size, *x.shape[axis + 1 :]))


def _flip(types: tuple[Type, ...], attrs: ReduceAttrs) -> Type:
    x = tensor(types[0])
    for axis in attrs.axes:
        check_axis(axis, x.rank)
    return x.with_shape(x.shape)


def _take(types: tuple[Type, ...], attrs: AxisAttrs) -> Type:
    x, index = (tensor(t) for t in types)
    axis = check_axis(attrs.axis, x.rank)
    if not index.dtype.is_integer:
        raise GraphError(f"the index must be integers, got {index.dtype}")
    return x.with_shape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]))


def _gather(types: tuple[Type, ...], attrs: AxisAttrs) -> Type:
    x, index = (tensor(t) for t in types)
    axis = check_axis(attrs.axis, x.rank)
    if not index.dtype.is_integer or index.rank != x.rank:
        raise GraphError("the index must be integers of the operand's rank")
    for i, (wide, narrow) in enumerate(zip(x.shape, index.shape, strict=True)):
        if i != axis and wide != narrow:
            raise GraphError(f"dim {i}: operand has {wide}, index has {narrow}; slice first")
    return x.with_shape(index.shape)


def _shape_batched(attrs: ShapeAttrs, batch: tuple[int, ...]) -> ShapeAttrs:
    return ShapeAttrs((*batch, *attrs.shape))


def _permute_batched(attrs: PermuteAttrs, batch: tuple[int, ...]) -> PermuteAttrs:
    n = len(batch)
    return PermuteAttrs((*range(n), *(p + n for p in attrs.perm)))


_KIND = OpKind.STRUCTURAL
_LINEAR = frozenset({0})
RESHAPE = declare(
    Op(
        "reshape",
        _KIND,
        1,
        ShapeAttrs,
        _reshape,
        "torch.reshape",
        batched=_shape_batched,
        linear_in=_LINEAR,
    )
)
BROADCAST = declare(
    Op(
        "broadcast",
        _KIND,
        1,
        ShapeAttrs,
        _broadcast,
        "tensor.expand",
        batched=_shape_batched,
        linear_in=_LINEAR,
    )
)
PERMUTE = declare(
    Op(
        "permute",
        _KIND,
        1,
        PermuteAttrs,
        _permute,
        "torch.permute",
        batched=_permute_batched,
        linear_in=_LINEAR,
    )
)
SLICE = declare(
    Op("slice", _KIND, 1, SliceAttrs, _slice, "x[..., start:stop:step, …]", linear_in=_LINEAR)
)
CONCAT = declare(Op("concat", _KIND, None, AxisAttrs, _concat, "torch.cat"))
PAD = declare(Op("pad", _KIND, 1, PadAttrs, _pad, "torch.nn.functional.pad, constant"))
FLIP = declare(Op("flip", _KIND, 1, ReduceAttrs, _flip, "torch.flip", linear_in=_LINEAR))
TAKE = declare(
    Op("take", _KIND, 2, AxisAttrs, _take, "x[…, index, …] along one axis; embedding, index_select")
)
GATHER = declare(Op("gather", _KIND, 2, AxisAttrs, _gather, "torch.gather(x, axis, index)"))

VIEWS = (RESHAPE, PERMUTE, SLICE, BROADCAST)
"""Ops whose result may be a tensor in memory seen in another way."""
