"""The driver with a clock that predicts: what it returns is proven, whatever proposed it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from math import inf, prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction, elementwise, library, tile
from superopt.ir.ops.library import ConvAttrs
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.ir.types import DType
from superopt.search import driver
from superopt.search.algebra import FUSION_RULES, Rule, apply_rules
from superopt.search.driver import Driver, Event, search
from superopt.search.emit import block_graph
from superopt.search.partition import is_compute, partition
from superopt.search.region import make_region
from superopt.search.schedule import derive
from superopt.verify import slices, threads
from superopt.verify.equivalence import Piece, Verdict, provable, verify_field
from superopt.verify.floating import FloatTest
from superopt.verify.reference import run_reference
from tests.search.programs import PROGRAMS
from tests.verify.llama import llama


class Predicted:
    """Custom kernels count by their tiles, library programs as slow."""

    device = torch.device("cpu")

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.seen = 0

    def prepare(self, graphs: Sequence[Graph]) -> None:
        pass

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        self.seen += len(graphs)
        return [inf if self.fails else 1e-3 / (1 + len(g.loops)) for g in graphs]

    def programs(self, graphs: Sequence[Graph]) -> list[float]:
        return [1.0 / (1 + sum(n.op is library.CUSTOM for n in g.nodes())) for g in graphs]

    def run(self, graph: Graph, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return run_reference(graph, tensors)


def run(graph: Graph, clock: Predicted, **options: float) -> driver.SearchResult:
    return search(graph, Target(), clock, budget_s=options.get("budget_s", 20.0), seed=0)


def test_a_budget_that_is_over_still_finds_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_OVERRUN_S", inf)
    result = run(PROGRAMS["causal_gqa"], Predicted(), budget_s=1e-3)
    assert result.statistics.stopped == "budget"
    assert result.verdict is not None


def test_what_no_budget_like_this_can_look_at_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slices, "ELEMENT_S", 1.0)  # large values, or a slow machine
    monkeypatch.setattr(Driver, "_variants", lambda self: pytest.fail("it looked at variants"))
    result = run(PROGRAMS["causal_gqa"], Predicted(), budget_s=10.0)
    assert result.verdict is None
    assert result.statistics.stopped == "budget"
    assert result.statistics.hurried


def test_a_batch_is_not_of_one_kind() -> None:
    """Steps beside a choice wait, and a schedule gets its turn where the prediction is near."""
    x = b.input_("x", (64, 96))
    graph = b.kernel_graph("g", [x], [b.reduce_sum(b.exp(x), -1)])
    flat, looped = derive(make_region(graph, [n for n in graph.nodes() if is_compute(n)]))[:2]
    (atom, *rest) = flat.grid
    sizes = [{atom: n, **dict.fromkeys(rest, 8)} for n in (64, 32, 16)]
    near = [(1.0 + 0.01 * i, flat, tiles) for i, tiles in enumerate(sizes)]
    assert driver._diverse(near, 3) == [near[0], near[2], near[1]]
    other = (1.05, looped, dict.fromkeys(looped.roles, 8))
    assert driver._diverse([*near, other], 3) == [near[0], other, near[2]]
    far = (1.5, looped, dict.fromkeys(looped.roles, 8))
    assert far not in driver._diverse([*near, far], 3)


@pytest.mark.parametrize("speeds", [(1.0, 3.0), (3.0, 1.0), (1.0, 2.0, 0.3)])
def test_a_slow_moment_of_the_machine_decides_nothing(speeds: tuple[float, ...]) -> None:
    class Drifting(Predicted):
        """The machine has another speed in every batch; kernels of many blocks are fast."""

        def __init__(self, *speeds: float) -> None:
            super().__init__()
            self.speeds = cycle(speeds)

        def kernels(self, graphs: Sequence[Graph]) -> list[float]:
            speed = next(self.speeds)
            return [speed / prod(a.count for a in g.grid) for g in graphs]

    x = b.input_("x", (256, 512))
    graph = b.kernel_graph("g", [x], [b.exp(b.sub(x, b.reduce_max(x, -1)))])
    region = make_region(graph, [n for n in graph.nodes() if is_compute(n)])

    def tuned(*speeds: float) -> driver._Choice | None:
        clock = Drifting(*speeds)
        search_ = Driver(graph, Target(), clock, 1000.0, 0, FloatTest(graph, seed=0))
        return search_.tune(region, time.monotonic() + 1000.0, minor=False)

    steady, drifting = tuned(1.0), tuned(*speeds)
    assert steady is not None
    assert drifting is not None
    assert drifting.graph == steady.graph
    assert drifting.seconds == pytest.approx(steady.seconds * speeds[0])


def test_a_climb_that_ends_goes_on_elsewhere() -> None:
    x = b.input_("x", (256, 512))
    graph = b.kernel_graph("g", [x], [b.exp(b.sub(x, b.reduce_max(x, -1)))])
    region = make_region(graph, [n for n in graph.nodes() if is_compute(n)])

    class Island(Predicted):
        """All kernels take the same but one, which is no neighbour of what is tried first."""

        island = ""

        def kernels(self, graphs: Sequence[Graph]) -> list[float]:
            return [0.1 if g.digest() == self.island else 1.0 for g in graphs]

    clock = Island()
    search_ = Driver(graph, Target(), clock, 1000.0, 0, FloatTest(graph, seed=0))
    ranking = search_._ranking(region)
    first = driver._diverse(ranking.likely(), 6)
    _, schedule, tiles = next(
        (c, s, t)
        for c, s, t in ranking.likely()
        if all(s is not o or driver._steps(t, near) > 1 for _, o, near in first)
    )
    clock.island = block_graph(schedule, tiles, ranking.name).digest()
    found = search_.tune(region, time.monotonic() + 1000.0, minor=False)
    assert found is not None
    assert found.tiles == tiles


def test_a_loop_of_one_step_is_tried_once() -> None:
    x = b.input_("x", (256, 512))
    graph = b.kernel_graph("g", [x], [b.exp(b.sub(x, b.reduce_max(x, -1)))])
    region = make_region(graph, [n for n in graph.nodes() if is_compute(n)])
    ranking = Driver(graph, Target(), Predicted(), 9.0, 0, FloatTest(graph, seed=0))._ranking(
        region
    )
    steps = [
        s.space.extent(s.loop) // t[s.loop] for _, s, t in ranking.candidates if s.loop is not None
    ]
    assert steps
    assert 1 not in steps


class SlowProducts(Predicted):
    """A library multiplies faster than any kernel does."""

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        own = (any(n.op.kind is OpKind.CONTRACTION for n in g.nodes()) for g in graphs)
        times = zip(super().kernels(graphs), own, strict=True)
        return [1e3 if slow else seconds for seconds, slow in times]

    def programs(self, graphs: Sequence[Graph]) -> list[float]:
        kernels = [[n.attrs.graph for n in g.nodes() if n.op is library.CUSTOM] for g in graphs]
        return [max([1.0, *self.kernels(own)]) for own in kernels]


def test_the_only_program_is_not_timed_when_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with the original at the end."""
    monkeypatch.setattr(driver, "_OVERRUN_S", inf)
    in_time, late = (run(PROGRAMS["norm_mlp"], Predicted(), budget_s=s) for s in (1000.0, 1e-3))
    assert in_time.original_s < inf
    assert late.original_s == late.best_s == inf
    assert late.verdict is not None


