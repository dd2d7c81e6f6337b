"""Block graphs whose padding is easy to get wrong; every backend runs them against their meaning."""

from superopt.ir import build as b
from superopt.ir.build import BlockBuilder, accum_sum, accumulate
from superopt.ir.graph import Graph
from superopt.ir.ops import tile


def running_maximum() -> Graph:
    g = BlockBuilder("running_maximum", loops={"n": 2})
    t = g.load(b.input_("x", (4, 5)), 4, ("n", 3))
    g.store(accumulate(tile.ACCUM_LAST, accumulate(tile.PREFIX_MAX, t, "n"), "n"), (4, 3), 4, 3)
    return g.graph()


def rescaled_past_the_edge() -> Graph:
    g = BlockBuilder("rescaled_past_the_edge", loops={"n": 3})
    t = g.load(b.input_("x", (4, 3)), 4, ("n", 2))
    top = accumulate(tile.PREFIX_MAX, b.reduce_max(t, -1), "n")
    g.store(b.accum_rescaled(t, top, "n", power=2), (4, 2), 4, 2)
    rows = g.load(b.input_("y", (5, 4)), ("n", 2), 4)
    least = accumulate(tile.PREFIX_MAX, b.reduce_max(rows, (-2, -1)), "n")
    product = b.matmul(rows, g.load(b.input_("w", (4, 3)), 4, 3))
    g.store(b.accum_rescaled(product, least, "n"), (2, 3), 2, 3)
    return g.graph()


def infinite_factor() -> Graph:
    g = BlockBuilder("infinite_factor", loops={"k": 2})
    row = b.exp(g.load(b.input_("x", (2, 5)), 2, ("k", 3)))
    infinite = b.full((3, 4), float("inf"))
    g.store(accum_sum(b.matmul(row, infinite), "k"), (2, 4), 2, 4)
    return g.graph()


def bounded_by_the_block() -> Graph:
    g = BlockBuilder("bounded_by_the_block", grid={"m": 3}, loops={"n": 3})
    g.bound("n", {"m": 1, "n": -1}, 0)
    total = accum_sum(g.load(b.input_("x", (1, 6)), 1, ("n", 2)), "n")
    g.store(total, (3, 2), ("m", 1), 2)
    return g.graph()


def thread() -> Graph:
    s, t = b.input_("s", ()), b.input_("t", ())
    body = b.thread_graph("body", [s, t], [b.mul(b.exp(b.sub(s, t)), 2.0)])
    g = BlockBuilder("thread", grid={"m": 2})
    x = g.load(b.input_("x-1", (4, 5)), ("m", 3), 5)
    (y,) = b.apply_graph(body, [x, b.reduce_max(x, -1)])
    g.store(y, (4, 5), ("m", 3), 5)
    return g.graph()


EDGES = {
    graph.__name__: graph
    for graph in (rescaled_past_the_edge, infinite_factor, bounded_by_the_block, thread)
}
