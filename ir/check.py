"""The graph checker: every rule of a level that types alone do not show, every violation reported.

In: a graph of any level. Out: a list of `Violation`, empty for a legal graph; nested graphs are
checked too. What is legal at block level:

- inputs are read only by loads, outputs are stores, and nothing reads a store;
- an axis splits at most one dim of a tensor, with the count that the graph gives it;
- an accumulator closes a loop over which its operand varies, the innermost such loop first (loops
  nest in the order of `graph.loops`), and its result is used only after that loop;
- a store names every axis over which its value varies, and stands in no bounded loop;
- a ragged dim (tiles reach past the extent) keeps its map from load to store: elementwise
  combinations agree on it, and only reductions, contractions and accumulators remove it.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

from superopt.ir.errors import GraphError
from superopt.ir.graph import Axis, Graph, Level
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, leaf, library, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.text import print_graph
from superopt.ir.tiles import DimSource, dim_sources, is_accumulator, varying_axes
from superopt.ir.types import TensorType

_BLOCK_KINDS = frozenset(
    {OpKind.TILE, OpKind.ELEMENTWISE, OpKind.REDUCTION, OpKind.CONTRACTION, OpKind.STRUCTURAL}
)
_BLOCK_OPS = frozenset({leaf.INPUT, leaf.CONSTANT, leaf.IOTA, library.THREAD})
_AXIS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@final
@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule: where (`node` is None for the graph as a whole), and what is wrong."""

    graph: Graph
    node: Node | None
    message: str

    def __str__(self) -> str:
        place = self.graph.name if self.node is None else f"{self.graph.name}, {self.node!r}"
        return f"{place}: {self.message}"


def check_graph(graph: Graph) -> list[Violation]:
    """Return every violation of the rules of the graph's level, nested graphs included."""
    found = [Violation(graph, node, message) for node, message in _violations(graph)]
    for node in graph.nodes():
        if node.op.kind is OpKind.GRAPH:
            found += check_graph(node.attrs.graph)
    return list(dict.fromkeys(found))


def verify_graph(graph: Graph) -> None:
    """Raise when `graph` breaks a rule.

    Raises:
        GraphError: the text of the graph with a `// ^` line under every offending node.
    """
    found = check_graph(graph)
    if not found:
        return
    notes: dict[tuple[Graph, Node | None], list[str]] = {}
    for v in found:
        notes.setdefault((v.graph, v.node), []).append(v.message)
    plural = "violation" if len(found) == 1 else "violations"
    raise GraphError(f"{len(found)} {plural} in {graph.name}\n{print_graph(graph, notes)}")


_Found = Iterator[tuple[Node | None, str]]


def _violations(graph: Graph) -> _Found:
    yield from _common(graph)
    if graph.level is Level.KERNEL:
        yield from _no_axes(graph)
        yield from _kernel(graph)
    elif graph.level is Level.THREAD:
        yield from _no_axes(graph)
        yield from _thread(graph)
    else:
        yield from _axes(graph)
        yield from _Block(graph).violations()


def _common(graph: Graph) -> _Found:
    listed = set(graph.inputs)
    names = [str(i.attrs.name) for i in graph.inputs if i.op is leaf.INPUT]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield None, f"two inputs are called {name}"
    if not graph.outputs:
        yield None, "there is no output"
    for node in graph.inputs:
        if node.op is not leaf.INPUT:
            yield node, f"{node.op.name} stands among the inputs"
    for node in graph.nodes():
        if node.op is leaf.INPUT and node not in listed:
            yield node, f"{node.attrs.name} is not among the graph's inputs"
    for node in graph.outputs:
        if not isinstance(node.type, TensorType):
            yield node, "an output has several results; take an item"


def _no_axes(graph: Graph) -> _Found:
    if graph.grid or graph.loops:
        yield None, f"a {graph.level.value} graph has no grid and no loops"


def _kernel(graph: Graph) -> _Found:
    for node in graph.nodes():
        if node.op.kind is OpKind.TILE:
            yield node, f"{node.op.name} stands only in a block graph"
        elif node.op is library.CUSTOM and node.attrs.graph.level is not Level.BLOCK:
            yield node, "custom applies a block graph"
        elif node.op is library.THREAD and node.attrs.graph.level is not Level.THREAD:
            yield node, "thread applies a thread graph"


