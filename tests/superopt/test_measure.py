"""The search's clock: what it refuses before a compiler sees it."""

import platform
from ctypes import c_float, c_int16, c_int64
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from superopt import measure
from superopt.backends import CpuBackend, wall
from superopt.codegen.errors import CodegenError
from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.ops import elementwise
from superopt.ir.target import Target
from superopt.ir.types import DType, TensorType
from superopt.measure import Clock
from superopt.plan import KernelSource
from superopt.verify.reference import run_reference
from tests.codegen.test_cpu_lower import attention


class NoCompiler:
    """A backend that nothing may reach."""

    device = torch.device("cpu")
    timed = staticmethod(wall)

    def variants(self, graph: object, count: int) -> list[Any]:
        raise AssertionError("a malformed graph was lowered")

    def load(self, sources: list[Any], limit_s: float = inf) -> list[Any]:
        assert not sources
        return []


def test_malformed_candidates_are_rejected_with_their_violations() -> None:
    x = b.input_("x", (8,))
    g = b.BlockBuilder("g", grid={"m": 2})
    g.store(g.load(x, ("m", 4)), (4,), 4)
    kernel = g.graph()
    program = b.kernel_graph("p", [x], b.apply_graph(kernel, [x]))
    clock = Clock(NoCompiler(), {})  # type: ignore[arg-type]
    assert clock.kernels([kernel]) == [inf]
    assert clock.programs([program]) == [inf]
    assert ["varies over m" in failure for failure in clock.failures] == [True, True]


def test_large_operands_are_not_found_in_a_cache() -> None:
    x, w = b.input_("x", (16,)), b.input_("w", (4096,))
    target = Target(inner_cache_bytes=4096, outer_cache_bytes=20000)
    given = {b.input_("all", (8000,)): torch.zeros(8000)}
    clock = Clock(NoCompiler(), given, target=target)  # type: ignore[arg-type]
    turns = clock._in_turn([(0, x.tensor, 1), (1, w.tensor, 1)])
    assert len({t.data_ptr() for _, t in turns}) * 4096 * 4 >= 2 * target.outer_cache_bytes
    assert len({t.data_ptr() for t, _ in turns}) == 1
    assert all(torch.equal(t, turns[0][1]) for _, t in turns)
    # copies of what another kernel read are let go
    clock._in_turn([(0, x.tensor, 1), (1, b.input_("v", (5000,)).tensor, 1)])
    assert [kind.shape for _, kind, _ in clock._copies] == [(5000,)]
    # a program that fits the caches keeps its operands there
    clock.inputs = {}
    assert len(clock._in_turn([(0, x.tensor, 1), (1, w.tensor, 1)])) == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels flush them by an x86 register")
def test_a_program_is_made_again_with_denormals(tmp_path: Path) -> None:
    x, w = b.input_("x", (4, 8)), b.input_("w", (8, 16))
    build = b.BlockBuilder("weighted")
    build.store(b.matmul(build.load(x, 4, 8), build.load(w, 8, 16)), (4, 16), 4, 16)
    scaled = b.BlockBuilder("scaled")
    scaled.store(b.mul(scaled.load(w, 8, 16), 0.5), (8, 16), 8, 16)
    (half,) = b.apply_graph(scaled.graph(), [w])
    program = b.kernel_graph("p", [x, w], b.apply_graph(build.graph(), [x, half]))
    clock = Clock(CpuBackend(tmp_path), {})
    tensors = [torch.full((4, 8), 2.0**-130), torch.ones(8, 16)]
    assert not clock.run(program, tensors)[0].any()
    before = dict(clock.compiled)
    replaced = clock.keep_denormals(program)
    assert list(replaced) == [build.graph().digest()], "a kernel without products keeps them"
    assert (clock.run(program, tensors)[0] == 2.0**-128).all()
    clock.compiled |= replaced
    assert clock.compiled == before
    clock.keep_denormals(program)
    assert not clock.keep_denormals(program)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.BOOL, DType.I64])
