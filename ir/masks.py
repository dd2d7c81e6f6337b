"""What masks leave: under which comparisons of element indices a value is 0 or -inf.

In: a node and where it is read, or the states of a loop. Out: `Cases`, alternatives of conditions that
together suffice, and the affine form of a condition (`excess`). `where(cond, x, -inf)` is -inf where the
comparison is false, its exp is 0, products with that are 0, and sums and maxima receive nothing.
Operands behind a mask are taken for finite: a NaN there would otherwise surface as 0 * NaN.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Final, TypeVar, final

from superopt.ir.coordinates import (
    Coordinates,
    broadcast_coords,
    identity_coords,
    is_move,
    moved_coords,
)
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType

Condition = tuple[Node, Coordinates | None, bool]
"""A comparison, where it is evaluated (None: at all of its elements), and its value."""
Cases = set[frozenset[Condition]]
"""Alternatives: conditions that together suffice for something."""

_Key = TypeVar("_Key")
_MOST: Final = 64
"""Cases of a mask that are looked at."""
_NEUTRAL: Final = {
    tile.ACCUM_SUM: 0.0,
    tile.ACCUM_RESCALED: 0.0,
    tile.ACCUM_MAX: -inf,
    tile.PREFIX_MAX: -inf,
}
"""What adds nothing to a state."""
_COMPARES: Final = (elementwise.GT, elementwise.GE, elementwise.LT, elementwise.LE)
_FOLLOWED: Final = {
    0.0: (elementwise.CAST, elementwise.DIV, elementwise.NEG),
    -inf: (elementwise.CAST, elementwise.SUB),
}
"""Ops that are 0, or -inf, where their first operand is."""
_SCALED: Final = (elementwise.MUL, elementwise.DIV)
"""Ops that leave -inf what it is if their second operand is positive."""
_UNITED: Final = {0.0: elementwise.MUL, -inf: elementwise.ADD}
"""Ops that are 0, or -inf, where one of their operands is."""
_SHARED: Final = (elementwise.ADD, elementwise.SUB)
"""Ops that are 0 where both of their operands are."""
_WHOLE: Final = {
    0.0: (structural.RESHAPE, contraction.REDUCE_SUM, contraction.MATMUL),
    -inf: (structural.RESHAPE, contraction.REDUCE_MAX),
}
"""Ops that are 0, or -inf, all over if one of their operands is."""


@final
@dataclass(frozen=True, slots=True)
class Linear:
    """An integer: weights of the dims of a loop nest and of the offsets of tiles, and a constant."""

    dims: tuple[tuple[int, int], ...] = ()
    offsets: tuple[tuple[tile.DimMap, int], ...] = ()
    constant: int = 0

    def plus(self, other: "Linear", factor: int = 1) -> "Linear":
        """Return the sum of this and `factor` times the other."""
        return Linear(
            _sum(self.dims, other.dims, factor),
            _sum(self.offsets, other.offsets, factor),
            self.constant + factor * other.constant,
        )

    def least(self, shape: tuple[int, ...]) -> "Linear":
        """Return the least value in a tile."""
        reach = sum(min(0, weight) * (shape[dim] - 1) for dim, weight in self.dims)
        return Linear((), self.offsets, self.constant + reach)

    def axes(self) -> set[str]:
        """Return the axes of the block graph that it depends on."""
        return {name for map_, _ in self.offsets for name, _ in map_.axes}


def _sum(
    left: tuple[tuple[_Key, int], ...], right: tuple[tuple[_Key, int], ...], factor: int
) -> tuple[tuple[_Key, int], ...]:
    total = dict(left)
    for key, weight in right:
        total[key] = total.get(key, 0) + factor * weight
    return tuple(sorted(((k, w) for k, w in total.items() if w), key=repr))


def linear(node: Node, coords: Coordinates) -> Linear | None:
    """Return an integer as a linear function of the dims of the nest and of offsets, if it is one."""
    if not node.tensor.dtype.is_integer:
        return None
    if node.op in (tile.TILE_INDEX, leaf.IOTA):
        axis = 0 if node.op is tile.TILE_INDEX else node.attrs.axis + len(coords)
        dim, scale, offset = coords[axis]
        if isinstance(offset, str):
            return None
        offsets = ((node.attrs.dim, 1),) if node.op is tile.TILE_INDEX else ()
        return Linear(() if dim is None else ((dim, scale),), offsets, offset)
    if node.op is leaf.CONSTANT:
        return Linear(constant=int(node.attrs.value))
    if is_move(node):
        return linear(node.inputs[0], moved_coords(node, coords))
    operands = [(i, broadcast_coords(i, coords)) for i in node.inputs]
    if node.op is elementwise.CAST:
        return linear(*operands[0])
    if node.op in (elementwise.ADD, elementwise.SUB, elementwise.MUL):
        left, right = (linear(*operand) for operand in operands)
        if left is None or right is None:
            return None
        if node.op is not elementwise.MUL:
            return left.plus(right, -1 if node.op is elementwise.SUB else 1)
        for factor, other in ((left, right), (right, left)):
            if not factor.dims and not factor.offsets:
                return Linear().plus(other, factor.constant)
    return None


def excess(compare: Node, coords: Coordinates, value: bool) -> Linear | None:
    """Return the number that is positive exactly where the comparison has that value, if it is linear."""
    left, right = (linear(i, broadcast_coords(i, coords)) for i in compare.inputs)
    if left is None or right is None:
        return None
    greater = compare.op in (elementwise.GT, elementwise.GE)
    difference = left.plus(right, -1) if greater == value else right.plus(left, -1)
    strict = (compare.op in (elementwise.GT, elementwise.LT)) == value
    return difference if strict else difference.plus(Linear(constant=1))


def nothing_new(states: Iterable[Node]) -> set[frozenset[Linear]]:
    """Return what makes an iteration give the states of a loop nothing.

    Out: alternatives; each is a set of numbers, without dims, that are positive together only in such
    iterations.
    """
    masks = Masks()
    common: set[frozenset[Linear]] | None = None
    for state in states:
        if state.op is tile.ACCUM_LAST and state.inputs[0].op is tile.PREFIX_MAX:
            continue
        if state.op not in _NEUTRAL:
            return set()
        cases = masks.vanishing(state.inputs[0], None, _NEUTRAL[state.op])
        found = {f for case in cases if (f := _everywhere(case)) is not None}
        common = found if common is None else common & found
    return common or set()


def _everywhere(case: Iterable[Condition]) -> frozenset[Linear] | None:
    found = set()
    for compare, _, value in case:
        number = excess(compare, identity_coords(compare.shape), value)
        if number is None:
            return None
        found.add(number.least(compare.shape))
    return frozenset(found)


@final
class Masks:
    """Finds what makes elements 0 or -inf; every place is looked at once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Node, Coordinates | None, float], Cases] = {}

    def vanishing(self, node: Node, at: Coordinates | None, value: float) -> Cases:
        """Return what makes the element at `at` (None: all elements) be `value`, 0 or -inf."""
        node, at = _source(node, at)
        if (node, at, value) not in self._known:
            self._known[node, at, value] = self._vanishing(node, at, value)
        return self._known[node, at, value]

    def _vanishing(self, node: Node, at: Coordinates | None, value: float) -> Cases:
        op = node.op
        if at is None and op in _WHOLE[value]:
            return set().union(*(self.vanishing(i, None, value) for i in node.inputs))
        if op.kind is not OpKind.ELEMENTWISE:
            return set()
        if node.tensor.dtype is DType.BOOL:
            return forced(node, at, False) if value == 0.0 else set()
        operands = [(i, None if at is None else broadcast_coords(i, at)) for i in node.inputs]
        if op is elementwise.WHERE:
            return self._selected(operands, value)
        if value == 0.0 and op is elementwise.EXP:
            return self.vanishing(*operands[0], -inf)
        if op in _FOLLOWED[value] or (
            value == -inf and op in _SCALED and _is_positive(node.inputs[1])
        ):
            return self.vanishing(*operands[0], value)
        if op is _UNITED[value]:
            return self.vanishing(*operands[0], value) | self.vanishing(*operands[1], value)
        if value == 0.0 and op in _SHARED:
            return self.vanishing(*operands[0], value) & self.vanishing(*operands[1], value)
        return set()

    def _selected(self, operands: list[tuple[Node, Coordinates | None]], value: float) -> Cases:
        condition, *sides = operands
        found = []
        for side, other, picked in zip(sides, reversed(sides), (True, False), strict=True):
            if side[0].op is leaf.CONSTANT and side[0].attrs.value == value:
                # it is `value` where this side is picked, or where the other is `value` too
                return forced(*condition, picked) | self.vanishing(*other, value)
            found.append(self.vanishing(*side, value))
        return found[0] & found[1]


def forced(node: Node, at: Coordinates | None, value: bool) -> Cases:
    """Return what makes the truth value `node` at `at` (None: everywhere) be `value`."""
    node, at = _source(node, at)
    if node.op in _COMPARES:
        return {frozenset({(node, at, value)})}
    if at is None and node.op is structural.RESHAPE:
        return forced(node.inputs[0], None, value)
    operands = [(i, None if at is None else broadcast_coords(i, at)) for i in node.inputs]
    if node.op is elementwise.NOT:
        return forced(*operands[0], not value)
    if node.op not in (elementwise.AND, elementwise.OR):
        return set()
    left, right = (forced(*operand, value) for operand in operands)
    found = left | right
    if value == (node.op is elementwise.AND):
        found = {one | other for one in left for other in right}
    return found if len(found) <= _MOST else set()


def _source(node: Node, at: Coordinates | None) -> tuple[Node, Coordinates | None]:
    while is_move(node):
        at = None if at is None else moved_coords(node, at)
        node = node.inputs[0]
    return node, at


def _is_positive(node: Node) -> bool:
    node, _ = _source(node, None)
    return node.op is leaf.CONSTANT and node.attrs.value > 0
