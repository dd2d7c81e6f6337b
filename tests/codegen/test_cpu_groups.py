"""Fused loops over rows that go by groups, as many rows as a vector has lanes."""

import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from superopt.codegen.cpu.compile import compile_source as compiled
from superopt.codegen.cpu.compile import find_compiler, load_kernel
from superopt.codegen.cpu.config import CpuConfig
from superopt.codegen.cpu.kernel import Kernel, compile_many
from superopt.codegen.cpu.lower import lower
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder
from superopt.ir.graph import Graph
from superopt.ir.homogeneity import cancels
from superopt.ir.ops import contraction, tile
from superopt.ir.types import DType
from superopt.verify.reference import DTYPES, run_reference
from tests.codegen.meaning import check, launched, tensor

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def reductions(rows: int, columns: int, size: int, dtype: DType = DType.F32) -> Graph:
    """Softmax of rows, with values per row that depend on one another and on the row's totals."""
    batch = 2
    g = BlockBuilder("rows", grid={"h": batch, "m": -(-rows // size)})
    x = b.input_("x", (batch, rows, columns), dtype)
    x = b.cast(g.load(x, ("h", 1), ("m", size), columns), DType.F32)
    top = b.reduce_max(x, -1)
    e = b.exp(b.sub(x, top))
    total = b.reduce_sum(e, -1)
    low = b.reduce(contraction.REDUCE_MIN, b.mul(e, x), -1)
    grown = b.log(b.add(b.exp(b.mul(low, 0.1)), b.mul(total, total)))
    product = b.reduce(contraction.REDUCE_PROD, b.add(b.mul(e, 0.01), 1.0), -1)
    g.store(b.mul(b.div(e, total), grown), (batch, rows, columns), ("h", 1), ("m", size), columns)
    for value in (b.add(top, b.log(total)), product):
        g.store(value, (batch, rows, 1), ("h", 1), ("m", size), 1)
    return g.graph()


@pytest.mark.parametrize(
    ("rows", "columns", "tile", "dtype"),
    [(64, 48, 32, DType.F32), (37, 50, 24, DType.F32), (37, 9, 37, DType.BF16)],
)
def test_values_of_rows(tmp_path: Path, rows: int, columns: int, tile: int, dtype: DType) -> None:
    graph = reductions(rows, columns, tile, dtype)
    source = lower(graph, CpuConfig(), graph.name)
    for kind in ("sum", "max", "min", "product"):
        assert f"fold_rows<combine_{kind}>" in source.text
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    inputs = [tensor(i, torch.Generator().manual_seed(1)) for i in graph.inputs]
    inputs[0][0, 1, 3] = torch.nan
    inputs[0][1, rows - 1, columns - 1] = torch.inf
    check(graph, inputs, launched(kernel, graph, inputs))


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [(2, DType.F32), (3, DType.BF16), (4, DType.F32), (5, DType.F32), (7, DType.BF16)],
)
def test_vectors_lie_across_short_rows(tmp_path: Path, columns: int, dtype: DType) -> None:
    rows = 37
    graph = reductions(rows, columns, 24, dtype)
    source = lower(graph, CpuConfig(), graph.name)
    assert f", {columns}L" in source.text
    assert "fold_rows" not in source.text
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    inputs = [tensor(i, torch.Generator().manual_seed(1)) for i in graph.inputs]
    inputs[0][0, 1, 1] = torch.nan
    inputs[0][1, rows - 1, columns - 1] = torch.inf
    check(graph, inputs, launched(kernel, graph, inputs))


def test_truth_and_whole_numbers_of_short_rows(tmp_path: Path) -> None:
    rows, columns = 40, 3
    g = BlockBuilder("boxes", grid={"m": 2})
    x = g.load(b.input_("x", (rows, columns)), ("m", 20), columns)
    n = g.load(b.input_("n", (rows, columns), DType.I64), ("m", 20), columns)
    inside = b.reduce(contraction.REDUCE_MIN, b.gt(x, -1.0), -1)
    area = b.reduce(contraction.REDUCE_PROD, b.maximum(x, 0.0), -1)
    most = b.reduce(contraction.REDUCE_MAX, n, -1)
    for value in (b.where(inside, area, b.neg(area)), most):
        g.store(value, (rows, 1), ("m", 20), 1)
    graph = g.graph()
    (kernel,) = compile_many([lower(graph, CpuConfig(), graph.name)], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    inputs = [tensor(i, torch.Generator().manual_seed(2)) for i in graph.inputs]
    check(graph, inputs, launched(kernel, graph, inputs))


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("element", ["float", "bf16"])
def test_elements_apart_are_read_to_the_last_and_no_further(
    tmp_path: Path, width: int, element: str
) -> None:
    steps = (2, 3, 4, 5, -1)
    cases = "".join(
        f"if (*step == {s}) store_n(to, load_strided(from, {s}L, *count), *count);\n"
        f"if (*step == {s}) store_strided(back, {s}L, load_n<vf>(to, *count), *count);\n"
        for s in steps
    )
    path = compiled(
        f'#define SO_VECTOR_BYTES {width}\n#include "tile.h"\nusing namespace so;\n'
        f"SO_KERNEL superopt_kernel(const {element}* from, float* to, {element}* back, "
        f"const long* step, const long* count) {{\n{cases}}}",
        tmp_path,
    )
    kernel, lanes = load_kernel(path, 5), width // 4
    dtype = torch.float32 if element == "float" else torch.bfloat16
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end, size = start + page, dtype.itemsize
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    try:
        for step in steps:
            for count in range(1, lanes + 1):
                reach = abs(step) * (count - 1) + 1
                x = torch.arange(1, reach + 1).to(dtype)
                ctypes.memmove(end - reach * size, x.data_ptr(), reach * size)
                first = end - (reach if step > 0 else 1) * size
                to, back = torch.zeros(lanes), torch.zeros(reach, dtype=dtype)
                begin = back.data_ptr() + (0 if step > 0 else (reach - 1) * size)
                numbers = torch.tensor([step, count])
                kernel(first, to.data_ptr(), begin, numbers.data_ptr(), numbers.data_ptr() + 8)
                wanted = x[::step] if step > 0 else x.flip(0)
                assert torch.equal(to[:count], wanted.float())
                kept = torch.zeros_like(back)
                kept[:: abs(step)] = x[:: abs(step)]
                assert torch.equal(back, kept)
    finally:
        libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 3)


@pytest.mark.parametrize("rows", [5, 37])
def test_passes_over_a_row_are_as_few_as_its_reductions_allow(tmp_path: Path, rows: int) -> None:
    g = BlockBuilder("passes", grid={"m": 1})
    x, y = (g.load(b.input_(name, (rows, 200)), rows, 200) for name in "xy")
    e = b.sigmoid(x)
    shares = b.div(b.reduce_sum(b.mul(e, y), -1), b.add(b.reduce_sum(e, -1), 1.0))
    spread = b.reduce_sum(b.mul(b.sub(e, shares), b.tanh(y)), -1)
    late = b.reduce(contraction.REDUCE_MAX, b.mul(x, y), -1)
    for value in (shares, spread, late):
        g.store(value, (rows, 1), rows, 1)
    g.store(b.mul(e, x), (rows, 200), rows, 200)
    graph = g.graph()
    source = lower(graph, CpuConfig(), graph.name)
    assert source.text.count("if (j1 < 200)") == 2  # the ends of two passes
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    inputs = [tensor(i, torch.Generator().manual_seed(1)) for i in graph.inputs]
    check(graph, inputs, launched(kernel, graph, inputs))


def test_long_rows_go_one_by_one() -> None:
    graph = reductions(64, 4096, 32)
    assert "fold_rows" not in lower(graph, CpuConfig(), graph.name).text


@pytest.mark.parametrize("width", [64, 32, 16])
def test_fold_rows(tmp_path: Path, width: int) -> None:
    path = compiled(
        f'#define SO_VECTOR_BYTES {width}\n#include "tile.h"\nusing namespace so;\n'
        "SO_KERNEL superopt_kernel(const float* partial, float* to, const long* rows) {\n"
        "fold_rows<combine_sum>(partial, to, *rows);\n"
        "fold_rows<combine_max>(partial, to + VL + 1, *rows); }",
        tmp_path,
    )
    lanes = width // 4
    partial = np.random.default_rng(2).standard_normal((lanes, lanes)).astype(np.float32)
    for rows in (1, lanes - 1, lanes):
        partial[rows:] = np.nan
        to = np.full(2 * lanes + 2, 77, np.float32)
        load_kernel(path, 3)(partial.ctypes.data, to.ctypes.data, np.array([rows]).ctypes.data)
        np.testing.assert_allclose(to[:rows], partial[:rows].sum(1), rtol=1e-5, atol=1e-6)
        assert (to[lanes + 1 : lanes + 1 + rows] == partial[:rows].max(1)).all()
        assert (to[rows : lanes + 1] == 77).all()
        assert (to[lanes + 1 + rows :] == 77).all()
        partial = np.random.default_rng(rows).standard_normal((lanes, lanes)).astype(np.float32)


def loose(columns: int, *, masked: bool) -> Graph:
    """Attention's sums without a maximum among the results, beside the logarithm of a sum of exponentials."""
    g = BlockBuilder("loose", grid={"m": 1}, loops={"n": 5})
    x = g.load(b.input_("x", (18, 5 * columns)), 18, ("n", columns))
    scores = b.mul(x, 0.3)
    if masked:
        scores = b.where(b.lt(b.abs_(x), 1e-3), float("-inf"), scores)
    top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(scores, -1), "n")
    value = b.exp(b.sub(scores, b.finite_or_zero(top)))
    total = b.accum_rescaled(b.reduce_sum(value, -1), top, "n")
    wide = b.accum_rescaled(b.matmul(value, b.transpose(x)), top, "n")
    g.store(b.div(wide, total), (18, 18), 18, 18)
    lse = b.add(b.log(total), b.accumulate(tile.ACCUM_LAST, top, "n"))
    if masked:
        g.store(lse, (18, 1), 18, 1)
    return g.graph()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [20, 64])
