"""Run a program a slice at a time: what is large and used row by row never exists as a whole.

Tests compute with intermediates that no kernel would write to memory, scores of attention above all. As
a whole they cost page faults and a trip to memory per operator; a slice of them stays in a cache. From
the results back to the inputs each value is *cut* along one axis where all that read it want the same
cut, and computed as a whole before where they do not. Every value is computed once, by the same operators.

A test of *whether* two programs are equal needs less: where all slices are computed alike, from slices of
the inputs and from inputs that all of them read, a few slices are as good as all (`alike`). So they are where
all slices are summed, and results are polynomials in the sums, or quotients of some.

In: a kernel graph of primitives, and the number of elements up to which a value is no reason to cut.
Out: `Slices`, or None where nothing would be gained; an `Alike`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf, prod
from typing import Any, Final, final

import torch

from superopt.ir import build as b
from superopt.ir.build import input_
from superopt.ir.graph import Graph, Level
from superopt.ir.interpret import Domain, interpret
from superopt.ir.node import Node, make, rebuild, topological
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import DType
from superopt.verify.cuts import MOVING, Cut, Wanted, cut_of, natural, operand_cuts, row_axes
from superopt.verify.draws import is_draw
from superopt.verify.memory import empty
from superopt.verify.needs import constant_power, real_valued

LARGE: Final = 1 << 19
"""Elements of float64 that several operators in turn still find in a cache."""
_TERMS: Final = 32
"""How many terms of a product cost as much as an operator on an element."""
TERMS_OF_FLOATS: Final = 160
"""The same in float64: a field's are of several products."""
ELEMENT_S = 1e-8
"""What an operator takes for an element on one core; exponentials and extrema take longer."""
_MOST: Final = 256
"""How many slices at most: each costs a walk over the graph."""
_WORTH: Final = 0.5
"""The largest share of the work that may be left for a cut to be worth it."""
_WORTH_OF_SUMS: Final = 0.8
"""The same where sums are cut too, or steps are picked: next to the scores of all heads, a wide layer is as much again."""
SUMMED: Final = 8.0
"""Of what degree in sums results may be, where steps that are summed are left out."""


_Seed = tuple[Node, bool]
"""Where cuts begin: a result (True), or the operands of a sum."""


@final
@dataclass(frozen=True, slots=True)
class _Body:
    """The program of one slice, over values that are given as a whole (no cut) or as their slice."""

    graph: Graph
    given: tuple[tuple[Node, Cut | None], ...]


@final
@dataclass(frozen=True, slots=True)
class Slices:
    """A program in three: what comes first and as a whole, slices, and what comes of all of them.

    `head` computes from the graph's inputs what slices are given, as a whole or cut. `starts` lists the
    first step and the number of steps of each slice, `bodies` their programs by that number. `tail` computes
    the results from what slices make, put together along `cuts`, and from `passed`, values of the head.
    """

    head: Graph
    bodies: dict[int, _Body]
    starts: tuple[tuple[int, int], ...]
    cuts: tuple[Cut, ...]
    passed: tuple[Node, ...]
    tail: Graph

    @property
    def whole_rows(self) -> bool:
        """Say whether the results are what slices make, in rows that none of them cuts."""
        made = self.tail.inputs[: len(self.cuts)]
        return all(o in made and self._cut(o).axis in row_axes(o) for o in self.tail.outputs)

    def _cut(self, result: Node) -> Cut:
        return self.cuts[self.tail.inputs.index(result)]

    def steps_of(self, rows: Sequence[torch.Tensor]) -> list[list[int]]:
        """Return the steps that make some rows of each result, as many at a time as slices have; see `whole_rows`."""
        found = set[int]()
        for result, wanted in zip(self.tail.outputs, rows, strict=True):
            cut = self._cut(result)
            step = torch.arange(result.shape[cut.axis]) // cut.unit
            step %= result.shape[cut.axis] // (cut.unit * cut.outer)
            step = step.reshape(-1, *(1 for _ in range(-1 - cut.axis))).expand(result.shape)
            found.update(step[..., 0].reshape(-1)[wanted].tolist())
        steps, size = sorted(found), self.starts[0][1]
        steps += steps[-1:] * (-len(steps) % size)
        return [steps[i : i + size] for i in range(0, len(steps), size)]

    def of(self, results: Sequence[torch.Tensor], wanted: list[list[int]]) -> list[torch.Tensor]:
        """Return the rows of results that `wanted` steps make; see `whole_rows`."""
        cuts = [self._cut(o) for o in self.tail.outputs]
        pairs = zip(results, cuts, strict=True)
        return [torch.cat([cut.of(x, steps) for steps in wanted], cut.axis) for x, cut in pairs]

    def run(
        self,
        args: Sequence[torch.Tensor],
        domain: Domain[Any],
        wanted: list[list[int]] | None = None,
    ) -> list[torch.Tensor]:
        """Evaluate the program on `args`, one per input; of `wanted` steps alone, what `of` returns."""
        whole = dict(zip(self.head.outputs, interpret(self.head, args, domain), strict=True))
        found: list[list[torch.Tensor]] = [[] for _ in self.cuts]
        if wanted is None:
            wanted = [list(range(start, start + steps)) for start, steps in self.starts]
        for steps in wanted:
            body = self.bodies[len(steps)]
            given = [
                whole[node] if cut is None else cut.of(whole[node], steps)
                for node, cut in body.given
            ]
            for parts, part in zip(found, interpret(body.graph, given, domain), strict=True):
                parts.append(part)
        joined = [torch.cat(p, c.axis) for p, c in zip(found, self.cuts, strict=True)]
        return interpret(self.tail, [*joined, *(whole[n] for n in self.passed)], domain)


