"""Which integers a program is tested with: those that are valid where they are used as indices."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
def integer_ranges(graph: Graph) -> Mapping[str, Integers]:
    """Map the name of each integer input to values that are valid where it is used as an index.

    Integers beside these are special where a comparison asks for them, and what it decides makes a valid
    index of them: classes to be ignored, negative places.
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
            _limit(node.inputs[1], _FAR, limits)  # PyTorch refuses negative ones of integers
    found = {}
    for x in expanded.inputs:
        limit = limits.get(x)
        if limit is None:
            found[x.attrs.name] = Integers()
            continue
        special = () if x in unknown else _special(expanded, x, max(limit, 1), indices)
        found[x.attrs.name] = Integers(0, max(limit, 1), special)
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


def _special(
    graph: Graph, x: Node, limit: int, indices: Iterable[tuple[Node, int]]
) -> tuple[int, ...]:
    """Return the integers around constants that `x` is compared with which all `indices` allow."""
    below = {x}
    asked: set[int] = set()
    for node in topological(graph.outputs):
        if any(i in below for i in node.inputs):
            below.add(node)
            if node.op in elementwise.COMPARISONS:
                asked.update(_constants(node.inputs))
    around = {k + d for k in asked for d in (-1, 0, 1)} - set(range(limit))
    mine = [(i, extent) for i, extent in indices if i in below]
    if not around or any(
        n.op is leaf.INPUT and n is not x for n in topological([i for i, _ in mine])
    ):
        return ()
    places = kernel_graph("places", [x], [i for i, _ in mine])
    return tuple(k for k in sorted(around) if _allowed(places, k, [extent for _, extent in mine]))


def _constants(nodes: Iterable[Node]) -> set[int]:
    return {
        int(n.attrs.value)
        for n in topological(nodes)
        if n.op is leaf.CONSTANT and n.tensor.dtype.is_integer
    }


def _allowed(places: Graph, value: int, extents: Iterable[int]) -> bool:
    (x,) = places.inputs
    info = torch.iinfo(DTYPES[x.tensor.dtype])
    if not info.min <= value <= info.max:
        return False
    given = torch.full(x.shape, value, dtype=DTYPES[x.tensor.dtype])
    found = run_reference(places, [given])
    return all(
        bool(((i >= 0) & (i < extent)).all()) for i, extent in zip(found, extents, strict=True)
    )