def test_every_part_around_products_has_a_kernel_however_late_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "_OVERRUN_S", inf)
    in_time, late = (run(PROGRAMS["norm_mlp"], SlowProducts(), budget_s=s) for s in (1000.0, 1e-3))
    custom = [sum(n.op is library.CUSTOM for n in r.graph.nodes()) for r in (in_time, late)]
    assert custom[0] == custom[1] > 1
    assert in_time.statistics.hurried == 0 < late.statistics.hurried


@pytest.mark.parametrize("name", ["causal_gqa", "norm_linear", "loss", "residual"])
def test_the_result_is_proven_and_custom(name: str) -> None:
    result = run(PROGRAMS[name], Predicted())
    assert result.verdict is not None
    assert result.verdict.equivalent
    assert any(n.op is library.CUSTOM for n in result.graph.nodes())
    assert result.statistics.proven == 1
    assert result.statistics.proposed >= result.statistics.measured > 0


def test_the_same_seed_gives_the_same_program() -> None:
    # time enough on any machine: a search that is cut short depends on how fast it was
    graph = PROGRAMS["causal_gqa"]
    first, second = (run(graph, Predicted(), budget_s=1000.0).graph for _ in range(2))
    assert first == second


def test_what_there_is_nothing_to_compare_with_is_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slices, "ELEMENT_S", 1.0)

    class Slow(Predicted):
        def programs(self, graphs: Sequence[Graph]) -> list[float]:
            raise AssertionError("a large program takes seconds")

    result = run(PROGRAMS["causal_gqa"], Slow(), budget_s=1e-3)
    assert result.original_s == inf
    assert result.verdict is None