@pytest.mark.parametrize("step", [0.1, 5.0, 40.0])
def test_a_maximum_that_cancels_is_looked_for_where_it_grows(
    tmp_path: Path, step: float, columns: int, *, masked: bool
) -> None:
    graph = loose(columns, masked=masked)
    source = lower(graph, CpuConfig(), graph.name)
    assert "if (above(" in source.text
    assert "settled" not in source.text
    assert "max_fast" in source.text
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    x = torch.rand(18, 5 * columns, generator=torch.Generator().manual_seed(3)) / 8
    growth = torch.arange(5 * columns).div(columns, rounding_mode="floor")
    x += step * growth * torch.linspace(-1, 1, 18)[:, None]
    check(graph, [x], launched(kernel, graph, [x]))
    # of a row nothing at first, nothing at all, NaN or infinities among numbers, at its beginning and its end
    x[0], x[1, 3], x[2, : 2 * columns], x[3, -1], x[16] = (
        -torch.inf,
        torch.nan,
        -torch.inf,
        torch.nan,
        0,
    )
    x[17, 2 * columns], x[5, -1] = torch.inf, torch.inf
    for got, want in zip(launched(kernel, graph, [x]), run_reference(graph, [x]), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize(
    ("result", "seen"),
    [
        (lambda total, top: b.div(b.mul(total, 2.0), total), False),
        (lambda total, top: b.add(top, b.log(total)), False),
        (lambda total, top: b.log(total), True),
        (lambda total, top: total, True),
        (lambda total, top: b.div(total, b.maximum(total, 1.0)), True),
        (lambda total, top: b.sub(b.log(total), top), True),
        (lambda total, top: top, True),
    ],
)
def test_which_maxima_cancel(result, seen: bool) -> None:
    g = BlockBuilder("cancels", grid={"m": 1}, loops={"n": 5})
    x = g.load(b.input_("x", (18, 100)), 18, ("n", 20))
    top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(x, -1), "n")
    total = b.accum_rescaled(b.reduce_sum(b.exp(b.sub(x, top)), -1), top, "n")
    g.store(result(total, b.accumulate(tile.ACCUM_LAST, top, "n")), (18, 1), 18, 1)
    assert cancels(top, list(g.graph().nodes())) != seen