def evaluate(
    graph: Graph,
    sliced: Slices | None,
    args: Sequence[torch.Tensor],
    domain: Domain[Any],
    wanted: list[list[int]] | None = None,
) -> list[torch.Tensor]:
    """Evaluate a program in slices where it has some, or `wanted` steps of them alone."""
    with torch.no_grad():
        if sliced is not None:
            return sliced.run(args, domain, wanted)
        return interpret(graph, args, domain)


def slices(graph: Graph, device: torch.device | str, large: int = LARGE) -> Slices | None:
    """Cut `graph` so that few values of primitives have more than `large` elements.

    A GPU computes as a whole.
    """
    if torch.device(device).type != "cpu":
        return None
    before = max((_size(n) for n in graph.nodes()), default=0)
    # what draws random numbers runs once, in its order
    if before <= large or any(is_draw(n) for n in graph.nodes()):
        return None
    roots = _roots(graph.outputs)
    order = list(topological(roots))
    lengths = sorted({d for n in order if _has_shape(n) for d in n.shape if d > 1}, reverse=True)
    cuttings = (_Cutting(order, roots, length, large) for length in lengths)
    best = min(cuttings, key=_Cutting.peak)
    return best.slices(graph) if 2 * best.peak() <= before else None


@final
@dataclass(frozen=True, slots=True)
class _Few:
    """How many of how many steps are left along one axis, and the cuts of inputs and outputs there."""

    steps: int
    length: int
    inputs: Wanted
    outputs: Wanted
    picked: bool = False

    def of(self, values: Sequence[torch.Tensor], cuts: Wanted) -> list[torch.Tensor]:
        """Return these steps of each value."""
        places = _places(self.steps, self.length)
        found = list(values)
        for i, (value, cut) in enumerate(zip(values, cuts, strict=True)):
            if cut is not None:
                found[i] = cut.of(value, places)
        return found

    def again(self, values: Sequence[torch.Tensor], cuts: Wanted) -> list[torch.Tensor]:
        """Return values of all steps, of which `of` gives these."""
        index = torch.arange(self.length) % self.steps
        index[_places(self.steps, self.length)] = torch.arange(self.steps)
        found = list(values)
        for i, (value, cut) in enumerate(zip(values, cuts, strict=True)):
            if cut is not None:
                axis, given = value.dim() + cut.axis, cut.split(value)
                shape = (*given.shape[: axis + 1], self.length, *given.shape[axis + 2 :])
                every = empty(shape, value.dtype, value.device)
                torch.index_select(given, axis + 1, index.to(value.device), out=every)
                found[i] = every.flatten(axis, axis + 2)
        return found


