"""The meaning of block graphs, case by case; `test_blocks` compares random ones with an oracle."""

import itertools

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.check import check_graph
from superopt.ir.graph import Graph
from superopt.ir.ops import contraction, tile
from superopt.ir.types import DType
from superopt.verify.reference import run_reference
from tests.ir.naive import run_naive

M, N, D = 11, 13, 5


def attention(tm: int, tn: int, *, causal: bool) -> Graph:
    q, k, v = b.input_("q", (M, D)), b.input_("k", (N, D)), b.input_("v", (N, D))
    builder = b.BlockBuilder("attention", grid={"m": -(-M // tm)}, loops={"n": -(-N // tn)})
    s = b.matmul(builder.load(q, ("m", tm), D), b.transpose(builder.load(k, ("n", tn), D)))
    if causal:
        rows = b.reshape(builder.index(M, ("m", tm)), (tm, 1))
        columns = b.reshape(builder.index(N, ("n", tn)), (1, tn))
        s = b.where(b.ge(rows, columns), s, float("-inf"))
        builder.bound("n", {"m": tm, "n": -tn}, tm - 1)
    top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), "n")
    p = b.exp(b.sub(s, b.finite_or_zero(top)))
    total = b.accum_rescaled(b.reduce_sum(p, -1), top, "n")
    out = b.accum_rescaled(b.matmul(p, builder.load(v, ("n", tn), D)), top, "n")
    builder.store(b.div(out, total), (M, D), ("m", tm), D)
    return builder.graph()


@pytest.mark.parametrize(("tm", "tn"), [(4, 4), (11, 13), (3, 5), (1, 1), (16, 16)])
@pytest.mark.parametrize("causal", [False, True])
def test_online_softmax_over_ragged_tiles(tm: int, tn: int, causal: bool) -> None:
    torch.manual_seed(tm)
    q, k, v = (torch.randn(n, D, dtype=torch.float64) for n in (M, N, N))
    s = q @ k.T
    if causal:
        s = s.masked_fill(torch.ones(M, N, dtype=torch.bool).triu(1), float("-inf"))
    (got,) = run_reference(
        attention(tm, tn, causal=causal), [q, k, v], dtype_override=torch.float64
    )
    torch.testing.assert_close(got, torch.softmax(s, -1) @ v)


ACCUMULATORS = {
    tile.ACCUM_SUM: lambda parts: torch.stack(parts).sum(0),
    tile.ACCUM_MAX: lambda parts: torch.stack(parts).amax(0),
    tile.ACCUM_MIN: lambda parts: torch.stack(parts).amin(0),
    tile.ACCUM_PROD: lambda parts: torch.stack(parts).prod(0),
    tile.ACCUM_LAST: lambda parts: parts[-1],
}


@pytest.mark.parametrize("op", ACCUMULATORS, ids=lambda op: op.name)
@pytest.mark.parametrize(("tm", "tn"), [(4, 4), (5, 13), (11, 1)])
def test_accumulators_against_loops(op: object, tm: int, tn: int) -> None:
    x = b.input_("x", (M, N))
    builder = b.BlockBuilder("g", grid={"m": -(-M // tm)}, loops={"n": -(-N // tn)})
    part = b.reduce_sum(builder.load(x, ("m", tm), ("n", tn)), -1)
    builder.store(b.accumulate(op, part, "n"), (M, 1), ("m", tm), 1)  # type: ignore[arg-type]
    torch.manual_seed(0)
    value = torch.randn(M, N, dtype=torch.float64)
    wanted = torch.empty(M, 1, dtype=torch.float64)
    for start in range(0, M, tm):
        block = value[start : start + tm]
        parts = [block[:, j : j + tn].sum(-1, keepdim=True) for j in range(0, N, tn)]
        wanted[start : start + tm] = ACCUMULATORS[op](parts)  # type: ignore[index]
    (got,) = run_reference(builder.graph(), [value], dtype_override=torch.float64)
    torch.testing.assert_close(got, wanted)


def test_two_passes_store_inside_the_loop() -> None:
    x = b.input_("x", (M, N))
    builder = b.BlockBuilder("softmax", grid={"m": 3}, loops={"a": 4, "c": 4})
    first = builder.load(x, ("m", 4), ("a", 4))
    total = b.accum_sum(b.reduce_sum(b.exp(first), -1), "a")
    again = b.exp(builder.load(x, ("m", 4), ("c", 4)))
    builder.store(b.div(again, total), (M, N), ("m", 4), ("c", 4))
    value = torch.randn(M, N, dtype=torch.float64)
    (got,) = run_reference(builder.graph(), [value], dtype_override=torch.float64)
    torch.testing.assert_close(got, torch.softmax(value, -1))


def test_two_axes_split_one_dim() -> None:
    x = b.input_("x", (24,))
    builder = b.BlockBuilder("g", grid={"m": 2, "n": 3})
    builder.store(b.mul(builder.load(x, ("m", "n", 4)), 2.0), (24,), ("m", "n", 4))
    value = torch.arange(24, dtype=torch.float64)
    (got,) = run_reference(builder.graph(), [value], dtype_override=torch.float64)
    torch.testing.assert_close(got, 2 * value)


def test_a_failed_bound_skips_the_iteration() -> None:
    x = b.input_("x", (8, 8))
    builder = b.BlockBuilder("g", grid={"m": 4}, loops={"n": 4})
    part = b.reduce_sum(builder.load(x, ("m", 2), ("n", 2)), -1)
    builder.bound("n", {"m": 1, "n": -1}, 0)
    builder.store(b.accum_sum(part, "n"), (8, 1), ("m", 2), 1)
    value = torch.randn(8, 8, dtype=torch.float64)
    wanted = torch.zeros(8, 1, dtype=torch.float64)
    for m, n in itertools.product(range(4), range(4)):
        if m - n >= 0:
            rows = slice(2 * m, 2 * m + 2)
            wanted[rows] += value[rows, 2 * n : 2 * n + 2].sum(-1, keepdim=True)
    (got,) = run_reference(builder.graph(), [value], dtype_override=torch.float64)
    torch.testing.assert_close(got, wanted)


def test_thread_graphs_apply_to_every_element() -> None:
    s = b.input_("s", ())
    thread = b.thread_graph("square_plus", [s], [b.add(b.mul(s, s), 1.0)])
    x = b.input_("x", (3, 4))
    graph = b.kernel_graph("g", [x], list(b.apply_graph(thread, [x])))
    value = torch.randn(3, 4, dtype=torch.float64)
    (got,) = run_reference(graph, [value], dtype_override=torch.float64)
    torch.testing.assert_close(got, value * value + 1)


def test_constants_are_accumulated_and_stored() -> None:
    g = b.BlockBuilder("g", grid={"m": 2}, loops={"n": 3})
    g.store(b.accum_sum(b.constant(1.5), "n"), ())
    (got,) = run_reference(g.graph(), [])
    assert got.shape == ()
    assert got.item() == 4.5


def test_integer_masks_fit_their_type() -> None:
    x = torch.tensor([230, 250, 240, 220, 210], dtype=torch.uint8)
    g = b.BlockBuilder("g", loops={"n": 2})
    t = g.load(b.input_("x", (5,), DType.U8), ("n", 3))
    least = b.reduce(contraction.REDUCE_MIN, t, -1)
    g.store(b.accumulate(tile.ACCUM_MIN, least, "n"), (1,), 1)
    g.store(b.accumulate(tile.ACCUM_MAX, b.reduce_max(t, -1), "n"), (1,), 1)
    low, high = run_reference(g.graph(), [x])
    assert (low.item(), high.item()) == (210, 250)


def agrees(graph: Graph, *arrays: list[float] | list[list[float]]) -> list[torch.Tensor]:
    """Check the graph, compare its meaning with the naive oracle, and return what it computes."""
    assert check_graph(graph) == []
    values = [torch.tensor(a, dtype=torch.float64) for a in arrays]
    found = run_reference(graph, values, dtype_override=torch.float64)
    for mine, oracle in zip(found, run_naive(graph, [v.numpy() for v in values]), strict=True):
        torch.testing.assert_close(mine, torch.from_numpy(oracle))
    return found


def test_a_running_maximum_along_its_own_loop_leaves_padding_out() -> None:
    g = b.BlockBuilder("g", loops={"n": 2})
    t = g.load(b.input_("x", (5,), DType.F64), ("n", 3))
    g.store(b.accumulate(tile.ACCUM_LAST, b.accumulate(tile.PREFIX_MAX, t, "n"), "n"), (3,), 3)
    (got,) = agrees(g.graph(), [1, 2, 3, 4, 9])
    assert got.tolist() == [4, 9, 3]


def test_padding_of_one_factor_hides_infinities_of_the_other() -> None:
    g = b.BlockBuilder("g", loops={"k": 2})
    row = g.load(b.input_("x", (1, 5), DType.F64), 1, ("k", 3))
    infinite = b.full((3, 2), float("inf"), DType.F64)
    g.store(b.accum_sum(b.matmul(row, infinite), "k"), (1, 2), 1, 2)
    (got,) = agrees(g.graph(), [[1, 1, 1, 1, 1]])
    assert got.tolist() == [[float("inf")] * 2]


def test_an_index_past_the_edge_selects_nothing() -> None:
    g = b.BlockBuilder("g", grid={"n": 2})
    table = g.load(b.input_("x", (5,), DType.F64), 5)
    g.store(b.gather(table, g.index(5, ("n", 3)), -1), (5,), ("n", 3))
    (got,) = agrees(g.graph(), [3, 1, 4, 1, 5])
    assert got.tolist() == [3, 1, 4, 1, 5]


def test_a_scalar_shift_rescales_a_row() -> None:
    g = b.BlockBuilder("g", loops={"n": 2})
    row = g.load(b.input_("x", (4,), DType.F64), ("n", 2))
    top = b.accumulate(tile.PREFIX_MAX, b.reshape(b.reduce_max(row, -1), ()), "n")
    g.store(b.accum_rescaled(row, top, "n"), (2,), 2)
    agrees(g.graph(), [0, 1, 3, 2])


def test_what_a_bounded_loop_gives_varies_over_the_axes_of_its_bounds() -> None:
    def graph(*dims: object) -> Graph:
        g = b.BlockBuilder("g", grid={"m": 2}, loops={"n": 2})
        g.bound("n", {"m": 1, "n": -1}, 0)
        total = b.accum_sum(g.load(b.input_("x", (2,), DType.F64), ("n", 1)), "n")
        g.store(total, (2 if dims else 1,), dims or 1)  # type: ignore[arg-type]
        return g.graph()

    assert "varies over m" in check_graph(graph())[0].message
    (got,) = agrees(graph("m", 1), [3, 4])
    assert got.tolist() == [3, 7]