def guessed(rows: int, columns: int, loops: int, hidden: float, dtype: DType = DType.BF16) -> Graph:
    """Attention's products of 16 bits with and without a loop over keys."""
    keys, block = columns * max(loops, 1), ("m", rows)
    g = BlockBuilder("guessed", grid={"m": 2}, loops={"n": loops} if loops else {})
    along = ("n", columns) if loops else columns
    x, mask = (g.load(b.input_(n, (2 * rows, keys)), block, along) for n in ("x", "mask"))
    y = b.cast(g.load(b.input_("y", (keys, 24), dtype), along, 24), DType.F32)
    scores = b.where(b.gt(mask, 0.0), b.mul(x, 0.3), hidden)
    top = b.reduce_max(scores, -1)
    if loops:
        top = b.accumulate(tile.PREFIX_MAX, top, "n")
    value = b.exp(b.sub(scores, b.finite_or_zero(top) if loops else top))
    wide = b.matmul(b.cast(b.cast(value, dtype), DType.F32), y)
    total = b.reduce_sum(value, -1)
    if loops:
        wide, total = (b.accum_rescaled(v, top, "n") for v in (wide, total))
    g.store(b.cast(b.div(wide, total), dtype), (2 * rows, 24), block, 24)
    return g.graph()


@pytest.mark.parametrize(
    ("rows", "columns", "loops"), [(20, 70, 0), (5, 700, 0), (20, 40, 3), (18, 64, 2)]
)
@pytest.mark.parametrize("hidden", [-torch.inf, -1e9])
def test_a_maximum_is_looked_for_only_where_another_number_is_too_far_from_it(
    tmp_path: Path, rows: int, columns: int, loops: int, hidden: float
) -> None:
    graph = guessed(rows, columns, loops, hidden)
    source = lower(graph, CpuConfig(pairs=True), graph.name)
    assert ("!over(" if loops else "missed") in source.text
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    draws = torch.Generator().manual_seed(3)
    for size in (0.1, 5.0, 300.0, 1e30):
        inputs = [tensor(i, draws) for i in graph.inputs]
        x, mask, _ = inputs
        x *= size
        for strange in (False, True):
            if strange:  # first numbers far below the others, far above, hidden; all hidden; NaN and infinities
                x[0, :20] -= 1e3
                x[1, :20] += 1e3
                mask[2, :20], mask[3], mask[4:7, 16:] = -1, -1, -1
                mask[:, -1] = 1
                x[7, 5], x[8, -1], x[9, 0], x[5, -1] = torch.nan, torch.nan, torch.inf, -torch.inf
            (got,), (want,) = launched(kernel, graph, inputs), run_reference(graph, inputs)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2, equal_nan=True)