def test_where_no_kernel_runs_the_original_stays() -> None:
    result = run(PROGRAMS["norm_linear"], Predicted(fails=True))
    assert result.verdict is None
    assert result.graph == PROGRAMS["norm_linear"]


@pytest.mark.parametrize(
    ("wide", "budget_s", "found"),
    [(3.0, 20.0, [1, 1]), (0.1, 20.0, [2]), (inf, 1e-3, [1, 1])],
    ids=["slow", "fast", "missing and late"],
)
def test_products_get_kernels_of_their_own_where_one_for_all_is_no_good(
    wide: float, budget_s: float, found: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "_OVERRUN_S", inf)

    def products(graph: Graph) -> int:
        return sum(n.op is contraction.MATMUL for n in graph.nodes())

    class Narrow(Predicted):
        """What a program takes is what its kernels take, and a kernel of two products takes long."""

        def kernels(self, graphs: Sequence[Graph]) -> list[float]:
            return [self.takes(g) for g in graphs]

        def takes(self, graph: Graph) -> float:
            return wide if products(graph) > 1 else 0.1

        def programs(self, graphs: Sequence[Graph]) -> list[float]:
            kernels = [[n for n in g.nodes() if n.op is library.CUSTOM] for g in graphs]
            return [
                sum(self.takes(n.attrs.graph) for n in own) + products(g)
                for g, own in zip(graphs, kernels, strict=True)
            ]

    x, up, down = b.input_("x", (10, 24)), b.input_("up", (24, 48)), b.input_("down", (48, 24))
    layers = b.add(b.matmul(b.maximum(b.matmul(x, up), 0.0), down), x)
    result = run(b.kernel_graph("layers", [x, up, down], [layers]), Narrow(), budget_s=budget_s)
    assert result.verdict is not None
    blocks = [n.attrs.graph for n in result.graph.nodes() if n.op is library.CUSTOM]
    counts = [products(g) for g in blocks if products(g)]
    assert counts == found


def test_a_wrong_rule_ends_as_a_rejected_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def forget_a_factor(node: Node) -> Node | None:
        if node.op is not contraction.MATMUL:
            return None
        left, right = node.inputs
        return b.matmul(left.inputs[0], right) if left.op.name == "div" else None

    monkeypatch.setattr(driver, "FUSION_RULES", (Rule("wrong", forget_a_factor, exact=False),))
    result = run(PROGRAMS["gqa"], Predicted())
    assert result.statistics.rejected > 0
    # the program without the rule is proven instead
    assert result.verdict is not None
    assert verify_field(PROGRAMS["gqa"], result.graph, seed=1)


