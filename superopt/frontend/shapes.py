"""Lifting rules for operators that make, move and select elements."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from superopt.frontend.rules import (
    Call,
    Decline,
    Scalar,
    as_dtype,
    axes_of,
    nearest,
    one_axis,
    rounded,
    rule,
    to,
)
from superopt.ir import build as b
from superopt.ir.node import Node
from superopt.ir.ops import leaf
from superopt.ir.types import DType

aten = torch.ops.aten
_FEW = 8
"""Elements of a window that kernels read as so many parts: one index for all is read element by element."""


@rule(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
)
def _view(call: Call, x: Node, *_: Any) -> Node:
    return b.reshape(x, call.shape)


@rule(aten.expand.default, aten.expand_as.default, aten.broadcast_to.default)
def _expand(call: Call, x: Node, *_: Any) -> Node:
    return b.broadcast(x, call.shape) if call.shape else x


@rule(aten.permute.default)
def _permute(call: Call, x: Node, dims: Sequence[int]) -> Node:
    return b.permute(x, dims) if dims else x


@rule(aten.t.default)
def _t(call: Call, x: Node) -> Node:
    return b.transpose(x) if x.tensor.rank == 2 else x


@rule(aten.transpose.int)
def _transpose(call: Call, x: Node, first: int, second: int) -> Node:
    perm = list(range(x.tensor.rank))
    if perm:
        perm[first], perm[second] = perm[second], perm[first]
    return b.permute(x, perm) if perm else x


def _bounds(size: int, start: int | None, stop: int | None) -> tuple[int, int]:
    """Return Python's reading of start:stop for a dim of `size`."""
    start, stop, _ = slice(start, stop).indices(size)
    return start, max(start, stop)


@rule(aten.slice.Tensor)
def _slice(
    call: Call, x: Node, dim: int, start: int | None, stop: int | None, step: int = 1
) -> Node:
    axis = one_axis(x, dim)
    first, last = _bounds(x.shape[axis], start, stop)
    return b.slice_(x, axis, first, last, step)


@rule(aten.narrow.default)
def _narrow(call: Call, x: Node, dim: int, start: int, length: int) -> Node:
    axis = one_axis(x, dim)
    start %= max(x.shape[axis], 1)
    return b.slice_(x, axis, start, start + length)


@rule(aten.select.int)
def _select(call: Call, x: Node, dim: int, index: int) -> Node:
    axis = one_axis(x, dim)
    index %= x.shape[axis]
    return b.reshape(b.slice_(x, axis, index, index + 1), call.shape)


@rule(aten.diagonal.default)
def _diagonal(call: Call, x: Node, offset: int = 0, first: int = 0, second: int = 1) -> Node:
    rank = x.tensor.rank
    others = [d for d in range(rank) if d not in (first % rank, second % rank)]
    x = b.permute(x, [*others, first % rank, second % rank])
    *outer, rows, columns = x.shape
    count = call.shape[-1]
    if not count:
        raise Decline("a diagonal without elements")
    start = offset if offset >= 0 else -offset * columns
    step = columns + 1
    flat = b.reshape(x, (*outer, rows * columns))
    return b.slice_(flat, -1, start, start + (count - 1) * step + 1, step)


@rule(aten.unfold.default)
def _unfold(call: Call, x: Node, dim: int, size: int, step: int) -> Node:
    axis = x.tensor.rank + one_axis(x, dim)
    windows = _windows(x, axis, size, call.shape[axis], step)
    rank = windows.tensor.rank
    return b.permute(windows, [*(d for d in range(rank) if d != axis), axis])


@rule(aten.im2col.default)
def _im2col(
    call: Call,
    x: Node,
    size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
) -> Node:
    first = x.tensor.rank - 2
    for n in (0, 1):
        x = b.pad(x, first + n, padding[n], padding[n])
    for n in (1, 0):
        axis = first + n
        count = (x.shape[axis] - dilation[n] * (size[n] - 1) - 1) // stride[n] + 1
        x = _windows(x, axis, size[n], count, stride[n], dilation[n])
    order = (*range(first), first, first + 2, first + 1, first + 3)
    return b.reshape(b.permute(x, order), call.shape)


