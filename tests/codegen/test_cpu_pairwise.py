"""Reductions of what pairs of rows make: vectors lie along the second rows, totals stay in registers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superopt.codegen.cpu.compile import find_compiler
from superopt.codegen.cpu.config import CpuConfig
from superopt.codegen.cpu.inline import Plan
from superopt.codegen.cpu.kernel import Kernel, compile_many
from superopt.codegen.cpu.lower import lower
from superopt.codegen.cpu.pairwise import ROWS, pairwise
from superopt.codegen.tile_program import tile_program
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction
from superopt.ir.types import DType
from tests.codegen.meaning import check, launched, tensor

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

Make = Callable[[Node, Node], Node]
KINDS = (
    contraction.REDUCE_SUM,
    contraction.REDUCE_MAX,
    contraction.REDUCE_MIN,
    contraction.REDUCE_PROD,
)


def apart(x: Node, y: Node) -> Node:
    return b.abs_(b.sub(x, y))


def pairs(
    rows: int,
    columns: int,
    length: int,
    *,
    make: Make = apart,
    kind: object = contraction.REDUCE_SUM,
    tiles: tuple[int, int] = (8, 32),
    turned: bool = False,
    dtype: DType = DType.F32,
) -> Graph:
    """Reduce over k what rows of x and of y make; y is [length, columns] where it is `turned`."""
    rows_tile, columns_tile = tiles
    grid = {"i": -(-rows // rows_tile), "j": -(-columns // columns_tile)}
    g = BlockBuilder("pairs", grid=grid)
    x = b.input_("x", (rows, 1, length), dtype)
    x = b.cast(g.load(x, ("i", rows_tile), 1, length), DType.F32)
    if turned:
        y = g.load(b.input_("y", (1, length, columns), dtype), 1, length, ("j", columns_tile))
        y = b.permute(y, (0, 2, 1))
    else:
        y = g.load(b.input_("y", (1, columns, length), dtype), 1, ("j", columns_tile), length)
    total = b.reduce(kind, make(x, b.cast(y, DType.F32)), -1)
    g.store(total, (rows, columns, 1), ("i", rows_tile), ("j", columns_tile), 1)
    return g.graph()


def run(graph: Graph, folder: Path, *, width: int | None = None, spoil: bool = False) -> str:
    source = lower(graph, CpuConfig(), graph.name)
    if width is not None:
        source = replace(source, text=f"#define SO_VECTOR_BYTES {width}\n{source.text}")
    (kernel,) = compile_many([source], folder)
    assert isinstance(kernel, Kernel), kernel
    inputs = [tensor(i, torch.Generator().manual_seed(1)) for i in graph.inputs]
    if spoil:
        inputs[0][0, 0, 1] = torch.nan
        inputs[1][0, -1, -1] = torch.inf
    check(graph, inputs, launched(kernel, graph, inputs))
    return source.text


def weighed(x: Node, y: Node) -> Node:
    """A function of each pair, and a factor of k alone."""
    return b.mul(b.tanh(b.add(x, y)), b.mul(x, 0.5))


def relative(x: Node, y: Node) -> Node:
    return b.div(apart(x, y), b.add(b.add(b.abs_(x), b.abs_(y)), 1e-3))


@pytest.mark.parametrize("width", [16, 32, None])
def test_vectors_of_any_width(tmp_path: Path, width: int | None) -> None:
    text = run(pairs(21, 45, 37), tmp_path, width=width)
    assert all(part in text for part in ("number<4>", "pack("))
    assert "fold_rows" not in text


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.name)
def test_every_reduction(tmp_path: Path, kind: object) -> None:
    run(pairs(9, 40, 7, kind=kind), tmp_path, spoil=True)


@pytest.mark.parametrize(
    ("make", "rows"),
    [(apart, 4), (relative, 4), (weighed, 1), (lambda x, y: b.mul(d := b.sub(x, y), d), 4)],
    ids=["sum of absolutes", "quotient", "function", "square"],
)
def test_functions_go_row_by_row(tmp_path: Path, make: Make, rows: int) -> None:
    assert (f"number<{ROWS}>" in run(pairs(12, 33, 19, make=make), tmp_path)) == (rows == ROWS)


def test_what_lies_along_the_vectors_is_not_copied(tmp_path: Path) -> None:
    assert "pack(" not in run(pairs(12, 40, 5, turned=True), tmp_path)


def test_long_sums_are_made_in_stretches(tmp_path: Path) -> None:
    """Of 2^24 and ones in turn nothing but 2^24 would be left."""
    graph = pairs(8, 16, 4096, tiles=(8, 16))
    source = lower(graph, CpuConfig(), graph.name)
    (kernel,) = compile_many([source], tmp_path)
    assert isinstance(kernel, Kernel), kernel
    x, y = torch.ones(8, 1, 4096), torch.zeros(1, 16, 4096)
    x[:, :, 0] = 2.0**24
    (total,) = launched(kernel, graph, [x, y])
    assert ((total - (2.0**24 + 4095)).abs() <= 64).all()


def test_values_of_the_pair_itself(tmp_path: Path) -> None:
    """The second pass of a logarithm of sums reads the first one's maximum: sum over k of exp(x + y - top)."""
    g = BlockBuilder("log_matmul", grid={"i": 3})
    x = g.load(b.input_("x", (20, 1, 21), DType.F32), ("i", 8), 1, 21)
    y = g.load(b.input_("y", (1, 33, 21), DType.F32), 1, 33, 21)
    top = b.reduce_max(b.add(x, y), -1)
    total = b.reduce_sum(b.exp(b.sub(b.add(x, y), top)), -1)
    g.store(b.add(top, b.log(total)), (20, 33, 1), ("i", 8), 33, 1)
    text = run(g.graph(), tmp_path)
    assert text.count("const auto tile") == 2


def test_batches_and_several_reduced_dims(tmp_path: Path) -> None:
    g = BlockBuilder("images", grid={"n": 3})
    x = g.load(b.input_("x", (3, 10, 1, 5, 7), DType.F32), ("n", 1), 10, 1, 5, 7)
    y = g.load(b.input_("y", (3, 1, 19, 5, 7), DType.F32), ("n", 1), 1, 19, 5, 7)
    total = b.reduce_sum(apart(x, y), (-1, -2))
    g.store(total, (3, 10, 19, 1, 1), ("n", 1), 10, 19, 1, 1)
    assert "const auto tile" in run(g.graph(), tmp_path)


@settings(max_examples=12)
@given(
    st.integers(4, 20),
    st.integers(8, 70),
    st.integers(1, 40),
    st.sampled_from([(4, 8), (5, 16), (8, 40)]),
    st.booleans(),
    st.sampled_from([DType.F32, DType.BF16]),
)
def test_any_extents(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    length: int,
    tiles: tuple[int, int],
    turned: bool,
    dtype: DType,
) -> None:
    graph = pairs(rows, columns, length, tiles=tiles, turned=turned, dtype=dtype)
    run(graph, tmp_path_factory.mktemp("kernels"))


def test_where_pairs_of_rows_are_not_met() -> None:
    """What varies along all dims is read once: nothing is gained."""
    g = BlockBuilder("plain", grid={"i": 2})
    x = g.load(b.input_("x", (16, 32, 24), DType.F32), ("i", 8), 32, 24)
    y = g.load(b.input_("y", (1, 32, 24), DType.F32), 1, 32, 24)
    total = b.reduce_sum(apart(x, y), -1)
    g.store(total, (16, 32, 1), ("i", 8), 32, 1)
    assert pairwise(Plan(tile_program(g.graph())), total) is None