def test_a_candidate_without_a_meaning_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def meaningless(*arguments: object, **options: object) -> None:
        raise GraphError("no such axis")

    monkeypatch.setattr(driver, "verify_field", meaningless)
    result = run(PROGRAMS["norm_linear"], Predicted())
    assert result.statistics.rejected > 0
    assert result.verdict is None


def test_moves_that_cost_accuracy_are_left_out() -> None:
    # (x / r) (x / r)^T => x x^T / r r^T overflows where x / r does not; x / r @ w => (x @ w) / r is fine
    x, w = b.input_("x", (8, 1024)), b.input_("w", (1024, 4))
    unit = b.div(x, b.sqrt(b.mean(b.mul(x, x), -1)))
    graph = b.kernel_graph("g", [x, w], [b.matmul(unit, b.transpose(unit)), b.matmul(unit, w)])
    found = Driver(graph, Target(), Predicted(), 60.0, 0, FloatTest(graph, seed=0))._variants()
    square, projected = found[0].outputs
    assert square.op is contraction.MATMUL
    assert projected.op is elementwise.DIV


def test_what_one_kernel_copies_the_next_reads_as_it_is() -> None:
    # merged heads are a copy, which the second kernel could make itself: then nobody would make what it is made of
    x, w = b.input_("x", (2, 4, 10, 8)), b.input_("w", (32, 16))
    merged = b.reshape(b.permute(b.exp(x), (0, 2, 1, 3)), (20, 32))
    out = b.add(b.matmul(merged, w), 1.0)
    graph = b.kernel_graph("g", [x, w], [out])
    groups = [frozenset(n for n in topological([o]) if is_compute(n)) for o in (merged, out)]
    first, second = driver._regions(graph, [groups[0], groups[1] - groups[0]])
    assert first.outputs == (merged,)
    assert second.inputs == (merged, w)
    # without a kernel that makes it, it is no copy but index arithmetic
    (alone,) = driver._regions(graph, [groups[1] - groups[0]])
    assert merged in alone.body


def test_events_tell_what_happens() -> None:
    events: list[Event] = []
    search(PROGRAMS["loss"], Target(), Predicted(), budget_s=10.0, seed=0, on_event=events.append)
    assert {"partition", "proven", "result"} <= {e.kind for e in events}


def test_an_interrupt_keeps_the_original() -> None:
    class Interrupted(Predicted):
        def kernels(self, graphs: Sequence[Graph]) -> list[float]:
            raise KeyboardInterrupt

    result = run(PROGRAMS["gqa"], Interrupted())
    assert result.statistics.stopped == "interrupted"
    assert result.graph == PROGRAMS["gqa"]


def test_what_nobody_accepts_leaves_the_original() -> None:
    asked: list[Graph] = []

    def accept(program: Graph) -> str:
        asked.append(program)
        return "overflows"

    result = search(
        PROGRAMS["norm_linear"], Target(), Predicted(), budget_s=10.0, seed=0, accept=accept
    )
    assert asked
    assert result.verdict is None
    assert result.statistics.rejected == len(asked)


def test_search_ends_early_enough_for_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Predicted):
        def kernels(self, graphs: Sequence[Graph]) -> list[float]:
            time.sleep(0.05 * len(graphs))
            self.seen += len(graphs)
            # each faster than the last, so that the climb goes on
            return [1.0 / (self.seen + i) for i in range(len(graphs))]

    plain = expand(PROGRAMS["gqa"])
    found = Driver(plain, Target(), Slow(), 2.0, 0, FloatTest(plain, seed=0))
    found.proof_s = 1.0
    monkeypatch.setattr(driver, "LAST_S", 0.0)
    started = time.monotonic()
    found._assemble(apply_rules(plain, FUSION_RULES), started + found._left())
    # of two seconds, and what it was doing then is finished: one batch of kernels
    assert time.monotonic() - started < 1.6