def _windows(x: Node, axis: int, size: int, count: int, step: int, dilation: int = 1) -> Node:
    """Return `count` windows of an axis, which becomes two: [size, count]."""
    outer, inner = x.shape[:axis], x.shape[axis + 1 :]
    if step == size and dilation == 1:  # nothing is read twice
        cut = b.reshape(b.slice_(x, axis, 0, count * size), (*outer, count, size, *inner))
        rank = cut.tensor.rank
        return b.permute(cut, [*range(axis), axis + 1, axis, *range(axis + 2, rank)])
    last = (count - 1) * step + 1
    if 0 < size <= _FEW:
        starts = (n * dilation for n in range(size))
        parts = [b.slice_(x, axis, n, n + last, step) for n in starts]
        return b.concat([b.reshape(p, (*outer, 1, count, *inner)) for p in parts], axis)
    first = b.mul(b.iota((size, 1), -2, DType.I64), dilation)
    return b.take(x, b.add(first, b.mul(b.iota((1, count), -1, DType.I64), step)), axis)


def _pieces(x: Node, dim: int, sizes: Sequence[int]) -> tuple[Node, ...]:
    axis = one_axis(x, dim)
    parts = []
    start = 0
    for size in sizes:
        parts.append(b.slice_(x, axis, start, start + size))
        start += size
    return tuple(parts)


@rule(aten.split_with_sizes.default)
def _split_with_sizes(call: Call, x: Node, sizes: Sequence[int], dim: int) -> tuple[Node, ...]:
    return _pieces(x, dim, sizes)


@rule(aten.split.Tensor, aten.chunk.default)
def _split(call: Call, x: Node, size: int, dim: int) -> tuple[Node, ...]:
    axis = one_axis(x, dim)
    return _pieces(x, dim, [t.shape[axis] for t in call.results])


@rule(aten.unbind.int)
def _unbind(call: Call, x: Node, dim: int) -> tuple[Node, ...]:
    parts = _pieces(x, dim, [1] * len(call.results))
    return tuple(b.reshape(p, t.shape) for p, t in zip(parts, call.results, strict=True))


@rule(aten.cat.default)
def _cat(call: Call, tensors: Sequence[Node], dim: int) -> Node:
    # PyTorch lets tensors of shape (0,) stand beside any others
    parts = [t for t in tensors if t.shape != (0,)] or list(tensors[:1])
    return b.concat([to(t, call.dtype) for t in parts], one_axis(parts[0], dim))


@rule(aten.stack.default)
def _stack(call: Call, tensors: Sequence[Node], dim: int) -> Node:
    axis = dim % len(call.shape)
    single = (*call.shape[:axis], 1, *call.shape[axis + 1 :])
    return b.concat([b.reshape(to(t, call.dtype), single) for t in tensors], axis)


@rule(aten.flip.default)
def _flip(call: Call, x: Node, dims: Sequence[int]) -> Node:
    return b.flip(x, axes_of(x, dims)) if dims and x.tensor.rank else x


@rule(aten.roll.default)
def _roll(call: Call, x: Node, shifts: Sequence[int], dims: Sequence[int]) -> Node:
    flat = not dims
    y = b.reshape(x, (x.tensor.elements,)) if flat else x
    for shift, dim in zip(shifts, [0] if flat else dims, strict=True):
        axis = one_axis(y, dim)
        size = y.shape[axis]
        cut = (size - shift) % size if size else 0
        if cut:
            y = b.concat([b.slice_(y, axis, cut, size), b.slice_(y, axis, 0, cut)], axis)
    return b.reshape(y, call.shape)


