"""Cuts of tensors along an axis, and which cuts of an operator's operands give a cut of its result.

In: a node and a cut of what it computes. Out: a cut per operand (None: all of it), so that steps of the result are
computed of steps of these, all of them in the same way.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Final, final

import torch

from superopt.ir import composite
from superopt.ir.node import Node
from superopt.ir.ops import contraction, structural
from superopt.ir.ops.registry import OpKind


@final
@dataclass(frozen=True, slots=True)
class Cut:
    """Slices of an axis (from the end): `unit` positions of it for each of a number of steps, `outer` times."""

    axis: int
    unit: int
    outer: int = 1

    def split(self, value: torch.Tensor) -> torch.Tensor:
        """Return a view in which the axis is three: outer, steps and unit."""
        place = value.dim() + self.axis
        before, after = value.shape[:place], value.shape[place + 1 :]
        return value.reshape(*before, self.outer, -1, self.unit, *after)

    def of(self, value: torch.Tensor, steps: list[int]) -> torch.Tensor:
        """Return the slice of `value` that consists of these steps: a view where they are neighbours."""
        start, count, axis = steps[0], len(steps), value.dim() + self.axis
        if steps != list(range(start, start + count)):
            return chosen(self.split(value), axis + 1, steps).flatten(axis, axis + 2)
        if self.outer == 1:
            return value.narrow(self.axis, start * self.unit, count * self.unit)
        return self.split(value).narrow(axis + 1, start, count).flatten(axis, axis + 2)

    def shape(self, whole: tuple[int, ...], steps: int) -> tuple[int, ...]:
        """Return the shape of a slice."""
        place = len(whole) + self.axis
        return (*whole[:place], self.outer * steps * self.unit, *whole[place + 1 :])


Wanted = list[Cut | None]


def chosen(value: torch.Tensor, axis: int, places: list[int]) -> torch.Tensor:
    """Return places along an axis, without copies of what repeats along other dims."""
    repeats = [n > 1 and stride == 0 for n, stride in zip(value.shape, value.stride(), strict=True)]
    shape = [len(places) if dim == axis else n for dim, n in enumerate(value.shape)]
    for dim in (d for d, again in enumerate(repeats) if again):
        value = value.narrow(dim, 0, 1)
    if not repeats[axis]:
        value = value.index_select(axis, torch.tensor(places, device=value.device))
    return value.expand(shape)


def natural(node: Node, axes: Iterable[int], length: int) -> Cut | None:
    """Return the first cut of some axes of a value, best by steps of single positions."""
    units = [(node.shape[a] // length, a) for a in axes if not node.shape[a] % length]
    return min((Cut(a, u) for u, a in units if u), key=lambda c: c.unit, default=None)


def cut_of(result: Node, length: int, *, rows: bool, inner: bool) -> Cut | None:
    """Return the cut of a result where cuts begin: of `rows` as a whole, or of columns too.

    Its steps are neighbouring positions or, `inner`, what lies as far apart as the tiles are long that kernels make of them.
    """
    cut = natural(result, row_axes(result) if rows else range(-len(result.shape), 0), length)
    return Cut(cut.axis, 1, cut.unit) if cut is not None and inner else cut


def row_axes(node: Node) -> Iterable[int]:
    """Return the axes of a value but the last, where there are several."""
    return range(-len(node.shape), 0 if len(node.shape) < 2 else -1)


def operand_cuts(node: Node, cut: Cut, length: int) -> Wanted | None:
    """Return a cut per operand (None: all of it), or None where a slice needs more than slices."""
    if not node.inputs:
        return []
    if node.op.kind in (OpKind.ELEMENTWISE, OpKind.REDUCTION):
        return _elementwise(node, cut, length)
    rule = _RULES.get(node.op.name)
    return None if rule is None else rule(node, cut, length)


def _elementwise(node: Node, cut: Cut, length: int) -> Wanted | None:
    return [_same(i, cut) for i in node.inputs]


def _same(operand: Node, cut: Cut) -> Cut | None:
    """Return the cut of an operand that may be broadcast."""
    return cut if operand.shape and operand.shape[cut.axis] != 1 else None


def _matmul(node: Node, cut: Cut, length: int) -> Wanted | None:
    a, c = node.inputs
    if cut.axis == -2:
        return [cut, None]
    if cut.axis == -1:
        return [None, cut]
    return [_same(a, cut), _same(c, cut)]


def _reshape(node: Node, cut: Cut, length: int) -> Wanted | None:
    (x,) = node.inputs
    place = len(node.shape) + cut.axis
    outer, inner = prod(node.shape[:place]), prod(node.shape[place + 1 :])
    if not prod(x.shape):
        return None
    # the axis of the steps has as many positions before it, and behind it, in both shapes
    for i, dim in enumerate(x.shape):
        before, outside = divmod(outer * cut.outer, prod(x.shape[:i]))
        behind, inside = divmod(inner * cut.unit, prod(x.shape[i + 1 :]))
        if not outside and not inside and before * length * behind == dim:
            return [Cut(i - len(x.shape), behind, before)]
    return None


def _broadcast(node: Node, cut: Cut, length: int) -> Wanted | None:
    return [_same(node.inputs[0], cut)]


def _permute(node: Node, cut: Cut, length: int) -> Wanted | None:
    return [replace(cut, axis=node.attrs.perm[cut.axis] - len(node.shape))]


def _along_axis(node: Node, cut: Cut, length: int) -> Wanted | None:
    return None if node.attrs.axis == cut.axis else [cut] * len(node.inputs)


def _flip(node: Node, cut: Cut, length: int) -> Wanted | None:
    return None if cut.axis in node.attrs.axes else [cut]


def _norm(node: Node, cut: Cut, length: int) -> Wanted | None:
    if cut.axis in node.attrs.axes:
        return None
    return [_same(i, cut) if i.tensor.rank >= -cut.axis else None for i in node.inputs]


def _attention(node: Node, cut: Cut, length: int) -> Wanted | None:
    q, *others = node.inputs
    if cut.axis == -1 or (cut.axis == -2 and node.attrs.causal):
        return None
    if cut.axis == -2:
        return [cut, None, None, *(_same(mask, cut) for mask in others[2:])]
    if any(-cut.axis > i.tensor.rank for i in others):
        return None
    # heads of which several read one are not cut
    alike_ = all(i.shape[cut.axis] in (1, q.shape[cut.axis]) for i in others)
    return [cut, *(_same(i, cut) for i in others)] if alike_ else None


def _of_batch(node: Node, cut: Cut, length: int) -> Wanted | None:
    return [cut, None] if -cut.axis == len(node.shape) else None


def _take(node: Node, cut: Cut, length: int) -> Wanted | None:
    rank = len(node.inputs[1].shape)
    behind = -1 - node.attrs.axis
    if cut.axis >= -behind:
        return [cut, None]
    if cut.axis >= -behind - rank:
        return [None, replace(cut, axis=cut.axis + behind)]
    return [replace(cut, axis=cut.axis + rank - 1), None]


def _gather(node: Node, cut: Cut, length: int) -> Wanted | None:
    return [None if node.attrs.axis == cut.axis else cut, cut]


MOVING: Final = (
    structural.RESHAPE,
    structural.BROADCAST,
    structural.PERMUTE,
    structural.SLICE,
    structural.PAD,
    structural.FLIP,
    structural.TAKE,
    structural.GATHER,
)
_RULES: Final[dict[str, Callable[[Node, Cut, int], Wanted | None]]] = {
    op.name: rule
    for op, rule in (
        (contraction.MATMUL, _matmul),
        (contraction.SCAN, _along_axis),
        (structural.RESHAPE, _reshape),
        (structural.BROADCAST, _broadcast),
        (structural.PERMUTE, _permute),
        (structural.SLICE, _along_axis),
        (structural.CONCAT, _along_axis),
        (structural.PAD, _along_axis),
        (structural.FLIP, _flip),
        (structural.TAKE, _take),
        (structural.GATHER, _gather),
        (composite.SOFTMAX, _along_axis),
        (composite.LOG_SOFTMAX, _along_axis),
        (composite.LOGSUMEXP, _along_axis),
        (composite.LAYER_NORM, _norm),
        (composite.RMS_NORM, _norm),
        (composite.ATTENTION, _attention),
        (composite.DEPTHWISE_CONV, _of_batch),
        (composite.SILU, _elementwise),
        (composite.GELU, _elementwise),
    )
}