def test_one_long_sum_occupies_all_cores() -> None:
    x = b.input_("x", (40009,))
    graph = b.kernel_graph("total", [x], [b.reduce_sum(b.mul(x, x), -1)])
    found = Driver(graph, Target(), Predicted(), 30.0, 0, FloatTest(graph, seed=0))
    variants = found._variants()
    sums = [[n.op for n in v.nodes()].count(contraction.REDUCE_SUM) for v in variants]
    assert sums == [1, 3]  # whole; pieces, their results, and the rest


def test_a_decoder_block_is_proven_in_pieces() -> None:
    result = run(llama(size=32, heads=2, length=8, hidden=48), Predicted(), budget_s=60.0)
    assert result.verdict is not None
    assert result.verdict.pieces
    assert sum(n.op is library.CUSTOM for n in result.graph.nodes()) > 1


def test_what_nobody_could_prove_is_no_kernel() -> None:
    x, w = b.input_("x", (16, 16)), b.input_("w", (16, 16))
    value = x
    for _ in range(2):
        value = b.matmul(value, w)
        for _ in range(13):
            value = b.mul(value, value)
    graph = b.kernel_graph("power", [x, w], [value])
    assert len(partition(graph, Target())) == 1
    assert not provable(graph)
    search_ = Driver(graph, Target(), Predicted(), 30.0, 0, FloatTest(graph, seed=0))
    found = search_._assemble(graph, time.monotonic() + 30.0)
    assert found is not None
    kernels = [n.attrs.graph for n in found.program.nodes() if n.op is library.CUSTOM]
    assert len(kernels) > 1
    assert all(provable(k) for k in kernels)


@pytest.mark.parametrize("accurate", [True, False])
def test_products_go_in_the_cheaper_order_where_that_is_accurate(
    monkeypatch: pytest.MonkeyPatch, accurate: bool
) -> None:
    rows, tall, wide = (b.input_(n, s) for n, s in (("r", (1, 64)), ("t", (64, 4)), ("w", (4, 64))))
    graph = b.kernel_graph("low", [rows, tall, wide], [b.matmul(rows, b.matmul(tall, wide))])
    monkeypatch.setattr(Driver, "_accurate", lambda *graphs: accurate)
    search_ = Driver(graph, Target(), Predicted(), 30.0, 0, FloatTest(graph, seed=0))
    inner = {n.shape for v in search_._variants() for n in v.nodes() if n.op is contraction.MATMUL}
    assert ((64, 64) in inner) is not accurate


def test_products_by_known_factors_stay_where_without_them_a_quotient_is_of_zeros() -> None:
    size = 49
    x = b.input_("x", (size, 3))
    same = b.exp(b.mul(b.matmul(x, b.transpose(x)), -0.01))
    centre = b.sub(
        b.cast(b.eq(b.iota((size, size), -2), b.iota((size, size), -1)), DType.F32), 1 / size
    )
    centred = b.matmul(centre, b.matmul(same, centre))
    length = b.sqrt(b.reduce_sum(b.mul(centred, centred), (-2, -1)))
    results = {"normalized": b.div(centred, length), "plain": centred}
    products = {}
    for name, result in results.items():
        graph = b.kernel_graph(name, [x], [result])
        search_ = Driver(graph, Target(), Predicted(), 30.0, 0, FloatTest(graph, seed=0))
        found = search_._cheaper(expand(graph))
        products[name] = sum(n.op is contraction.MATMUL for n in found.nodes())
    assert products == {"normalized": 3, "plain": 1}


class LibraryWins(Predicted):
    """Every program is the slower the more products its kernels hold, and kernels alone are slow."""

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        return [1e-2 / (1 + len(g.loops)) for g in graphs]

    def programs(self, graphs: Sequence[Graph]) -> list[float]:
        kernels = [[n.attrs.graph for n in g.nodes() if n.op is library.CUSTOM] for g in graphs]
        return [
            1e-3 * (1 + sum(n.op is contraction.MATMUL for k in own for n in k.nodes()))
            for own in kernels
        ]


