"""The checker: legal graphs pass, every kind of illegal graph is named, in the printed graph too."""

from collections.abc import Callable

import pytest

from superopt.ir import build as b
from superopt.ir.check import check_graph, verify_graph
from superopt.ir.errors import GraphError
from superopt.ir.graph import Axis, Bound, Graph, Level
from superopt.ir.node import Node, make
from superopt.ir.ops import tile
from superopt.ir.text import parse_graph

X = b.input_("x", (60, 64))


def attention(shift_loop: str = "n", *, finite: bool = False) -> Graph:
    g = b.BlockBuilder("attention", grid={"m": 3}, loops={"n": 4})
    q = g.load(b.input_("q", (40, 8)), ("m", 16), 8)
    k = g.load(b.input_("k", (50, 8)), ("n", 16), 8)
    v = g.load(b.input_("v", (50, 8)), ("n", 16), 8)
    s = b.matmul(q, b.transpose(k))
    m = b.accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), shift_loop)
    shift = b.finite_or_zero(m)
    p = b.exp(b.sub(s, shift))
    used = shift if finite else m
    out = b.accum_rescaled(b.matmul(p, v), used, "n")
    total = b.accum_rescaled(b.reduce_sum(p, -1), used, "n")
    g.store(b.div(out, total), (40, 8), ("m", 16), 8)
    return g.graph()


def one(body: Callable[[b.BlockBuilder, Node], None], *, bounds: bool = False) -> Graph:
    """A graph of one ragged load over grid m and loop n, and a body."""
    g = b.BlockBuilder("g", grid={"m": 4}, loops={"n": 4, "l": 4})
    if bounds:
        g.bound("n", {"m": 1, "n": -1}, 0)
    body(g, g.load(X, ("m", 16), ("n", 16)))
    return g.graph()


def stored(value: Callable[[Node], Node]) -> Callable[[b.BlockBuilder, Node], None]:
    def body(g: b.BlockBuilder, t: Node) -> None:
        v = value(t)
        g.store(v, (60, v.shape[1]), ("m", 16), v.shape[1])

    return body


def test_a_legal_block_graph_passes() -> None:
    assert check_graph(attention()) == []
    verify_graph(attention())
    assert check_graph(one(stored(lambda t: b.accum_sum(b.exp(t), "n")), bounds=True)) == []


def _two_uses(t: Node) -> Node:
    total = b.accum_sum(b.reduce_sum(t, -1), "n")
    return b.accum_sum(b.div(t, total), "n")


def _outer_first(t: Node) -> Node:
    g = b.BlockBuilder("h", grid={"m": 4}, loops={"n": 4, "l": 4})
    y = g.load(b.input_("y", (60, 64)), ("m", 16), ("l", 16))
    return b.accum_sum(b.accum_sum(b.add(t, y), "n"), "l")


def _later_loop(t: Node) -> Node:
    g = b.BlockBuilder("h", grid={"m": 4}, loops={"n": 4, "l": 4})
    y = g.load(b.input_("y", (60, 64)), ("m", 16), ("l", 16))
    return b.accum_sum(b.add(t, b.accum_sum(y, "l")), "n")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda t: t, "varies over n, which the map does not name; accumulate"),
        (lambda t: b.accum_sum(b.accum_sum(t, "n"), "n"), "does not vary over loop n"),
        (lambda t: b.accum_sum(t, "k"), "closes k, which is not a loop"),
        (_two_uses, "in loop n stands a use of what loop n gives last"),
        (_outer_first, "loop n is closed before loop l"),
        (_later_loop, "in loop n stands a use of what loop l gives last"),
        (lambda t: b.accum_rescaled(t, t, "n"), "the shift is not a prefix_max"),
        (lambda t: b.accum_sum(b.flip(t, 0), "n"), "flip along axis -2, which is ragged"),
        (lambda t: b.accum_sum(b.scan(t, 0, "sum"), "n"), "scan along axis -2"),
        (
            lambda t: b.accum_sum(b.reshape(b.reshape(t, (4, 64)), (16, 16)), "n"),
            "reshape loses the ragged dim at axis -2",
        ),
    ],
)
def test_a_broken_rule_of_block_graphs_is_named(
    value: Callable[[Node], Node], message: str
) -> None:
    graph = one(stored(value))
    assert any(message in v.message for v in check_graph(graph)), check_graph(graph)


def test_the_shift_of_a_rescaled_sum_is_the_running_maximum_itself() -> None:
    messages = [v.message for v in check_graph(attention(finite=True))]
    assert messages == ["the shift is not a prefix_max over loop n"] * 2


