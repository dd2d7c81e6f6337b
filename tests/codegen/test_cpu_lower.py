"""Lowered block graphs against their meaning (superopt.ir.semantics) evaluated by PyTorch."""

import platform
from pathlib import Path

import pytest
import torch

from superopt.codegen.cpu.compile import find_compiler
from superopt.codegen.cpu.config import Contraction, CpuConfig
from superopt.codegen.cpu.expressions import LOWER
from superopt.codegen.cpu.kernel import Kernel, compile_many
from superopt.codegen.cpu.lower import lower
from superopt.codegen.errors import CodegenError
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder, accum_rescaled, accum_sum, accumulate, finite_or_zero
from superopt.ir.graph import Graph
from superopt.ir.ops import contraction, elementwise, tile
from superopt.ir.types import DType
from superopt.verify.reference import run_reference
from tests.block_graphs import BLOCK_GRAPHS
from tests.codegen.edges import EDGES, running_maximum

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

TORCH = {
    DType.F64: torch.float64,
    DType.F32: torch.float32,
    DType.F16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.I64: torch.int64,
    DType.I32: torch.int32,
    DType.BOOL: torch.bool,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def tensor(node, generator) -> torch.Tensor:
    type_ = node.tensor
    if type_.dtype is DType.BOOL:
        dense = torch.rand(type_.shape, generator=generator) < 0.5
    elif type_.dtype.is_integer:
        dense = torch.randint(-5, 20, type_.shape, generator=generator, dtype=TORCH[type_.dtype])
    else:
        dense = torch.randn(type_.shape, generator=generator).to(TORCH[type_.dtype])
    if type_.strides is None:
        return dense
    size = 1 + sum((d - 1) * s for d, s in zip(type_.shape, type_.strides, strict=True))
    held = torch.empty(size, dtype=dense.dtype).as_strided(type_.shape, type_.strides)
    once = tuple(slice(None) if step else slice(1) for step in type_.strides)
    held[once] = dense[once]
    return held


def check(graph: Graph, folder: Path, *, tolerance: float = 2e-5, config: CpuConfig | None = None):
    source = lower(graph, config or CpuConfig(), graph.name)
    (kernel,) = compile_many([source], folder)
    assert isinstance(kernel, Kernel), kernel
    generator = torch.Generator().manual_seed(3)
    inputs = [tensor(i, generator) for i in graph.inputs]
    # float32 results of PyTorch depend on its build: whoever is nearer to the truth is right
    expected = run_reference(graph, inputs, dtype_override=torch.float64)
    guard = 8
    held, outputs = [], []
    for node in graph.outputs:
        dtype = TORCH[node.tensor.dtype]
        whole = torch.full((node.tensor.elements + 2 * guard,), 77).to(dtype)
        held.append(whole)
        outputs.append(whole[guard : guard + node.tensor.elements].view(node.shape))
    pointers = [t.data_ptr() for t in (*inputs, *outputs)]
    kernel(*pointers)
    first = [o.clone() for o in outputs]
    for _ in range(2):  # nothing but its operands decides a result
        kernel(*pointers)
        for got, before in zip(outputs, first, strict=True):
            torch.testing.assert_close(got, before, rtol=0, atol=0, equal_nan=True)
    for whole, got, want in zip(held, outputs, expected, strict=True):
        assert (whole[:guard] == torch.full((), 77).to(whole.dtype)).all()
        assert (whole[-guard:] == torch.full((), 77).to(whole.dtype)).all()
        if got.dtype.is_floating_point:
            near = 1e-2 if got.dtype in (torch.bfloat16, torch.float16) else tolerance
            torch.testing.assert_close(got.double(), want, rtol=near, atol=near, equal_nan=True)
        else:
            assert torch.equal(got, want)
    return source


def attention(heads, queries, keys, width, q_tile, k_tile, *, causal=False, dtype=DType.F32):
    q = b.input_("q", (heads, queries, width), dtype)
    k = b.input_("k", (heads, keys, width), dtype)
    v = b.input_("v", (heads, keys, width), dtype)
    grid = {"h": heads, "m": -(-queries // q_tile)}
    build = BlockBuilder("attention", grid=grid, loops={"n": -(-keys // k_tile)})
    if causal:
        build.bound("n", {"m": q_tile, "n": -k_tile}, q_tile - 1)
    q, k, v = (
        b.cast(t, DType.F32)
        for t in (
            build.load(q, ("h", 1), ("m", q_tile), width),
            build.load(k, ("h", 1), ("n", k_tile), width),
            build.load(v, ("h", 1), ("n", k_tile), width),
        )
    )
    s = b.mul(b.matmul(q, b.transpose(k)), width**-0.5)
    if causal:
        i = b.reshape(build.index(queries, ("m", q_tile)), (1, q_tile, 1))
        j = b.reshape(build.index(keys, ("n", k_tile)), (1, 1, k_tile))
        s = b.where(b.le(j, i), s, float("-inf"))
    m = accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), "n")
    p = b.exp(b.sub(s, finite_or_zero(m)))
    total = accum_rescaled(b.reduce_sum(p, -1), m, "n")
    o = accum_rescaled(b.matmul(p, v), m, "n")
    build.store(
        b.cast(b.div(o, total), dtype), (heads, queries, width), ("h", 1), ("m", q_tile), width
    )
    return build.graph()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("heads", "queries", "keys", "width", "q_tile", "k_tile"),
    [
        (2, 32, 64, 16, 16, 16),
        (1, 37, 53, 24, 16, 20),
        (2, 5, 100, 64, 1, 33),
        (1, 40, 40, 7, 40, 9),
    ],
)
def test_attention(folder, heads, queries, keys, width, q_tile, k_tile, causal):
    check(attention(heads, queries, keys, width, q_tile, k_tile, causal=causal), folder)


def test_long_blocks_come_first():
    causal, plain = (
        lower(attention(2, 64, 64, 8, 16, 16, causal=c), CpuConfig(), "a").text
        for c in (True, False)
    )
    assert "block_index = 7L; block_index >= 0; --block_index" in causal
    assert "block_index = 0; block_index < 8L; ++block_index" in plain


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_attention_16_bit(folder, dtype):
    check(attention(2, 37, 70, 32, 16, 32, dtype=dtype), folder)


@pytest.mark.parametrize("columns", [5000, 70001, 300007])
def test_long_sums_are_no_chain(folder, columns):
    x = b.input_("x", (2, columns))
    build = BlockBuilder("total", grid={"m": 2})
    row = build.load(x, ("m", 1), columns)
    build.store(b.reduce_sum(b.mul(row, row), -1), (2, 1), ("m", 1), 1)
    build.store(b.reduce_max(row, -1), (2, 1), ("m", 1), 1)
    graph = build.graph()
    source = check(graph, folder, tolerance=1e-5)
    # equal numbers: every addition of a chain rounds the same way
    (kernel,) = compile_many([source], folder)
    values = torch.full((2, columns), 1.2345)
    total, top = torch.empty(2, 1), torch.empty(2, 1)
    kernel(values.data_ptr(), total.data_ptr(), top.data_ptr())
    exact = (values.double() ** 2).sum(-1, keepdim=True)
    assert ((total - exact).abs() / exact).max() < 16 * torch.finfo(torch.float32).eps
    assert (top == values[:, :1]).all()


@pytest.mark.parametrize(
    ("shape", "axes"), [((9001, 5), (0,)), ((3, 2051, 5), (0, 1)), ((700, 9), (0, 1))]
)
def test_long_sums_over_rows_are_no_chain(folder, shape, axes):
    x = b.input_("x", shape)
    build = BlockBuilder("total")
    tile = build.load(x, *shape)
    total = b.reduce_sum(tile, tuple(a - len(shape) for a in axes))
    build.store(total, total.shape, *total.shape)
    source = check(build.graph(), folder, tolerance=1e-5)
    (kernel,) = compile_many([source], folder)
    values = torch.full(shape, 1.2345)
    found = torch.empty(total.shape)
    kernel(values.data_ptr(), found.data_ptr())
    exact = values.double().sum(axes, keepdim=True)
    assert ((found - exact).abs() / exact).max() < 16 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("past", [False, True])
@pytest.mark.parametrize("columns", [64, 203, 2100])
def test_pairs_of_16_bit_vectors(folder, columns, past):
    x, gain = b.input_("x", (5, columns), DType.BF16), b.input_("gain", (columns,), DType.BF16)
    build = BlockBuilder("scaled", grid={"m": 3})
    row = b.cast(build.load(x, ("m", 2), columns), DType.F32)
    total = b.reduce_sum(b.mul(row, row), -1)
    scaled = b.mul(
        b.div(row, b.sqrt(total)),
        b.reshape(b.cast(build.load(gain, columns), DType.F32), (1, columns)),
    )
    build.store(b.cast(scaled, DType.BF16), (5, columns), ("m", 2), columns)
    build.store(b.reduce_max(row, -1), (5, 1), ("m", 2), 1)
    source = check(build.graph(), folder, config=CpuConfig(store_past=past))
    assert ("store_pair_past(" if past else "store_pair(") in source.text


def test_pairs_only_where_they_pay(folder):
    x = b.input_("x", (4, 200), DType.BF16)
    build = BlockBuilder("widened", grid={"m": 4})
    row = b.cast(build.load(x, ("m", 1), 200), DType.F32)
    build.store(b.exp(row), (4, 200), ("m", 1), 200)
    assert "load_half" not in check(build.graph(), folder).text


def test_lines_of_large_outputs_are_fetched_for_writing():
    def text(rows, columns, tile_, **options):
        x = b.input_("x", (rows, columns))
        build = BlockBuilder("twice", grid={"m": rows, "n": -(-columns // tile_)})
        y = b.mul(build.load(x, ("m", 1), ("n", tile_)), 2.0)
        build.store(y, (rows, columns), ("m", 1), ("n", tile_))
        return lower(build.graph(), CpuConfig(**options), "twice").text

    assert "+ 512L, 1, 3)" in text(512, 1024, 1024)
    for other in (
        text(16, 1024, 1024),  # stays in the caches
        text(512, 1024, 256),  # what follows in a row is another block's
        text(512, 1024, 1024, store_past=True),
        text(512, 1024, 1024, prefetch=False),
    ):
        assert ", 1, 3)" not in other


def linear(rows, inner, columns, tiles, *, transposed, norm=False, strides=None):
    m_tile, k_tile, n_tile = tiles
    x = b.input_("x", (rows, inner), **({"strides": strides} if strides else {}))
    shape = (columns, inner) if transposed else (inner, columns)
    w = b.input_("w", shape)
    grid = {"m": -(-rows // m_tile), "n": -(-columns // n_tile)}
    build = BlockBuilder("linear", grid=grid, loops={"k": -(-inner // k_tile)})
    xt = build.load(x, ("m", m_tile), ("k", k_tile))
    if transposed:
        wt = b.transpose(build.load(w, ("n", n_tile), ("k", k_tile)))
    else:
        wt = build.load(w, ("k", k_tile), ("n", n_tile))
    y = accum_sum(b.matmul(xt, wt), "k")
    if norm:
        squares = accum_sum(b.reduce_sum(b.mul(xt, xt), -1), "k")
        y = b.div(y, b.sqrt(b.add(b.div(squares, float(inner)), 1e-6)))
    build.store(y, (rows, columns), ("m", m_tile), ("n", n_tile))
    return build.graph()


@pytest.mark.parametrize("contraction_", ["auto", "pack", "dot"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        ((16, 64, 48), (16, 16, 48)),
        ((13, 70, 100), (8, 32, 33)),
        ((1, 600, 40), (1, 600, 16)),
        ((20, 1024, 17), (20, 512, 17)),
        ((9, 33, 1), (4, 8, 1)),
        ((16, 4096, 256), (16, 8, 256)),
    ],
)
def test_linear(folder, shape, tiles, transposed, contraction_):
    graph = linear(*shape, tiles, transposed=transposed)
    check(graph, folder, config=CpuConfig(contraction=contraction_), tolerance=5e-4)


@pytest.mark.parametrize("rows", [41, 64, 90])
@pytest.mark.parametrize("inner", [600, 300])
def test_some_rows_are_the_columns_of_a_product(folder, rows, inner):
    graph = linear(rows, 600, 2000, (48 if rows == 90 else rows, inner, 1300), transposed=True)
    assert "gemm_swapped<" in check(graph, folder, tolerance=5e-4).text


@pytest.mark.parametrize("shape", [(33, 600, 600), (61, 600, 600), (48, 64, 2000), (48, 2000, 64)])
def test_rows_that_fill_no_vectors_or_are_not_few_stay_rows(shape):
    source = lower(linear(*shape, shape, transposed=True), CpuConfig(), "k")
    assert "gemm_swapped<" not in source.text


@pytest.mark.parametrize(
    ("rows", "depth", "tile", "fetched"),
    [(37, 300, (8, 3), "true"), (37, 96, (6, 4), "false"), (217, 300, (6, 4), "false")],
)
def test_what_few_rows_transpose_next_is_fetched(rows, depth, tile, fetched):
    graph = linear(rows, depth, 200, (rows, depth, 80), transposed=True)
    text = lower(graph, CpuConfig(), "k").text
    assert f"gemm_packed<{tile[0]}, (int)min_of({tile[1]}, " in text
    assert f", {depth}, {fetched}>({rows}, n0, {depth}" in text


def test_many_rows_share_groups_of_panels(folder):
    graph = linear(517, 600, 300, (517, 600, 150), transposed=True)
    assert "gemm_tall<" in check(graph, folder, tolerance=5e-4).text


@pytest.mark.parametrize(("transposed", "kind"), [(False, "nn"), (True, "packed")])
@pytest.mark.parametrize(("columns", "rows"), [(10, "(10 <= VL ? 11 : 6)"), (17, "6")])
def test_few_columns_are_multiplied_by_more_rows_at_once(folder, transposed, kind, columns, rows):
    graph = linear(150, 70, columns, (64, 70, columns), transposed=transposed)
    assert f"gemm_{kind}<{rows}, " in check(graph, folder).text


def test_norm_linear(folder):
    check(linear(7, 100, 50, (4, 32, 20), transposed=False, norm=True), folder)


def test_strided_input(folder):
    check(linear(6, 32, 24, (4, 16, 24), transposed=False, strides=(1, 6)), folder)
    check(linear(6, 32, 24, (4, 16, 24), transposed=False, norm=True, strides=(70, 2)), folder)


@pytest.mark.parametrize("extent", [48, 50])
def test_two_loops_one_after_the_other(folder, extent):
    x = b.input_("x", (6, extent))
    build = BlockBuilder("normalize", grid={"m": 3}, loops={"k": 4, "j": 4})
    first = build.load(x, ("m", 2), ("k", 13))
    mean = b.div(accum_sum(b.reduce_sum(first, -1), "k"), float(extent))
    second = build.load(x, ("m", 2), ("j", 13))
    build.store(b.sub(second, mean), (6, extent), ("m", 2), ("j", 13))
    build.store(mean, (6, 1), ("m", 2), 1)
    check(build.graph(), folder)


def test_second_pass_over_one_loop(folder):
    x = b.input_("x", (6, 50))
    build = BlockBuilder("softmax", grid={"m": 3}, loops={"k": 4})
    t = build.load(x, ("m", 2), ("k", 13))
    top = accumulate(tile.ACCUM_MAX, b.reduce_max(t, -1), "k")
    e = b.exp(b.sub(t, top))
    build.store(b.div(e, accum_sum(b.reduce_sum(e, -1), "k")), (6, 50), ("m", 2), ("k", 13))
    check(build.graph(), folder)


def test_nested_loops(folder):
    x, w = b.input_("x", (10, 24)), b.input_("w", (24, 30))
    build = BlockBuilder("nested", grid={"m": 2}, loops={"n": 4, "k": 3})
    y = accum_sum(
        b.matmul(build.load(x, ("m", 5), ("k", 8)), build.load(w, ("k", 8), ("n", 8))), "k"
    )
    build.store(y, (10, 30), ("m", 5), ("n", 8))
    build.store(accum_sum(b.reduce_sum(b.exp(y), -1), "n"), (10, 1), ("m", 5), 1)
    check(build.graph(), folder, tolerance=1e-4)


@pytest.mark.parametrize("axes", [(-1,), (-2,), (-1, -2), (-3,)])
@pytest.mark.parametrize(
    "op",
    [
        contraction.REDUCE_SUM,
        contraction.REDUCE_MAX,
        contraction.REDUCE_MIN,
        contraction.REDUCE_PROD,
    ],
)
def test_reductions(folder, op, axes):
    x = b.input_("x", (4, 6, 37))
    build = BlockBuilder("reduce", grid={"a": 2})
    t = build.load(x, ("a", 2), 6, 37)
    y = b.reduce(op, b.mul(t, 0.5), axes)
    shape = [2, 6, 37]
    for a in axes:
        shape[a] = 1
    build.store(y, [2 * shape[0], *shape[1:]], ("a", shape[0]), *shape[1:])
    check(build.graph(), folder)


@pytest.mark.parametrize("op", [tile.ACCUM_SUM, tile.ACCUM_MAX, tile.ACCUM_MIN, tile.ACCUM_PROD])
@pytest.mark.parametrize("extent", [24, 22])
def test_accumulators_over_the_dim_itself(folder, op, extent):
    x = b.input_("x", (5, extent))
    build = BlockBuilder("accumulate", grid={"m": 1}, loops={"k": 3})
    build.store(accumulate(op, build.load(x, 5, ("k", 8)), "k"), (5, 8), 5, 8)
    check(build.graph(), folder)


def test_last_and_prefix(folder):
    x = b.input_("x", (5, 22))
    build = BlockBuilder("last", grid={"m": 1}, loops={"k": 3})
    m = accumulate(tile.PREFIX_MAX, b.reduce_max(build.load(x, 5, ("k", 8)), -1), "k")
    build.store(accumulate(tile.ACCUM_LAST, m, "k"), (5, 1), 5, 1)
    check(build.graph(), folder)


UNARY = [
    o
    for o in vars(elementwise).values()
    if getattr(o, "arity", None) == 1 and o in LOWER and o.attrs_class is None
]
BINARY = [o for o in vars(elementwise).values() if getattr(o, "arity", None) == 2 and o in LOWER]
BITS = {elementwise.AND, elementwise.OR, elementwise.XOR, elementwise.SHL, elementwise.SHR}


def test_every_float_op(folder):
    x, y = b.input_("x", (3, 37)), b.input_("y", (3, 37))
    build = BlockBuilder("unary", grid={"m": 3})
    s = build.load(x, ("m", 1), 37)
    t = build.load(y, ("m", 1), 37)
    for op in UNARY:
        if op is not elementwise.NOT:
            build.store(b.elementwise_op(op, s), (3, 37), ("m", 1), 37)
    for op in BINARY:
        if op not in BITS:
            build.store(b.elementwise_op(op, s, t), (3, 37), ("m", 1), 37)
    check(build.graph(), folder, tolerance=1e-4)


@pytest.mark.parametrize("dtype", [DType.I64, DType.I32])
def test_integer_ops(folder, dtype):
    x, y = b.input_("x", (3, 37), dtype), b.input_("y", (3, 37), dtype)
    build = BlockBuilder("integers", grid={"m": 3})
    s = build.load(x, ("m", 1), 37)
    t = b.add(b.abs_(build.load(y, ("m", 1), 37)), 1)
    real = (elementwise.DIV, elementwise.ATAN2, elementwise.COPYSIGN)
    ops = [o for o in BINARY if o not in real]
    for op in (*ops, elementwise.NEG, elementwise.ABS, elementwise.SIGN, elementwise.NOT):
        values = (s, t) if op.arity == 2 else (s,)
        if op in (elementwise.POW, elementwise.SHL, elementwise.SHR):
            values = (s, b.minimum(t, 5))
        build.store(b.elementwise_op(op, *values), (3, 37), ("m", 1), 37)
    build.store(b.reduce_sum(s, -1), (3, 1), ("m", 1), 1)
    build.store(b.cast(s, DType.F32), (3, 37), ("m", 1), 37)
    check(build.graph(), folder)


def test_float64(folder):
    x = b.input_("x", (6, 40), DType.F64)
    w = b.input_("w", (40, 12), DType.F64)
    build = BlockBuilder("double", grid={"m": 2}, loops={"k": 3})
    t = build.load(x, ("m", 3), ("k", 16))
    y = accum_sum(b.matmul(b.exp(t), build.load(w, ("k", 16), 12)), "k")
    build.store(y, (6, 12), ("m", 3), 12)
    check(build.graph(), folder, tolerance=1e-12)


def test_masks_and_labels(folder):
    x = b.input_("x", (5, 40))
    labels = b.input_("labels", (5, 1), DType.I64)
    keep = b.input_("keep", (5, 40), DType.BOOL)
    build = BlockBuilder("pick", grid={"m": 5}, loops={"c": 3})
    t = build.load(x, ("m", 1), ("c", 16))
    at = b.eq(b.reshape(build.index(40, ("c", 16)), (1, 16)), build.load(labels, ("m", 1), 1))
    k = build.load(keep, ("m", 1), ("c", 16))
    picked = b.where(b.and_(at, b.not_(k)), t, 0.0)
    build.store(accum_sum(b.reduce_sum(picked, -1), "c"), (5, 1), ("m", 1), 1)
    build.store(b.and_(at, k), (5, 40), ("m", 1), ("c", 16))
    check(build.graph(), folder)


def test_moving_elements(folder):
    x = b.input_("x", (4, 6, 10))
    build = BlockBuilder("moves", grid={"a": 2})
    t = build.load(x, ("a", 2), 6, 10)
    build.store(b.exp(b.permute(t, (1, 0, 2))), (6, 4, 10), 6, ("a", 2), 10)
    build.store(b.permute(b.exp(t), (0, 2, 1)), (4, 10, 6), ("a", 2), 10, 6)
    build.store(b.slice_(b.mul(t, 2.0), -1, 1, 8, 3), (4, 6, 3), ("a", 2), 6, 3)
    build.store(b.flip(t, (-1, -2)), (4, 6, 10), ("a", 2), 6, 10)
    build.store(b.reshape(b.neg(t), (2, 60)), (4, 60), ("a", 2), 60)
    build.store(b.concat([t, b.exp(t)], -1), (4, 6, 20), ("a", 2), 6, 20)
    build.store(b.pad(t, -2, 1, 2, 3.0), (4, 9, 10), ("a", 2), 9, 10)
    build.store(b.add(b.reduce_max(t, -1), t), (4, 6, 10), ("a", 2), 6, 10)
    check(build.graph(), folder)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
@pytest.mark.parametrize("axis", [-1, -2, -3])
def test_parts_are_read_where_they_lie(folder, dtype, axis):
    build = BlockBuilder("joined", grid={"a": 2})
    x = b.cast(build.load(b.input_("x", (6, 5, 131), dtype), ("a", 3), 5, 131), DType.F32)
    halves = b.cast(build.load(b.input_("y", (6, 5, 131), dtype), ("a", 3), 5, 131), dtype.wide)
    mean = b.reduce_sum(x, axis)  # one place along the axis, and often one value per row
    joined = b.concat([x, b.neg(halves), b.slice_(mean, axis, 0, 1)], axis)
    rolled = b.concat([b.slice_(x, axis, 2, x.shape[axis]), b.slice_(x, axis, 0, 2)], axis)
    shifted = b.slice_(b.pad(b.mul(x, halves), axis, 2, 1, 0.5), axis, 0, x.shape[axis])
    turned = b.flip(b.pad(x, axis, 0, 1), axis)
    for value in (b.exp(joined), b.add(rolled, x), b.add(shifted, halves), b.mul(turned, 2.0)):
        shape = value.shape
        build.store(value, (2 * shape[0], *shape[1:]), ("a", shape[0]), *shape[1:])
    build.store(
        b.reduce_sum(b.mul(turned, turned), -1),
        (2 * turned.shape[0], turned.shape[1], 1),
        ("a", turned.shape[0]),
        turned.shape[1],
        1,
    )
    graph = build.graph()
    check(graph, folder, tolerance=2e-5)
    assert "const tile" not in lower(graph, CpuConfig(), graph.name).text


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_tiles_are_copied_into_rows_that_loops_can_read(folder, dtype):
    build = BlockBuilder("across", grid={"a": 2}, loops={"k": 3})
    across = build.load(b.input_("x", (3, 37, 45), dtype, strides=(1665, 1, 37)), ("a", 2), 37, 45)
    weights = build.load(b.input_("w", (45,), dtype, strides=(4,)), 45)
    scaled = b.mul(b.cast(across, DType.F32), b.cast(weights, DType.F32))
    build.store(scaled, (3, 37, 45), ("a", 2), 37, 45)
    part = build.load(b.input_("y", (37, 45), dtype, strides=(1, 37)), ("k", 16), 45)
    build.store(accum_sum(b.reduce_sum(b.cast(part, DType.F32), -2), "k"), (1, 45), 1, 45)
    graph = build.graph()
    check(graph, folder)
    assert "load_strided(" not in lower(graph, CpuConfig(), graph.name).text


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_products_of_transposed_tiles_are_read_in_rows(folder, dtype):
    build = BlockBuilder("mixed", grid={"a": 3})
    x = build.load(b.input_("x", (3, 20, 37), dtype), ("a", 1), 20, 37)
    features = b.reshape(b.add(b.cast(x, DType.F32), 1.0), (20, 37))
    turned = b.cast(b.cast(b.permute(features, (1, 0)), dtype), DType.F32)
    weights = b.cast(build.load(b.input_("w", (20, 20), dtype), 20, 20), DType.F32)
    mixed = b.permute(b.add(b.matmul(turned, weights), 1.0), (1, 0))
    build.store(b.mul(b.reshape(mixed, (1, 20, 37)), 0.5), (3, 20, 37), ("a", 1), 20, 37)
    graph = build.graph()
    check(graph, folder, tolerance=1e-5 if dtype is DType.F32 else 1e-2)
    for pairs in (False, True):
        text = lower(graph, CpuConfig(pairs=pairs), graph.name).text
        assert "_strided(" not in text


def test_gathers(folder):
    build = BlockBuilder("gathers", grid={"m": 3})

    def places(name, count, extent):
        index = build.load(b.input_(name, (9, count), DType.I64), ("m", 3), count)
        return b.minimum(b.maximum(index, 0), extent - 1)

    table = build.load(b.input_("x", (20, 40)), 20, 40)
    rows = b.gather(table, b.broadcast(places("i", 1, 20), (3, 40)), -2)
    build.store(b.mul(rows, 2.0), (9, 40), ("m", 3), 40)
    exps = b.exp(build.load(b.input_("y", (9, 40)), ("m", 3), 40))
    build.store(b.gather(exps, places("k", 5, 40), -1), (9, 5), ("m", 3), 5)
    build.store(b.gather(b.flip(exps, (-1,)), places("l", 1, 40), -1), (9, 1), ("m", 3), 1)
    build.store(b.flip(exps, (-1,)), (9, 40), ("m", 3), 40)
    check(build.graph(), folder)


def test_rows_chosen_by_a_repeated_index_are_vectors(folder):
    build = BlockBuilder("rows", grid={"m": 3})
    table = build.load(b.input_("x", (20, 40)), 20, 40)
    # strides (1, 0): an index per row, repeated along it
    index = build.load(b.input_("i", (9, 40), DType.I64, strides=(1, 0)), ("m", 3), 40)
    inside = b.minimum(b.maximum(index, 0), 19)
    build.store(b.exp(b.gather(table, inside, -2)), (9, 40), ("m", 3), 40)
    graph = build.graph()
    check(graph, folder)
    assert "so::exp(" in lower(graph, CpuConfig(), graph.name).text
    assert "so::exp_one(" not in lower(graph, CpuConfig(), graph.name).text


def test_a_place_per_lane_is_a_vector(folder):
    build = BlockBuilder("lanes", grid={"m": 3})
    table = build.load(b.input_("x", (3, 20, 40)), 3, 20, 40)
    flat = build.load(b.input_("y", (9, 20), DType.BF16), ("m", 3), 20)
    distance = b.sub(b.iota((3, 40), -1, DType.I64), b.iota((3, 40), -2, DType.I64))
    near = b.minimum(b.maximum(distance, -7), 12)
    places = b.broadcast(b.reshape(b.add(near, 7), (3, 1, 40)), (3, 1, 40))
    build.store(b.exp(b.gather(table, places, -2)), (9, 1, 40), ("m", 3), 1, 40)
    along = b.reshape(b.add(near, 7), (3, 40))
    for data in (flat, b.flip(flat, (-1,)), b.exp(b.cast(flat, DType.F32))):
        build.store(b.exp(b.gather(data, along, -1)), (9, 40), ("m", 3), 40)
    graph = build.graph()
    check(graph, folder)
    assert "so::exp_one(" not in lower(graph, CpuConfig(), graph.name).text


@pytest.mark.parametrize(("rows", "columns"), [(3, 40), (3, 1)])
def test_an_index_beyond_its_tensor_gives_nan(folder, rows, columns):
    build = BlockBuilder("beyond", grid={"m": 1})
    index = build.load(b.input_("i", (rows, 1), DType.I64), rows, 1)
    table = build.load(b.input_("x", (20, columns)), 20, columns)
    found = b.gather(table, b.broadcast(index, (rows, columns)), -2)
    build.store(found, (rows, columns), rows, columns)
    graph = build.graph()
    (kernel,) = compile_many([lower(graph, CpuConfig(), graph.name)], folder)
    places, x = torch.tensor([[-1], [19], [20]]), torch.randn(20, columns)
    got = torch.zeros(rows, columns)
    kernel(*(t.data_ptr() for t in (places, x)), got.data_ptr())
    assert got[[0, 2]].isnan().all()
    assert torch.equal(got[1], x[19])


@pytest.mark.parametrize("used", ["as given", "some ignored", "from the end"])
def test_a_place_per_lane_beyond_its_tensor_gives_nan(folder, used):
    build = BlockBuilder("beyond_lanes", grid={"m": 1})
    places = build.load(b.input_("i", (1, 40), DType.I64), 1, 40)
    if used == "some ignored":  # what is chosen of saturated numbers is saturated
        places = b.where(b.ne(places, 40), places, 3)
    elif used == "from the end":  # and so is what a little is added to
        places = b.where(b.lt(places, 0), b.add(places, 20), places)
    table = build.load(b.input_("x", (1, 20)), 1, 20)
    build.store(b.gather(table, places, -1), (1, 40), 1, 40)
    graph = build.graph()
    source = lower(graph, CpuConfig(), graph.name)
    assert "load_scattered(" in source.text
    (kernel,) = compile_many([source], folder)
    places, x = torch.arange(40)[None] % 20, torch.randn(1, 20)
    beyond = [0, 17, 20, 30, 39]
    places[0, beyond] = torch.tensor([-21, 20, 2**31, 2**31 - 1, -(2**40)])
    if used == "from the end":
        places[0, 1:4] -= 20
    got = torch.zeros(1, 40)
    kernel(*(t.data_ptr() for t in (places, x)), got.data_ptr())
    inside = torch.tensor([n not in beyond for n in range(40)])
    assert got[:, ~inside].isnan().all()
    assert torch.equal(got[:, inside], torch.gather(x, 1, places[:, inside] % 20))


@pytest.mark.parametrize("used", ["compared", "chosen and compared", "clamped"])
def test_sums_wrap_at_the_ends_of_64_bits(folder, used):
    build = BlockBuilder("wraps", grid={"m": 1})
    given = build.load(b.input_("i", (1, 40), DType.I64), 1, 40)
    value = b.add(given, 5)
    if used == "chosen and compared":
        value = b.where(b.lt(given, 7), given, value)
    elif used == "clamped":
        value = b.maximum(value, 0)
    below = b.where(b.lt(value, 100), b.full((1, 40), 1.0), b.full((1, 40), 0.0))
    build.store(below, (1, 40), 1, 40)
    graph = build.graph()
    (kernel,) = compile_many([lower(graph, CpuConfig(), graph.name)], folder)
    i = torch.arange(40)[None] * 4
    i[0, :6] = torch.tensor([2**63 - 1, 2**63 - 5, 2**63 - 6, 2**31, -(2**40), -(2**63)])
    got = torch.zeros(1, 40)
    kernel(i.data_ptr(), got.data_ptr())
    sums = torch.where(i < 7, i, i + 5) if used == "chosen and compared" else i + 5
    assert torch.equal(got, (sums < 100).float())


@pytest.mark.parametrize("dtype", [DType.F32, DType.I64])
def test_scans_and_places_of_extremes(folder, dtype):
    build = BlockBuilder("along", grid={"a": 2})
    t = build.load(b.input_("x", (4, 6, 37), dtype), ("a", 2), 6, 37)
    for axis in (-1, -2, -3):
        shape = [4 if axis != -3 else 2, 6, 37]
        shape[axis] = 1 if axis != -3 else 2
        dims = [("a", shape[0] // 2), *shape[1:]]
        for op in (contraction.ARGMAX, contraction.ARGMIN):
            place = b.arg_reduce(op, b.abs_(b.sub(t, 1)), axis)
            build.store(place, shape, *dims)
        for kind in ("sum", "max", "min"):
            total = b.scan(t, axis, kind)
            build.store(b.mul(total, 2), (4, 6, 37), ("a", 2), 6, 37)
    check(build.graph(), folder)


def test_batched_matmul_broadcast_and_views(folder):
    q = b.input_("q", (2, 4, 3, 16))
    k = b.input_("k", (2, 1, 50, 16))
    build = BlockBuilder("grouped", grid={"b": 2, "n": 3})
    s = b.matmul(
        build.load(q, ("b", 1), 4, 3, 16),
        b.permute(build.load(k, ("b", 1), 1, ("n", 20), 16), (0, 1, 3, 2)),
    )
    build.store(s, (2, 4, 3, 50), ("b", 1), 4, 3, ("n", 20))
    check(build.graph(), folder)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels flush them by an x86 register")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_denormals_count_as_zero_in_products_alone_or_nowhere(folder, rows, kept):
    x, w = b.input_("x", (rows, 64)), b.input_("w", (64, 80))
    build = BlockBuilder("flushed")
    left = build.load(x, rows, 64)
    build.store(b.matmul(left, build.load(w, 64, 80)), (rows, 80), rows, 80)
    build.store(b.mul(left, 0.5), (rows, 64), rows, 64)
    source = lower(build.graph(), CpuConfig(denormals=kept), "flushed")
    (kernel,) = compile_many([source], folder)
    tiny, weights = torch.full((rows, 64), 2.0**-130), torch.full((64, 80), 2.0**20)
    product, half = torch.empty(rows, 80), torch.empty(rows, 64)
    for first in (1.0, 0.0):
        tiny[:, 0] = first
        kernel(*(t.data_ptr() for t in (tiny, weights, product, half)))
        assert (product == first * 2.0**20 + (63 * 2.0**-110 if kept else 0)).all()
        assert (half == tiny * 0.5).all()
        assert half[0, 1] > 0


@pytest.mark.parametrize("count", [40, 38], ids=["rows in one run", "rows in four runs"])
def test_rows_and_columns_of_several_dims(folder, count):
    # two heads of four, of queries, keys and values at once: columns in three runs
    x, w = b.input_("x", (4, 40, 24)), b.input_("w", (3, 4, 16, 24))
    build = BlockBuilder("projections", grid={"h": 2})
    rows = b.slice_(build.load(x, 4, 40, 24), -2, 0, count)
    columns = b.permute(build.load(w, 3, ("h", 2), 16, 24), (3, 0, 1, 2))
    product = b.matmul(b.reshape(rows, (4 * count, 24)), b.reshape(columns, (24, 96)))
    parts = b.reshape(product, (4, count, 3, 2, 16))
    build.store(parts, (4, count, 3, 4, 16), 4, count, 3, ("h", 2), 16)
    source = check(build.graph(), folder)
    assert source.text.count("gemm_packed") == 1
    assert "tile" not in source.text.split("block(")[1]  # nothing is copied


@pytest.mark.parametrize(("rows", "columns", "panels"), [(40, 1100, 1), (8, 1100, 0), (40, 300, 0)])
def test_rows_a_page_apart_are_copied_where_many_rows_read_them(folder, rows, columns, panels):
    x, w = b.input_("x", (rows, 24)), b.input_("w", (24, columns))
    build = BlockBuilder("scattered", grid={"n": 2})
    half = columns // 2
    product = b.matmul(build.load(x, rows, 24), build.load(w, 24, ("n", half)))
    build.store(product, (rows, columns), rows, ("n", half))
    source = check(build.graph(), folder)
    assert source.text.count("gemm_packed") == panels


def test_a_reshape_of_what_a_loop_has_just_written(folder):
    x, w = b.input_("x", (2, 6, 20)), b.input_("w", (20, 8))
    build = BlockBuilder("twice", grid={"g": 1}, loops={"n": 3})
    tile_ = b.exp(build.load(x, 2, ("n", 2), 20))
    kept = b.add(tile_, b.reduce_max(tile_, -1))
    product = b.matmul(
        b.reshape(b.div(kept, b.reduce_sum(kept, -1)), (4, 20)), build.load(w, 20, 8)
    )
    build.store(accum_sum(b.reshape(product, (2, 2, 8)), "n"), (2, 2, 8), 2, 2, 8)
    check(build.graph(), folder)


def test_fully_masked_rows_give_zero_over_zero(folder):
    x = b.input_("x", (3, 20))
    build = BlockBuilder("empty", grid={"m": 1}, loops={"k": 2})
    t = b.where(b.gt(build.load(x, 3, ("k", 10)), 1e9), 1.0, float("-inf"))
    m = accumulate(tile.PREFIX_MAX, b.reduce_max(t, -1), "k")
    one = b.add(b.exp(b.sub(t, finite_or_zero(m))), 1.0)
    build.store(accum_rescaled(b.reduce_sum(one, -1), m, "k"), (3, 1), 3, 1)
    check(build.graph(), folder)


SHARED = (
    *(name for name in BLOCK_GRAPHS if name.startswith("searched-")),
    "accumulators-bool",
    "half-arithmetic-bf16",
    "moves-bool",
    "rescaled-twice",
    "scalars",
    "two-axes-on-one-dim",
)
"""What the tests above do not have a form of."""


@pytest.fixture(scope="module")
def compiled(folder) -> Path:
    """Compile the shared graphs, several compilers at a time; `check` finds them in the folder."""
    graphs = [BLOCK_GRAPHS[name]() for name in SHARED]
    compile_many([lower(g, CpuConfig(), g.name) for g in graphs], folder)
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_the_block_graphs_of_all_backends(compiled, name):
    check(BLOCK_GRAPHS[name](), compiled, tolerance=1e-4)


def test_refusals_and_completeness():
    assert LOWER.missing() == []
    x = b.input_("x", (3, 20), DType.BOOL)
    build = BlockBuilder("scan", grid={"m": 1})
    build.store(b.scan(build.load(x, 3, 20), -1, "max"), (3, 20), 3, 20)
    with pytest.raises(CodegenError, match="scan"):
        lower(build.graph(), CpuConfig(), "scan")


@pytest.mark.parametrize("name", EDGES)
def test_edges(name: str, folder: Path) -> None:
    check(EDGES[name](), folder)


def test_a_running_maximum_of_ragged_tiles_stays_with_the_library() -> None:
    with pytest.raises(CodegenError, match="ragged along its own loop"):
        lower(running_maximum(), CpuConfig(), "g")


def test_single_elements_outside_their_tensor_stay_with_the_library() -> None:
    g = BlockBuilder("outside", grid={"m": 2, "n": 2})
    g.store(b.exp(g.load(b.input_("x", (3,)), ("m", "n", 1))), (3,), ("m", "n", 1))
    with pytest.raises(CodegenError, match="outside their tensor"):
        lower(g.graph(), CpuConfig(), "g")


@pytest.mark.parametrize("contraction_", ["dot", "pack"])
def test_a_product_over_nothing_is_zero(folder: Path, contraction_: Contraction) -> None:
    g = BlockBuilder("over_nothing", grid={"m": 3})
    x = g.load(b.input_("x", (14, 5)), 14, ("m", 3))
    g.store(b.matmul(x, b.transpose(x)), (42, 14), ("m", 14), 14)
    check(g.graph(), folder, config=CpuConfig(contraction=contraction_))


def test_infinities_under_a_maximum_that_stays_low(folder: Path) -> None:
    g = BlockBuilder("low", loops={"n": 2})
    t = b.where(b.gt(g.load(b.input_("x", (3, 4)), 3, ("n", 2)), 1e9), 1.0, float("-inf"))
    top = accumulate(tile.PREFIX_MAX, b.reduce_max(t, -1), "n")
    g.store(accum_rescaled(t, top, "n"), (3, 2), 3, 2)
    check(g.graph(), folder)


def test_the_largest_of_nothing_is_the_first(folder: Path) -> None:
    g = BlockBuilder("empty", grid={"m": 3})
    place = b.arg_reduce(contraction.ARGMAX, g.load(b.input_("x", (5,)), ("m", 3)), -1)
    g.store(place, (3,), ("m", 1))
    check(g.graph(), folder)