def test_a_product_stays_in_the_library_where_that_is_faster() -> None:
    x, w = b.input_("x", (64, 96)), b.input_("w", (96, 128))
    graph = b.kernel_graph("g", [x, w], [b.exp(b.matmul(b.sub(x, b.reduce_max(x, -1)), w))])
    result = run(graph, LibraryWins())
    assert result.verdict is not None
    ops = [n.op for n in result.graph.nodes()]
    assert contraction.MATMUL in ops
    assert library.CUSTOM in ops


def test_parts_that_the_budget_does_not_reach_get_a_kernel_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "_OVERRUN_S", inf)
    x, w = b.input_("x", (64, 96)), b.input_("w", (96, 96))
    value = x
    for _ in range(3):
        value = b.exp(b.flip(b.matmul(b.div(value, b.reduce_sum(value, -1)), w), -2))
    result = run(b.kernel_graph("g", [x, w], [value]), LibraryWins(), budget_s=1e-3)
    assert result.verdict is not None
    left = [n.op for n in result.graph.nodes()]
    assert elementwise.EXP not in left
    assert contraction.REDUCE_SUM not in left


def test_a_convolution_may_stay_in_the_library() -> None:
    x, w = b.input_("x", (2, 3, 9)), b.input_("w", (3, 1, 4))
    attrs = ConvAttrs((1,), (0,), (1,), False, (0,), 3)
    graph = b.kernel_graph("g", [x, w], [make(composite.DEPTHWISE_CONV, (x, w), attrs)])
    assert driver._expand_simple(graph) == graph
    assert verify_field(graph, expand(graph), seed=0)


def test_only_composites_that_hold_a_product_stay_whole() -> None:
    x, w, k = b.input_("x", (4, 8)), b.input_("w", (8, 6)), b.input_("k", (1, 4, 6))
    gate = make(composite.SILU, (b.matmul(x, w),))
    q, attrs = b.reshape(gate, (1, 4, 6)), composite.AttentionAttrs(1.0, causal=False)
    graph = b.kernel_graph("g", [x, w, k], [make(composite.ATTENTION, (q, k, k), attrs)])
    simple = driver._expand_simple(graph)
    assert {n.op for n in simple.nodes() if n.op.expand is not None} == {composite.ATTENTION}


