"""Partition a kernel graph into kernels by predicted cost.

Every op starts as a kernel of its own (library kernels for contractions, convolutions and opaque
nodes); neighbours are merged, best saving first, as long as their union is one legal kernel that
the model thinks cheaper than the two. Nothing but index structure and cost decides.

In: a kernel graph of primitives (composites in it stay library kernels). Out: groups of nodes.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from math import inf
from typing import final

from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.target import Target
from superopt.search.cost import library_cost
from superopt.search.region import is_leaf, is_view, make_region, view_base
from superopt.search.schedule import derive
from superopt.search.tiling import best_tiles

_FUSIBLE = (OpKind.ELEMENTWISE, OpKind.REDUCTION, OpKind.CONTRACTION)
_FUSIBLE_STRUCTURAL = (
    structural.CONCAT,
    structural.PAD,
    structural.FLIP,
    structural.SLICE,
    structural.RESHAPE,
    structural.BROADCAST,
    contraction.SCAN,
)
_COARSE = 256
Group = frozenset[Node]


def is_compute(node: Node) -> bool:
    """Say whether a node needs a kernel: not inputs, leaves, projections or views."""
    return not (node.op in (leaf.INPUT, leaf.ITEM) or is_leaf(node) or is_view(node))


def partition(
    graph: Graph,
    machine: Target,
    *,
    products: int | None = None,
    refused: Collection[Group] = (),
) -> dict[Group, float]:
    """Return groups of compute nodes, each one kernel, in topological order, with predicted seconds.

    No two groups need each other, directly or through others. At most `products` contractions are in one
    (None: any number); with 0 each is a library kernel. No group of several nodes contains a `refused` one.
    """
    return _Partition(graph, machine, products, refused).run()


@final
@dataclass(slots=True)
class _Partition:
    graph: Graph
    machine: Target
    products: int | None
    refused: Collection[Group] = ()
    owner: dict[Node, Group] = field(default_factory=dict)
    costs: dict[Group, float] = field(default_factory=dict)
    producers: dict[Node, list[Node]] = field(default_factory=dict)

    def run(self) -> dict[Group, float]:
        order = [n for n in topological(self.graph.outputs) if is_compute(n)]
        self.owner = {n: frozenset([n]) for n in order}
        self.producers = {n: _producers(n) for n in order}
        gains: dict[tuple[Group, Group], float] = {}
        while True:
            union = self._best(self._edges(order), gains) or self._best(
                self._siblings(order), gains
            )
            if union is None:
                break
            for node in union:
                self.owner[node] = union
        self._merge_components(order)
        for first, second in self._edges(order):
            self._hand_back(first, second)
        groups = dict.fromkeys(self.owner[n] for n in order)
        return {g: self._cost(g) for g in _sorted(self.graph, groups)}

    def _best(
        self, pairs: list[tuple[Group, Group]], gains: dict[tuple[Group, Group], float]
    ) -> Group | None:
        """Return the groups that gain most as one kernel, if any do: a pair, and what lies between the two."""
        for pair in pairs:
            if pair not in gains:
                gains[pair] = self._gain(*pair)
        best, most = None, 0.0
        # what lies between takes long to tell: only the best are asked
        for pair in sorted((e for e in pairs if gains[e] > 0), key=lambda e: -gains[e]):
            if gains[pair] <= most:
                break
            between = self._between(*pair)
            gain = self._gain(*pair, *between) if between else gains[pair]
            # more than a trifle between the two would be merged before it is known with what it goes best
            if gain > most and sum(map(self._cost, between)) < gains[pair]:
                best, most = frozenset().union(*pair, *between), gain
        return best

    def _siblings(self, order: list[Node]) -> list[tuple[Group, Group]]:
        """Return pairs of groups without products that read one tensor: together they read it once."""
        readers: dict[Node, dict[Group, None]] = {}
        for node in order:
            group = self.owner[node]
            if not any(n.op.kind is OpKind.CONTRACTION for n in group):
                for read in map(view_base, node.inputs):
                    if not is_leaf(read) and self.owner.get(read) != group:
                        readers.setdefault(read, {})[group] = None
        pairs = (pair for groups in readers.values() for pair in combinations(groups, 2))
        return list(dict.fromkeys(pairs))

    def _merge_components(self, order: list[Node]) -> None:
        """Merge whole neighbourhoods where pairs did not pay but all together do."""
        component: dict[Node, set[Node]] = {n: set(self.owner[n]) for n in order}
        for first, second in self._edges(order):
            if all(self._fusible(n) for n in first | second):
                a, b = component[next(iter(first))], component[next(iter(second))]
                if a is not b:
                    a |= b
                    for node in b:
                        component[node] = a
        for members in {id(c): c for c in component.values()}.values():
            union = frozenset(members)
            parts = {self.owner[n] for n in union}
            separate = sum(self._cost(p) for p in parts)
            if self._crowded(union):
                continue
            if len(parts) > 2 and self._closed(union) and self._cost(union) < separate:
                for node in union:
                    self.owner[node] = union

    def _hand_back(self, first: Group, second: Group) -> None:
        """Let a group compute what another one computes of its results alone, elementwise, where that is cheaper.

        Merging pairs may leave a boundary where two tensors cross it that are one right after.
        """
        if any(self.owner[n] != g for g in (first, second) for n in g):
            return
        moved: set[Node] = set()
        for node in topological(tuple(second)):
            known = all(p in first or p in moved for p in self.producers.get(node, [None]))
            if node in second and known and node.op.kind is OpKind.ELEMENTWISE:
                moved.add(node)
        one, other = first | moved, second - moved
        if not moved or not other or not all(self._fusible(n) for n in one) or self._crowded(one):
            return
        before = self._cost(first) + self._cost(second)
        if self._cost(one) + self._cost(other) < before:
            for group in (one, other):
                for node in group:
                    self.owner[node] = group

    def _closed(self, union: Group) -> bool:
        """Say whether no path of groups leaves `union` and comes back."""
        return not self._reaches(self._sources(union) - {self.owner[n] for n in union}, union)

    def _sources(self, group: Group) -> set[Group]:
        """Return the groups that `group` reads from, itself among them where it reads its own."""
        return {self.owner[p] for n in group for p in self.producers[n]}

    def _reaches(self, start: set[Group], goal: Group) -> bool:
        """Say whether one of the groups in `start` needs a result of `goal`.

        Groups and not nodes: two groups that need different results of each other are a cycle too.
        """
        stack, seen = list(start), set(start)
        while stack:
            for source in self._sources(stack.pop()):
                if not source.isdisjoint(goal):
                    return True
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        return False

    def _edges(self, order: list[Node]) -> list[tuple[Group, Group]]:
        edges: dict[tuple[Group, Group], None] = {}
        for node in order:
            for producer in self.producers[node]:
                a, b = self.owner[producer], self.owner[node]
                if a != b:
                    edges[a, b] = None
        return list(edges)

    def _between(self, first: Group, second: Group) -> list[Group]:
        """Return the other groups on paths from one of the two to the other: they have to be in one kernel with them."""
        ends = (first, second)
        found: dict[Group, None] = {}
        for end, other in (ends, ends[::-1]):
            stack = [g for g in self._sources(end) if g not in ends]
            while stack:
                group = stack.pop()
                if group not in found and self._reaches({group}, other):
                    found[group] = None
                    stack += [g for g in self._sources(group) if g not in ends]
        return list(found)

    def _gain(self, *groups: Group) -> float:
        union: Group = frozenset().union(*groups)
        if not all(self._fusible(n) for n in union) or self._crowded(union):
            return -inf
        return sum(map(self._cost, groups)) - self._cost(union)

    def _crowded(self, union: Group) -> bool:
        """Say whether there are more products than may be in one kernel, or what may not be together."""
        if any(group <= union for group in self.refused):
            return True
        count = sum(n.op.kind is OpKind.CONTRACTION for n in union)
        return self.products is not None and count > max(1, self.products)

    def _fusible(self, node: Node) -> bool:
        if node.op.kind is OpKind.CONTRACTION:
            return self.products != 0
        if node.op is structural.GATHER:
            return self.machine.kind == "cpu"
        return node.op.kind in _FUSIBLE or node.op in _FUSIBLE_STRUCTURAL

    def _cost(self, group: Group) -> float:
        if group not in self.costs:
            self.costs[group] = self._estimate(group)
        return self.costs[group]

    def _estimate(self, group: Group) -> float:
        cost = inf
        if len(group) == 1:
            (node,) = group
            if node.op is leaf.ITEM or not hasattr(node.type, "shape"):
                return self.machine.library_call_s
            cost = library_cost(node, self.machine)
            if not self._fusible(node):
                return cost
        for schedule in derive(make_region(self.graph, group)):
            found = best_tiles(schedule, self.machine, 1, _COARSE)
            if found:
                cost = min(cost, found[0][0])
        return cost


def _producers(node: Node) -> list[Node]:
    """Return the compute nodes whose results `node` reads, through views and projections."""
    result = []
    stack = list(node.inputs)
    while stack:
        current = stack.pop()
        if is_compute(current):
            result.append(current)
        elif current.op in structural.VIEWS or current.op is leaf.ITEM:
            stack += current.inputs
    return list(dict.fromkeys(result))


def _sorted(graph: Graph, groups: Iterable[Group]) -> list[Group]:
    position = {n: i for i, n in enumerate(topological(graph.outputs))}
    return sorted(groups, key=lambda g: max(position[n] for n in g))