def _thread(graph: Graph) -> _Found:
    if len(graph.outputs) != 1:
        yield None, f"a thread graph has one output, not {len(graph.outputs)}"
    needed = set(topological(graph.outputs))
    for node in graph.inputs:
        if node not in needed:
            yield None, f"the output does not use {node.attrs.name}"
    for node in graph.nodes():
        if node.op in (leaf.INPUT, leaf.CONSTANT):
            if isinstance(node.type, TensorType) and node.shape != ():
                yield node, "the values of a thread graph are scalars"
        elif node.op.kind is not OpKind.ELEMENTWISE:
            yield node, f"{node.op.name} is not elementwise"


def _axes(graph: Graph) -> _Found:
    names = [a.name for a in (*graph.grid, *graph.loops)]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield None, f"two axes are called {name}"
    grid = {a.name for a in graph.grid}
    for axis in (*graph.grid, *graph.loops):
        if not _AXIS_NAME.fullmatch(axis.name):
            yield None, f"the axis name {axis.name!r} is not a word"
        if axis.count < 1:
            yield None, f"axis {axis.name} has {axis.count} points"
    for axis in graph.grid:
        if axis.bounds:
            yield None, f"grid axis {axis.name} has bounds; only loops do"
    for axis in graph.loops:
        for bound in axis.bounds:
            if not bound.terms:
                yield None, f"a bound of loop {axis.name} names no axis"
            for name, _ in bound.terms:
                if name != axis.name and name not in grid:
                    yield None, f"a bound of loop {axis.name} names {name}, not a grid axis"


@final
@dataclass(slots=True)
class _Block:
    graph: Graph
    axes: dict[str, Axis] = field(default_factory=dict)
    order: dict[str, int] = field(default_factory=dict)
    varying: dict[Node, frozenset[str]] = field(default_factory=dict)

    def violations(self) -> _Found:
        self.axes = {a.name: a for a in (*self.graph.grid, *self.graph.loops)}
        self.order = {a.name: i for i, a in enumerate(self.graph.loops)}
        shape_errors = list(self._shape_of_graph())
        yield from shape_errors
        if shape_errors:
            return  # what follows relies on loads, stores and known axes
        self.varying = varying_axes(self.graph)
        for node in self.graph.nodes():
            if node.op is tile.STORE:
                yield from self._store(node)
            elif node.op is tile.PREFIX_MAX or is_accumulator(node):
                yield from self._accumulator(node)
        yield from self._uses_after_close()
        yield from self._ragged()

    def _shape_of_graph(self) -> _Found:
        for node in self.graph.nodes():
            op = node.op
            if (op.kind not in _BLOCK_KINDS and op not in _BLOCK_OPS) or op is structural.TAKE:
                yield node, f"{op.name} does not stand in a block graph"
            for i in node.inputs:
                if i.op is tile.STORE:
                    yield node, f"{op.name} reads a store"
                elif (i.op is leaf.INPUT) != (op is tile.LOAD):
                    yield node, f"{op.name} reads {i.op.name}: loads read inputs, nothing else does"
            yield from self._maps(node)
            loop = getattr(node.attrs, "loop", None)
            if loop is not None and loop not in self.order:
                yield node, f"{op.name} closes {loop}, which is not a loop"
        for node, count in Counter(self.graph.outputs).items():
            if count > 1:
                yield node, "the store gives two outputs; one is enough"
            if node.op is not tile.STORE:
                yield node, f"the output is a {node.op.name}, not a store"

    def _maps(self, node: Node) -> _Found:
        if node.op in (tile.LOAD, tile.STORE):
            maps = node.attrs.dims
        elif node.op is tile.TILE_INDEX:
            maps = (node.attrs.dim,)
        else:
            return
        seen: set[str] = set()
        for dim in maps:
            if dim.tile < 1:
                yield node, f"a tile has {dim.tile} elements"
            for name, count in dim.axes:
                axis = self.axes.get(name)
                if axis is None:
                    yield node, f"the map names {name}, which is not an axis"
                elif axis.count != count:
                    yield node, f"the map says {name}={count}, the graph {name}={axis.count}"
                if name in seen:
                    yield node, f"axis {name} splits a tensor twice"
                seen.add(name)

    def _loops(self, node: Node) -> frozenset[str]:
        if node.op is tile.STORE:
            named = {name for dim in node.attrs.dims for name, _ in dim.axes}
            return frozenset(named & self.order.keys())
        return frozenset(self.varying[node] & self.order.keys())

    def _store(self, node: Node) -> _Found:
        named = {name for dim in node.attrs.dims for name, _ in dim.axes}
        for name in sorted(self.varying[node.inputs[0]] - named):
            remedy = "accumulate over it first" if name in self.order else "name it in the map"
            yield node, f"the value varies over {name}, which the map does not name; {remedy}"
        for name in sorted(named & self.order.keys()):
            if self.axes[name].bounds:
                yield node, f"loop {name} has bounds: its iterations may not store"

    def _accumulator(self, node: Node) -> _Found:
        loop = node.attrs.loop
        loops = frozenset[str]().union(*(self._loops(i) for i in node.inputs))
        if loop not in self._loops(node.inputs[0]) and self.axes[loop].count > 1:
            yield node, f"the operand of {node.op.name} does not vary over loop {loop}"
        for inner in sorted(loops, key=self.order.__getitem__):
            if self.order[inner] > self.order[loop]:
                yield node, f"loop {loop} is closed before loop {inner}, which is inside it"
        operand = node.inputs[0].op
        bounded = bool(self.axes[loop].bounds)
        if node.op is tile.ACCUM_LAST and bounded and operand is not tile.PREFIX_MAX:
            yield node, f"loop {loop} has bounds: accum_last takes a prefix_max of it"
        if node.op is tile.ACCUM_RESCALED:
            shift = node.inputs[1]
            if shift.op is not tile.PREFIX_MAX or shift.attrs.loop != loop:
                yield node, f"the shift is not a prefix_max over loop {loop}"
            if not 0 < node.attrs.power < math.inf:
                yield node, f"the power is {node.attrs.power}, no positive number"

    def _uses_after_close(self) -> _Found:
        """Find values inside a loop that need the finished value of that or a later loop."""
        closed: dict[Node, frozenset[tuple[str, frozenset[str]]]] = {}
        reported: set[tuple[str, str]] = set()
        for node in self.graph.nodes():
            needs = frozenset[tuple[str, frozenset[str]]]().union(*(closed[i] for i in node.inputs))
            for loop, outer in sorted(needs, key=lambda n: (n[0], sorted(n[1]))):
                for inside in sorted(self._loops(node) - outer):
                    early = self.order[inside] <= self.order[loop]
                    if early and (loop, inside) not in reported:
                        reported.add((loop, inside))
                        yield node, f"in loop {inside} stands a use of what loop {loop} gives last"
            if is_accumulator(node):
                needs |= {(node.attrs.loop, self._loops(node))}
            closed[node] = needs

    # -- ragged dims ---------------------------------------------------------------------------

    def _ragged(self) -> _Found:
        sources = dim_sources(self.graph)
        for node in self.graph.nodes():
            if node.op is tile.STORE:
                yield from _ragged_store(node, sources[node.inputs[0]])
            elif node.op not in (leaf.INPUT, tile.LOAD):
                yield from _ragged_use(node, sources)


