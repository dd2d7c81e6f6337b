"""Products of bfloat16 as it is: the runtime's three ways, and kernels that use them."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from superopt.codegen.cpu.compile import compile_source, find_compiler, load_kernel
from superopt.codegen.cpu.config import CpuConfig, configs
from superopt.codegen.cpu.lower import lower
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder, accum_rescaled, accum_sum, accumulate, finite_or_zero
from superopt.ir.graph import Graph
from superopt.ir.ops import tile
from superopt.ir.types import DType
from tests.block_graphs import BLOCK_GRAPHS
from tests.codegen.test_cpu_lower import attention, check

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

PAIRS = CpuConfig(pairs=True)
EXTENTS = [
    (1, 1, 1),
    (3, 5, 7),
    (16, 16, 32),
    (33, 40, 64),
    (7, 65, 33),
    (70, 31, 96),
    (32, 100, 2),
    (48, 80, 64),
    (50, 70, 34),
]
WAYS = {
    "native": (64, ""),
    "dot products": (64, "#define SO_HAS_TILES 0\n"),
    "floats": (32, "#define SO_HAS_TILES 0\n"),
    "narrow": (16, "#define SO_HAS_TILES 0\n"),
}
CANARY = 12345.0


@dataclass
class Processor:
    vector_bytes: int
    bf16: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def build(folder: Path, way: str):
    width, head = WAYS[way]
    source = f"""#define SO_VECTOR_BYTES {width}
{head}#include "tile.h"
#include "gemm_bf16.h"
using namespace so;
SO_KERNEL superopt_kernel(const void* va, const void* vb, float* c, const long* e) {{
  const long m = e[0], n = e[1], k = e[2], depth = round_up(k, DEPTH);
  auto a = (const bf16*)va, b = (const bf16*)vb;
  static bf16 rows[128 * 128], pairs[128 * 128];
  Tiles tiles;
  if (e[3] < 2) {{
    pack_rows_bf16(a, e[4], e[5], k, m, rows, depth);
    if (e[3]) gemm_pairs<true>(tiles, m, n, k, rows, depth, b, e[7], e[6], pairs, c, e[8]);
    else gemm_pairs<false, 3>(tiles, m, n, k, rows, depth, b, e[7], e[6], pairs, c, e[8]);
  }} else if (e[3] >= 4) {{
    pack_rows_bf16(a, e[4], e[5], k, m, rows, depth);
    pack_pairs(b, e[7], e[6], n, k, pairs);
    if (e[3] == 5) gemm_pairs_made<true>(tiles, m, n, k, rows, depth, pairs, c, e[8]);
    else gemm_pairs_made<false>(tiles, m, n, k, rows, depth, pairs, c, e[8]);
  }} else {{
    pack_rows_bf16(b, e[7], e[6], k, n, rows, depth);
    pack_pairs(a, e[4], e[5], m, k, pairs);
    if (e[3] == 3) gemm_pairs_transposed<true, 1>(tiles, n, m, k, rows, depth, pairs, c, e[8]);
    else gemm_pairs_transposed<false, 0>(tiles, n, m, k, rows, depth, pairs, c, e[8]);
  }}
}}
"""
    return load_kernel(compile_source(source, folder), 4)


@pytest.mark.parametrize("way", WAYS)
def test_any_extent_and_strides(folder: Path, way: str) -> None:
    kernel = build(folder, way)
    random = torch.Generator().manual_seed(1)
    for m, n, k in EXTENTS:
        a = torch.randn(m, k, generator=random).bfloat16()
        w = torch.randn(k, n, generator=random).bfloat16()
        want = a.double() @ w.double()
        for left in (a, a.T.contiguous().T):
            for right in (w, w.T.contiguous().T, w.repeat_interleave(2, 1)[:, ::2]):
                for kind in (0, 2, 4):
                    c = torch.full((m + 1, n + 3), CANARY)
                    for added in (0, 1):
                        numbers = [m, n, k, added + kind, *left.stride(), *right.stride()]
                        e = np.array([*numbers, n + 3], dtype=np.int64)
                        kernel(left.data_ptr(), right.data_ptr(), c.data_ptr(), e.ctypes.data)
                        assert (c[:m, :n] - (1 + added) * want).abs().max() < 2e-5 * k**0.5
                    assert (c[m:] == CANARY).all()
                    assert (c[:, n:] == CANARY).all()


@pytest.mark.parametrize("way", WAYS)
def test_what_is_not_a_number_is_none(folder: Path, way: str) -> None:
    kernel = build(folder, way)
    a, w = torch.ones(5, 40).bfloat16(), torch.ones(40, 6).bfloat16()
    a[1, 3], a[2, 4], w[7, 2] = torch.nan, torch.inf, -torch.inf
    for kind in (0, 2):
        c = torch.zeros(5, 6)
        e = np.array([5, 6, 40, kind, *a.stride(), *w.stride(), 6], dtype=np.int64)
        kernel(a.data_ptr(), w.data_ptr(), c.data_ptr(), e.ctypes.data)
        torch.testing.assert_close(c, a.float() @ w.float(), equal_nan=True)


def rounded(x):
    return b.cast(b.cast(x, DType.BF16), DType.F32)


def gated(rows: int, inner: int, columns: int, *, transposed: bool, norm: bool = True) -> Graph:
    """A product of what is computed and rounded, summed over a loop."""
    x = b.input_("x", (rows, inner), DType.BF16)
    w = b.input_("w", (columns, inner) if transposed else (inner, columns), DType.BF16)
    g = BlockBuilder(
        "gated", grid={"m": -(-rows // 16), "n": -(-columns // 48)}, loops={"k": -(-inner // 64)}
    )
    xt = b.cast(g.load(x, ("m", 16), ("k", 64)), DType.F32)
    dims = (("n", 48), ("k", 64)) if transposed else (("k", 64), ("n", 48))
    wt = b.cast(g.load(w, *dims), DType.F32)
    left = rounded(b.mul(xt, b.sigmoid(xt)))
    y = accum_sum(b.matmul(left, b.transpose(wt) if transposed else wt), "k")
    if norm:
        y = b.div(y, b.sqrt(accum_sum(b.reduce_sum(b.mul(left, left), -1), "k")))
    g.store(b.cast(y, DType.BF16), (rows, columns), ("m", 16), ("n", 48))
    return g.graph()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(16, 64, 96), (13, 100, 70), (40, 192, 48)])
def test_operands_that_are_computed(folder: Path, shape, transposed: bool) -> None:
    text = check(gated(*shape, transposed=transposed), folder, config=PAIRS).text
    assert "gemm_pairs" in text
    assert re.search(r"so::bf16\* const (tile|kept)", text)  # blocks of other columns find it


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(2, 64, 64, 32, 32, 32), (3, 41, 50, 17, 16, 32)])
def test_attention(folder: Path, shape, causal: bool) -> None:
    graph = attention(*shape, causal=causal, dtype=DType.BF16)
    assert "gemm_pairs" in check(graph, folder, config=PAIRS).text


@pytest.mark.parametrize(
    ("length", "keys", "width", "rows"), [(64, 64, 32, 16), (64, 64, 32, 64), (50, 70, 40, 16)]
)
def test_blocks_share_pairs_within_a_call(
    folder: Path, length: int, keys: int, width: int, rows: int
) -> None:
    graph = attention(2, length, keys, width, rows, 32, dtype=DType.BF16)
    source = lower(graph, PAIRS, "shared")
    assert ("gemm_pairs_made" in source.text) == (rows < length)
    kernel = load_kernel(compile_source(source.text, folder), source.pointers)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (
            torch.randn(2, n, width, generator=generator).bfloat16() for n in (length, keys, keys)
        )
        found = torch.full_like(q, torch.nan)
        kernel(*(t.data_ptr() for t in (q, k, v, found)))
        expected = torch.softmax(q.double() @ k.double().mT * width**-0.5, -1) @ v.double()
        torch.testing.assert_close(found.double(), expected, atol=0.02, rtol=0.02)


def normalized_attention(keys: int, tiles: tuple[int, int], *, passes: int, half: DType) -> Graph:
    """Keys are normalized behind the product, and scaled before it; values before theirs."""
    heads, queries, width = 2, 64, 16
    q, k, v = (
        b.input_(n, (heads, rows, width), half)
        for n, rows in (("q", queries), ("k", keys), ("v", keys))
    )
    loops = {"n": -(-keys // tiles[1])}
    build = BlockBuilder("norms", grid={"h": heads, "m": queries // tiles[0]}, loops=loops)
    q, k, v = (
        b.cast(build.load(t, ("h", 1), rows, width), DType.F32)
        for t, rows in ((q, ("m", tiles[0])), (k, ("n", tiles[1])), (v, ("n", tiles[1])))
    )
    sizes = [b.sqrt(b.add(b.reduce_sum(b.mul(t, t), -1), 1.0)) for t in (k, v)]
    scaled, normed = (
        b.cast(b.cast(t, half), DType.F32) for t in (b.mul(k, 1.5), b.div(v, sizes[1]))
    )
    s = b.div(b.matmul(q, b.transpose(scaled)), b.transpose(sizes[0]))
    if passes == 1:
        shift = accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), "n")
        p = b.exp(b.sub(s, finite_or_zero(shift)))
        mixed = b.matmul(b.cast(b.cast(p, half), DType.F32), normed)
        o, total = (accum_rescaled(t, shift, "n") for t in (mixed, b.reduce_sum(p, -1)))
    else:
        p = b.exp(b.sub(s, accumulate(tile.ACCUM_MAX, b.reduce_max(s, -1), "n")))
        mixed = b.matmul(b.cast(b.cast(p, half), DType.F32), normed)
        o, total = accum_sum(mixed, "n"), accum_sum(b.reduce_sum(p, -1), "n")
    y = b.cast(b.div(o, total), half)
    build.store(y, (heads, queries, width), ("h", 1), ("m", tiles[0]), width)
    return build.graph()


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(("keys", "passes"), [(64, 1), (53, 2)])
def test_blocks_leave_computed_operands_to_each_other(folder: Path, keys, passes, pairs) -> None:
    """Sizes of keys, scaled keys, normalized values: each made by one block of a head, as they lie."""
    graph = normalized_attention(keys, (32, 32), passes=passes, half=DType.BF16)
    text = check(graph, folder, config=CpuConfig(pairs=pairs)).text
    made = set(re.findall(r"if \((made\d+)\[", text))
    assert len(made) == (3 if pairs else 2)
    assert "load_strided" not in text


def test_one_block_per_head_keeps_nothing() -> None:
    graph = normalized_attention(64, (64, 32), passes=1, half=DType.BF16)
    assert "made" not in lower(graph, PAIRS, "alone").text


@pytest.mark.parametrize("grid", [("m", "n"), ("n", "m")])
def test_blocks_share_transposed_rows(folder: Path, grid: tuple[str, str]) -> None:
    rows, columns, depth = 40, 90, 70
    g = BlockBuilder("gram", grid={a: {"m": 3, "n": 3}[a] for a in grid}, loops={"k": 2})
    x = g.load(b.input_("x", (rows, depth), DType.BF16, strides=(1, rows)), ("m", 16), ("k", 40))
    w = g.load(b.input_("w", (depth, columns), DType.BF16), ("k", 40), ("n", 32))
    product = b.matmul(b.cast(x, DType.F32), b.cast(w, DType.F32))
    g.store(accum_sum(product, "k"), (rows, columns), ("m", 16), ("n", 32))
    text = check(g.graph(), folder, config=PAIRS).text
    assert "const rows" in text


def column() -> Graph:
    """A product of one column, computed for each block, with a matrix that is the same for all."""
    build = BlockBuilder("column", grid={"j": 6})
    x = build.load(b.input_("x", (64, 40), DType.BF16), 64, 40)
    w = build.load(b.input_("w", (6, 40, 1), DType.BF16), ("j", 1), 40, 1)
    left, right = b.cast(b.reshape(x, (1, 64, 40)), DType.F32), b.cast(w, DType.F32)
    product = b.matmul(left, rounded(b.mul(right, 2.0)))
    build.store(b.cast(product, DType.BF16), (6, 64, 1), ("j", 1), 64, 1)
    return build.graph()


def gram() -> Graph:
    """What is computed is both operands, one of them transposed; its pieces are the loop's."""
    build = BlockBuilder("gram", grid={"b": 2, "j": 3}, loops={"k": 4})
    x = build.load(b.input_("x", (2, 16, 64), DType.BF16), ("b", 1), 16, ("k", 16))
    s = build.load(b.input_("s", (3, 1, 1)), ("j", 1), 1, 1)
    value = rounded(b.mul(b.cast(x, DType.F32), 2.0))
    total = accum_sum(b.matmul(value, b.transpose(value)), "k")
    result = b.reshape(b.mul(total, s), (1, 1, 16, 16))
    build.store(result, (2, 3, 16, 16), ("b", 1), ("j", 1), 16, 16)
    return build.graph()


