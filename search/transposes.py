"""Products between two transpositions are taken the other way round: (a^T b)^T => b^T a.

Programs that mix along positions transpose their features, multiply, and transpose back. Neither copy is
needed: elementwise ops, bias and product alike can be computed on the transposed tensors.

In: a kernel graph. Out: an equal one. What others read too stays as it is.
"""

from collections.abc import Mapping, Sequence

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, rebuild, users_of
from superopt.ir.ops import contraction, structural
from superopt.ir.ops.registry import OpKind
from superopt.search.region import substitute


def untransposed(graph: Graph) -> Graph:
    """Return the graph without the pairs of transpositions that only products and elementwise ops separate."""
    while True:
        users = users_of(graph.outputs)
        found = (
            (n, _transposed(n.inputs[0], [n], graph, users)) for n in graph.nodes() if _swaps(n)
        )
        step = next(((n, other) for n, other in found if other is not None), None)
        if step is None:
            return graph
        graph = substitute(graph, dict([step]))


def _swaps(node: Node) -> bool:
    rank = len(node.shape) if node.op is structural.PERMUTE else 0
    return (
        rank >= 2
        and 1 not in node.shape[-2:]
        and node.attrs.perm == (*range(rank - 2), rank - 1, rank - 2)
    )


def _transposed(
    node: Node, readers: Sequence[Node], graph: Graph, users: Mapping[Node, Sequence[Node]]
) -> Node | None:
    """Return `node`, which only `readers` may read, with its last two dims swapped; None where that is a copy."""
    if len(node.shape) < 2:
        return None if node.shape else node
    if _swaps(node):
        return node.inputs[0]
    if 1 in node.shape[-2:]:
        return b.transpose(node)
    if node in graph.outputs or any(u not in readers for u in users[node]):
        return None
    if node.op.kind is OpKind.ELEMENTWISE:
        operands = [_transposed(i, [node], graph, users) for i in node.inputs]
        found = [o for o in operands if o is not None]
        return rebuild(node, tuple(found)) if len(found) == len(operands) else None
    if node.op is contraction.MATMUL:
        left = _transposed(node.inputs[0], [node], graph, users)
        return None if left is None else b.matmul(b.transpose(node.inputs[1]), left)
    return _rows_transposed(node, graph, users)


def _rows_transposed(node: Node, graph: Graph, users: Mapping[Node, Sequence[Node]]) -> Node | None:
    """Return the transposed of a matrix product of rows that are one dim within it and several around it."""
    product = node.inputs[0] if node.op is structural.RESHAPE else node
    if product.op is not contraction.MATMUL or len(product.shape) != 2 or users[product] != [node]:
        return None
    merged, matrix = product.inputs
    rows = merged.inputs[0] if merged.op is structural.RESHAPE else merged
    if rows.shape[:-1] != node.shape[:-1] or (rows is not merged and users[merged] != [product]):
        return None
    if product in graph.outputs or merged in graph.outputs:
        return None
    left = _transposed(rows, [merged], graph, users)
    if left is None:
        return None
    ones = (1,) * (len(rows.shape) - 2)
    return b.matmul(b.reshape(b.transpose(matrix), (*ones, *matrix.shape[::-1])), left)