@rule(aten.linalg_cross.default)
def _cross(call: Call, x: Node, y: Node, dim: int) -> Node:
    def turned(t: Node, by: int) -> Node:
        t = b.broadcast(t, call.shape)
        axis = one_axis(t, dim)
        return b.concat([b.slice_(t, axis, by, 3), b.slice_(t, axis, 0, by)], axis)

    return b.sub(b.mul(turned(x, 1), turned(y, 2)), b.mul(turned(x, 2), turned(y, 1)))


@rule(aten.repeat.default)
def _repeat(call: Call, x: Node, repeats: Sequence[int]) -> Node:
    if 0 in repeats:
        raise Decline("repeat makes an empty tensor")
    shape = (1,) * (len(repeats) - x.tensor.rank) + x.shape
    spaced = b.reshape(x, [n for d in shape for n in (1, d)])
    wide = b.broadcast(spaced, [n for r, d in zip(repeats, shape, strict=True) for n in (r, d)])
    return b.reshape(wide, call.shape)


@rule(aten.constant_pad_nd.default)
def _pad(call: Call, x: Node, widths: Sequence[int], value: Scalar) -> Node:
    for i in range(len(widths) // 2):
        axis, before, after = -1 - i, widths[2 * i], widths[2 * i + 1]
        size = x.shape[axis]
        x = b.slice_(x, axis, max(-before, 0), size - max(-after, 0))
        x = b.pad(x, axis, max(before, 0), max(after, 0), float(nearest(value, call.dtype)))
    return x


# -- selection by index --------------------------------------------------------------------------


@rule(aten.embedding.default)
def _embedding(call: Call, weight: Node, index: Node, *_: Any) -> Node:
    return b.take(weight, index, 0)


@rule(aten.index_select.default)
def _index_select(call: Call, x: Node, dim: int, index: Node) -> Node:
    if index.tensor.rank != 1:
        raise Decline("index_select by a scalar")
    return b.take(x, index, one_axis(x, dim))


@rule(aten.gather.default)
def _gather(call: Call, x: Node, dim: int, index: Node, *_: Any) -> Node:
    axis = one_axis(x, dim)
    if index.tensor.rank != x.tensor.rank:
        raise Decline("gather by an index of another rank")
    for other in range(-x.tensor.rank, 0):
        if other != axis:
            x = b.slice_(x, other, 0, index.shape[other])
    return b.gather(x, index, axis)


_WRITES = 8
"""Positions per row up to which writing there is a choice for each element."""


@rule(
    aten.scatter.value,
    aten.scatter.src,
    aten.scatter_add.default,
)
def _scatter(call: Call, x: Node, dim: int, index: Node, source: Node | Scalar) -> Node:
    """Let each element ask whether it is written: no loop writes where data says."""
    if not x.shape or index.tensor.rank != x.tensor.rank:
        raise Decline("scatter by an index of another rank")
    axis = one_axis(x, dim)
    rows = [n for i, n in enumerate(x.shape) if i != axis + len(x.shape)]
    if rows != [n for i, n in enumerate(index.shape) if i != axis + len(x.shape)]:
        raise Decline("scatter into a part of the rows")
    if not 0 < index.shape[axis] <= _WRITES:
        raise Decline("scatter to many places of a row")
    places = [b.slice_(index, axis, i, i + 1) for i in range(index.shape[axis])]
    if call.dtype.is_float:
        # PyTorch refuses an index beyond its tensor; a kernel cannot, and lets nobody miss it
        for place in places:
            inside = b.and_(b.ge(place, 0), b.lt(place, x.shape[axis]))
            x = b.where(inside, x, b.constant(math.nan, call.dtype))
    at = b.iota(x.shape, axis, index.tensor.dtype)
    for i, place in enumerate(places):
        if isinstance(source, Node):
            value = b.slice_(source, axis, i, i + 1)
        else:
            value = rounded(source, call.dtype)
        if call.target is aten.scatter_add.default:
            value = b.add(x, value)
        x = b.where(b.eq(at, place), value, x)
    return x


def _from_start(index: Node, size: int) -> Node:
    """Turn negative indices, which count from the end, into positions."""
    if _never_negative(index):
        return index
    dtype = index.tensor.dtype
    wrapped = b.add(index, b.constant(size, dtype))
    return b.where(b.lt(index, b.constant(0, dtype)), wrapped, index)


def _never_negative(index: Node) -> bool:
    return index.op is leaf.IOTA or index.tensor.dtype is DType.U8


@rule(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(call: Call, x: Node, indices: Sequence[Node | None]) -> Node:
    places = [i for i, index in enumerate(indices) if index is not None]
    chosen = [index for index in indices if index is not None]
    if not places or any(not i.tensor.dtype.is_integer for i in chosen):
        raise Decline("indexing by a mask")
    if places != list(range(places[0], places[-1] + 1)):
        raise Decline("indices of separate dims")
    total: Node | None = None
    for place, index in zip(places, chosen, strict=True):
        position = to(_from_start(index, x.shape[place]), DType.I64)
        total = position if total is None else b.add(b.mul(total, x.shape[place]), position)
    assert total is not None
    first, last = places[0], places[-1] + 1
    merged = math.prod(x.shape[first:last])
    flat = b.reshape(x, (*x.shape[:first], merged, *x.shape[last:]))
    return b.take(flat, total, first)


@rule(aten.slice_scatter.default)
def _slice_scatter(
    call: Call, x: Node, source: Node, dim: int, start: int | None, stop: int | None, step: int
) -> Node:
    if step != 1:
        raise Decline("slice_scatter with a step")
    axis = one_axis(x, dim)
    size = x.shape[axis]
    first, last = _bounds(size, start, stop)
    parts = [b.slice_(x, axis, 0, first), source, b.slice_(x, axis, last, size)]
    return b.concat([p for p in parts if p.shape[axis]], axis)


@rule(aten.select_scatter.default)
def _select_scatter(call: Call, x: Node, source: Node, dim: int, index: int) -> Node:
    axis = one_axis(x, dim)
    index %= x.shape[axis]
    shape = list(x.shape)
    shape[axis] = 1
    return _slice_scatter(call, x, b.reshape(source, shape), dim, index, index + 1, 1)


# -- creation ------------------------------------------------------------------------------------


@rule(
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
)
def _full(call: Call, _like: Any, second: Any, *rest: Any) -> Node:
    value = rest[0] if call.target is aten.new_full.default else second
    return _filled(call, value)


@rule(aten.scalar_tensor.default)
def _scalar_tensor(call: Call, value: Scalar, *_: Any) -> Node:
    return rounded(value, call.dtype)


@rule(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
)
def _zeros(call: Call, *_: Any) -> Node:
    # the elements of an empty tensor may be anything
    return _filled(call, 0)


@rule(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(call: Call, *_: Any) -> Node:
    return _filled(call, 1)


def _filled(call: Call, value: Scalar) -> Node:
    if not isinstance(value, bool | int | float):
        raise Decline("filled with a value known only at run time")
    return b.full(call.shape, nearest(value, call.dtype), call.dtype)


@rule(aten.eye.default, aten.eye.m)
def _eye(call: Call, *_: Any) -> Node:
    return to(b.eq(b.iota(call.shape, -2), b.iota(call.shape, -1)), call.dtype)


@rule(aten.arange.start_step, aten.arange.start, aten.arange.default)
def _arange(call: Call, first: Scalar, second: Any = None, third: Any = None, *_: Any) -> Node:
    start, step = first, third
    if call.target is aten.arange.default:
        start, step = 0, 1
    elif call.target is aten.arange.start:
        step = 1
    if call.dtype.is_integer:
        start, step = int(start), int(step)  # as PyTorch does, after counting
    else:
        # PyTorch computes start + i * step in float64 and rounds once
        index = b.iota(call.shape, -1, DType.F64)
        value = b.add(b.mul(index, float(step)), float(start))
        return to(value, call.dtype)
    index = b.iota(call.shape, -1, call.dtype)
    if step != 1:
        index = b.mul(index, as_dtype(step, call.dtype))
    return b.add(index, as_dtype(start, call.dtype)) if start else index
