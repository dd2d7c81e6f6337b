"""The driver: from a program to the best proven program that the budget allows.

It proposes algebraic variants, partitions each into kernels, tries schedules and tile sizes of every
kernel on the clock (cheapest prediction first, then a hill climb over tile sizes; the first of all
kernels are compiled together), compares each with its library alternative, and proves the assembled
program equal to the original as a whole. The fastest program that is proven, and accepted by whoever
asked, is the result. Moves that change what a program computes, or cost it accuracy, are left out before
kernels are made; how long that takes to see predicts how long the proof will take, for which search
leaves time.

In: the lifted kernel graph, machine rates, a `Measurer`. Out: a `SearchResult`; it always holds a
program (the original when nothing better was proven).
"""

import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf, log2
from typing import Any, Final, Protocol, final

import torch

from superopt.ir.errors import GraphError, SuperoptError
from superopt.ir.graph import Graph
from superopt.ir.node import Node, rebuild, rewrite, topological
from superopt.ir.ops import structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.search.algebra import (
    FUSION_RULES,
    REDUCE_IN_PARTS,
    apply_accepted,
    apply_rules,
    with_gathers,
)
from superopt.search.emit import block_graph, place
from superopt.search.errors import NotFusible
from superopt.search.indices import Atom
from superopt.search.partition import Group, is_compute, partition
from superopt.search.reassociate import reassociated
from superopt.search.region import Region, extract, make_region, substitute
from superopt.search.schedule import Schedule, derive
from superopt.search.sparse import without_known_factors
from superopt.search.tiling import best_tiles, choices
from superopt.search.transposes import laid_out, untransposed
from superopt.verify.equivalence import (
    Verdict,
    least_s,
    nests_exponentials,
    provable,
    verify_field,
)
from superopt.verify.floating import FloatTest, sampled
from superopt.verify.inputs import DISTRIBUTIONS, HARDEST
from superopt.verify.reference import TorchDomain
from superopt.verify.slices import evaluate, slices
from superopt.verify.threads import now, suitable, worked_s

_CLEAR: Final = 0.7
"""A kernel this much faster than its products alone are in a library needs no comparison."""
_MINOR: Final = 0.02
"""The share of a program's predicted time below which a kernel is not tuned."""
_BATCH: Final = 6
"""How many kernels are compiled and timed at once."""
_LEAST: Final = 3
"""How many are tried where time is short."""
_LIKELY: Final = 2.5
"""By how much dearer than the cheapest a prediction may be to be tried."""
_SAME_SCHEDULE: Final = 1.03
"""How much dearer a candidate seems for every one of its schedule that is tried already."""
_NEXT_TILES: Final = 1.06
"""And for every one of these whose tile sizes differ in one step only."""
_KERNEL_S: Final = 0.5
"""What one of them is thought to take, before any was: a second of a core, of two."""
_LONG_S: Final = 0.02
"""A kernel that takes so long, as predicted, is not compared with a library when time is over: the whole is."""
_FIRST_LOOK: Final = 2.0**-20
"""The error bound of a variant's test: one draw as a rule."""
_PROOF: Final = 3.0
"""How many times as long as that the proof of a program may take: three draws."""
_PROOF_IN_PIECES: Final = 1.5
"""The same where it is proven in pieces: the whole is drawn once in either, and pieces are small."""
_LOOKED_AT_S: Final = 1.0
"""How long a proof may take, as far as variants tell, for nobody to ask how long that of a program would."""
LAST_S: Final = 2.0
"""For what comes after the proof: the program is compared with the original."""
_LAST_SHARE: Final = 0.6
"""The largest share of the budget that is kept for all this."""
_OVERRUN_S: Final = 5.0
_OVERRUN: Final = 0.5
"""By how much, in seconds or in budgets, a proof may be thought to end too late: the machine may be busy, and
what was found would be lost. Shorter proofs are made however late it is."""


