"""Programs that run in slices compute what they compute as a whole."""

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given

from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.interpret import interpret
from superopt.ir.node import Node
from superopt.ir.ops import contraction, structural
from superopt.ir.ops.registry import Op
from superopt.ir.semantics import expand
from superopt.ir.types import DType
from superopt.verify import cuts
from superopt.verify import slices as module
from superopt.verify.cuts import Cut
from superopt.verify.reference import TorchDomain
from superopt.verify.slices import Alike, Slices, alike, slices
from tests.strategies import arrays_for, kernel_graphs

WIDE = TorchDomain(torch.float64)


def inputs_of(graph: Graph) -> list[torch.Tensor]:
    return [torch.as_tensor(a) for a in arrays_for(graph, 3)]


def largest(found: Slices) -> int:
    parts = [found.head, found.tail, *(body.graph for body in found.bodies.values())]
    return max(module._size(n) for part in parts for n in part.nodes())


def equal(graph: Graph, found: Slices) -> bool:
    tensors = inputs_of(graph)
    pairs = zip(interpret(graph, tensors, WIDE), found.run(tensors, WIDE), strict=True)
    return all(torch.equal(a.isnan(), c.isnan()) and _close(a, c) for a, c in pairs)


def _close(a: torch.Tensor, c: torch.Tensor) -> bool:
    return a.dtype is c.dtype and torch.allclose(a.double(), c.double(), equal_nan=True)


def wide(name: str, *shape: int) -> Node:
    return b.input_(name, shape, DType.F64)


def softmax(x: Node) -> Node:
    e = b.exp(b.sub(x, b.reduce_max(x, -1)))
    return b.div(e, b.reduce_sum(e, -1))


def attention() -> Node:
    """Heads split from and merged into the features of 90 positions, by all of which keys are read."""
    x, weight = wide("x", 90, 16), wide("weight", 16, 48)
    q, k, v = (
        b.permute(b.reshape(b.slice_(b.matmul(x, weight), -1, i, i + 16), (90, 2, 8)), (1, 0, 2))
        for i in (0, 16, 32)
    )
    later = b.gt(b.iota((1, 1, 90), -1), b.iota((1, 90, 1), -2))
    scores = b.where(later, b.constant(float("-inf"), DType.F64), b.matmul(q, b.transpose(k)))
    merged = b.reshape(b.permute(b.matmul(softmax(scores), v), (1, 0, 2)), (90, 16))
    return b.add(x, merged)


def loss() -> Node:
    """One number, of rows in each of which a class is looked up."""
    logits, classes = wide("logits", 24, 40), b.input_("classes", (24, 1), DType.I64)
    kept = b.maximum(classes, b.constant(0, DType.I64))
    picked = b.gather(b.log(softmax(logits)), kept, -1)
    return b.neg(b.div(b.reduce_sum(picked, (-2, -1)), b.constant(24.0, DType.F64)))


def moved() -> Node:
    """Views that cut, join, turn and pick, and a scan, beside or along the axis of the slices."""
    x, table, index = wide("x", 21, 4, 5), wide("table", 6, 5), b.input_("i", (21, 4), DType.I64)
    places = b.maximum(index, b.constant(0, DType.I64))
    everywhere = b.broadcast(b.reshape(places, (21, 4, 1)), (21, 4, 5))
    rows = b.concat([b.gather(x, everywhere, -3), b.take(table, places, -2)], -1)
    turned = b.flip(b.pad(b.permute(rows, (2, 0, 1)), -3, 1, 0, 2.0), (-1,))
    return b.scan(b.slice_(b.reshape(turned, (11, 84)), -2, 0, 9), -2, "sum")


PROGRAMS: dict[str, Callable[[], Node]] = {"attention": attention, "loss": loss, "moved": moved}


def program(name: str) -> Graph:
    result = PROGRAMS[name]()
    return b.kernel_graph(name, b.graph_inputs([result]), [result])


@pytest.mark.parametrize("name", PROGRAMS)
def test_slices_compute_what_the_whole_does(name: str) -> None:
    graph = program(name)
    found = slices(graph, "cpu", 120)
    assert found is not None
    assert len(found.starts) > 1
    assert len(found.bodies) <= 2
    assert equal(graph, found)
    before = max(module._size(n) for n in graph.nodes())
    assert largest(found) <= before / 2


def test_scores_never_exist_as_a_whole() -> None:
    found = slices(program("attention"), "cpu", 120)
    assert found is not None
    # the projection is read by all positions: it alone is computed before
    assert largest(found) == 90 * 48


