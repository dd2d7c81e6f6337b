"""Where masks leave a diagonal band of a matrix, or nothing of a tile: kernels need not look at the rest.

In: operands and results of products. Out: `Band`s: the texts of bounds between which row - column lies
for every element that counts. What is outside is 0 in an operand, and not looked at in a result.

In: the states of a loop. Out: the text of a test for iterations that give them nothing. A block graph's own bounds
(`superopt.search.bounds`) are single comparisons; a window beside a visible prefix hides a tile by two at once.
Both take operands behind masks for finite.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf
from typing import Final, final

from superopt.codegen.cpu.context import Context
from superopt.codegen.cpu.environment import (
    Coordinate,
    broadcast_coords,
    identity_coords,
    moved_coords,
)
from superopt.codegen.cpu.inline import Plan, is_move
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType

_Coordinates = tuple[Coordinate, ...]
_MOST: Final = 64
"""Cases of a mask that are looked at."""
_NEUTRAL: Final = {
    tile.ACCUM_SUM: 0.0,
    tile.ACCUM_RESCALED: 0.0,
    tile.ACCUM_MAX: -inf,
    tile.PREFIX_MAX: -inf,
}
"""What adds nothing to a state."""


@final
@dataclass(frozen=True, slots=True)
class Band:
    """Elements count where first <= row - column <= last; None: there is no such bound."""

    first: str | None
    last: str | None

    @property
    def text(self) -> str:
        """The band as a C++ argument."""
        return f"Band{{{self.first or '-Whole::FAR'}, {self.last or 'Whole::FAR'}}}"


@final
@dataclass(frozen=True, slots=True)
class Linear:
    """An integer: coefficients of the dims of a loop nest and of the offsets of tiles, and a constant."""

    dims: dict[int, int] = field(default_factory=dict)
    offsets: dict[tile.DimMap, int] = field(default_factory=dict)
    constant: int = 0

    def plus(self, other: "Linear", sign: int) -> "Linear":
        """Return the sum or, with sign -1, the difference."""
        dims, offsets = dict(self.dims), dict(self.offsets)
        for dim, weight in other.dims.items():
            dims[dim] = dims.get(dim, 0) + sign * weight
        for map_, weight in other.offsets.items():
            offsets[map_] = offsets.get(map_, 0) + sign * weight
        return Linear(
            {d: w for d, w in dims.items() if w},
            {m: w for m, w in offsets.items() if w},
            self.constant + sign * other.constant,
        )

    def axes(self) -> set[str]:
        """Return the axes of the block graph that it depends on."""
        return {name for map_ in self.offsets for name, _ in map_.axes}

    def base(self, context: Context, sign: int) -> str:
        """Return the text of sign * (what does not depend on the dims)."""
        terms = [f"{sign * w}L * ({context.offset_text(m)})" for m, w in self.offsets.items()]
        return " + ".join([*terms, f"{sign * self.constant}L"])


def linear(node: Node, coords: _Coordinates) -> Linear | None:
    """Return an integer as a linear function of the dims of the nest and of offsets, if it is one."""
    if not node.tensor.dtype.is_integer:
        return None
    if node.op in (tile.TILE_INDEX, leaf.IOTA):
        axis = 0 if node.op is tile.TILE_INDEX else node.attrs.axis + len(coords)
        dim, scale, offset = coords[axis]
        if isinstance(offset, str):
            return None
        offsets = {node.attrs.dim: 1} if node.op is tile.TILE_INDEX else {}
        return Linear({} if dim is None else {dim: scale}, offsets, offset)
    if node.op is leaf.CONSTANT:
        return Linear(constant=int(node.attrs.value))
    if is_move(node):
        return linear(node.inputs[0], moved_coords(node, coords))
    if node.op is elementwise.CAST:
        return linear(node.inputs[0], broadcast_coords(node.inputs[0], coords))
    if node.op in (elementwise.ADD, elementwise.SUB):
        left, right = (linear(i, broadcast_coords(i, coords)) for i in node.inputs)
        if left is not None and right is not None:
            return left.plus(right, -1 if node.op is elementwise.SUB else 1)
    return None


_Condition = tuple[Node, _Coordinates, bool]
"""A comparison, where it is evaluated, and its value."""
_Cases = set[frozenset[_Condition]]
"""Alternatives: conditions that together suffice for something."""


def zero_outside(context: Context, node: Node) -> Band | None:
    """Return the band outside of which a matrix is 0."""
    return _band(context, node, _vanishing(node, identity_coords(node.shape), 0.0))


def unseen_outside(context: Context, plan: Plan, node: Node) -> Band | None:
    """Return the band outside of which nobody looks at a matrix."""
    return _band(context, node, _unseen(plan, node))


def nothing_new(context: Context, states: Iterable[Node]) -> str | None:
    """Return the text of a test that holds only in iterations from which the states of a loop get nothing."""
    common: set[str] | None = None
    for state in states:
        if state.op is tile.ACCUM_LAST and state.inputs[0].op is tile.PREFIX_MAX:
            continue
        if state.op not in _NEUTRAL:
            return None
        cases = _nothing(state.inputs[0], _NEUTRAL[state.op])
        texts = {text for case in cases if (text := _everywhere(context, case)) is not None}
        common = texts if common is None else common & texts
    return " || ".join(sorted(common)) if common else None


def _nothing(node: Node, value: float) -> _Cases:
    """Return what makes a tile 0, or -inf, if it holds at all of its elements."""
    if node.op is contraction.MATMUL and value == 0.0:
        return set().union(*(_nothing(i, value) for i in node.inputs))
    if node.op is (contraction.REDUCE_SUM if value == 0.0 else contraction.REDUCE_MAX):
        return _nothing(node.inputs[0], value)
    return _vanishing(node, identity_coords(node.shape), value)


def _everywhere(context: Context, case: Iterable[_Condition]) -> str | None:
    """Return the text of "these conditions, several of them, hold in the whole tile"."""
    texts = set()
    for compare, _, value in case:
        # wherever it is evaluated, that is inside the tile of the comparison
        excess = _excess(compare, identity_coords(compare.shape), value)
        if excess is None:
            return None
        least = sum(min(0, w) * (compare.shape[d] - 1) for d, w in excess.dims.items())
        texts.add(f"{excess.base(context, 1)} + {least}L > 0")
    return f"({' && '.join(sorted(texts))})" if len(texts) > 1 else None


def _band(context: Context, node: Node, cases: _Cases) -> Band | None:
    """Turn what elements outside may fulfil into bounds of row - column."""
    row, column = len(node.shape) - 2, len(node.shape) - 1
    loops = {axis.name for axis in context.program.graph.loops}
    firsts: dict[str, None] = {}
    lasts: dict[str, None] = {}
    for compare, coords, value in (c for case in cases if len(case) == 1 for c in case):
        excess = _excess(compare, coords, value)
        if excess is None or not excess.axes() & loops <= context.program.loops_of[node]:
            continue  # what is made once must serve every iteration of a later loop
        # outside where excess > 0
        if excess.dims == {row: -1, column: 1}:
            firsts.setdefault(excess.base(context, 1))
        elif excess.dims == {row: 1, column: -1}:
            lasts.setdefault(excess.base(context, -1))
    if not firsts and not lasts:
        return None
    return Band(_nested("max_of", firsts), _nested("min_of", lasts))


def _nested(function: str, texts: Iterable[str]) -> str | None:
    found: str | None = None
    for text in sorted(texts):
        found = text if found is None else f"{function}({found}, {text})"
    return found


def _excess(compare: Node, coords: _Coordinates, value: bool) -> Linear | None:
    """Return the number that is positive exactly where the comparison has that value."""
    left, right = (linear(i, broadcast_coords(i, coords)) for i in compare.inputs)
    if left is None or right is None:
        return None
    greater = compare.op in (elementwise.GT, elementwise.GE)
    difference = left.plus(right, -1) if greater == value else right.plus(left, -1)
    strict = (compare.op in (elementwise.GT, elementwise.LT)) == value
    return difference if strict else difference.plus(Linear(constant=1), 1)


_COMPARES: Final = (elementwise.GT, elementwise.GE, elementwise.LT, elementwise.LE)
_FOLLOWED: Final = {
    0.0: (elementwise.CAST, elementwise.DIV, elementwise.NEG),
    -inf: (elementwise.CAST, elementwise.SUB),
}
"""Ops that are 0, or -inf, where their first operand is."""
_UNITED: Final = {0.0: elementwise.MUL, -inf: elementwise.ADD}
"""Ops that are 0, or -inf, where one of their operands is."""


def _vanishing(node: Node, coords: _Coordinates, value: float) -> _Cases:
    """Return what makes the element at `coords` 0, or -inf."""
    while is_move(node):
        node, coords = node.inputs[0], moved_coords(node, coords)
    if node.op.kind is not OpKind.ELEMENTWISE:
        return set()
    if node.tensor.dtype is DType.BOOL:
        return _forced(node, coords, False) if value == 0.0 else set()
    at = [broadcast_coords(i, coords) for i in node.inputs]
    if node.op is elementwise.WHERE:
        return _selected(node, at, value)
    if value == 0.0 and node.op is elementwise.EXP:
        return _vanishing(node.inputs[0], at[0], -inf)
    if node.op in _FOLLOWED[value]:
        return _vanishing(node.inputs[0], at[0], value)
    if node.op is _UNITED[value]:
        sides = dict.fromkeys(zip(node.inputs, at, strict=True))
        return set().union(*(_vanishing(i, c, value) for i, c in sides))
    return set()


def _selected(node: Node, at: list[_Coordinates], value: float) -> _Cases:
    condition, *sides = node.inputs
    found = []
    for side, coords, picked in zip(sides, at[1:], (True, False), strict=True):
        if side.op is leaf.CONSTANT and side.attrs.value == value:
            # it is `value` where this side is picked, or where the other is `value` too
            other = 1 if picked else 0
            return _forced(condition, at[0], picked) | _vanishing(
                sides[other], at[1 + other], value
            )
        found.append(_vanishing(side, coords, value))
    return found[0] & found[1]


def _forced(node: Node, coords: _Coordinates, value: bool) -> _Cases:
    """Return what makes the truth value `node` at `coords` be `value`."""
    while is_move(node):
        node, coords = node.inputs[0], moved_coords(node, coords)
    if node.op in _COMPARES:
        return {frozenset({(node, coords, value)})}
    if node.op is elementwise.NOT:
        return _forced(node.inputs[0], broadcast_coords(node.inputs[0], coords), not value)
    if node.op not in (elementwise.AND, elementwise.OR):
        return set()
    left, right = (_forced(i, broadcast_coords(i, coords), value) for i in node.inputs)
    found = left | right
    if value == (node.op is elementwise.AND):
        found = {one | other for one in left for other in right}
    return found if len(found) <= _MOST else set()


def _unseen(plan: Plan, node: Node) -> _Cases:
    """Return under what nobody reads an element, by those who read it in place."""
    found: _Cases | None = None
    coords = identity_coords(node.shape)
    for user in plan.users.get(node, ()):
        if user.op.kind is not OpKind.ELEMENTWISE or user.shape != node.shape:
            return set()
        unread = _unseen(plan, user)
        if user.op is elementwise.WHERE and node is not user.inputs[0]:
            condition, yes, no = user.inputs
            if yes is not no:
                unread |= _forced(condition, broadcast_coords(condition, coords), node is no)
        found = unread if found is None else found & unread
    return found or set()
