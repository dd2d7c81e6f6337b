"""Indices that always come together become one, where the inner of them is short.

Rows of 28 pixels or 21 classes fill vectors badly, and there are many of them. Where every tensor of a
region has two indices side by side, and lies in memory as if they were one, one index runs over both,
as in PyTorch's `TensorIterator`.

In: a `Region` and its `IndexSpace`, which changes.
"""

from superopt.ir.node import Node
from superopt.ir.ops import leaf
from superopt.ir.types import contiguous_strides
from superopt.search.indices import SHORT_ROW, Atom, IndexSpace
from superopt.search.region import Region, view_type


def coalesce(region: Region, space: IndexSpace) -> None:
    """Let short indices absorb those that always come right before them."""
    after: dict[Atom, set[Atom | None]] = {}
    before: dict[Atom, set[Atom | None]] = {}
    apart = set(space.whole)
    strides = {i: _strides(i, space) for i in region.inputs}
    for node in (*region.inputs, *region.body):
        atoms = space.atoms(node)
        for outer, inner in zip((None, *atoms), (*atoms, None), strict=True):
            if outer is not None:
                after.setdefault(outer, set()).add(inner)
            if inner is not None:
                before.setdefault(inner, set()).add(outer)
        if node.op is leaf.IOTA:
            # the number of an element along one of two dims
            apart.update(space.layout(node)[node.attrs.axis])
    for inner in [a for a in before if a not in apart]:
        while space.extent(inner) < SHORT_ROW and len(before[inner]) == 1:
            (outer,) = before[inner]
            if outer is None or outer in apart or after[outer] != {inner}:
                break
            size = space.extent(inner)
            if any(outer in s and s[outer] != size * s[inner] for s in strides.values()):
                break
            space.absorb(outer, inner)
            before[inner] = before.pop(outer)
            for others in (after[a] for a in before[inner] if a is not None):
                others.discard(outer)
                others.add(inner)


def _strides(node: Node, space: IndexSpace) -> dict[Atom, int]:
    lies = view_type(node) or node.tensor
    found: dict[Atom, int] = {}
    for dim, stride in zip(space.layout(node), lies.element_strides, strict=True):
        extents = tuple(space.extent(a) for a in dim)
        found.update(zip(dim, (s * stride for s in contiguous_strides(extents)), strict=True))
    return found
