"""Views: by which one are the elements of one value those of another, reshaped, permuted, repeated, padded.

A kernel holds what its program computes block by block: rows of a tensor in blocks of rows, the last of
them repeated where blocks do not divide, the same ones for every block of columns. Which elements these are
is read from a test's values, which are drawn from so many that few are equal by chance. It is a guess:
the view is stated in operators, and a claim about it is proven like any other.

In: nodes and their values as whole numbers. Out: a node that takes its elements from another one.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Final, final

import torch

from superopt.ir import build as b
from superopt.ir.node import Node
from superopt.ir.semantics import extended

MOST_ELEMENTS: Final = 1 << 18
"""Larger values are not looked at: proofs start from rows' statistics, and sorting takes time."""


@final
@dataclass(frozen=True, slots=True)
class _Dim:
    """One dim of a value, or some neighbouring ones as one, and the axes that run along it.

    Of `axes` the first is the outermost; a step along the last one is a step along the dim.
    """

    extent: int
    stride: int
    axes: tuple[int, ...]


def occurring(values: torch.Tensor) -> bytes:
    """Digest which numbers occur in a value, wherever and how often."""
    return hashlib.blake2b(torch.unique(values).cpu().numpy().tobytes()).digest()


def view(source: Node, values: torch.Tensor, target: Node, wanted: torch.Tensor) -> Node | None:
    """Return what has the elements of `target` where it has them, all taken from `source`.

    `values` and `wanted` are the values of the two. None: no view that is known here does that.
    """
    flat = values.reshape(-1)
    held, order = flat.sort(stable=True)
    shape = tuple(target.shape)
    zeros = (0,) * len(shape)
    ends = [zeros, *(tuple(int(i == a) for i in range(len(shape))) for a in range(len(shape)))]
    corners = [wanted[tuple(min(i, n - 1) for i, n in zip(e, shape, strict=True))] for e in ends]
    found = order[torch.searchsorted(held, torch.stack(corners)).clamp(max=len(flat) - 1)]
    origin, *strides = (int(i) for i in found)
    if origin:
        return None
    for extents in _groupings([n for n in source.shape if n > 1]):
        dims = _dims(extents, strides, shape)
        if dims is not None and bool((flat[_indices(dims, shape, flat.device)] == wanted).all()):
            return _built(source, target, dims)
    return None


def _groupings(extents: Sequence[int]) -> Iterator[list[int]]:
    """List the shapes in which neighbouring dims may be one, beginning with all on their own."""
    for joined in product((False, True), repeat=max(0, len(extents) - 1)):
        result = list(extents[:1])
        for extent, one in zip(extents[1:], joined, strict=True):
            result[-1:] = [result[-1] * extent] if one else [result[-1], extent]
        yield result


def _dims(
    extents: Sequence[int], strides: Sequence[int], shape: Sequence[int]
) -> list[_Dim] | None:
    """Say which axes of `shape` run along which dim; None where their strides fit none."""
    left = {a for a, (k, n) in enumerate(zip(strides, shape, strict=True)) if n > 1 and k}
    dims = []
    for i, extent in enumerate(extents):
        stride = prod(extents[i + 1 :])
        axes = sorted((a for a in left if strides[a] >= stride), key=lambda a: -strides[a])
        left.difference_update(axes)
        step = stride
        for axis in reversed(axes):
            if strides[axis] != step:
                return None
            step *= shape[axis]
        dims.append(_Dim(extent, stride, tuple(axes)))
    return None if left else dims


def _indices(dims: Sequence[_Dim], shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return from where in the source, counted as one list, each element is taken."""
    total = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
    for dim in dims:
        place = torch.zeros_like(total)
        step = 1
        for axis in reversed(dim.axes):
            along = [1] * len(shape)
            along[axis] = shape[axis]
            place = place + step * torch.arange(shape[axis], device=device).reshape(along)
            step *= shape[axis]
        total = total + dim.stride * place.clamp(max=dim.extent - 1)
    return total.expand(tuple(shape))


def _built(source: Node, target: Node, dims: Sequence[_Dim]) -> Node:
    shape = target.shape
    x = b.reshape(source, [d.extent for d in dims])
    for i, dim in enumerate(dims):
        size = prod(shape[a] for a in dim.axes)
        axis = i - len(dims)
        x = extended(x, axis, size) if size > dim.extent else b.slice_(x, axis, 0, size)
    axes = [a for d in dims for a in d.axes]
    x = b.reshape(x, [shape[a] for a in axes])
    x = b.permute(x, [axes.index(a) for a in sorted(axes)])
    x = b.reshape(x, [n if a in axes else 1 for a, n in enumerate(shape)])
    x = b.broadcast(x, shape)
    return b.cast(x, target.tensor.dtype)