class Recording(LibraryWins):
    """Notes what it is asked for, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[Graph]]] = []

    def prepare(self, graphs: Sequence[Graph]) -> None:
        self.asked.append(("prepare", list(graphs)))

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        self.asked.append(("kernels", list(graphs)))
        return super().kernels(graphs)

    def programs(self, graphs: Sequence[Graph]) -> list[float]:
        self.asked.append(("programs", list(graphs)))
        return super().programs(graphs)


def test_the_first_kernels_of_all_parts_are_compiled_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "_OVERRUN_S", inf)
    clock = Recording()
    inputs = [b.input_(f"x{n}", (16, n)) for n in (24, 40, 40, 56)]
    sums = [b.exp(b.sub(x, b.reduce_max(x, -1))) for x in inputs]
    run(b.kernel_graph("g", inputs, sums), clock, budget_s=1e-3)
    together = [graphs for how, graphs in clock.asked if how == "prepare"]
    assert [len(graphs) for graphs in together] == [3]  # two of the four are the same kernel
    prepared = [g for graphs in together for g in graphs]
    timed = [g for how, graphs in clock.asked if how == "kernels" for g in graphs]
    assert set(prepared) <= set(timed), "a kernel was compiled for nothing"


def test_the_original_is_timed_once_beside_what_was_found() -> None:
    clock, graph = Recording(), PROGRAMS["norm_linear"]
    result = run(graph, clock)
    (timed,) = [graphs for how, graphs in clock.asked if how == "programs" and graph in graphs]
    assert result.graph in timed
    assert result.original_s >= result.best_s > 0


@pytest.mark.parametrize("budget_s", [7.0, 12.0])
def test_search_ends_when_the_budget_does(budget_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Predicted):
        """A kernel takes a second, on a clock of its own; each is a little faster than the last."""

        now_s = 0.0

        def kernels(self, graphs: Sequence[Graph]) -> list[float]:
            self.now_s += len(graphs)
            self.seen += len(graphs)
            return [1e-3 / (self.seen + i) for i in range(len(graphs))]

    clock = Slow()
    monkeypatch.setattr(driver, "time", SimpleNamespace(monotonic=lambda: clock.now_s))
    x, w = b.input_("x", (64, 128)), b.input_("w", (128, 96))
    graph = b.kernel_graph("g", [x, w], [b.exp(b.matmul(b.exp(x), w))])
    run(graph, clock, budget_s=budget_s)
    assert 3.0 <= clock.now_s <= budget_s - driver.LAST_S


def softmax(x: Node) -> Node:
    e = b.exp(b.sub(x, b.reduce_max(x, -1)))
    return b.div(e, b.reduce_sum(e, -1))


@pytest.mark.parametrize("why", ["wrong alone", "wrong together", "inaccurate"])
def test_where_a_kernel_is_rejected_smaller_ones_are_tried(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = b.input_("x", (8, 24)), b.input_("y", (6, 40))
    outputs = [softmax(b.sqrt(x)), b.exp(b.sub(y, b.reduce_max(y, -1)))]
    graph = b.kernel_graph("two", [x, y], outputs)
    asked: list[Graph] = []

    def kernels(program: Graph) -> list[Graph]:
        return [n.attrs.graph for n in program.nodes() if n.op is library.CUSTOM]

    def mixes(program: Graph) -> bool:
        both = {elementwise.SQRT, elementwise.EXP}
        return any(both <= {n.op for n in k.nodes()} for k in kernels(program))

    def verify(original: Graph, candidate: Graph, **options: object) -> object:
        verdict = verify_field(original, candidate, seed=0)
        fails = mixes(candidate) and (why == "wrong alone" or len(kernels(candidate)) > 1)
        fails = fails and why != "inaccurate"
        return replace(verdict, equivalent=False, reason="mixed") if fails else verdict

    def accept(program: Graph) -> str:
        asked.append(program)
        return "inaccurate" if mixes(program) else ""

    class Inaccurate(Predicted):
        def run(self, graph: Graph, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            return [r * (1.1 if mixes(graph) else 1.0) for r in run_reference(graph, tensors)]

    monkeypatch.setattr(driver, "verify_field", verify)
    result = search(graph, Target(), Inaccurate(), budget_s=1000.0, seed=0, accept=accept)
    assert result.verdict is not None
    assert asked[-1] == result.graph
    assert (len(asked) > 1) is (why == "inaccurate")
    assert result.statistics.rejected > 0
    # only what was at fault is in pieces, and every value still comes from a kernel
    assert len(kernels(result.graph)) == 3
    assert not mixes(result.graph)
    assert all(n.op.kind is not OpKind.ELEMENTWISE for n in result.graph.nodes())


def test_a_proof_that_would_end_long_after_the_budget_is_not_begun() -> None:
    graph = PROGRAMS["norm_linear"]
    found = Driver(graph, Target(), Predicted(), 5.0, 0, FloatTest(graph, seed=0))
    programs = [expand(graph)]
    found.proof_s = 40.0
    assert found._first_proven(programs) is None
    assert found.statistics.hurried == 1  # so that nobody keeps the plan
    assert found.statistics.stopped == "budget"
    assert found._search() is None
    assert found.statistics.proposed == 0  # nor is a kernel tried that it would be for
    # a short one is made however late it is
    found.proof_s, found.started = 1.0, found.started - 1000.0
    assert found._first_proven(programs) is not None


def test_the_proof_of_a_program_may_take_longer_than_that_of_variants(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = PROGRAMS["norm_linear"]
    found = Driver(graph, Target(), Predicted(), 5.0, 0, FloatTest(graph, seed=0))
    long, short = expand(graph), graph
    found.proof_s = 2.0
    monkeypatch.setattr(driver, "least_s", lambda _, program: 40.0 if program is long else 0.1)
    assert found._first_proven([long]) is None
    assert found.statistics.stopped == "budget"
    best = found._first_proven([long, short])
    assert best is not None
    assert best[0] is short


def test_a_busy_moment_foretells_no_long_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = PROGRAMS["norm_linear"]

    lost_s = 0.0

    def starved(*args: Any, **options: Any) -> Verdict:
        nonlocal lost_s
        lost_s += 1000.0
        return verify_field(*args, **options)

    for module in (driver, threads):
        monkeypatch.setattr(module, "now", lambda: (lost_s + time.monotonic(), time.process_time()))
    monkeypatch.setattr(driver, "verify_field", starved)
    found = Driver(graph, Target(), Predicted(), 5.0, 0, FloatTest(graph, seed=0))
    assert found._equal(graph, graph)
    assert 0 < found.proof_s < 1000.0


def test_a_proof_in_pieces_draws_the_whole_once(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = PROGRAMS["norm_linear"]
    verdict = verify_field(graph, graph, seed=1)
    piece = Piece("", (), verdict.primes, verdict.seeds, verdict.error_per_test, False)
    monkeypatch.setattr(driver, "worked_s", lambda begun: 2.0)
    for pieces, proof_s in (((), 6.0), ((piece,), 3.0)):
        looked = replace(verdict, pieces=pieces)
        monkeypatch.setattr(driver, "verify_field", lambda *a, looked=looked, **k: looked)
        found = Driver(graph, Target(), Predicted(), 5.0, 0, FloatTest(graph, seed=0))
        assert found._equal(graph, graph)
        assert found.proof_s == proof_s


def attention() -> Node:
    q, k, v = b.input_("q", (8, 16)), b.input_("k", (96, 16)), b.input_("v", (96, 8))
    return b.matmul(softmax(b.matmul(q, b.transpose(k))), v)


def gated_by_itself() -> Node:
    attended = attention()
    return b.mul(attended, b.sigmoid(attended))


def softmax_of_attention() -> Node:
    return softmax(attention())


class Online(Predicted):
    """Kernels run only where they carry a running maximum."""

    def kernels(self, graphs: Sequence[Graph]) -> list[float]:
        return [1e-3 if self.carries(g) else inf for g in graphs]

    def carries(self, graph: Graph) -> bool:
        rescaled = any(n.op is tile.ACCUM_RESCALED for n in graph.nodes())
        return rescaled and graph.loops[0].count > 1


@pytest.mark.parametrize("program", [gated_by_itself, softmax_of_attention])
def test_exponentials_of_exponentials_are_proven_inside_one_kernel(
    program: Callable[[], Node],
) -> None:
    result = program()
    graph = b.kernel_graph("g", b.graph_inputs([result]), [result])
    found = run(graph, Online(), budget_s=1000.0)
    assert found.verdict is not None
    assert not found.verdict.pieces
    assert [n.op is library.CUSTOM for n in found.graph.nodes()].count(True) == 1


def test_a_kernel_without_a_proof_is_found_out_before_its_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # retrieval from a memory in three steps (Ramsauer et al., 2020): exponents of exponents are exponentials
    value, keys = b.input_("x", (8, 8)), b.input_("k", (96, 8))
    for _ in range(3):
        value = b.matmul(softmax(b.matmul(value, b.transpose(keys))), keys)
    graph = b.kernel_graph("hopfield", b.graph_inputs([value]), [value])
    proposed = list[int]()
    proven = Driver._first_proven

    def counted(self: Driver, programs: Sequence[Graph]) -> object:
        proposed.append(len(programs))
        return proven(self, programs)

    monkeypatch.setattr(Driver, "_first_proven", counted)
    found = run(graph, Online(), budget_s=1000.0)
    assert found.verdict is not None
    assert len(proposed) == 1
    assert [n.op is library.CUSTOM for n in found.graph.nodes()].count(True) > 1