def square() -> Graph:
    """A tensor is both operands, in rows and in pairs."""
    build = BlockBuilder("square", grid={"b": 2, "j": 3})
    x = b.cast(build.load(b.input_("x", (2, 40, 40), DType.BF16), ("b", 1), 40, 40), DType.F32)
    y = build.load(b.input_("y", (3, 40, 40)), ("j", 1), 40, 40)
    product = b.mul(b.matmul(x, x), y)
    build.store(b.reshape(product, (1, 1, 40, 40)), (2, 3, 40, 40), ("b", 1), ("j", 1), 40, 40)
    return build.graph()


@pytest.mark.parametrize("make", [column, gram, square])
def test_operands_that_blocks_leave_each_other(folder: Path, make: Callable[[], Graph]) -> None:
    check(make(), folder, config=PAIRS)


def test_shared_operands_are_computed_with_denormals(folder: Path) -> None:
    build = BlockBuilder("denormal", grid={"n": 1, "m": 4})
    x = b.cast(build.load(b.input_("x", (32, 32), DType.BF16), ("m", 8), 32), DType.F32)
    w = b.cast(build.load(b.input_("w", (32, 32), DType.BF16), 32, 32), DType.F32)
    ones = b.where(b.gt(w, 0.0), b.constant(1.0, DType.F32), b.constant(0.0, DType.F32))
    build.store(b.matmul(x, rounded(ones)), (32, 32), ("m", 8), 32)
    source = lower(build.graph(), PAIRS, "denormal")
    assert "gemm_pairs_made" in source.text
    kernel = load_kernel(compile_source(source.text, folder), source.pointers)
    x_, w_ = torch.ones(32, 32).bfloat16(), torch.full((32, 32), 2.0**-130).bfloat16()
    found = torch.empty(32, 32)
    kernel(*(t.data_ptr() for t in (x_, w_, found)))
    assert (found == 32).all()


