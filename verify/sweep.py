"""Proof of large programs piece by piece: sweeping, as in the equivalence checking of circuits.

The degree of a whole model is too high for one test to say much. But a candidate differs from its
original in pieces, and between them the two compute the same values. One test of both programs tells
which nodes may be equal (Kuehlmann and Krohm, *Equivalence Checking Using Cuts and Heaps*, DAC 1997; Mishchenko
et al., *FRAIGs*, 2005). In topological order each such pair becomes a claim: equal as functions of
values that both have, each in place of a free variable. What is proven for all values holds for those
that occur. A proven node of the candidate is replaced by its partner, so later claims start there.

A claim may fail because its variables are related in the program and free in the claim. It is then
made again over a larger part of the program, at last over the whole.

In: the outputs of both programs as primitives, pairs that may be equal, and a prover of claims. Out: whether
the outputs are proven equal. The bound of an error is the prover's: it sees every claim that is made.
"""

from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final, final

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, rebuild, topological
from superopt.ir.ops import elementwise, leaf, library
from superopt.ir.ops.registry import OpKind
from superopt.verify.needs import real_valued
from superopt.verify.ranges import Integers

SKIPS: Final = (0, 2, 8)
"""How many shared values a claim reaches past before it makes them variables, attempt by attempt."""

OUTPUT_SKIPS: Final = (*SKIPS, 32, inf)
"""The same for outputs, where the last attempt is the whole program."""


@final
@dataclass(frozen=True, slots=True)
class Claim:
    """Two outputs that are to be equal for all inputs; `ranges` as in `integer_ranges`."""

    graph: Graph
    ranges: tuple[tuple[str, Integers], ...]