def test_a_table_that_all_rows_share_is_drawn_once(dtype: DType) -> None:
    kind = TensorType((1000, 7, 30), dtype, (0, 1, 9))
    drawn = measure.random_tensor(kind, 3)
    assert (drawn.shape, drawn.stride()) == (kind.shape, kind.strides)
    assert drawn.untyped_storage().nbytes() == (1 + 6 + 29 * 9) * drawn.element_size()


def test_kernels_are_prepared_together_without_what_is_malformed() -> None:
    class Compiles(NoCompiler):
        """Notes what is compiled at once."""

        def __init__(self) -> None:
            self.batches: list[list[str]] = []

        def variants(self, graph: Graph, count: int) -> list[Any]:
            assert count == 1
            return [KernelSource("cpu", graph.name, "", "", "f", 2, {})]

        def load(self, sources: list[KernelSource], limit_s: float = inf) -> list[Any]:
            self.batches.append([s.name for s in sources])
            return [CodegenError("no matter") for _ in sources]

    def kernel(name: str, varies: bool) -> Graph:
        g = b.BlockBuilder(name, grid={"m": 2})
        tile = g.load(b.input_("x", (8,)), ("m", 4))
        g.store(tile, (8,), ("m", 4)) if varies else g.store(tile, (4,), 4)
        return g.graph()

    clock = Clock(backend := Compiles(), {})  # type: ignore[arg-type]
    clock.prepare([kernel("first", True), kernel("malformed", False), kernel("second", True)])
    assert backend.batches == [["first", "second"]]
    assert clock.compiled == {}