@pytest.mark.parametrize("name", ["attention-bf16", "gated-mlp-bf16", "batched-products-bf16"])
def test_block_graphs(folder: Path, name: str) -> None:
    assert "gemm_pairs" in check(BLOCK_GRAPHS[name](), folder, config=PAIRS).text


def test_products_in_floats_need_no_roundings(folder: Path) -> None:
    graph = gated(16, 64, 96, transposed=False, norm=False)
    assert "round_to" not in check(graph, folder, config=CpuConfig()).text


def test_what_one_pass_makes_and_uses_is_not_stored(folder: Path) -> None:
    text = check(attention(1, 64, 64, 32, 32, 32, dtype=DType.BF16), folder, config=PAIRS).text
    for name in set(re.findall(r"\w+(?= = reinterpret_cast)", text)):
        uses = [line for line in text.splitlines() if re.search(rf"\b{name}\b", line)]
        assert any(f"store({name} " not in u and "reinterpret_cast" not in u for u in uses), name


def test_configurations() -> None:
    half, plain = gated(16, 64, 96, transposed=False), attention(1, 32, 32, 32, 32, 32)
    tiles, dots = Processor(64, "tiles"), Processor(64, "dots")
    assert [c.pairs for c in configs(half, tiles)] == [True, False]
    assert [c.pairs for c in configs(half, dots)[:3]] == [False, True, False]
    assert not any(c.pairs for c in configs(half))
    assert not any(c.pairs for c in configs(plain, tiles))