@final
@dataclass(slots=True)
class Sweep:
    """One candidate, node by node.

    `partners` maps nodes of the candidate to nodes of the original, or views of these, that may be equal. `finite` holds the
    nodes of the original that were finite everywhere: only those become variables, since variables are.
    """

    original: tuple[Node, ...]
    partners: Mapping[Node, Node]
    finite: frozenset[Node]
    ranges: Mapping[str, Integers]
    prove: Callable[[Claim], bool]
    known: dict[Claim, bool] = field(default_factory=dict)
    numbers: dict[Node, int] = field(default_factory=dict)
    below: dict[Node, int] = field(default_factory=dict)
    cuttable: set[Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        varying: set[Node] = set()
        for node in topological(self.original):
            self.numbers[node] = len(self.numbers)
            self._number(node)
            free = node.op in (leaf.INPUT, library.OPAQUE)
            if free or any(i in varying for i in node.inputs):
                varying.add(node)
                if node in self.finite and computes(node):
                    self.cuttable.add(node)

    def _number(self, node: Node) -> None:
        """Record which nodes of the original `node` depends on, one bit each."""
        bits = 1 << self.numbers[node] if node in self.numbers else 0
        for i in node.inputs:
            bits |= self.below[i]
        self.below[node] = bits

    def _number_all(self, partner: Node) -> None:
        """Record the same of a view of a node of the original."""
        for node in topological([partner], stop=self.below.keys()):
            if node not in self.below:
                self._number(node)

    def equal(self, candidate: Sequence[Node]) -> bool:
        """Prove the outputs of the candidate equal to those of the original, if that can be done."""
        merged: dict[Node, Node] = {}
        for node in topological(candidate):
            new = rebuild(node, tuple(merged[i] for i in node.inputs))
            if new not in self.below:
                self._number(new)
            partner = self.partners.get(node)
            if partner is not None:
                self._number_all(partner)
                if self._proven(partner, new, SKIPS):
                    new = partner
            merged[node] = new
        pairs = zip(self.original, candidate, strict=True)
        return all(self._proven(a, merged[c], OUTPUT_SKIPS) for a, c in pairs)

    def _proven(self, left: Node, right: Node, skips: Iterable[float]) -> bool:
        if left is right:
            return True
        for skip in skips:
            claim = self._claim(left, right, skip)
            if claim not in self.known:
                a, c = claim.graph.outputs
                self.known[claim] = a is c or self.prove(claim)
            if self.known[claim]:
                return True
        return False

    def _claim(self, left: Node, right: Node, skip: float) -> Claim:
        """Say that two nodes are equal, over variables that are named by where they are met.

        So repeated layers make the same claim, which is proven once.
        """
        cuts = self._cuts(left, right, skip)
        new: dict[Node, Node] = {}
        inputs: list[Node] = []
        ranges: list[tuple[str, Integers]] = []
        for node in topological([left, right], stop=cuts):
            if node in cuts or node.op is leaf.INPUT:
                name = f"v{len(inputs)}"
                new[node] = b.input_(name, node.shape, node.tensor.dtype)
                inputs.append(new[node])
                drawn = Integers() if real_valued(node) else self.ranges[node.attrs.name]
                ranges.append((name, drawn))
            else:
                new[node] = rebuild(node, tuple(new[i] for i in node.inputs))
        graph = b.kernel_graph("claim", inputs, [new[left], new[right]])
        return Claim(graph, tuple(ranges))

    def _cuts(self, left: Node, right: Node, skip: float) -> set[Node]:
        """Return values that both nodes read, past `skip` others on each path: the claim's variables.

        A value that one of them reads the other may depend on all the same, through what lies between or
        by computing it again. As a variable of one side alone it would refute the claim, so it is none.
        """
        opened: set[Node] = set()
        while True:
            cuts = self._first_shared(left, right, skip, opened)
            sides = [cuts.intersection(topological([side], stop=cuts)) for side in (left, right)]
            alone = sides[0] ^ sides[1]
            if not alone:
                return cuts
            # the last of them first: what it is made of may be what the other side reads
            opened.add(max(alone, key=self.numbers.__getitem__))

    def _first_shared(
        self, left: Node, right: Node, skip: float, opened: Container[Node]
    ) -> set[Node]:
        """Return the first values below both nodes that both have, past `skip` others on each path."""
        shared = self.below[left] & self.below[right]
        passed: dict[Node, float] = {left: 0, right: 0}
        queue = deque([left, right])
        done: set[Node] = set()
        cuts: set[Node] = set()
        while queue:
            node = queue.popleft()
            if node in done:
                continue
            done.add(node)
            distance = passed[node]
            if node in self.cuttable and node not in opened and shared >> self.numbers[node] & 1:
                if distance >= skip:
                    cuts.add(node)
                    continue
                distance += 1
            for i in node.inputs:
                if distance < passed.get(i, inf):
                    passed[i] = distance
                    # nearest first: what is taken from the queue has its least distance
                    queue.append(i) if distance > passed[node] else queue.appendleft(i)
        return cuts


def computes(node: Node) -> bool:
    """Say whether a node makes numbers; what only moves them is cut where they were made."""
    return (
        real_valued(node)
        and node.op.kind is not OpKind.STRUCTURAL
        and node.op not in (elementwise.CAST, leaf.INPUT, leaf.ITEM)
    )


def partners(
    original: Sequence[Node], boundaries: Iterable[Node], signatures: Mapping[Node, Any]
) -> dict[Node, Node]:
    """Map each boundary that is not in the original to the first node there that may be equal.

    Signatures are digests per kind of residue; equal ones under a common kind make a pair.
    """
    first: dict[tuple[Any, ...], Node] = {}
    own = list(topological(original))
    for node in own:
        for kind, digest in signatures.get(node, {}).items():
            first.setdefault((node.type, kind, digest), node)
    found: dict[Node, Node] = {}
    for node in set(boundaries).difference(own):
        for kind, digest in sorted(signatures.get(node, {}).items()):
            match = first.get((node.type, kind, digest))
            if match is not None:
                found.setdefault(node, match)
    return found
