"""Products between transpositions are taken the other way round, where nobody else reads them."""

from math import prod

import pytest

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, structural
from superopt.search.transposes import untransposed
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
