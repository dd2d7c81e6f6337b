"""Products with identities and constants, and diagonals of products: without a product, and equal."""

import pytest

from superopt.ir import build as b
from superopt.ir.node import Node
from superopt.ir.ops import contraction
from superopt.ir.types import DType
from superopt.search.sparse import without_known_factors
from superopt.verify.equivalence import verify_field

X, Y = b.input_("x", (2, 6, 5)), b.input_("y", (2, 5, 6))
K, V = b.input_("k", (6, 6)), b.input_("v", (6, 1))
ROW, COLUMN = b.iota((6, 6), -2), b.iota((6, 6), -1)
IDENTITY = b.cast(b.eq(ROW, COLUMN), DType.F32)
CENTER = b.sub(IDENTITY, 1 / 6)


def diagonal(x: Node) -> Node:
    size = x.shape[-1]
    flat = b.reshape(x, (*x.shape[:-2], size * size))
    return b.slice_(flat, -1, 0, size * size, size + 1)


WITHOUT = {
    "identity": b.matmul(IDENTITY, K),
    "centered": b.matmul(b.matmul(CENTER, K), b.neg(b.mul(CENTER, 3.0))),
    "divided": b.matmul(K, b.div(b.add(IDENTITY, b.full((6, 6), 2.0)), 7.0)),
    "columns": b.matmul(K, b.full((6, 4), 0.5)),
    "pairs": diagonal(b.div(b.exp(b.matmul(X, Y)), 3.0)),
    "trace": b.reduce_sum(diagonal(b.matmul(K, b.exp(K))), -1),
    "row": diagonal(b.sub(b.matmul(K, K), b.broadcast(b.exp(V), (6, 6)))),
}
KEPT = {
    "shifted": b.matmul(K, b.cast(b.eq(ROW, b.add(COLUMN, 1)), DType.F32)),
    "of a column": b.matmul(
        b.add(b.cast(b.eq(b.iota((6, 1), -2), b.iota((6, 1), -1)), DType.F32), b.full((6, 6), 2.0)),
        K,
    ),
    "square": b.matmul(K, b.mul(CENTER, CENTER)),
    "every other": b.slice_(b.reshape(b.matmul(K, K), (36,)), -1, 0, 36, 2),
}


def products(node: Node) -> int:
    graph = b.kernel_graph("g", [X, Y, K, V], [node])
    after = without_known_factors(graph)
    assert verify_field(graph, after, seed=0)
    return sum(n.op is contraction.MATMUL for n in after.nodes())


@pytest.mark.parametrize("name", WITHOUT)
def test_no_product_is_left(name: str) -> None:
    assert products(WITHOUT[name]) == 0


@pytest.mark.parametrize("name", KEPT)
def test_other_products_stay(name: str) -> None:
    assert products(KEPT[name]) == 1