class Measurer(Protocol):
    """Compiles and times; the pipeline implements it with a backend."""

    @property
    def device(self) -> torch.device:
        """Where it runs programs; they are tested there too."""
        ...

    def prepare(self, graphs: Sequence[Graph]) -> None:
        """Compile block graphs that `kernels` will be asked about."""
        ...

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        """Return seconds per block graph; inf for one that does not compile, run or agree."""
        ...

    def programs(self, graphs: Sequence[Graph]) -> list[float]:
        """Return seconds per kernel graph, timed against each other in turn."""
        ...

    def run(self, graph: Graph, tensors: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Return the results of a kernel graph whose kernels were measured before."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Event:
    """One step of the search, for progress and logs."""

    kind: str
    message: str
    data: dict[str, Any] = field(default_factory=dict)


@final
@dataclass(slots=True)
class Statistics:
    """What the search did; `hurried` variants and parts were reached when the budget was over."""

    proposed: int = 0
    measured: int = 0
    rejected: int = 0
    proven: int = 0
    hurried: int = 0
    seconds: float = 0.0
    stopped: str = "done"


@final
@dataclass(slots=True)
class SearchResult:
    """The best proven program, its verdict (None: it is the original), and how it was found.

    `original_s` is infinite where there was no other program to time beside it, or no time; so is `best_s` then.
    """

    graph: Graph
    verdict: Verdict | None
    original_s: float
    best_s: float
    statistics: Statistics
    notes: list[str]


@final
@dataclass(frozen=True, slots=True)
class _Choice:
    """A kernel that was measured for a region."""

    schedule: Schedule
    tiles: dict[Atom, int]
    graph: Graph
    seconds: float


_Candidate = tuple[float, Schedule, dict[Atom, int]]
"""A kernel that may be tried: predicted seconds, schedule, tile sizes."""


@final
@dataclass(frozen=True, slots=True)
class _Ranking:
    """What may be tried for a region, the cheapest prediction first, and what was; its kernels' name."""

    name: str
    candidates: list[_Candidate]
    tried: set[Any] = field(default_factory=set)

    def likely(self) -> list[_Candidate]:
        """Return those that are not predicted to be far slower than the first."""
        return [e for e in self.candidates if e[0] <= _LIKELY * self.candidates[0][0]]

    def elsewhere(self, count: int) -> list[_Candidate]:
        """Return some that were not tried, apart from one another and from those that were."""
        tried = [e for e in self.likely() if _key(*e[1:]) in self.tried]
        return _diverse([e for e in self.likely() if e not in tried], count, tried)


@final
@dataclass(frozen=True, slots=True)
class _Assembled:
    """A program, and the kernels that were put into a variant to make it."""

    program: Graph
    variant: Graph
    kernels: tuple[tuple[Region, _Choice], ...]


@final
@dataclass(slots=True)
class Driver:
    """Search state; `run` is anytime and stops at the budget."""

    original: Graph
    machine: Target
    measurer: Measurer
    budget_s: float
    seed: int
    floats: FloatTest
    on_event: Callable[[Event], None] = lambda event: None
    accept: Callable[[Graph], str] = lambda graph: ""
    statistics: Statistics = field(default_factory=Statistics)
    started: float = field(default_factory=lambda: time.monotonic())
    proof_s: float = 0.0
    least_s: float = 0.0
    beyond_glance_s: float = 0.0
    looked: bool = False
    kernel_s: float = _KERNEL_S
    original_s: float = inf
    timed: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rankings: dict[Region, _Ranking] = field(default_factory=dict)
    refused: dict[Group, None] = field(default_factory=dict)

    def _left(self) -> float:
        """Return the seconds left for search, without those that the proof and all after it will take."""
        ending_s = self.proof_s + self.floats.predicted_s() + LAST_S
        ending_s = min(ending_s, _LAST_SHARE * self.budget_s)
        return self.budget_s - ending_s - (time.monotonic() - self.started)

    def _over(self) -> bool:
        """Say whether there is no time for another try."""
        over = self._left() <= 0
        self.statistics.hurried += over
        return over

    def _too_late(self, proof_s: float = 0.0) -> bool:
        """Say whether a proof that begins now is long and would end long after the budget."""
        ending_s = max(proof_s, self.proof_s) + self.floats.predicted_s()
        late_s = time.monotonic() - self.started + ending_s - self.budget_s
        if min(ending_s, late_s) <= max(_OVERRUN_S, _OVERRUN * self.budget_s):
            return False
        self.statistics.stopped = "budget"
        self.statistics.hurried += 1
        return True

    def _tell(self, kind: str, message: str, **data: Any) -> None:
        self.on_event(Event(kind, message, data))

    def run(self) -> SearchResult:
        """Search until done or out of budget; Ctrl-C ends it with the best so far."""
        best: tuple[Graph, Verdict, float] | None = None
        try:
            best = self._search()
        except KeyboardInterrupt:
            self.statistics.stopped = "interrupted"
        self.statistics.seconds = time.monotonic() - self.started
        graph, verdict, best_s = best or (self.original, None, self.original_s)
        if self.original_s < inf:
            self._tell("result", f"{self.original_s * 1e3:.3f} ms -> {best_s * 1e3:.3f} ms")
        elif best is None:  # there was nothing to compare it with, and no reason to wait for it
            self._tell("result", "the original stays")
        return SearchResult(graph, verdict, self.original_s, best_s, self.statistics, self.notes)

    def _search(self) -> tuple[Graph, Verdict, float] | None:
        found: list[_Assembled] = []
        # not even the first look would end in time
        if self.measurer.device.type == "cpu":
            whole_s, glance_s = (least_s(self.original, glance=g) for g in (False, True))
            self.least_s, self.beyond_glance_s = whole_s, whole_s - glance_s
            self.proof_s = max(self.proof_s, whole_s)
        if self._too_late():
            return None
        variants = self._variants()
        if self._too_late():
            return None
        for number, variant in enumerate(variants):
            if found and self._left() <= 0:
                self.statistics.stopped = "budget"
                self.statistics.hurried += len(variants) - number
                break
            share = self._left() / (len(variants) - number) * 0.85
            assembled = self._assemble(variant, time.monotonic() + share)
            if assembled is not None:
                found.append(assembled)
        tried = set[Graph]()
        while True:
            fresh = {a.program: a for a in found if a.program not in tried}
            best = self._first_proven(list(fresh))
            tried.update(fresh)
            if best is not None or not fresh or self._left() <= 0:
                return best
            found = self._finer(list(fresh.values()))

    def _finer(self, rejected: Sequence[_Assembled]) -> list[_Assembled]:
        """Make rejected programs again, without the kernels that alone are not proven, or not accurate.

        Where all are, the largest of a program is left out: it was together that they failed.
        """
        found = []
        for assembled in rejected:
            at_fault = [k for k in assembled.kernels if not self._provable_alone(*k)]
            if not at_fault:
                at_fault = [k for k in assembled.kernels if not self._accurate_alone(*k)]
            groups = [_group(region) for region, _ in at_fault or assembled.kernels]
            groups = groups if at_fault else [max(groups, key=len)]
            self.refused.update(dict.fromkeys(groups))
            if self._left() <= 0:
                break
            finer = self._assemble(assembled.variant, time.monotonic() + self._left())
            if finer is not None:
                found.append(finer)
        return found

    def _provable_alone(self, region: Region, choice: _Choice) -> bool:
        return self._equal(extract(region, "part"), _alone(region, choice), glance=False)

    def _accurate_alone(self, region: Region, choice: _Choice) -> bool:
        alone = _alone(region, choice)
        test = FloatTest(extract(region, "part"), seed=self.seed, device=self.measurer.device)
        try:
            return self._left() <= 0 or bool(test.check(lambda t: self.measurer.run(alone, t)))
        except SuperoptError:  # what does not run here alone is not known to err
            return True

    def _first_proven(self, programs: Sequence[Graph]) -> tuple[Graph, Verdict, float] | None:
        """Return the fastest program that is proven and accepted, with its verdict and seconds."""
        if len(programs) == 1 and self._left() <= 0:
            times = [0.0]  # nothing to choose from: it is compared with the original at the end
        else:
            self.original_s, *times = self.measurer.programs([self.original, *programs])
        for seconds, program in sorted(zip(times, programs, strict=True), key=lambda pair: pair[0]):
            if seconds == inf:
                self._reject("it does not run")
                continue
            if self._too_late(self._foreseen_s(program)):
                continue
            try:
                verdict = verify_field(
                    self.original, program, seed=self.seed, device=self.measurer.device
                )
                refusal = self.accept(program) if verdict.equivalent else str(verdict)
            except SuperoptError as error:  # a candidate without a meaning is a wrong candidate
                self._reject(str(error))
                continue
            if not refusal:
                self.statistics.proven += 1
                self._tell("proven", "the program is proven equal to the original")
                return program, verdict, seconds or inf
            self._reject(refusal)
        return None

    def _foreseen_s(self, program: Graph) -> float:
        """Return how long the proof of a program may take: its tiles may keep axes whole that variants are cut along."""
        if self.proof_s <= _LOOKED_AT_S or self.measurer.device.type != "cpu":
            return 0.0
        return _PROOF_IN_PIECES * least_s(self.original, program)

    def _reject(self, why: str) -> None:
        self.statistics.rejected += 1
        self._tell("rejected", f"a program was rejected: {why}")

    def _variants(self) -> list[Graph]:
        """Algebraic variants, most promising first; duplicates dropped."""
        expanded = (expand(self.original), _expand_simple(self.original))
        plain = {g.digest(): g for g in map(self._cheaper, dict.fromkeys(expanded))}
        moved: list[Graph] = []
        for graph in plain.values():
            if moved and self._left() <= 0:
                self.statistics.hurried += 1
                break
            moved.append(self._moved(graph))
        # in parts they occupy all cores; whole they stay in a loop with what else is read there
        moved += [apply_rules(g, (REDUCE_IN_PARTS,)) for g in moved]
        return list({g.digest(): g for g in moved}.values())

    def _cheaper(self, plain: Graph) -> Graph:
        """Return a graph with products in the order and layout of least work, where that costs no accuracy.

        Every kernel is made of it, and no other variant is left where it fails at the end: so it is asked on
        every distribution. What is centered by sums is 0 where the product would leave rounding errors.
        """
        cheaper = reassociated(untransposed(without_known_factors(plain)))
        return cheaper if cheaper == plain or self._accurate(cheaper, DISTRIBUTIONS) else plain

    def _moved(self, plain: Graph) -> Graph:
        """Apply the algebraic moves, all of them or those that are right and cost no accuracy.

        A scale that leaves two products in turn may leave a square of large numbers behind: equal,
        and beyond the range of floats.
        """
        rules = with_gathers(FUSION_RULES) if self.machine.kind == "cpu" else FUSION_RULES
        moved = apply_rules(plain, rules)
        equal = self._equal(self.original, moved)
        if self._too_late():
            return plain
        if equal and self._accurate(moved):
            return moved
        if equal:
            return apply_accepted(plain, rules, lambda g: not self._over() and self._accurate(g))
        if not self._equal(self.original, plain):
            return plain  # it cannot be told what rules do
        return apply_accepted(
            plain,
            rules,
            lambda g: not self._over() and self._equal(self.original, g) and self._accurate(g),
        )

    def _equal(self, original: Graph, variant: Graph, *, glance: bool = True) -> bool:
        """Say whether a variant passes a first look, which is timed to predict the proof.

        No more than a glance as a rule: what comes of it is proven.
        """
        begun = now()
        try:
            verdict = verify_field(
                original,
                variant,
                seed=self.seed,
                error_bound=_FIRST_LOOK,
                device=self.measurer.device,
                glance=glance,
            )
        except SuperoptError as error:
            self._reject(str(error))
            return False
        times = _PROOF_IN_PIECES if verdict.pieces else _PROOF
        foreseen_s = times * (worked_s(begun) + self.beyond_glance_s)
        # the first one of a process waits for memory; one that ends early tells nothing
        if verdict.equivalent and self.looked:
            foreseen_s = min(foreseen_s, self.proof_s)
            self.proof_s = self.least_s
        self.looked |= verdict.equivalent
        self.proof_s = max(self.proof_s, foreseen_s)
        if not verdict.equivalent:
            self._reject(str(verdict))
        return verdict.equivalent

    def _accurate(self, variant: Graph, distributions: Sequence[str] = HARDEST) -> bool:
        device = self.measurer.device
        domain = TorchDomain(device=device)
        both = (*expand(self.original).outputs, *expand(variant).outputs)
        left = sampled(self.original.with_outputs(both), repeated=True)
        half = len(both) // 2
        if left.few:
            # no kernel is at fault here: what is alike errs alike
            variant = left.graph.with_outputs(left.graph.outputs[half:])
        sliced = slices(variant, device)

        def evaluated(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            with suitable():
                return evaluate(variant, sliced, tensors, domain)

        floats = self.floats
        if left.few:
            few = left.first(half)
            # what the original gives is computed once for all variants and the last test
            if floats.near_few(few, evaluated, distributions):
                return True
            floats = FloatTest(few.graph, seed=self.seed, device=device)
        verdict = floats.check(evaluated, distributions)
        self.floats.begin()
        if not verdict.accurate:
            self._tell("inaccurate", f"a variant would be inaccurate: {verdict.reason}")
        return verdict.accurate

    def _assemble(self, variant: Graph, deadline: float) -> _Assembled | None:
        """Choose a kernel or the library for every part of a variant."""
        variant = self._laid_out(variant)
        costs = self._costs(variant, None)
        self._tell("partition", f"{len(costs)} kernels to generate", kernels=len(costs))
        kernels = tuple(self._kernels(variant, costs, deadline))
        self.notes += [f"{c.graph.name}: {c.schedule.describe()}" for _, c in kernels]
        return _Assembled(_replaced(variant, kernels), variant, kernels) if kernels else None

    def _laid_out(self, variant: Graph) -> Graph:
        """Return the variant, with copies where these are predicted to pay."""
        graphs = dict.fromkeys((variant, laid_out(variant)))
        if len(graphs) == 1:
            return variant
        totals = {g: partition(g, self.machine, refused=self.refused).values() for g in graphs}
        return min(graphs, key=lambda g: sum(totals[g]))

    def _costs(self, graph: Graph, products: int | None) -> dict[Group, float]:
        """Return the groups that may gain from a kernel, at most so many products in each."""
        found = partition(graph, self.machine, products=products, refused=self.refused)
        return {
            group: cost
            for group, cost in found.items()
            if _worth(group, self.machine) and group not in self.refused
        }

    def _kernels(
        self, graph: Graph, costs: Mapping[Group, float], deadline: float
    ) -> list[tuple[Region, _Choice]]:
        """Return kernels for groups; time is shared by predicted cost.

        However late it is every group gets a kernel, if only the first that comes to mind: op by op it
        would be slower than the original.
        """
        regions = _regions(graph, costs)
        self._prepare(regions)
        found: list[tuple[Region, _Choice]] = []
        total = missing = sum(costs.values())
        for region, cost in zip(regions, costs.values(), strict=True):
            left = deadline - time.monotonic()
            if left <= 0:
                self.statistics.stopped = "budget"
                self.statistics.hurried += self._left() <= 0
            until = time.monotonic() + left * cost / max(missing, cost)
            missing -= cost
            minor = left <= 0 or cost < _MINOR * total
            found += self._kernels_of(graph, region, until, minor)
        return found

    def _kernels_of(
        self, variant: Graph, region: Region, until: float, minor: bool
    ) -> list[tuple[Region, _Choice]]:
        """Return the kernels for a region: one, or those of its parts, some of them library calls."""
        products = [n for n in region.body if n.op.kind is OpKind.CONTRACTION]
        # the parts need the rest of the time where one kernel is not the best
        now = time.monotonic()
        share = 1.0 if not products else 0.5 if len(products) == 1 else 0.3
        subgraph = extract(region, "part")
        # a kernel that nobody can prove costs the whole program
        whole = None
        if provable(subgraph):
            whole = self.tune(region, now + share * (until - now), minor)
        # sums that a kernel rescales by exponentials may have no proof where their results are exponents again
        if whole and nests_exponentials(subgraph) and not self._provable_alone(region, whole):
            whole = None
        if not products:
            return [] if whole is None else [(region, whole)]
        if whole is not None and time.monotonic() >= until and self._believed(region, whole):
            return [(region, whole)]
        if whole is not None and self._clear(region, whole, variant, products):
            return [(region, whole if minor else self._climbed(region, whole, until))]
        # without a kernel for all of it products have one each, however late it is: a library may be slow
        now = time.monotonic()
        half = until if whole is None else now + (until - now) / 2
        if len(products) > 1 and (whole is None or now < until):
            parts = self._kernels(subgraph, self._costs(subgraph, (len(products) + 1) // 2), half)
        else:
            parts = self._around(subgraph, half, minor)
        if whole is None:
            return _moved(variant, region, parts)
        fused = _alone(region, whole)
        custom_s, parts_s = self.measurer.programs([fused, _replaced(subgraph, parts)])
        self._tell(
            "compared", f"one kernel {custom_s * 1e3:.3f} ms, its parts {parts_s * 1e3:.3f} ms"
        )
        if custom_s <= parts_s:
            return [(region, whole if minor else self._climbed(region, whole, until))]
        return _moved(variant, region, parts)

    def _believed(self, region: Region, whole: _Choice) -> bool:
        """Say whether a kernel takes long, and what was predicted: no time is lost by comparing it with a library."""
        predicted = self._ranking(region).candidates[0][0]
        return _LONG_S <= whole.seconds <= _LIKELY * predicted

    def _around(self, graph: Graph, until: float, minor: bool) -> list[tuple[Region, _Choice]]:
        """Return kernels for what is around products, which stay in the library; all, however late it is."""
        parts: list[tuple[Region, _Choice]] = []
        groups = self._costs(graph, 0)
        around = [g for g in groups if all(n.op.kind is not OpKind.CONTRACTION for n in g)]
        regions = _regions(graph, around)
        self._prepare(regions)
        for inner in regions:
            late = self._left() <= 0
            self.statistics.hurried += late
            choice = self.tune(inner, until, minor or late)
            if choice is not None:
                parts.append((inner, choice))
        return parts

    def _clear(
        self, region: Region, whole: _Choice, variant: Graph, products: Sequence[Node]
    ) -> bool:
        """Say whether a kernel is that much faster than its products alone are in the library."""
        library = extract(make_region(variant, products), "products")
        custom_s, library_s = self.measurer.programs([_alone(region, whole), library])
        return custom_s < _CLEAR * library_s

    # -- tuning one kernel ---------------------------------------------------------------------

    def _ranking(self, region: Region) -> _Ranking:
        """Rank what may be tried for a region, once."""
        if region not in self.rankings:
            ranked: list[_Candidate] = []
            for schedule in derive(region):
                ranked += [(c, schedule, t) for c, t in best_tiles(schedule, self.machine, 12)]
            ranked.sort(key=lambda entry: entry[0])
            different: dict[tuple[Any, ...], _Candidate] = {}
            for entry in ranked:
                different.setdefault(_effective(*entry[1:]), entry)
            name = f"{self.original.name}_{len(self.rankings) + 1}"
            self.rankings[region] = _Ranking(name, list(different.values()))
        return self.rankings[region]

    def _prepare(self, regions: Sequence[Region]) -> None:
        """Compile the first candidate of each region, together: one by one a core would wait."""
        found: dict[str, Graph] = {}
        for ranking in map(self._ranking, regions):
            for _, schedule, tiles in ranking.candidates[:1]:
                with suppress(NotFusible, GraphError):
                    graph = block_graph(schedule, tiles, ranking.name)
                    found.setdefault(graph.digest(), graph)
        fresh = [graph for digest, graph in found.items() if digest not in self.timed]
        if len(fresh) > 1:
            self.measurer.prepare(fresh)

    def tune(self, region: Region, until: float, minor: bool) -> _Choice | None:
        """Return the fastest kernel found for a region before `until`; the first for a minor one."""
        ranking = self._ranking(region)
        ranked, name = ranking.candidates, ranking.name
        if not ranked:
            return None
        batch = _diverse(ranking.likely(), max(_LEAST, self._affordable(until)))
        if minor:
            found = (self._measure(name, [(s, t)], None) for _, s, t in batch)
            return next((choice for choice in found if choice is not None), None)
        best = self._measure(name, [(s, t) for _, s, t in batch], None)
        ranking.tried.update(_key(s, t) for _, s, t in batch)
        return None if best is None else self._climbed(region, best, until)

    def _climbed(self, region: Region, best: _Choice, until: float) -> _Choice:
        """Change the tile sizes of a kernel step by step, while that helps and there is time.

        Where it no longer does, what was predicted next best and lies apart is looked at, once for each climb.
        """
        ranking = self._ranking(region)
        random_ = random.Random(self.seed)
        elsewhere = False
        while (count := self._affordable(until)) > 0:
            near = [m for m in _neighbours(best, self.machine) if _key(*m) not in ranking.tried]
            random_.shuffle(near)
            near = near[:count]
            if not near:
                elsewhere = True
            if elsewhere:
                near = [(s, t) for _, s, t in ranking.elsewhere(count)]
            ranking.tried.update(_key(*m) for m in near)
            better = self._measure(ranking.name, near, best) if near else best
            if better is not None and better is not best:
                best, elsewhere = better, False
            elif elsewhere:
                break
            else:
                elsewhere = True
        return best

    def _affordable(self, until: float) -> int:
        """Return how many kernels can be measured at once before `until`."""
        left = until - time.monotonic()
        if left <= 0:
            return 0
        return _BATCH if left >= _BATCH * self.kernel_s else int(left / self.kernel_s)

    def _measure(
        self,
        name: str,
        candidates: Sequence[tuple[Schedule, dict[Atom, int]]],
        best: _Choice | None,
    ) -> _Choice | None:
        graphs: list[tuple[Schedule, dict[Atom, int], Graph]] = []
        for schedule, tiles in candidates:
            self.statistics.proposed += 1
            try:
                graph = block_graph(schedule, tiles, name)
            except (NotFusible, GraphError):
                self.statistics.rejected += 1
                continue
            graphs.append((schedule, tiles, graph))
        fresh = [g for _, _, g in graphs if g.digest() not in self.timed]
        started = time.monotonic()
        # a busy machine is by half slower in one batch than in another: the best so far is timed with each
        beside = [best.graph] if best is not None and fresh else []
        times = self.measurer.kernels([*beside, *fresh])
        slower = times.pop(0) / best.seconds if best is not None and beside else 1.0
        for graph, seconds in zip(fresh, times, strict=True):
            self.timed[graph.digest()] = seconds / slower
            self.statistics.measured += 1
        if fresh:
            self.kernel_s = (time.monotonic() - started) / len(fresh)
        for schedule, tiles, graph in graphs:
            seconds = self.timed[graph.digest()]
            if seconds == inf:
                self.statistics.rejected += 1
            elif best is None or seconds < best.seconds:
                best = _Choice(schedule, tiles, graph, seconds)
        if best is not None:
            self._tell("kernel", f"best so far {best.seconds * 1e3:.3f} ms")
        return best


def search(
    graph: Graph,
    machine: Target,
    measurer: Measurer,
    *,
    budget_s: float = 120.0,
    seed: int = 0,
    on_event: Callable[[Event], None] = lambda event: None,
    accept: Callable[[Graph], str] = lambda graph: "",
    floats: FloatTest | None = None,
) -> SearchResult:
    """Search for a faster program equal to `graph` for at most about `budget_s` seconds.

    `accept` is asked about a program that is proven: it says why not to use it, or nothing. `floats`
    is the original's floating-point test, where the caller has one.
    """
    floats = floats or FloatTest(graph, seed=seed, device=measurer.device)
    return Driver(graph, machine, measurer, budget_s, seed, floats, on_event, accept).run()


def _regions(graph: Graph, groups: Collection[Group]) -> list[Region]:
    """Return the regions of groups that become kernels together."""
    made = frozenset[Node]().union(*groups)
    return [make_region(graph, group, made) for group in groups]


def _group(region: Region) -> Group:
    """Return what a region computes, as `partition` has it."""
    return frozenset(n for n in region.body if is_compute(n))


def _expand_simple(graph: Graph) -> Graph:
    """Expand the composites that hold no contraction or convolution.

    The others are worth trying whole: a library that has a kernel for them fuses products, as search does.
    """

    def step(node: Node, inputs: tuple[Node, ...]) -> Node:
        fresh = rebuild(node, inputs)
        if fresh.op.expand is None:
            return fresh
        defined: Node = fresh.op.expand(fresh.inputs, fresh.attrs)
        given = set(fresh.inputs)
        made = (n for n in topological([defined], stop=given) if n not in given)
        multiplies = fresh.op.flops or any(n.op.kind is OpKind.CONTRACTION for n in made)
        return fresh if multiplies else defined

    return graph.with_outputs(rewrite(graph.outputs, step))


def _worth(group: Group, machine: Target) -> bool:
    """Say whether a group may gain from a kernel of its own; single library ops do not."""
    if len(group) > 1:
        return True
    (node,) = group
    if node.op is structural.GATHER:
        return machine.kind == "cpu"
    return node.op.kind in (OpKind.ELEMENTWISE, OpKind.REDUCTION, OpKind.CONTRACTION)


def _alone(region: Region, choice: _Choice) -> Graph:
    """Return the program that is one kernel, over the inputs of its region."""
    part = extract(region, "part")
    return part.with_outputs(place(choice.schedule, choice.graph, part.inputs))


def _replaced(graph: Graph, parts: Sequence[tuple[Region, _Choice]]) -> Graph:
    replacements: dict[Node, Node] = {}
    for region, choice in parts:
        results = place(choice.schedule, choice.graph, region.inputs)
        replacements.update(zip(region.outputs, results, strict=True))
    return substitute(graph, replacements)


def _moved(
    variant: Graph, region: Region, parts: Sequence[tuple[Region, _Choice]]
) -> list[tuple[Region, _Choice]]:
    """Carry kernels found on an extracted region back to the graph that it came from."""
    back: dict[Node, Node] = {}
    subgraph = extract(region, "part")
    back.update(zip(subgraph.inputs, region.inputs, strict=True))
    copies: dict[Node, Node] = dict(zip(region.inputs, subgraph.inputs, strict=True))
    for node in region.body:
        copies[node] = rebuild(node, tuple(copies[i] for i in node.inputs))
        back[copies[node]] = node
    result = []
    for inner, choice in parts:
        moved = Region(
            tuple(back[n] for n in inner.inputs),
            tuple(back[n] for n in inner.body),
            tuple(back[n] for n in inner.outputs),
        )
        result.append((moved, choice))
    return result


def _key(schedule: Schedule, tiles: dict[Atom, int]) -> tuple[Any, ...]:
    return (schedule.loop, tuple(sorted(tiles.items())))


def _effective(schedule: Schedule, tiles: Mapping[Atom, int]) -> tuple[Any, ...]:
    """Return what a kernel with these tile sizes is: a loop of one step, or a grid of one block, is none."""
    extents = {a: schedule.space.extent(a) for a in schedule.roles}
    sizes = {a: min(tiles.get(a, e), e) for a, e in extents.items()}
    loop = schedule.loop
    loops = None if loop is None or sizes[loop] == extents[loop] else loop
    return loops, tuple(sorted(sizes.items()))


def _diverse(
    ranked: Sequence[_Candidate], count: int, before: Sequence[_Candidate] = ()
) -> list[_Candidate]:
    """Choose the cheapest, one after the other, each the dearer the more it is like those before it.

    Predictions within a schedule are wrong together, and steps next to a choice are left to the climb.
    """
    left, chosen = list(ranked), list[_Candidate]()

    def price(entry: _Candidate) -> float:
        cost, schedule, tiles = entry
        others = [t for _, s, t in (*before, *chosen) if s is schedule]
        near = sum(_steps(tiles, t) <= 1 for t in others)
        return cost * _SAME_SCHEDULE ** len(others) * _NEXT_TILES**near

    while left and len(chosen) < count:
        entry = min(left, key=price)
        left.remove(entry)
        chosen.append(entry)
    return chosen


def _steps(left: Mapping[Atom, int], right: Mapping[Atom, int]) -> float:
    """Return how many doublings two choices of tile sizes are apart."""
    return sum(abs(log2(left[a] / right[a])) for a in left)


def _neighbours(best: _Choice, machine: Target) -> list[tuple[Schedule, dict[Atom, int]]]:
    result = []
    for atom, options in choices(best.schedule, machine).items():
        sizes = sorted({*options, best.tiles[atom]})
        at = sizes.index(best.tiles[atom])
        for other in sizes[max(0, at - 1) : at + 2]:
            if other != best.tiles[atom]:
                result.append((best.schedule, {**best.tiles, atom: other}))
    return result