def _distances(steps: int, length: int) -> tuple[int, int, int]:
    """Return (a, c, d): of so many steps the i-th stands at a i + c (d i // (steps - 1)).

    They are the first, the last and some between; if they can, as they come where all repeat them in turn.
    """
    return (1, steps, length // steps - 1) if length % steps == 0 else (0, 1, length - 1)


def _places(steps: int, length: int) -> list[int]:
    """Return so many steps; one is the last."""
    a, c, d = _distances(steps, length)
    return [a * i + c * (d * i // (steps - 1)) for i in range(steps)] if steps > 1 else [length - 1]


@final
@dataclass(frozen=True, slots=True)
class Alike:
    """What is left of a program whose results are alike along some axes: a few positions of each.

    `values` maps the program's nodes to those of what is left.
    """

    graph: Graph
    few: tuple[_Few, ...]
    values: dict[Node, Node]

    @property
    def kept(self) -> tuple[tuple[int, int], ...]:
        """How many of how many steps are left, axis by axis."""
        return tuple((few.steps, few.length) for few in self.few)

    def inputs(self, whole: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inputs of what is left, of those of the program."""
        for few in self.few:
            whole = few.of(whole, few.inputs)
        return list(whole)

    def outputs(self, whole: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the results of what is left, of those of the program."""
        for few in self.few:
            whole = few.of(whole, few.outputs)
        return list(whole)

    @property
    def picked(self) -> bool:
        """Say whether what is left is computed of all steps of something."""
        return any(few.picked for few in self.few)

    def all_inputs(self, left: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return inputs of the program in which those of what is left come again and again."""
        for few in reversed(self.few):
            left = few.again(left, few.inputs)
        return list(left)

    def all_outputs(self, left: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the results for `all_inputs`, of those of what is left."""
        for few in reversed(self.few):
            left = few.again(left, few.outputs)
        return list(left)

    def first(self, count: int) -> "Alike":
        """Return what is left of the first results."""
        few = tuple(replace(f, outputs=f.outputs[:count]) for f in self.few)
        return Alike(self.graph.with_outputs(self.graph.outputs[:count]), few, self.values)


def alike(
    graph: Graph,
    large: int = LARGE,
    *,
    summed: float = 0.0,
    rows: int = 0,
    picked: bool = False,
    repeated: bool = False,
) -> Alike:
    """Leave of `graph` a few steps of each axis along which all is computed alike, where it is large.

    A result at a step of such an axis is one function, the same for all steps, of what inputs have at this step and
    of inputs that all steps read. No position is known to it: nothing counts along the axis, moves elements
    along it or sums over it. So results of two programs in one graph are equal for all inputs if and only if
    those that are left are.

    With `summed` sums over steps are no reason to keep all: the last step left then stands for all others, and what is
    left gives the results of the whole for inputs that have equal steps there. Results are equal for all
    inputs if they are for these, where they are quotients of polynomials in sums of degree `summed` at most (of
    any, where that is infinite: whoever asks for it must know why a few are enough).

    With `repeated` sums over rows are no reason either: what is left gives the results of the whole for inputs in which
    its own come again and again (`Alike.all_inputs`).

    With `picked` what is left computes steps of the results, and of all else what these
    read: all steps of a value, of which some are picked for what reads only those. So queries are few where keys
    are not. Steps need not be alike then, and others may be anything.

    Of results that are cut, and of sums over `repeated` steps, at least so many `rows` are left.
    """
    found = Alike(graph, (), {n: n for n in topological(graph.outputs)})
    wanted = _Kept(summed, rows, picked, repeated)
    while (fewer := _fewer(found.graph, large, wanted)) is not None:
        values = {n: fewer.values[v] for n, v in found.values.items() if v in fewer.values}
        found = Alike(fewer.graph, found.few + fewer.few, values)
    return found


@final
@dataclass(frozen=True, slots=True)
class _Kept:
    """What is to be left; see `alike`."""

    summed: float
    rows: int
    picked: bool
    repeated: bool


def _fewer(graph: Graph, large: int, wanted: _Kept) -> Alike | None:
    """Cut the axis that leaves least, if that is worth it."""
    summed = wanted.summed
    order = list(topological(graph.outputs))
    dear = [n for n in order if _cost(n, summed) > large]
    if not dear or any(is_draw(n) for n in order):
        return None
    lengths = sorted({d for n in order if _has_shape(n) for d in n.shape if d > 1}, reverse=True)
    # a test of whether results are equal needs no whole rows of them
    seen = set[tuple[int, tuple[Cut | None, ...]]]()
    cuttings = []
    for length, rows, inner in product(lengths, (True, False)[: 2 if summed else 1], (False, True)):
        cuts = tuple(cut_of(o, length, rows=rows, inner=inner) for o in graph.outputs)
        if any(cuts) and (length, cuts) not in seen:
            seen.add((length, cuts))
            cuttings.append(_Cutting(order, list(graph.outputs), length, large, rows, inner=inner))
    if summed:
        # steps of what is dear may be told by a cheap value alone, as blocks of rows by their sums
        within = {d for n in dear for d in n.shape}
        divisors = [n for n in lengths if any(d % n == 0 for d in within)]
        sums = [(n, False) for n in order if n.op in _SUMS]
        cuttings += _summing(order, graph.outputs, large, divisors, sums)
    elif wanted.repeated:
        for length in lengths:
            sums = [(n, False) for n in order if _sums_rows(n, length)]
            cuttings += _summing(order, graph.outputs, large, [length], sums)
    parts = [p for p in (c.part(graph, wanted) for c in cuttings) if p is not None]
    least = min(((work(tuple(p.graph.nodes())), i) for i, p in enumerate(parts)), default=None)
    share = _WORTH_OF_SUMS if summed or wanted.picked else _WORTH
    return None if least is None or least[0] > share * work(order) else parts[least[1]]


def _cost(node: Node, summed: float) -> int:
    """Return how much there is of a value; terms of products are part of it where a test does not need all."""
    return work([node]) if summed else _size(node)


def _summing(
    order: list[Node],
    outputs: Sequence[Node],
    large: int,
    lengths: Iterable[int],
    sums: "Sequence[_Seed]",
) -> "list[_Cutting]":
    """Return cuts of what `sums` add up over steps: of all sums, and results, of steps of the same inputs."""
    found = []
    for length in lengths:
        groups: list[tuple[set[tuple[Node, Cut]], set[_Seed]]] = []
        for seed in (*((o, True) for o in outputs), *sums):
            leaves, seeds = _leaves(order, seed, length), {seed}
            for group in [g for g in groups if g[0] & leaves]:
                groups.remove(group)
                leaves, seeds = leaves | group[0], seeds | group[1]
            if leaves:
                groups.append((leaves, seeds))
        found += [
            _Cutting(order, list(outputs), length, large, rows=True, seeds=seeds)
            for _, seeds in groups
            if not all(is_result for _, is_result in seeds)
        ]
    return found


def _leaves(order: Sequence[Node], seed: "_Seed", length: int) -> set[tuple[Node, Cut]]:
    """Return the inputs of which a result, or what a sum adds up, reads steps."""
    node, is_result = seed
    wanted = [natural(node, row_axes(node), length)] if is_result else _summed(node, length)
    nodes = (node,) if is_result else node.inputs
    cuts = dict(zip(nodes, wanted or [None] * len(nodes), strict=True))
    found = set()
    for node in reversed(order):
        cut = cuts.get(node)
        if cut is None:
            continue
        if node.op is leaf.INPUT:
            found.add((node, cut))
        for operand, want in zip(node.inputs, operand_cuts(node, cut, length) or (), strict=False):
            cuts.setdefault(operand, want)
    return found


def work(nodes: Sequence[Node], terms_of_one: int = _TERMS) -> int:
    """Return how many elements are computed, terms of products counted as a part of one."""
    terms = {n: n.inputs[0].shape[-1] // terms_of_one for n in nodes if n.op is contraction.MATMUL}
    return sum(_size(n) * (1 + terms.get(n, 0)) for n in nodes)


def seconds(elements: int) -> float:
    """Return about how long a test computes so many elements, at least."""
    return ELEMENT_S / torch.get_num_threads() * elements


def _roots(outputs: Iterable[Node]) -> list[Node]:
    """Return the last values that can be cut: a single number (a loss) comes of all slices."""
    stack, found, peeled = list(outputs)[::-1], dict[Node, None](), set[Node]()
    while stack:
        node = stack.pop()
        if node in peeled:
            continue
        single = node.op.kind is not OpKind.LEAF and not (_has_shape(node) and prod(node.shape) > 1)
        if single:
            peeled.add(node)
            stack += node.inputs[::-1]
        elif not _is_constant(node):
            found[node] = None
    return list(found)


def _has_shape(node: Node) -> bool:
    return hasattr(node.type, "shape")


def _size(node: Node) -> int:
    """Return the elements of a value that is computed; views and leaves are none."""
    free = node.op.kind is OpKind.LEAF or node.op in structural.VIEWS or not _has_shape(node)
    return 0 if free else prod(node.shape)


def _is_constant(node: Node) -> bool:
    """Say whether this is one number that every slice has for itself; operators look for those."""
    while node.op in (structural.RESHAPE, structural.BROADCAST, elementwise.CAST):
        node = node.inputs[0]
    return node.op is leaf.CONSTANT


@final
@dataclass(slots=True)
class _Cutting:
    """The cuts of all values for one number of steps.

    With `rows` no row of a result is cut: errors are measured by all of a row. With `seeds` only these results are
    cut, and what these sums add up; those of which not all is made step by step are left out. `inner`: see `cut_of`.
    """

    order: list[Node]
    roots: list[Node]
    length: int
    large: int
    rows: bool = False
    seeds: set[_Seed] | None = None
    inner: bool = False
    cuts: dict[Node, Cut | None] = field(default_factory=dict)
    wanted: dict[Node, Wanted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._cut()
        while self.seeds and (doubtful := self._doubtful()):
            self.seeds -= doubtful
            self._cut()

    def _cut(self) -> None:
        self.cuts, self.wanted = {}, {}
        seeds = {(r, True) for r in self.roots} if self.seeds is None else self.seeds
        for root in self.roots:
            cut = cut_of(root, self.length, rows=self.rows, inner=self.inner)
            self._want(root, cut if (root, True) in seeds else None)
        for node in reversed(self.order):
            cut = self.cuts[node]
            if cut is not None:
                wanted = operand_cuts(node, cut, self.length)
            else:
                wanted = _summed(node, self.length) if (node, False) in seeds else None
            if wanted is None:
                self.cuts[node] = None
                wanted = [None] * len(node.inputs)
            self.wanted[node] = wanted
            for operand, want in zip(node.inputs, wanted, strict=True):
                self._want(operand, want)

    def _doubtful(self) -> set[_Seed]:
        """Return the seeds of which not all is made step by step."""
        tainted, found = set[Node](), set[_Seed]()
        for node in self.order:
            cut, pairs = self.cuts[node], zip(node.inputs, self.wanted[node], strict=True)
            if self._apart(node) or any(i in tainted for i, want in pairs if want is not None):
                found |= {(node, False)} if cut is None else {(node, True)}
                tainted |= set() if cut is None else {node}
        return found & (self.seeds or set())

    def _want(self, node: Node, cut: Cut | None) -> None:
        if self.cuts.setdefault(node, cut) != cut:
            self.cuts[node] = None

    def _count(self) -> int:
        """Return the number of slices."""
        largest = max((_size(n) for n in self.order if self.cuts[n]), default=0)
        return max(1, min(self.length, _MOST, -(-largest // self.large)))

    def peak(self) -> int:
        """Return the elements of the largest value that is computed at once."""
        count = self._count()
        sizes = (-(-_size(n) // count) if self.cuts[n] else _size(n) for n in self.order)
        return max(self.large, *sizes)

    def _degree(self) -> float:
        """Return the degree of the results in sums over steps; infinite where they are no quotients."""
        found: dict[Node, _Quotient] = {}
        for node in self.order:
            over = self.cuts[node] is None and any(self.wanted[node])
            found[node] = _in_sums(node, [found[i] for i in node.inputs], over)
        tops, bottoms = zip(*(found[r] for r in self.roots), strict=True)
        return float(max(tops) + max(bottoms))

    def part(self, graph: Graph, wanted: _Kept) -> Alike | None:
        """Return the program of a few steps; None where not all are computed alike, and none may be picked."""
        summed = inf if wanted.repeated else wanted.summed
        largest = max((_cost(n, summed) for n in self.order if self.cuts[n]), default=0)
        degree = 0.0 if self.seeds is None else self._degree()
        if degree > summed:
            return None
        # one step that stands for others, and as many as tell the functions of all from others
        least = 1 if not self.seeds else 2 if summed == inf else int(2 * degree) + 4
        apart = any(self._apart(n) for n in self.order)
        if apart and not wanted.picked:
            return None
        rows = [prod(r.shape[:-1]) for r in self.roots if self.cuts[r]]
        if self.seeds or not rows:
            rows.append(self.length)
        least = max(least, 1 + apart, -(-wanted.rows * self.length // max(1, min(rows))))
        steps = max(least, self.large * self.length // max(1, largest))
        if wanted.repeated:
            while steps < self.length and self.length % steps:
                steps += 1  # each stands for as many
        if not largest or steps >= self.length:
            return None
        new: dict[Node, Node] = {}
        for node in self.order:
            cut, wants = self.cuts[node], self.wanted[node]
            if cut is None:
                new[node] = node
                if any(new[i] is not i for i in node.inputs):
                    operands = [new[i] for i in node.inputs]
                    if wants[0] is not None and wanted.repeated:
                        operands[0] = b.mul(operands[0], self.length // steps)
                    elif wants[0] is not None:
                        rest = self.length - steps + 1
                        operands[0] = _standing(operands[0], wants[0], steps, rest)
                    new[node] = make(node.op, tuple(operands), node.attrs)
                continue
            shape = cut.shape(node.shape, steps)
            attrs = node.attrs
            if node.op is leaf.INPUT:
                new[node] = input_(attrs.name, shape, node.tensor.dtype)
                continue
            if node.op is leaf.IOTA and self._apart(node):
                new[node] = self._picked(node, cut, steps)
                continue
            if node.op in (leaf.IOTA, structural.RESHAPE, structural.BROADCAST):
                attrs = replace(attrs, shape=shape)
            operands = [
                new[i] if want == self.cuts[i] else self._picked(new[i], want, steps)
                for i, want in zip(node.inputs, wants, strict=True)
            ]
            new[node] = make(node.op, tuple(operands), attrs)
        inputs = tuple(new.get(i, i) for i in graph.inputs)
        fewer = Graph(Level.KERNEL, graph.name, inputs, tuple(new[o] for o in graph.outputs))
        ins, outs = ([self.cuts.get(n) for n in nodes] for nodes in (graph.inputs, graph.outputs))
        few = _Few(steps, self.length, ins, outs, apart)
        return Alike(fewer, (few,), new)

    def _apart(self, node: Node) -> bool:
        """Say whether something of all steps is read where one is computed, or steps are counted."""
        cut = self.cuts[node]
        counts = node.op is leaf.IOTA and cut is not None and node.attrs.axis == cut.axis
        pairs = zip(node.inputs, self.wanted[node], strict=True)
        return counts or any(want != self.cuts[i] for i, want in pairs)

    def _picked(self, whole: Node, cut: Cut | None, steps: int) -> Node:
        """Return steps of a value that is computed as a whole."""
        assert cut is not None, "what is read as a whole is computed as a whole"
        a, c, d = _distances(steps, self.length)
        number = b.iota((steps,), -1)
        part = make(elementwise.FLOORDIV, (b.mul(number, d), b.constant(steps - 1, DType.I64)))
        places = b.add(b.mul(number, a), b.mul(part, c))
        before, after = whole.shape[: cut.axis], whole.shape[whole.tensor.rank + cut.axis + 1 :]
        split = b.reshape(whole, (*before, cut.outer, self.length, cut.unit, *after))
        return b.reshape(b.take(split, places, len(before) + 1), cut.shape(whole.shape, steps))

    def slices(self, graph: Graph) -> Slices:
        """Return the three parts of the program."""
        steps = -(-self.length // self._count())
        starts = tuple((s, min(steps, self.length - s)) for s in range(0, self.length, steps))
        cut = [r for r in self.roots if self.cuts[r] is not None]
        bodies = {n: self._body(cut, n) for n in {count for _, count in starts}}
        passed = [r for r in self.roots if self.cuts[r] is None]
        given = [node for body in bodies.values() for node, _ in body.given]
        needed = tuple(dict.fromkeys((*given, *passed)))
        return Slices(
            graph.with_outputs(needed),
            bodies,
            starts,
            tuple(c for c in (self.cuts[r] for r in cut) if c is not None),
            tuple(passed),
            _tail(graph, [*cut, *passed]),
        )

    def _body(self, roots: Sequence[Node], steps: int) -> _Body:
        new: dict[Node, Node] = {}
        given: dict[tuple[Node, Cut | None], Node] = {}

        def operand(node: Node, cut: Cut | None) -> Node:
            if cut is not None and cut == self.cuts[node] and node in new:
                return new[node]
            if _is_constant(node) and prod(node.shape) == 1:
                return node
            if (node, cut) not in given:
                shape = node.shape if cut is None else cut.shape(node.shape, steps)
                given[node, cut] = input_(f"given{len(given)}", shape, node.tensor.dtype)
            return given[node, cut]

        for node in self.order:
            cut = self.cuts[node]
            if cut is None or node.op.kind is OpKind.LEAF:
                continue
            pairs = zip(node.inputs, self.wanted[node], strict=True)
            attrs = node.attrs
            if node.op in (structural.RESHAPE, structural.BROADCAST):
                attrs = replace(attrs, shape=cut.shape(node.shape, steps))
            new[node] = make(node.op, tuple(operand(i, w) for i, w in pairs), attrs)
        outputs = tuple(operand(r, self.cuts[r]) for r in roots)
        return _Body(Graph(Level.KERNEL, "slice", tuple(given.values()), outputs), tuple(given))


def _tail(graph: Graph, roots: Sequence[Node]) -> Graph:
    new = {r: input_(f"root{k}", r.shape, r.tensor.dtype) for k, r in enumerate(roots)}
    inputs = tuple(new.values())
    for node in topological(graph.outputs, stop=new):
        if node not in new:
            new[node] = rebuild(node, tuple(new[i] for i in node.inputs))
    return Graph(Level.KERNEL, "tail", inputs, tuple(new[o] for o in graph.outputs))


# -- sums over steps ---------------------------------------------------------------------------

_SUMS: Final = (contraction.MATMUL, contraction.REDUCE_SUM)
_Quotient = tuple[float, float]
"""The degrees of numerator and denominator as polynomials in sums over steps."""
_ANY: Final = (inf, inf)


def _summed(node: Node, length: int) -> Wanted | None:
    """Return the cuts of the operands of which a sum adds up steps, if it does."""
    x = node.inputs[0] if node.op in _SUMS else None
    if x is None or x.tensor.dtype is DType.BOOL:
        return None
    axes = (-1,) if node.op is contraction.MATMUL else node.attrs.axes
    cut = natural(x, axes, length)
    if cut is None:
        return None
    return [cut] if node.op is contraction.REDUCE_SUM else [cut, Cut(-2, cut.unit)]


def _sums_rows(node: Node, length: int) -> bool:
    """Say whether a sum adds up rows in steps: what lies in one is summed as it is."""
    if node.op is not contraction.REDUCE_SUM or not (cuts := _summed(node, length)):
        return False
    return all(cut is not None and cut.axis in row_axes(node.inputs[0]) for cut in cuts)


def _standing(x: Node, cut: Cut, steps: int, count: int) -> Node:
    """Return what is summed, the last step `count` times as much."""
    last = b.eq(b.iota((cut.outer, steps, cut.unit), -2), steps - 1)
    place = (cut.outer * steps * cut.unit, *(1 for _ in range(-1 - cut.axis)))
    # not times a tensor of numbers: what is infinite keeps its sign
    return b.where(b.reshape(last, place), b.mul(x, count), x)


def _in_sums(node: Node, args: Sequence[_Quotient], over: bool) -> _Quotient:
    """Return the degrees of a value; `over`: it is itself a sum over steps.

    Anything is a function of its step, if no sum is in it.
    """
    top, bottom = (max(degrees, default=0.0) for degrees in zip(*args, (0.0, 0.0), strict=False))
    if not args or (not top and not bottom and not over):
        return 0.0, 0.0
    numbers = [a for a in args if a != (0.0, 0.0)]
    if node.op in (elementwise.ADD, elementwise.SUB):
        (a, c), (d, e) = args
        return max(a + e, d + c), c + e
    if node.op is elementwise.MUL or node.op in _SUMS:
        # terms of different denominators would have one of all
        plain = node.op is elementwise.MUL or not bottom
        return (sum(a for a, _ in args) + over, sum(c for _, c in args)) if plain else _ANY
    if node.op is elementwise.DIV and real_valued(node):
        (a, c), (d, e) = args
        return a + e, c + d
    if node.op is elementwise.POW and numbers == [args[0]] and (constant_power(node) or 0) > 0:
        times = constant_power(node) or 0
        return top * times, bottom * times
    chosen = node.op is elementwise.WHERE and args[0] == (0.0, 0.0)
    moved = node.op in MOVING and numbers == [args[0]]
    kept = node.op is elementwise.CAST and (
        real_valued(node)
        or (node.tensor.dtype is not DType.BOOL and not real_valued(node.inputs[0]))
    )
    same = node.op in (elementwise.NEG, structural.CONCAT)
    return (top, bottom) if chosen or moved or kept or same else _ANY