def test_what_is_small_or_not_on_a_cpu_is_not_sliced() -> None:
    assert slices(program("attention"), "cuda", 120) is None
    assert slices(program("attention"), "cpu", 2 * 90 * 90) is None


@pytest.mark.parametrize("name", PROGRAMS)
def test_some_rows_alone(name: str) -> None:
    """Steps that make them are computed, as many at a time as slices have, and give what the whole gives there."""
    graph = program(name)
    found = slices(graph, "cpu", 120)
    assert found is not None
    assert found.whole_rows is (name == "attention")
    if not found.whole_rows:
        return
    tensors = inputs_of(graph)
    whole = found.run(tensors, WIDE)
    rows = [torch.tensor([1, prod(o.shape[:-1]) - 2]) for o in graph.outputs]
    wanted = found.steps_of(rows)
    assert len(wanted) < len(found.starts)
    expected = found.of(whole, wanted)
    for x, y in zip(expected, found.run(tensors, WIDE, wanted), strict=True):
        assert _close(x, y)
    for x, y, index in zip(whole, expected, rows, strict=True):
        there = y.reshape(-1, y.shape[-1])
        for row in x.reshape(-1, x.shape[-1])[index]:
            assert bool((there == row).all(-1).any())


@given(graph=kernel_graphs())
def test_random_programs(graph: Graph) -> None:
    graph = expand(graph)
    found = slices(graph, "cpu", 1)
    assert found is None or equal(graph, found)


def _unmoved(node: Node, cut: Cut, length: int) -> list[Any]:
    return [cut] * len(node.inputs)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (contraction.MATMUL, "attention"),
        (structural.PERMUTE, "attention"),
        (structural.RESHAPE, "attention"),
        (structural.GATHER, "moved"),
        (structural.TAKE, "moved"),
        (structural.PERMUTE, "moved"),
        (structural.RESHAPE, "moved"),
    ],
)
def test_wrong_rules_are_seen(op: Op, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cuts._RULES, op.name, _unmoved)
    try:
        found = slices(program(name), "cpu", 120)
        right = found is not None and equal(program(name), found)
    except (GraphError, RuntimeError, IndexError):
        right = False
    assert not right


def part_equals_whole(graph: Graph, part: Alike) -> bool:
    tensors = inputs_of(graph)
    expected = part.outputs(interpret(graph, tensors, WIDE))
    found = interpret(part.graph, part.inputs(tensors), WIDE)
    pairs = zip(expected, found, strict=True)
    return all(torch.equal(a.isnan(), c.isnan()) and _close(a, c) for a, c in pairs)


def heads(*, causal: bool) -> Graph:
    q, k, v = (wide(name, 6, 48, 8) for name in "qkv")
    scores = b.matmul(q, b.transpose(k))
    if causal:
        later = b.gt(b.iota((1, 1, 48), -1), b.iota((1, 48, 1), -2))
        scores = b.where(later, b.constant(float("-inf"), DType.F64), scores)
    return b.kernel_graph("heads", [q, k, v], [b.matmul(softmax(scores), v)])


def test_a_few_steps_stand_for_all_that_are_alike() -> None:
    part = alike(heads(causal=False), 200)
    assert part.kept == ((1, 48),)
    assert [i.shape for i in part.graph.inputs] == [(6, 1, 8), (6, 48, 8), (6, 48, 8)]
    assert part_equals_whole(heads(causal=False), part)
    # how many keys a query sees depends on where it is
    part = alike(heads(causal=True), 200)
    assert part.kept == ((1, 6),)
    assert part_equals_whole(heads(causal=True), part)
    assert alike(heads(causal=True), 1 << 20).kept == ()


def test_what_repeats_is_not_copied_when_a_few_steps_are_taken() -> None:
    table = torch.arange(12.0).reshape(3, 4)
    rows = table[None, :, None].expand(50, 3, 20, 4)
    for axis, places in ((0, [0, 49]), (1, [2, 0]), (2, [19]), (3, [1, 3])):
        chosen = cuts.chosen(rows, axis, places)
        assert torch.equal(chosen, rows.index_select(axis, torch.tensor(places)))
        assert chosen.untyped_storage().nbytes() <= table.untyped_storage().nbytes()


