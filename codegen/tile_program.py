"""Tile programs: the order in which a block graph's values are computed, loops made explicit.

In: a block graph. Out: a tree of `Compute` and `Loop` items for one block, which every backend
prints in its own way. Invariants: operands come before users; a value stands in the innermost
scope that it varies over and nowhere deeper, so what does not change in a loop is computed before
it; a loop runs once for all accumulators that can share the pass, and again (its tiles loaded
anew) for those that need the finished value of another.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import final

from superopt.codegen.errors import CodegenError
from superopt.ir.graph import Axis, Graph, Level
from superopt.ir.node import Node, topological
from superopt.ir.ops import leaf, tile
from superopt.ir.threads import inline_threads
from superopt.ir.tiles import DimSource, dim_sources, is_accumulator, varying_axes


@final
@dataclass(frozen=True, slots=True)
class Compute:
    """Compute one value; for an accumulator, add this iteration's operand to it."""

    node: Node


@final
@dataclass(frozen=True, slots=True)
class Loop:
    """Run `body` for every point of `axis` whose bounds hold; `states` are carried through it."""

    axis: Axis
    states: tuple[Node, ...]
    body: "tuple[Compute | Loop, ...]"


Item = Compute | Loop


@final
@dataclass(frozen=True, slots=True)
class TileProgram:
    """The schedule of one block, with what is known of each value."""

    graph: Graph
    items: tuple[Item, ...]
    loops_of: dict[Node, frozenset[str]]
    sources: dict[Node, tuple[DimSource | None, ...]]


def tile_program(graph: Graph) -> TileProgram:
    """Schedule a block graph, its thread graphs inlined: backends fuse as they see fit.

    Raises:
        CodegenError: the graph is not a block graph, or its loops depend on each other in a ring.
    """
    if graph.level is not Level.BLOCK:
        raise CodegenError(f"graph {graph.name} is a {graph.level.value} graph; need a block graph")
    graph = inline_threads(graph)
    names = {a.name for a in graph.loops}
    axes = varying_axes(graph)
    loops_of = {n: frozenset(axes[n] & names) for n in axes}
    for node in graph.nodes():
        if node.op is tile.STORE:
            loops_of[node] = loops_of[node.inputs[0]]
    items = _Scheduler(graph, loops_of).scope((), list(graph.outputs), frozenset())
    return TileProgram(graph, tuple(items), loops_of, dim_sources(graph))


@final
@dataclass(slots=True)
class _Scheduler:
    graph: Graph
    loops_of: dict[Node, frozenset[str]]
    order: dict[Node, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {n: i for i, n in enumerate(topological(self.graph.outputs))}

    def scope(
        self, inside: tuple[str, ...], sinks: Sequence[Node], known: frozenset[Node]
    ) -> list[Item]:
        """Items that compute `sinks` inside the loops `inside`, given the values `known`."""
        have = set(known)
        items: list[Item] = []
        pending = self._loop_sinks(inside, sinks, have)
        while pending:
            progress = False
            for axis in self.graph.loops:
                ready = self._ready(axis.name, inside, pending, have)
                if ready:
                    self._straight(inside, ready, have, items)
                    items.append(self._loop(axis, inside, ready, have))
                    have |= set(ready)
                    pending = [n for n in pending if n not in ready]
                    progress = True
            if not progress:
                raise CodegenError(f"the loops of {self.graph.name} wait for each other")
        self._straight(inside, sinks, have, items)
        return items

    def _loop_sinks(
        self, inside: tuple[str, ...], sinks: Sequence[Node], have: set[Node]
    ) -> list[Node]:
        found = []
        for node in self._needs(sinks, have):
            here = self.loops_of[node] <= set(inside)
            if (is_accumulator(node) and here and node.attrs.loop not in inside) or (
                node.op is tile.STORE and not here
            ):
                found.append(node)
        return found

    def _loop_name(self, node: Node, inside: tuple[str, ...]) -> str:
        if is_accumulator(node):
            name: str = node.attrs.loop
            return name
        return next(
            a.name
            for a in self.graph.loops
            if a.name in self.loops_of[node] and a.name not in inside
        )

    def _ready(
        self, axis: str, inside: tuple[str, ...], pending: list[Node], have: set[Node]
    ) -> list[Node]:
        waiting = set(pending)
        ready = []
        for node in pending:
            if self._loop_name(node, inside) != axis:
                continue
            below = self._needs(node.inputs, have)
            if not any(n in waiting for n in below):
                ready.append(node)
        return ready

    def _straight(
        self, inside: tuple[str, ...], sinks: Iterable[Node], have: set[Node], items: list[Item]
    ) -> None:
        """Compute at this scope what `sinks` need and what does not vary any deeper."""
        outer = set(inside)
        roots = list(sinks)
        for node in self._needs(roots, have):
            deeper = not self.loops_of[node] <= outer
            closing = is_accumulator(node) and node.attrs.loop not in outer
            if deeper or closing or node.op is leaf.INPUT:
                continue
            items.append(Compute(node))
            have.add(node)

    def _loop(
        self, axis: Axis, inside: tuple[str, ...], ready: list[Node], have: set[Node]
    ) -> Loop:
        body = self.scope((*inside, axis.name), ready, frozenset(have))
        states = list(ready)
        for node in _computed(body):
            if node.op is tile.PREFIX_MAX and node.attrs.loop == axis.name:
                states.append(node)
        return Loop(axis, tuple(s for s in states if s.op is not tile.STORE), tuple(body))

    def _needs(self, roots: Iterable[Node], have: set[Node]) -> list[Node]:
        """Nodes under `roots`, themselves included, that are not in `have`, operands first."""
        found: set[Node] = set()
        stack = [r for r in roots if r not in have]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            stack += [i for i in node.inputs if i not in have and i not in found]
        return sorted(found, key=self.order.__getitem__)


def _computed(items: Iterable[Item]) -> list[Node]:
    found: list[Node] = []
    stack = list(items)
    while stack:
        item = stack.pop(0)
        if isinstance(item, Compute):
            found.append(item.node)
        else:
            stack = [*item.body, *stack]
    return found
