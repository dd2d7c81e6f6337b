"""Which reductions are of what pairs of rows make: distances, and scores that are no products.

In: a reduction over k of f(x[i, k], y[j, k], z[i, j]), where no value in memory varies along all dims. Out:
the dim along which vectors should lie, and what has to lie along it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, final

from superopt.codegen.cpu.inline import DEAR_OPS, Plan
from superopt.ir.coordinates import (
    Coordinates,
    broadcast_coords,
    identity_coords,
    is_move,
    moved_coords,
)
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType

ROWS: Final = 4
"""Rows of a register tile; those of a tile that asks for functions are one by one."""
_LANES: Final = 8
"""Elements along the lane dim that pay the copy."""
_REDUCTIONS: Final = (
    contraction.REDUCE_SUM,
    contraction.REDUCE_PROD,
    contraction.REDUCE_MAX,
    contraction.REDUCE_MIN,
)
_FUNCTIONS: Final = DEAR_OPS - {elementwise.DIV, elementwise.SQRT}
"""What takes more code than an instruction."""
_FLOATS: Final = (DType.F32, DType.F16, DType.BF16)


@final
@dataclass(frozen=True, slots=True)
class Pairwise:
    """Where vectors lie, over what they are read again, and which values have to lie along them."""

    lane: int
    rows: int
    along: tuple[tuple[Node, int], ...]
    """Values in memory that vary with the lane, and which of their dims that is."""
    dear: bool
    """Whether a function is computed for each pair."""


def pairwise(plan: Plan, node: Node) -> Pairwise | None:
    """Say how a reduction of what pairs of rows make is best computed; None for all others."""
    if node.op not in _REDUCTIONS:
        return None
    source = node.inputs[0]
    axes = {a + len(source.shape) for a in node.attrs.axes}
    if (source.tensor.dtype, node.tensor.dtype) != (DType.F32, DType.F32):
        return None
    wide = [d for d, n in enumerate(source.shape) if n > 1 and d not in axes]
    if source in plan.memory or len(wide) < 2:
        return None
    found = list(_leaves(plan, source))
    if any(f is None for f in found):
        return None
    leaves = [f for f in found if f is not None]
    lane = wide[-1]
    varying = [(n, coords) for n, coords in leaves if any(d == lane for d, _, _ in coords)]
    along = dict.fromkeys((n, _only(coords, lane)) for n, coords in varying)
    again = [c for _, coords in varying if any(d in axes for d, _, _ in coords) for c in coords]
    fixed = set(wide) - {lane} - {d for d, _, _ in again}
    if not fixed or source.shape[lane] < _LANES or any(dim is None for _, dim in along):
        return None
    rows = max(fixed, key=lambda d: source.shape[d])
    if source.shape[rows] < ROWS or len({n for n, _ in along}) < len(along):
        return None
    inside = tuple((n, dim) for n, dim in along if dim is not None)
    return Pairwise(lane, rows, inside, any(n.op in _FUNCTIONS for n in _computed(plan, source)))


def _only(coords: Coordinates, lane: int) -> int | None:
    """Return the one dim of a value that goes with the lane, element by element; None where it is another way."""
    dims = [i for i, (d, _, _) in enumerate(coords) if d == lane]
    return dims[0] if len(dims) == 1 and coords[dims[0]] == (lane, 1, 0) else None


def _computed(plan: Plan, node: Node) -> Iterator[Node]:
    """Yield what is computed where `node` is read."""
    stack, seen = [node], set[Node]()
    while stack:
        node = stack.pop()
        if node in seen or node in plan.memory or node.op is tile.LOAD:
            continue
        seen.add(node)
        yield node
        stack += node.inputs


def _leaves(plan: Plan, node: Node) -> Iterator[tuple[Node, Coordinates] | None]:
    """Yield the values in memory of which an element is made, and where they are read; None for anything unusual."""
    stack = [(node, identity_coords(node.shape))]
    seen = set(stack)
    while stack:
        node, coords = stack.pop()
        if node in plan.memory or node.op is tile.LOAD:
            yield (node, coords) if node.tensor.dtype in _FLOATS else None
            continue
        if is_move(node):
            inputs = [(node.inputs[0], moved_coords(node, coords))]
        elif node.op.kind is OpKind.ELEMENTWISE and plan.vector[node]:
            inputs = [(i, broadcast_coords(i, coords)) for i in node.inputs]
        elif node.op is leaf.CONSTANT:
            inputs = []
        else:
            yield None
            continue
        stack += [i for i in inputs if i not in seen]
        seen.update(inputs)