def test_last_value_of_a_bounded_loop_needs_a_running_maximum() -> None:
    last = stored(lambda t: b.accumulate(tile.ACCUM_LAST, t, "n"))
    assert check_graph(one(last)) == []
    assert "takes a prefix_max" in check_graph(one(last, bounds=True))[0].message


def test_a_bounded_loop_may_not_store() -> None:
    def body(g: b.BlockBuilder, t: Node) -> None:
        g.store(t, (60, 64), ("m", 16), ("n", 16))

    assert check_graph(one(body)) == []
    assert "its iterations may not store" in check_graph(one(body, bounds=True))[0].message


def test_a_store_names_grid_axes_and_keeps_ragged_maps() -> None:
    def unnamed(g: b.BlockBuilder, t: Node) -> None:
        g.store(b.accum_sum(t, "n"), (16, 16), 16, 16)

    def wider(g: b.BlockBuilder, t: Node) -> None:
        g.store(b.accum_sum(t, "n"), (64, 16), ("m", 16), 16)

    assert "name it in the map" in str(check_graph(one(unnamed))[0])
    assert "not stored with the map" in str(check_graph(one(wider))[0])


def test_axes_maps_and_bounds() -> None:
    load = make(
        tile.LOAD, (X,), tile.LoadAttrs((tile.DimMap((("m", 4),), 16), tile.DimMap((), 64)))
    )
    maps = (tile.DimMap((("m", 4),), 16), tile.DimMap((("m", 4),), 64))
    store = make(tile.STORE, (load,), tile.StoreAttrs(maps, (60, 64)))
    grid = (Axis("m", 3, (Bound((), 0),)),)
    loops = (Axis("n", 0, (Bound((("k", 1),), 0), Bound((), 1))), Axis("m", 4))
    found = " | ".join(
        v.message for v in check_graph(Graph(Level.BLOCK, "g", (X,), (store,), grid, loops))
    )
    for message in (
        "two axes are called m",
        "axis n has 0 points",
        "grid axis m has bounds",
        "names k, not a grid axis",
        "names no axis",
        "axis m splits a tensor twice",
    ):
        assert message in found


def test_kernel_and_thread_levels() -> None:
    y = b.input_("y", (4,))
    missing = b.kernel_graph("g", [X], [b.exp(y)])
    assert "y is not among" in check_graph(missing)[0].message
    tiles = b.kernel_graph("g", [X], [make(tile.LOAD, (X,), attention_load())])
    assert "only in a block graph" in check_graph(tiles)[0].message
    wide = b.thread_graph("t", [y], [b.reduce_sum(y, -1)])
    messages = [v.message for v in check_graph(wide)]
    assert messages == [
        "the values of a thread graph are scalars",
        "reduce_sum is not elementwise",
    ]


def attention_load() -> tile.LoadAttrs:
    return tile.LoadAttrs((tile.DimMap((), 60), tile.DimMap((), 64)))


def test_every_violation_is_printed_in_the_nested_graph() -> None:
    graph = attention(finite=True)
    outer = b.kernel_graph("outer", graph.inputs, b.apply_graph(graph, graph.inputs))
    with pytest.raises(GraphError) as error:
        verify_graph(outer)
    text = str(error.value)
    assert text.startswith("2 violations in outer\n")
    lines = text.splitlines()
    marks = [i for i, line in enumerate(lines) if "// ^ the shift" in line]
    assert len(marks) == 2
    assert all("accum_rescaled" in lines[i - 1] for i in marks)
    assert parse_graph(text.split("\n", 1)[1]) == outer


def test_a_loop_of_one_iteration_may_replicate_its_operand() -> None:
    g = b.BlockBuilder("g", grid={"m": 4}, loops={"n": 1})
    t = g.load(X, ("m", 16), 64)
    g.store(b.accum_sum(t, "n"), (60, 64), ("m", 16), 64)
    assert check_graph(g.graph()) == []


def test_a_store_is_one_output() -> None:
    graph = attention()
    assert "gives two outputs" in check_graph(graph.with_outputs(graph.outputs * 2))[0].message


def test_equal_ragged_dims_are_told_apart() -> None:
    g = b.BlockBuilder("g", grid={"m": 4})
    square = g.load(b.input_("x", (7, 1)), ("m", 2), 2)
    cube = g.load(b.input_("z", (1, 2, 1)), 3, 2, 3)
    g.store(b.mul(b.transpose(square), square), (7, 1), ("m", 2), 2)
    g.store(b.reshape(cube, (3, 6)), (1, 6), 3, 6)
    messages = [v.message for v in check_graph(g.graph())]
    assert any("mul loses the ragged dim" in m for m in messages)
    assert "reshape loses the ragged dim at axis -1" in messages
