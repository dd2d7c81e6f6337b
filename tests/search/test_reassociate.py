"""Products in another order: where that is done, where it must not be, and that nothing changes."""

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, leaf
from superopt.ir.types import DType
from superopt.search.reassociate import reassociated
from superopt.verify.equivalence import verify_field
from superopt.verify.reference import run_reference

q = b.input_("q", (2, 3, 1, 8))
cache = b.input_("cache", (2, 50, 6))
narrow = b.input_("narrow", (24, 6))
x, tall, flat = b.input_("x", (40, 40)), b.input_("tall", (40, 4)), b.input_("flat", (4, 40))


def heads(weight: Node) -> Node:
    """Project a cache of [2, 50, N] to three heads: [2, 3, 50, 8]."""
    rows = b.reshape(cache, (100, 6))
    split = b.reshape(b.matmul(rows, b.transpose(weight)), (2, 50, 3, 8))
    return b.permute(split, (0, 2, 1, 3))


scores = b.matmul(q, b.transpose(heads(narrow)))
repeated = b.broadcast(b.reshape(b.matmul(tall, flat), (1, 40, 40)), (3, 40, 40))
similar = b.matmul(b.exp(tall), b.exp(flat))
wide = b.input_("wide", (6, 9))
CHEAPER = {
    "scores": scores,
    "values": b.matmul(b.exp(scores), heads(b.input_("other", (24, 6)))),
    "left": b.matmul(b.matmul(tall, flat), tall),
    "repeated": b.matmul(b.input_("three", (3, 1, 40)), repeated),
    "rows": b.reduce_sum(b.matmul(tall, flat), -1),
    "tokens": b.reduce_sum(b.reshape(b.matmul(b.reshape(cache, (100, 6)), wide), (2, 50, 9)), -2),
    "linear attention": b.div(b.matmul(similar, tall), b.add(b.reduce_sum(similar, -1), 1.0)),
    "chain": b.matmul(b.matmul(b.matmul(x, x), x), tall),
}
AS_CHEAP = {
    "order": b.matmul(x, b.matmul(x, tall)),
    "elementwise": b.matmul(b.exp(b.matmul(tall, flat)), tall),
    "half": b.matmul(b.matmul(x, x), b.input_("y", (40, 20))),
    "integers": b.matmul(
        b.matmul(b.input_("i", (40, 4), DType.I64), b.input_("j", (4, 40), DType.I64)),
        b.input_("k", (40, 4), DType.I64),
    ),
}


def work(g: Graph) -> int:
    nodes = [n for n in g.nodes() if n.op is contraction.MATMUL]
    return sum(n.op.flops(tuple(i.type for i in n.inputs), n.type) for n in nodes)


def graph_of(*outputs: Node) -> Graph:
    inputs = [n for n in topological(outputs) if n.op is leaf.INPUT]
    return b.kernel_graph("g", inputs, outputs)


@pytest.mark.parametrize("name", CHEAPER)
def test_the_cheaper_order_computes_the_same(name: str) -> None:
    plain = graph_of(CHEAPER[name])
    moved = reassociated(plain)
    assert work(moved) <= 0.5 * work(plain)
    assert verify_field(plain, moved, seed=0).equivalent
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(n.shape, generator=generator) / 4 for n in plain.inputs]
    left = run_reference(plain, values, dtype_override=torch.float64)
    right = run_reference(moved, values, dtype_override=torch.float64)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", AS_CHEAP)
def test_the_order_stays(name: str) -> None:
    plain = graph_of(AS_CHEAP[name])
    assert reassociated(plain) == plain


def test_a_product_that_others_read_stays() -> None:
    keys = heads(narrow)
    plain = graph_of(b.matmul(q, b.transpose(keys)), keys)
    assert reassociated(plain) == plain
    # its sum costs less than the sum of its factors and another product
    square = b.matmul(x, x)
    plain = graph_of(b.reduce_sum(square, -1), square)
    assert reassociated(plain) == plain