def test_no_maximum_is_guessed_where_values_would_leave_their_range() -> None:
    for columns in (70, 700):
        text = lower(guessed(20, columns, 0, -1e9), CpuConfig(), "floats").text
        assert "missed" not in text  # exact exponentials are of numbers below 0
        half = lower(guessed(20, columns, 0, -1e9, DType.F16), CpuConfig(pairs=True), "half").text
        assert "missed" not in half


@pytest.mark.parametrize("left_out", [False, True])
def test_nan_that_is_left_out_of_sums_is_in_the_maximum(tmp_path: Path, *, left_out: bool) -> None:
    g = BlockBuilder("hidden", grid={"m": 1}, loops={"n": 5})
    x, y = (g.load(b.input_(name, (18, 100)), 18, ("n", 20)) for name in "xy")
    top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(x, -1), "n")
    value = b.exp(b.sub(x, b.finite_or_zero(top)))
    value = b.where(b.lt(y, 0.0), value, 0.0) if left_out else b.mul(value, y)
    wide = b.accum_rescaled(b.matmul(value, b.transpose(x)), top, "n")
    g.store(b.div(wide, b.accum_rescaled(b.reduce_sum(value, -1), top, "n")), (18, 18), 18, 18)
    graph = g.graph()
    source = lower(graph, CpuConfig(), graph.name)
    assert ("if (above(" in source.text) != left_out
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    inputs = [tensor(i, torch.Generator().manual_seed(1)) for i in graph.inputs]
    inputs[0][3, 7], inputs[1][3, 7] = torch.nan, 1.0
    for got, want in zip(
        launched(kernel, graph, inputs), run_reference(graph, inputs), strict=True
    ):
        assert want[3].isnan().all()
        torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_sums_along_a_part_of_the_maximum_do_not_have_all_of_its_nan() -> None:
    g = BlockBuilder("strided", grid={"m": 1}, loops={"n": 5})
    x = g.load(b.input_("x", (18, 100)), 18, ("n", 20))
    top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(x, -1), "n")
    value = b.exp(b.sub(x, b.finite_or_zero(top)))
    for total in (value, b.reduce_sum(value, -1)):
        one, other = (b.accum_rescaled(v, top, "n") for v in (b.mul(total, 2.0), total))
        found = BlockBuilder("one", grid={"m": 1}, loops={"n": 5})
        found.store(b.div(one, other), one.shape, *one.shape)
        assert cancels(top, list(found.graph().nodes())) == (total is not value)


