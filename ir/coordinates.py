"""From where an element is read: coordinates in a loop nest, followed through ops that only move elements."""

from superopt.ir.node import Node
from superopt.ir.ops import structural

Coordinate = tuple[int | None, int, int | str]
"""(dim of the loop nest or None, scale, offset): the element index scale * variable + offset.

An offset that is only known when a kernel runs is the text of it.
"""
Coordinates = tuple[Coordinate, ...]
"""Where an element lies: one coordinate per dim of its tensor."""

_MOVES = frozenset({structural.BROADCAST, structural.PERMUTE, structural.SLICE, structural.FLIP})


def adds_ones(node: Node) -> bool:
    """Recognize a reshape that only adds or drops dims of size 1."""
    before = [d for d in node.inputs[0].shape if d != 1]
    return before == [d for d in node.shape if d != 1]


def is_move(node: Node) -> bool:
    """Recognize ops that only say from where an element is read."""
    return node.op in _MOVES or (node.op is structural.RESHAPE and adds_ones(node))


def identity_coords(shape: tuple[int, ...]) -> Coordinates:
    """Coordinates of a tile of `shape` in a loop nest of the same rank."""
    return tuple((None, 0, 0) if d == 1 else (i, 1, 0) for i, d in enumerate(shape))


def broadcast_coords(operand: Node, coords: Coordinates) -> Coordinates:
    """Return where an elementwise op reads an operand."""
    if not operand.shape:
        return ()
    return tuple((None, 0, 0) if d == 1 else c for d, c in zip(operand.shape, coords, strict=True))


def gathered(node: Node, coords: Coordinates, place: Coordinate) -> Coordinates:
    """Return where a gather reads its data: at `place` along its axis."""
    axis = node.attrs.axis + len(coords)
    return (*coords[:axis], place, *coords[axis + 1 :])


def moved_coords(node: Node, coords: Coordinates) -> Coordinates:
    """Return where a move reads the element at `coords`."""
    source = node.inputs[0]
    if node.op is structural.PERMUTE:
        at: list[Coordinate] = [(None, 0, 0)] * len(coords)
        for i, p in enumerate(node.attrs.perm):
            at[p] = coords[i]
        return tuple(at)
    if node.op is structural.BROADCAST:
        return broadcast_coords(source, coords)
    if node.op is structural.RESHAPE:
        kept = iter([c for d, c in zip(node.shape, coords, strict=True) if d != 1])
        return tuple((None, 0, 0) if d == 1 else next(kept) for d in source.shape)
    moved = list(coords)
    if node.op is structural.SLICE:
        axis = node.attrs.axis + len(coords)
        dim, scale, offset = moved[axis]
        step = node.attrs.step
        moved[axis] = (dim, scale * step, _affine(offset, step, node.attrs.start))
    else:
        for axis in (a + len(coords) for a in node.attrs.axes):
            dim, scale, offset = moved[axis]
            moved[axis] = (dim, -scale, _affine(offset, -1, source.shape[axis] - 1))
    return tuple(moved)


def shifted(offset: int | str, start: int) -> int | str:
    """Return an offset that counts from elsewhere."""
    return _affine(offset, 1, start)


def _affine(offset: int | str, scale: int, start: int) -> int | str:
    if isinstance(offset, int):
        return offset * scale + start
    return offset if (scale, start) == (1, 0) else f"({offset} * {scale}L + {start}L)"