def _ragged_store(node: Node, source: tuple[DimSource | None, ...]) -> _Found:
    for i, (dim, s) in enumerate(zip(node.attrs.dims, source, strict=True)):
        if s is not None and s.ragged and (s.map, s.extent) != (dim, node.attrs.shape[i]):
            yield node, f"dim {i} is ragged and not stored with the map it was loaded with"


def _ragged_use(node: Node, sources: dict[Node, tuple[DimSource | None, ...]]) -> _Found:
    op = node.op
    removed: set[int] = set()
    if op.kind is OpKind.REDUCTION:
        removed = set(getattr(node.attrs, "axes", None) or (node.attrs.axis,))
    if op in (structural.SLICE, structural.PAD, structural.CONCAT, structural.GATHER):
        cut = {node.attrs.axis}
    elif op is structural.FLIP:
        cut = set(node.attrs.axes)
    else:
        cut = {node.attrs.axis} if op is contraction.SCAN else set()
    closes = is_accumulator(node) or op is tile.PREFIX_MAX
    moved = Counter(sources[node]) if op in (structural.RESHAPE, structural.PERMUTE) else None
    for number, operand in enumerate(node.inputs):
        for i, s in enumerate(sources[operand]):
            axis = i - len(operand.shape)
            if s is None or not s.ragged or axis in removed:
                continue
            if axis in cut and not (op is structural.GATHER and number == 1):
                yield node, f"{op.name} along axis {axis}, which is ragged"
            elif op is contraction.MATMUL and axis == (-1 if number == 0 else -2):
                other = sources[node.inputs[1 - number]][-2 if number == 0 else -1]
                if other is not None and other != s:
                    yield node, "the contracted dims run over different tensor dims"
            elif closes and any(a == node.attrs.loop for a, _ in s.map.axes):
                if op is tile.ACCUM_LAST:
                    yield node, f"axis {axis} is ragged over the loop: its last value is outside"
            elif moved is not None:
                moved[s] -= 1
                if moved[s] < 0:
                    yield node, f"{op.name} loses the ragged dim at axis {axis}"
            elif axis not in cut and sources[node][axis] != s:
                yield node, f"{op.name} loses the ragged dim at axis {axis} of operand {number}"
