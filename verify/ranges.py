"""Which integers a program is tested with: those that are valid where they are used as indices."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, final

import numpy as np
import numpy.typing as npt
import torch

from superopt.ir.build import kernel_graph
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import elementwise, leaf, library, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand
from superopt.ir.types import TensorType
from superopt.verify.reference import DTYPES, run_reference

_FAR: Final = 64
_STARTS: Final = {
    "aten._embedding_bag.default": 2,
    "aten._embedding_bag_forward_only.default": 2,
}
"""Operators and which of their operands says where bags begin. The first is to begin at 0 and none before the
one ahead of it, so all begin there."""


@final
@dataclass(frozen=True, slots=True)
class Integers:
    """What an integer is drawn from: low <= i < high, and the `special` ones among others."""

    low: int = -_FAR
    high: int = _FAR
    special: tuple[int, ...] = ()


def draw_integers(
    source: np.random.Generator, shape: tuple[int, ...], integers: Integers
) -> "npt.NDArray[np.int64]":
    """Draw integers; one of four is an end of the range or special, where mistakes are made."""
    drawn = source.integers(integers.low, integers.high, size=shape, dtype=np.int64)
    rare = np.array([integers.low, integers.high - 1, *integers.special], dtype=np.int64)
    picked = rare[source.integers(0, len(rare), size=shape)]
    return np.where(source.integers(0, 4, size=shape) == 0, picked, drawn)


@lru_cache(maxsize=64)
def integer_ranges(graph: Graph, joint: Graph | None = None) -> Mapping[str, Integers]:
    """Map the name of each integer input to values that are valid where it is used as an index.

    Integers are special where a comparison of `graph` asks for them, or one of `joint`, which may compute other
    things of the same inputs, and where all of `graph`'s indices allow them: classes to be ignored, negative places.
    """
    expanded = expand(graph)
    limits: dict[Node, int] = {}
    indices: list[tuple[Node, int]] = []
    unknown: set[Node] = set()
    for node in topological(expanded.outputs):
        if node.op in (structural.TAKE, structural.GATHER):
            indices.append((node.inputs[1], node.inputs[0].shape[node.attrs.axis]))
            _limit(*indices[-1], limits)
        elif node.op.kind is OpKind.LIBRARY:
            starts = _STARTS.get(node.attrs.target) if node.op is library.OPAQUE else None
            for place, operand in enumerate(node.inputs):
                extent = 1 if place == starts else _smallest_dim(node)
                unknown.update(_limit(operand, extent, limits))
        elif node.op is elementwise.POW:
            # PyTorch refuses negative ones of integers
            unknown.update(_limit(node.inputs[1], _FAR, limits))
    found = {}
    for x in expanded.inputs:
        limit = limits.get(x)
        drawn = Integers() if limit is None else Integers(0, max(limit, 1))
        if x.tensor.dtype.is_integer and x not in unknown:
            asked = _asked(x, expanded.outputs if joint is None else joint.outputs)
            drawn = replace(drawn, special=_special(x, drawn, asked, indices))
        found[x.attrs.name] = drawn
    return found


def _smallest_dim(node: Node) -> int:
    # an unknown operator may index any of its tensors
    dims = [d for i in node.inputs for d in i.shape if d > 1]
    return min([*dims, _FAR])


def _limit(index: Node, extent: int, limits: dict[Node, int]) -> set[Node]:
    """Record the limit on every integer input from which `index` is taken or cast; return these."""
    pending, seen = [index], set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or not node.tensor.dtype.is_integer:
            continue
        seen.add(node)
        if node.op is leaf.INPUT:
            limits[node] = min(limits.get(node, extent), extent)
        elif node.op.kind is OpKind.STRUCTURAL or node.op in (elementwise.CAST, elementwise.WHERE):
            pending += node.inputs
    return {n for n in seen if n.op is leaf.INPUT}


def _asked(x: Node, outputs: Sequence[Node]) -> set[int]:
    """Return the integers around those that `x`, or what is made of it, is compared with."""
    below, found = {x}, set[int]()
    for node in topological(outputs):
        if any(i in below for i in node.inputs):
            below.add(node)
            if node.op in elementwise.COMPARISONS:
                found.update(_constants(node.inputs))
    return {k + d for k in found for d in (-1, 0, 1)}


def _special(
    x: Node, drawn: Integers, asked: set[int], indices: Iterable[tuple[Node, int]]
) -> tuple[int, ...]:
    """Return those of the integers `asked` for, but the ends of the range, which all indices of `x` allow."""
    info = torch.iinfo(DTYPES[x.tensor.dtype])
    ends = (drawn.low, drawn.high - 1)
    asked = {k for k in asked if info.min <= k <= info.max and k not in ends}
    mine = [(i, extent) for i, extent in indices if x in topological([i])]
    inside = sorted(k for k in asked if drawn.low <= k < drawn.high)
    outside = sorted(asked.difference(inside))
    if not mine:
        return tuple(inside + outside)
    if not outside or any(
        n.op is leaf.INPUT and n is not x for n in topological([i for i, _ in mine])
    ):
        return tuple(inside)
    places = kernel_graph("places", [x], [i for i, _ in mine])
    extents = [extent for _, extent in mine]
    return (*inside, *(k for k in outside if _allowed(places, k, extents)))


def _constants(nodes: Iterable[Node]) -> set[int]:
    """Return the integers that operands of a comparison are made of, of a count its ends."""
    found, pending, seen = set[int](), list(nodes), set[Node]()
    while pending:
        node = pending.pop()
        if node in seen or not (isinstance(node.type, TensorType) and node.tensor.dtype.is_integer):
            continue
        seen.add(node)
        if node.op is leaf.CONSTANT:
            found.add(int(node.attrs.value))
        elif node.op is leaf.IOTA:
            found |= {0, node.shape[node.attrs.axis] - 1}
        pending += node.inputs
    return found


def _allowed(places: Graph, value: int, extents: Iterable[int]) -> bool:
    (x,) = places.inputs
    given = torch.full(x.shape, value, dtype=DTYPES[x.tensor.dtype])
    found = run_reference(places, [given])
    return all(
        bool(((i >= 0) & (i < extent)).all()) for i, extent in zip(found, extents, strict=True)
    )