def test_what_was_timed_before_is_timed_again_beside_the_rest() -> None:
    class Slowing(NoCompiler):
        """Every call takes a second longer than the one before; all kernels are of one kind."""

        def __init__(self) -> None:
            self.compiled = self.timings = 0

        def variants(self, graph: Graph, count: int) -> list[Any]:
            return [KernelSource("cpu", graph.name, "", "", "f", 2, {})]

        def load(self, sources: list[KernelSource], limit_s: float = inf) -> list[Any]:
            self.compiled += len(sources)
            return [negate for _ in sources]

        def timed(self, call: Any, repeats: int) -> float:
            self.timings += 1
            return float(self.timings)

    def negate(source: int, result: int) -> None:
        values = (c_float * 8).from_address(source)
        (c_float * 8).from_address(result)[:] = [-v for v in values]

    def kernel(name: str, size: int) -> Graph:
        g = b.BlockBuilder(name, grid={"m": 8 // size})
        g.store(b.neg(g.load(b.input_("x", (8,)), ("m", size))), (8,), ("m", size))
        return g.graph()

    clock = Clock(backend := Slowing(), {})  # type: ignore[arg-type]
    first, second = kernel("first", 2), kernel("second", 4)
    (alone_s,) = clock.kernels([first])
    again_s, beside_s = clock.kernels([first, second])
    assert backend.compiled == 2
    assert alone_s < again_s < beside_s


def test_what_takes_very_long_is_timed_twice() -> None:
    calls: list[str] = []

    def timed(call: Any, repeats: int) -> float:
        call()
        return {"a": 0.5, "b": 0.6, "c": 2.0}[calls[-1]]

    names = [lambda name=name: calls.append(name) for name in "abc"]
    assert measure.interleaved(names, limit_s=0.0, timed=timed) == [0.5, 0.6, 2.0]
    # one that is slower than that once is slower
    assert sorted(calls) == ["a", "a", "b", "b", "c"]


def test_what_takes_long_is_timed_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once where another is far faster, once more where it is clearly so, and until it takes as long every time."""
    monkeypatch.setattr(measure, "waited_s", lambda: 0.0)
    calls: list[float] = []

    def timed(call: Any, repeats: int) -> float:
        calls.append(call())
        return calls[-1]

    given = [partial(float, s) for s in (0.1, 0.12, 0.13, 0.31)]
    found = measure.interleaved(given, limit_s=60.0, timed=timed)
    assert found == [0.1, 0.12, 0.13, 0.31]
    assert [calls.count(s) for s in found] == [4, 4, 2, 1]


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("rows", [4096, 64])
def test_large_results_are_checked_at_a_few_steps(
    wrong: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def reference(
        graph: Graph, tensors: list[torch.Tensor], dtype_override: torch.dtype | None = None
    ) -> list[torch.Tensor]:
        seen.append(tensors[0].shape[0])
        return run_reference(graph, tensors, dtype_override=dtype_override)

    monkeypatch.setattr(measure, "run_reference", reference)
    columns = (1 << 22) // rows
    g = b.BlockBuilder("g", grid={"m": rows})
    x = b.input_("x", (rows, columns))
    g.store(b.neg(g.load(x, ("m", 1), columns)), (rows, columns), ("m", 1), columns)

    def negate(source: int, result: int) -> None:
        read, written = ((c_float * (1 << 22)).from_address(a) for a in (source, result))
        torch.frombuffer(written, dtype=torch.float32).copy_(
            torch.frombuffer(read, dtype=torch.float32) * (-2.0 if wrong else -1.0)
        )

    clock = Clock(NoCompiler(), {})  # type: ignore[arg-type]
    assert clock._agrees(g.graph(), negate) is not wrong
    assert 16 <= seen[0] <= rows // 4


@pytest.mark.parametrize(("shift", "wrong"), [(0, False), (0, True), (3, False)])
def test_a_kernel_that_reads_other_places_is_refused(shift: int, wrong: bool) -> None:
    """Places are drawn, but for those that would make places beyond the tensor (`shift`)."""
    g = b.BlockBuilder("g", grid={"m": 4})
    places = g.load(b.input_("i", (64, 1), DType.I64), ("m", 16), 1)
    rows = g.load(b.input_("x", (64, 16)), ("m", 16), 16)
    for index in (places, b.add(places, shift)):
        g.store(b.gather(rows, index, -1), (64, 1), ("m", 16), 1)

    def gather(index: int, data: int, *results: int) -> None:
        i = torch.frombuffer((c_int64 * 64).from_address(index), dtype=torch.int64)
        x = torch.frombuffer((c_float * 1024).from_address(data), dtype=torch.float32)
        i = i.roll(1) if wrong else i  # those of the row ahead
        for result, first in zip(results, (0, shift), strict=True):
            found = x.view(64, 16).gather(1, i[:, None] + first)
            torch.frombuffer((c_float * 64).from_address(result), dtype=torch.float32).copy_(
                found.flatten()
            )

    clock = Clock(NoCompiler(), {})  # type: ignore[arg-type]
    assert clock._agrees(g.graph(), gather) is not wrong


@pytest.mark.parametrize("wrong", [False, True])
def test_roots_of_what_cancels_may_be_as_far_off_as_roundings_make_them(wrong: bool) -> None:
    g = b.BlockBuilder("g", grid={"m": 4})
    x, y = (g.load(b.input_(n, (512, 32), DType.BF16), ("m", 128), 32) for n in "xy")
    total = b.reduce_sum(b.mul(b.mul(b.add(x, 30.0), b.add(y, 30.0)), b.sub(x, y)), -1)
    g.store(b.elementwise_op(elementwise.SQRT, b.maximum(total, 0.0)), (512, 1), ("m", 128), 1)

    def rooted(*addresses: int) -> None:
        x, y, result = (
            torch.frombuffer((c_int16 * n).from_address(a), dtype=torch.bfloat16)
            for a, n in zip(addresses, (16384, 16384, 512), strict=True)
        )
        x, y = (t.view(512, 32).float() for t in (x, y))
        total = ((x + 30) * (y + 30) * (x - y)).sum(-1)
        result.copy_((total.clamp_min(0) * (2 if wrong else 1)).sqrt())

    clock = Clock(NoCompiler(), {})  # type: ignore[arg-type]
    assert clock._agrees(g.graph(), rooted) is not wrong


def test_compilers_are_waited_for_so_long_in_all_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[float] = []
    now_s = [100.0]

    class Slow(NoCompiler):
        """Takes a while for everything."""

        def load(self, sources: list[Any], limit_s: float = inf) -> list[Any]:
            limits.append(limit_s)
            now_s[0] += 2.0
            return []

    monkeypatch.setattr(measure.time, "monotonic", lambda: now_s[0])
    clock = Clock(Slow(), {}, deadline=now_s[0], patience_s=3.0)  # type: ignore[arg-type]
    for _ in range(3):
        clock.prepare([])
    assert limits == [3.0, 1.0, 0.0]


@pytest.mark.parametrize(("error", "dtype"), [(6e-3, torch.bfloat16), (7e-4, torch.float16)])
def test_results_are_held_against_a_step_of_their_row(error: float, dtype: torch.dtype) -> None:
    """What cancels in a row of large numbers errs by a rounding of these; of float32 that is nothing."""
    expected = torch.full((500, 64), 1e-3)
    expected[0] = 1.0
    expected[0, 5] = 1e-3
    for row, size, agrees in ((0, error, True), (0, 4 * error, False), (7, error, False)):
        found = expected.clone()
        found[row, 5] += size
        assert measure.close(found.to(dtype), expected.to(dtype)) is agrees
        assert not measure.close(found, expected)


def test_what_is_no_number_is_expected_where_it_is() -> None:
    expected = torch.ones(5, 7)
    for strange in (torch.inf, -torch.inf, torch.nan):
        found = expected.clone()
        found[3, 3] = strange
        assert not measure.close(found, expected)
        assert not measure.close(expected, found)
        assert measure.close(found, found.clone())


@pytest.mark.parametrize("loops", [1, 5])
def test_what_products_sum_over_is_small(loops: int) -> None:
    x, w, bias = (b.input_(n, s) for n, s in (("x", (4, 320)), ("w", (64, 320)), ("b", (64,))))
    g = b.BlockBuilder("linear", grid={"m": 4}, loops={"k": loops})
    tiles = [g.load(x, ("m", 1), ("k", 320 // loops)), g.load(w, 64, ("k", 320 // loops))]
    product = b.matmul(tiles[0], b.transpose(tiles[1]))
    total = b.accum_sum(product, "k") if loops > 1 else product
    g.store(b.add(total, g.load(bias, 64)), (4, 64), ("m", 1), 64)
    kernel = g.graph()
    assert measure.contracted(kernel) == {1: 320}
    other = b.input_("other", (64, 320))
    assert measure.contracted(attention(1, 8, 256, 32, 8, 16)) == {1: 32, 2: 256}
    placed = b.kernel_graph("p", [bias, other, x], b.apply_graph(kernel, [x, other, bias]))
    assert measure.contracted(placed) == {1: 320}
    clock = Clock(NoCompiler(), {})  # type: ignore[arg-type]
    one, two, three = clock._inputs(placed)
    assert min(one.abs().max(), three.abs().max()) > 1
    assert two.abs().max() < 0.1


def test_what_other_programs_disturb_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    count, waited = 0, 0.0

    def timed(seconds: tuple[float, float]) -> float:
        nonlocal count, waited
        count += 1
        disturbed = count <= 30  # 15 rounds: together they say that the slower one is faster
        waited += seconds[disturbed] / 2 if disturbed else 0.0
        return seconds[disturbed]

    monkeypatch.setattr(measure, "waited_s", lambda: waited)
    calls: Any = [(2e-3, 9e-3), (1e-3, 50e-3)]
    found = measure.interleaved(calls, limit_s=60.0, timed=lambda call, repeats: timed(call))
    assert found == [2e-3, 1e-3]
    # where all is disturbed, low times are believed
    count, waited = -1000, 0.0
    monkeypatch.setattr(measure, "waited_s", lambda: count)
    calls = [iter([4e-3, *[3e-3, 9e-3] * 100]), iter([4e-3, *[5e-3, 6e-3] * 100])]

    def scattered(call: Any, repeats: int) -> float:
        nonlocal count
        count += 1
        return float(next(call))

    assert measure.interleaved(calls, limit_s=60.0, timed=scattered) == [3e-3, 5e-3]
