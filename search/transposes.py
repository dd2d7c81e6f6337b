"""Transpositions that need not be, and copies that pay for themselves.

Programs that mix along positions transpose their features, multiply, and transpose back: (a^T b)^T => b^T a. Neither
copy is needed: elementwise ops, bias and product alike can be computed on the transposed tensors.

Where elementwise ops read a kernel's result across the order in which it lies, the kernel may store it the way it is
read.

In: a kernel graph. Out: an equal one. What others read too stays as it is.
"""

from collections.abc import Mapping, Sequence

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, rebuild, rewrite, users_of
from superopt.ir.ops import contraction, elementwise, structural
from superopt.ir.ops.registry import OpKind
from superopt.search.region import substitute, view_base, view_type

_COMPUTED = (OpKind.ELEMENTWISE, OpKind.REDUCTION, OpKind.CONTRACTION, OpKind.STRUCTURAL)


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


def laid_out(graph: Graph) -> Graph:
    """Return the graph with copies of computed values that elementwise ops read across the order in which they lie.

    Whether the kernel that makes a value writes it so, or the one that reads it follows the strides, is for the
    partition to say.
    """

    def rule(node: Node, inputs: tuple[Node, ...]) -> Node:
        if node.op.kind is OpKind.ELEMENTWISE and node.op is not elementwise.CAST:
            inputs = tuple(copied(i) if _lies_across(i) else i for i in inputs)
        return rebuild(node, inputs)

    return graph.with_outputs(rewrite(graph.outputs, rule))


def copied(node: Node) -> Node:
    """Return a copy of a value, which lies row-major: a cast to the type that it has."""
    return make(elementwise.CAST, (node,), elementwise.CastAttrs(node.tensor.dtype))


def is_copy(node: Node) -> bool:
    """Say whether a node only says how a value is to lie."""
    cast = node.op is elementwise.CAST and not node.attrs.rounds
    return cast and node.tensor.dtype is node.inputs[0].tensor.dtype


def _lies_across(node: Node) -> bool:
    """Say whether a view of a computed value has its last elements apart in memory, each of them once."""
    if node.op not in structural.VIEWS or view_base(node).op.kind not in _COMPUTED:
        return False
    lies = view_type(node)
    strides = lies.element_strides if lies is not None else ()
    wide = [s for n, s in zip(node.shape, strides, strict=False) if n > 1]
    return len(wide) > 1 and wide[-1] > 1 and 0 not in wide


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
    if is_copy(node) or node in graph.outputs or any(u not in readers for u in users[node]):
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