def test_steps_may_lie_apart_in_an_axis_that_was_made_of_several() -> None:
    """A batch that comes second, as in PyTorch's attention, is in every row of a flat product."""
    x, w = wide("x", 12, 30, 8), wide("w", 8, 16)
    flat = b.matmul(b.reshape(b.permute(x, (1, 0, 2)), (360, 8)), w)
    back = b.permute(b.reshape(b.exp(flat), (30, 12, 2, 8)), (1, 2, 0, 3))
    graph = b.kernel_graph("g", [x, w], [b.scan(back, -2, "sum")])
    part = alike(graph, 500)
    assert part.kept == ((1, 12),)
    assert part_equals_whole(graph, part)
    found = slices(graph, "cpu", 200)
    assert found is not None
    assert equal(graph, found)


def test_steps_may_lie_as_far_apart_as_tiles_are_long() -> None:
    """A kernel that reads blocks of rows has the same steps as a program that reads all of them."""
    x, w, block = wide("x", 64, 8), wide("w", 8, 16), wide("block", 4, 1, 1)
    tiled = b.matmul(b.mul(b.reshape(x, (4, 16, 8)), block), b.reshape(w, (1, 8, 16)))
    outputs = [b.exp(b.matmul(x, w)), b.exp(b.reshape(tiled, (64, 16)))]
    graph = b.kernel_graph("g", [x, w, block], outputs)
    part = alike(graph, 100)
    assert part.kept == ((1, 16),)
    assert [o.shape for o in part.graph.outputs] == [(4, 16), (4, 16)]
    assert part_equals_whole(graph, part)


def test_columns_of_results_are_cut_where_no_errors_are_measured() -> None:
    """All heads of an attention are in every row of what it gives."""
    q, k, v = (wide(name, 40, 16) for name in "qkv")
    queries, keys, values = (b.permute(b.reshape(x, (40, 4, 4)), (1, 0, 2)) for x in (q, k, v))
    later = b.gt(b.iota((1, 1, 40), -1), b.iota((1, 40, 1), -2))
    scores = b.matmul(queries, b.transpose(keys))
    weights = softmax(b.where(later, b.constant(float("-inf"), DType.F64), scores))
    merged = b.reshape(b.permute(b.matmul(weights, values), (1, 0, 2)), (40, 16))
    graph = b.kernel_graph("g", [q, k, v], [merged])
    assert alike(graph, 200).kept == ()
    part = alike(graph, 200, summed=8.0)
    assert part.kept[0] == (1, 4)
    assert part.graph.outputs[0].shape[-1] < 16
    assert part_equals_whole(graph, part)


def test_the_axis_that_leaves_least_is_cut() -> None:
    """Not the longest: along that, all weights would be left."""
    x, w = wide("x", 30, 40, 8), wide("w", 30, 8, 400)
    graph = b.kernel_graph("g", [x, w], [b.matmul(b.exp(b.matmul(x, b.exp(w))), b.transpose(w))])
    assert alike(graph, 1 << 14).kept[0] == (1, 30)


ROWS = wide("x", 48, 8)
NUMBERED = b.cast(b.iota((48, 1), -2), DType.F64)


@pytest.mark.parametrize(
    "other",
    [
        b.mul(ROWS, NUMBERED),
        b.sub(ROWS, b.reduce_sum(ROWS, -2)),
        b.scan(ROWS, -2, "sum"),
        b.flip(ROWS, (-2,)),
        b.concat([b.slice_(ROWS, -2, 1, 48), b.slice_(ROWS, -2, 0, 1)], -2),
        b.pad(b.slice_(ROWS, -2, 0, 47), -2, 1, 0, 0.0),
        b.matmul(b.matmul(ROWS, b.transpose(ROWS)), ROWS),
    ],
)
def test_steps_that_are_not_alike_are_all_kept(other: Node) -> None:
    square = b.mul(ROWS, ROWS)
    assert alike(b.kernel_graph("g", [ROWS], [square, b.exp(ROWS)]), 100).few
    assert not alike(b.kernel_graph("g", [ROWS], [square, b.exp(other)]), 100).few


@pytest.mark.parametrize("graph", [program("attention"), heads(causal=True)])
def test_rows_of_results_are_picked_where_they_read_all_others(graph: Graph) -> None:
    """All keys are computed, and a few queries: they need not be alike."""
    part = alike(graph, 1000, rows=6, picked=True)
    assert part.kept[0][1] % 3 == 0
    assert max(map(module._size, part.graph.nodes())) < max(map(module._size, graph.nodes())) / 3
    assert all(prod(o.shape[:-1]) >= 6 for o in part.graph.outputs)
    assert part_equals_whole(graph, part)


@given(graph=kernel_graphs())
def test_a_few_steps_of_random_programs(graph: Graph) -> None:
    graph = expand(graph)
    assert part_equals_whole(graph, alike(graph, 1))
    assert part_equals_whole(graph, alike(graph, 1, rows=2, picked=True))
