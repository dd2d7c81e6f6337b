"""What C++ kernels do to tiles on their way into loops: shared divisors, transposed operands of products."""

from itertools import product
from pathlib import Path

import pytest
import torch

from superopt.codegen.cpu.compile import find_compiler
from superopt.codegen.cpu.config import Contraction, CpuConfig, configs
from superopt.codegen.cpu.divide import shared_divisions
from superopt.codegen.cpu.kernel import Kernel, compile_many
from superopt.codegen.cpu.lower import lower
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder
from superopt.ir.graph import Graph
from superopt.ir.node import topological
from superopt.ir.ops import elementwise
from superopt.ir.types import DType
from superopt.verify.reference import DTYPES, run_reference
from tests.codegen.meaning import check, launched, tensor

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

SIZES = (0.0, 1e-45, 3e-41, 1.17549435e-38, 1e-20, 0.3, 1.0, 7.0, 1e20, 9e37, 2.5e38, 3.4e38)
VALUES = torch.tensor([s * v for v in SIZES for s in (1, -1)] + [torch.inf, -torch.inf, torch.nan])


def run(graph: Graph, folder: Path, *inputs: torch.Tensor) -> torch.Tensor:
    (kernel,) = compile_many([lower(graph, CpuConfig(), graph.name)], folder)
    assert isinstance(kernel, Kernel), kernel
    out = torch.empty(graph.outputs[0].shape)
    kernel(*(t.data_ptr() for t in inputs), out.data_ptr())
    return out


@pytest.mark.parametrize("by_row", [True, False])
def test_shared_divisors_of_all_sizes(tmp_path: Path, by_row: bool) -> None:
    n = len(VALUES)
    g = BlockBuilder("divided", grid={"m": 1})
    x = g.load(b.input_("x", (n, n)), n, n)
    y = g.load(b.input_("y", (n, 1) if by_row else (1, n)), *((n, 1) if by_row else (1, n)))
    g.store(b.div(x, y), (n, n), n, n)
    graph = g.graph()
    divisions = [n for n in topological(shared_divisions(graph.outputs)) if n.op is elementwise.DIV]
    assert [d.tensor.elements for d in divisions] == [n]
    above, below = VALUES.repeat(n, 1), VALUES
    above, below = (above, below[:, None]) if by_row else (above.T.contiguous(), below[None, :])
    got = run(graph, tmp_path, above, below.contiguous())
    want = above / below
    least = torch.finfo(torch.float32).smallest_normal
    torch.testing.assert_close(got, want, rtol=3e-7, atol=2 * least * 2**-23, equal_nan=True)
    assert torch.equal(got.isnan(), want.isnan())


def test_divisions_that_stay() -> None:
    def kept(x_shape: tuple[int, ...], divisor: object, dtype: DType = DType.F32) -> int:
        g = BlockBuilder("g", grid={"m": 1})
        x = g.load(b.input_("x", x_shape, dtype), *x_shape)
        y = (
            divisor
            if isinstance(divisor, float)
            else g.load(b.input_("y", divisor, dtype), *divisor)
        )  # type: ignore[arg-type,misc]
        g.store(b.div(x, y), x_shape, *x_shape)
        nodes = topological(shared_divisions(g.graph().outputs))
        return sum(n.op is elementwise.DIV and n.tensor.elements == 12 for n in nodes)

    assert kept((3, 4), (3, 4)) == 1
    assert kept((3, 4), (1, 4)) == 1
    assert kept((3, 4), (3, 1), DType.BF16) == 1
    assert kept((3, 4), 3e-39) == 1
    assert kept((3, 4), (3, 1)) == kept((3, 4), 3.0) == 0


