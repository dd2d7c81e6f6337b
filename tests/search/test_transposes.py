"""Products between transpositions are taken the other way round, where nobody else reads them."""

from math import prod

import pytest

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, structural
from superopt.ir.target import Target
from superopt.search.cost import KernelModel
from superopt.search.partition import is_compute, partition
from superopt.search.region import make_region
from superopt.search.schedule import derive
from superopt.search.tiling import best_tiles
from superopt.search.transposes import copied, laid_out, untransposed
from superopt.verify.equivalence import verify_field

X = b.input_("x", (2, 5, 6))
MIX, BACK = b.input_("mix", (5, 7)), b.input_("back", (7, 5))
BIAS = b.input_("bias", (1, 1, 7))
EACH = b.input_("each", (2, 5, 7))


def layer(x: Node, weight: Node) -> Node:
    """Multiply rows [..., K] as one dim, as linear layers are lifted."""
    rows = b.reshape(x, (prod(x.shape[:-1]), x.shape[-1]))
    return b.reshape(b.matmul(rows, weight), (*x.shape[:-1], weight.shape[-1]))


def mixed(x: Node) -> Node:
    hidden = b.maximum(b.add(layer(b.transpose(x), MIX), BIAS), 0.0)
    return b.mul(x, b.transpose(layer(hidden, BACK)))


def graph(*outputs: Node) -> Graph:
    return b.kernel_graph("g", [X, MIX, BACK, BIAS, EACH], outputs)


@pytest.mark.parametrize("output", [mixed(X), b.transpose(b.matmul(b.transpose(X), EACH))])
def test_features_are_not_transposed(output: Node) -> None:
    before = graph(output)
    after = untransposed(before)
    permuted = [n for n in after.nodes() if n.op is structural.PERMUTE]
    assert not any(X in p.inputs or p.inputs[0].op is contraction.MATMUL for p in permuted)
    assert any(n.op is contraction.MATMUL and n.shape[-1] == 6 for n in after.nodes())
    assert verify_field(before, after, seed=0)
    assert untransposed(after) == after


def test_what_others_read_stays() -> None:
    product = layer(b.transpose(X), MIX)
    for other in (product, b.exp(product)):
        before = graph(b.transpose(b.add(product, BIAS)), other)
        assert untransposed(before) == before
    rows = product.inputs[0]  # before its one dim of rows is two again
    before = graph(b.transpose(b.add(product, BIAS)), rows)
    assert untransposed(before) == before


def test_a_copy_says_how_a_result_is_to_lie() -> None:
    before = graph(b.transpose(copied(b.transpose(b.exp(X)))))
    assert untransposed(before) == before


SCORES, TABLE = b.input_("scores", (8, 90, 70)), b.input_("table", (40, 8))
INDEX = b.input_("index", (90, 70), b.DType.I64)


def picked() -> Node:
    """Return a row of the table for each pair of positions, as [pair, head]."""
    index = b.broadcast(b.reshape(INDEX, (90 * 70, 1)), (90 * 70, 8))
    return b.reshape(b.gather(TABLE, index, -2), (90, 70, 8))


def biased(bias: Node, scores: Node = SCORES) -> Graph:
    return b.kernel_graph("g", [SCORES, TABLE, INDEX], [b.exp(b.add(scores, bias))])


def copies(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes() if n.op is elementwise.CAST]


def test_what_is_read_across_may_be_copied_by_what_makes_it() -> None:
    often = b.input_("often", (16, *SCORES.shape))
    bias = b.reshape(b.permute(picked(), (2, 0, 1)), (1, *SCORES.shape))
    before = b.kernel_graph("g", [often, TABLE, INDEX], [b.exp(b.add(often, bias))])
    after = laid_out(before)
    (copy,) = copies(after)
    assert copy.inputs[0] is bias
    assert laid_out(after) == after
    assert verify_field(before, after, seed=1).equivalent
    first, second = partition(after, Target())
    assert copy in first
    assert copy not in second


@pytest.mark.parametrize(
    "bias",
    [
        b.reshape(picked(), (8, 90, 70)),  # the order in which it lies
        b.permute(b.reshape(picked(), (90, 8, 70)), (1, 0, 2)),  # rows stay rows
        b.broadcast(b.reshape(b.reduce_sum(SCORES, -1), (1, 8, 90, 1)), (1, 8, 90, 70)),
    ],
)
def test_what_is_read_along_is_not_copied(bias: Node) -> None:
    graph = biased(bias, b.reshape(SCORES, bias.shape))
    assert laid_out(graph) == graph


def test_inputs_that_lie_across_stay_and_cost_more() -> None:
    along, across = b.input_("t", (512, 512)), b.input_("t", (512, 512), strides=(1, 512))
    seconds = []
    for given in (along, across):
        graph = b.kernel_graph("g", [given], [b.neg(given)])
        assert laid_out(graph) == graph
        (schedule,) = derive(make_region(graph, filter(is_compute, graph.nodes())))
        _, tiles = best_tiles(schedule, Target(), 1)[0]
        seconds.append(KernelModel(schedule, Target()).seconds(tiles))
    assert seconds[0] < seconds[1]