def test_a_shift_that_is_also_a_result_is_not_loose(tmp_path: Path) -> None:
    """Scores and scores times a number have one maximum, up to that number: one cancels, the other is seen."""
    g = BlockBuilder("both", grid={"m": 1}, loops={"n": 5})
    x = g.load(b.input_("x", (18, 100)), 18, ("n", 20))
    for scores, seen in ((b.mul(x, 0.125), False), (x, True)):
        top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(scores, -1), "n")
        value = b.exp(b.sub(scores, b.finite_or_zero(top)))
        total = b.accum_rescaled(b.reduce_sum(value, -1), top, "n")
        wide = b.accum_rescaled(b.matmul(value, b.transpose(x)), top, "n")
        g.store(b.div(wide, total), (18, 18), 18, 18)
        if seen:
            g.store(total, (18, 1), 18, 1)
            g.store(b.accumulate(tile.ACCUM_LAST, top, "n"), (18, 1), 18, 1)
    graph = g.graph()
    (kernel,) = compile_many([lower(graph, CpuConfig(), graph.name)], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    x = torch.rand(18, 100, generator=torch.Generator().manual_seed(3)) / 8
    x += 0.5 * torch.arange(100).div(20, rounding_mode="floor")
    check(graph, [x], launched(kernel, graph, [x]))


def running(dtype: DType, power: int, *, homogeneous: bool) -> Graph:
    """Sums over tiles of 20 with a running maximum per row, which is a result, too."""
    g = BlockBuilder("running", grid={"m": 1}, loops={"n": 5})
    x = g.load(b.input_("x", (18, 100), dtype), 18, ("n", 20))
    top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(x, -1), "n")
    value = b.exp(b.mul(b.sub(x, b.finite_or_zero(top)), float(power))) if homogeneous else x
    wide = b.accum_rescaled(b.matmul(value, b.transpose(x)), top, "n", power)
    g.store(b.accum_rescaled(b.reduce_sum(value, -1), top, "n", power), (18, 1), 18, 1)
    g.store(wide, (18, 18), 18, 18)
    g.store(b.accumulate(tile.ACCUM_LAST, top, "n"), (18, 1), 18, 1)
    return g.graph()


@pytest.mark.parametrize(
    ("dtype", "power", "homogeneous"),
    [
        (DType.F32, 1, True),
        (DType.F32, 20, True),
        (DType.F64, 2, True),
        (DType.F32, 1, False),
    ],
)
@pytest.mark.parametrize("step", [0.1, 1.5, 3.0, 60.0])
def test_a_shift_may_lag(
    tmp_path: Path, step: float, dtype: DType, power: int, *, homogeneous: bool
) -> None:
    graph = running(dtype, power, homogeneous=homogeneous)
    source = lower(graph, CpuConfig(), graph.name)
    assert ("lagging" in source.text) == homogeneous
    # no value gets larger than by exp(2)
    assert all(f"{2 / power}f" in line for line in source.text.splitlines() if "lagging" in line)
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    x = torch.rand(18, 100, generator=torch.Generator().manual_seed(3)) / 8
    x += (
        step * torch.arange(100).div(20, rounding_mode="floor") * torch.linspace(-1, 1, 18)[:, None]
    )
    x = x.to(DTYPES[dtype])
    check(graph, [x], launched(kernel, graph, [x]))
    if not homogeneous:
        return
    x[0], x[1, 30], x[2, :60], x[17, 99] = -torch.inf, torch.nan, -torch.inf, torch.inf
    found, exact = launched(kernel, graph, [x]), run_reference(graph, [x])
    for got, want in ((found[0], exact[0]), (found[2], exact[2])):
        torch.testing.assert_close(got, want, equal_nan=True)