@pytest.mark.parametrize(
    ("bound", "dtype", "left"),
    [
        (0.0, DType.F32, 0),
        (-1.0, DType.F32, 1),
        (None, DType.F32, 1),
        (0.0, DType.F64, 1),
    ],
)
def test_squares_of_roots_are_what_the_root_is_taken_of(
    tmp_path: Path, bound: float | None, dtype: DType, left: int
) -> None:
    n = len(VALUES)
    g = BlockBuilder("squared", grid={"m": 1})
    x = g.load(b.input_("x", (n,), dtype), n)
    root = b.sqrt(x if bound is None else b.maximum(x, bound))
    g.store(b.mul(root, root), (n,), n)
    graph = g.graph()
    nodes = topological(shared_divisions(graph.outputs))
    assert sum(n.op is elementwise.SQRT for n in nodes) == left
    if dtype is DType.F32:
        want = (VALUES if bound is None else VALUES.clamp(min=bound)).sqrt().square()
        got = run(graph, tmp_path, VALUES)
        torch.testing.assert_close(got, want, rtol=4e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(("keys", "tile"), [(64, 32), (41, 16)])
def test_an_operand_made_of_transposed_tiles_lies_as_they_do(
    tmp_path: Path, keys: int, tile: int
) -> None:
    g = BlockBuilder("scores", grid={"n": -(-keys // tile)})
    q = g.load(b.input_("q", (40, 19)), 40, 19)
    k = g.load(b.input_("k", (19, keys), strides=(1, 19)), 19, ("n", tile))
    gain = g.load(b.input_("gain", (19, 1)), 19, 1)
    g.store(b.matmul(q, b.mul(k, gain)), (40, keys), 40, ("n", tile))
    graph = g.graph()
    assert "strided" not in lower(graph, CpuConfig(), "scores").text
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.randn(40, 19, generator=generator),
        torch.randn(keys, 19, generator=generator),
    )
    scale = torch.randn(19, 1, generator=generator)
    (want,) = run_reference(graph, [left, right.T, scale])
    torch.testing.assert_close(run(graph, tmp_path, left, right, scale), want)


@pytest.mark.parametrize("strided", [True, False])
def test_rows_that_share_an_operand_are_one_product(tmp_path: Path, strided: bool) -> None:
    heads, keys, width = 5, 19, 33
    layout = {"strides": (keys * width, 0, width, 1)} if strided else {}
    g = BlockBuilder("shared", grid={"b": 2})
    q = g.load(b.input_("q", (2, heads, 1, width)), ("b", 1), heads, 1, width)
    repeats = heads if strided else 1
    k = g.load(b.input_("k", (2, repeats, keys, width), **layout), ("b", 1), repeats, keys, width)
    scores = b.matmul(q, b.transpose(k))
    shape = (2, heads, 1, width)
    g.store(b.matmul(b.exp(scores), k), shape, ("b", 1), heads, 1, width)
    graph = g.graph()
    found = configs(graph)
    assert {c.rows for c in found} == {8, 4, 6}
    text = lower(graph, found[0], "shared").text
    assert text.count("gemm_") == 2
    assert text.count(f">({heads}, ") == 2
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(shape, generator=generator)
    right = torch.randn(2, 1, keys, width, generator=generator) * 0.1
    (want,) = run_reference(graph, [left, right.expand(2, repeats, keys, width)])
    torch.testing.assert_close(run(graph, tmp_path, left, right), want, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_a_result_is_rounded_once(tmp_path: Path, dtype: DType) -> None:
    g = BlockBuilder("rounded", grid={"m": 1})
    doubled = b.mul(g.load(b.input_("x", (5, 37)), 5, 37), 1.7)
    g.store(b.cast(doubled, dtype), (5, 37), 5, 37)
    g.store(b.cast(b.cast(doubled, dtype), DType.F32), (5, 37), 5, 37)  # this rounding is seen
    graph = g.graph()
    source = lower(graph, CpuConfig(), "rounded")
    assert source.text.count("round_to") == 2  # whole vectors and the rest of them, of the second
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    x = torch.randn(5, 37, generator=torch.Generator().manual_seed(2)) * 100
    x[0, :4] = torch.tensor([torch.inf, torch.nan, 6e4, 1e-8])
    first, second = run_reference(graph, [x])
    stored, seen = torch.empty_like(first), torch.empty_like(second)
    kernel(x.data_ptr(), stored.data_ptr(), seen.data_ptr())
    torch.testing.assert_close(stored, first, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(seen, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "once"), [(40, True), (32, False)])
def test_halves_are_converted_once_where_many_rows_read_them(
    tmp_path: Path, rows: int, once: bool
) -> None:
    g = BlockBuilder("halves", grid={}, loops={"n": 2})
    x = g.load(b.input_("x", (rows, 40)), rows, ("n", 20))
    y = g.load(b.input_("y", (40, 70), DType.BF16), ("n", 20), 70)
    g.store(b.accum_sum(b.matmul(x, b.cast(y, DType.F32)), "n"), (rows, 70), rows, 70)
    graph = g.graph()
    assert ("pack(" in lower(graph, CpuConfig(), "halves").text) is once
    left, right = torch.randn(rows, 40), torch.randn(40, 70).to(torch.bfloat16)
    got = run(graph, tmp_path, left, right)
    torch.testing.assert_close(got, left @ right.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_halves_that_a_loop_reads_again_are_converted_before_it(
    tmp_path: Path, split: bool
) -> None:
    g = BlockBuilder("halves", grid={}, loops={"n": 2})
    shape = (20, 2, 20) if split else (20, 40)
    x = b.cast(g.load(b.input_("x", shape, DType.BF16), *shape), DType.F32)
    y = g.load(b.input_("y", (70, 40)), ("n", 35), 40)
    scores = b.matmul(b.reshape(x, (20, 40)) if split else x, b.transpose(y))
    g.store(b.accum_sum(b.reduce_sum(b.exp(scores), -1), "n"), (20, 1), 20, 1)
    graph = g.graph()
    before, loop = lower(graph, CpuConfig(contraction="pack"), "halves").text.split("for (long i_n")
    assert "load<vf>(x" in before
    assert "pack_rows" not in loop
    left, right = torch.randn(20, 40).to(torch.bfloat16), torch.randn(70, 40)
    want = (left.float() @ right.T).exp().sum(-1, keepdim=True)
    torch.testing.assert_close(run(graph, tmp_path, left, right), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16])
def test_columns_that_merge_are_read_where_they_lie(tmp_path: Path, dtype: DType) -> None:
    rows, heads, width, inner = 6, 3, 32, 70
    g = BlockBuilder("merged", grid={"h": 2})
    x = g.load(b.input_("x", (rows, inner)), rows, inner)
    shape = (inner, 2 * heads, width)
    stored = b.input_("w", shape, dtype, strides=(1, width * inner, inner))
    w = b.cast(g.load(stored, inner, ("h", heads), width), DType.F32)
    flat = b.reshape(w, (inner, heads * width))
    product = b.reshape(b.matmul(x, flat), (rows, heads, width))
    g.store(product, (rows, 2 * heads, width), rows, ("h", heads), width)
    g.store(b.mul(flat, 3.0), (inner, 2 * heads * width), inner, ("h", heads * width))
    graph = g.graph()
    source = lower(graph, CpuConfig(), "merged")
    assert "tile" not in source.text.split("x1 = ")[0].split("SO_NOINLINE void block")[1]
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(rows, inner, generator=generator)
    right = torch.randn(2 * heads * width, inner, generator=generator).to(DTYPES[dtype])
    first, second = run_reference(graph, [left, right.T.reshape(shape)])
    got, also = torch.empty(first.shape), torch.empty(second.shape)
    kernel(left.data_ptr(), right.data_ptr(), got.data_ptr(), also.data_ptr())
    torch.testing.assert_close(got, first, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(also, second, rtol=0, atol=0)


@pytest.mark.parametrize("contraction", ["pack", "dot"])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F16])
def test_products_of_halves_that_lie_either_way(
    tmp_path: Path, dtype: DType, contraction: Contraction
) -> None:
    """What runs along the rows of the left operand is not what a copy of its rows would take."""
    m, n, k = 13, 37, 21
    g = BlockBuilder("layouts", grid={"m": 1})
    for number, (left, right) in enumerate(product((True, False), repeat=2)):
        a = b.input_(f"a{number}", (m, k), dtype, strides=(k, 1) if left else (1, m))
        c = b.input_(f"c{number}", (k, n), dtype, strides=(n, 1) if right else (1, k))
        found = b.matmul(*(b.cast(g.load(x, *x.shape), DType.F32) for x in (a, c)))
        g.store(found, (m, n), m, n)
    graph = g.graph()
    source = lower(graph, CpuConfig(contraction=contraction), graph.name)
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    generator = torch.Generator().manual_seed(1)
    inputs = [tensor(i, generator) for i in graph.inputs]
    check(graph, inputs, launched(kernel, graph, inputs))
