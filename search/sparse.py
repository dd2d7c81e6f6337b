"""Products that need no multiplication: with matrices that are known, and of which only the diagonal is read.

- a (s I + c) => s a + c times the sums of its rows: kernels are centered this way, `H = I - 1/n`.
- the diagonal of a b => sums of a times bᵀ: the trace of a product, pairs that belong together in a loss.
- the diagonal of f(x) => f of the diagonal of x.

In: a kernel graph. Out: an equal one, up to rounding.
"""

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, rebuild
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.search.algebra import Rule, apply_rules

_Parts = tuple[Node | None, Node | None]
"""The scalars s and c of s I + c; None is 0."""


def without_known_factors(graph: Graph) -> Graph:
    """Return the graph without products by identities and constants, or of which a diagonal is read."""
    return apply_rules(graph, _RULES)


def _by_known(node: Node) -> Node | None:
    if node.op is not contraction.MATMUL or not node.tensor.dtype.is_float:
        return None
    for side, other, axis in ((1, 0, -1), (0, 1, -2)):
        parts, x = _parts(node.inputs[side]), node.inputs[other]
        if parts is None:
            continue
        scale, shift = parts
        terms = []
        if scale is not None:
            terms.append(x if scale.attrs == _ONE.attrs else b.mul(x, scale))
        if shift is not None:
            terms.append(b.mul(b.reduce_sum(x, axis), shift))
        if not terms:
            continue
        return b.broadcast(b.add(*terms) if len(terms) > 1 else terms[0], node.shape)
    return None


_ONE = b.constant(1.0)


def _parts(node: Node) -> _Parts | None:
    """Return s and c where a matrix is s I + c."""
    op = node.op
    if op is leaf.CONSTANT:
        return None, node
    if op in (structural.BROADCAST, structural.RESHAPE):
        inner = _parts(node.inputs[0])
        return inner if inner is not None and inner[0] is None else None
    if op is elementwise.CAST and _is_identity(node.inputs[0]):
        return b.constant(1.0, node.tensor.dtype), None
    if not node.tensor.dtype.is_float or op not in _LINEAR:
        return None
    found = [_parts(i) for i in node.inputs]
    if any(f is None for f in found):
        return None
    spread = (f and f[0] and i.shape != node.shape for f, i in zip(found, node.inputs, strict=True))
    if any(spread):
        return None  # an identity of another size, or of more matrices
    (scale, shift), *rest = [f for f in found if f is not None]
    if op is elementwise.NEG:
        return scale and b.neg(scale), shift and b.neg(shift)
    ((scale_2, shift_2),) = rest
    if op is elementwise.ADD:
        return _sum(scale, scale_2), _sum(shift, shift_2)
    if op is elementwise.SUB:
        return _sum(scale, scale_2 and b.neg(scale_2)), _sum(shift, shift_2 and b.neg(shift_2))
    if scale_2 is None and shift_2 is not None:
        apply = b.mul if op is elementwise.MUL else b.div
        return scale and apply(scale, shift_2), shift and apply(shift, shift_2)
    return None


_LINEAR = (elementwise.NEG, elementwise.ADD, elementwise.SUB, elementwise.MUL, elementwise.DIV)


def _sum(left: Node | None, right: Node | None) -> Node | None:
    return b.add(left, right) if left is not None and right is not None else left or right


def _is_identity(node: Node) -> bool:
    """Recognize `row == column` of a matrix."""
    if node.op is not elementwise.EQ or any(i.op is not leaf.IOTA for i in node.inputs):
        return False
    return {i.attrs.axis for i in node.inputs} == {-1, -2} and node.shape[-1] == node.shape[-2]


def _read_diagonally(node: Node) -> Node | None:
    """Return the matrices of which a node is the diagonal."""
    if node.op is not structural.SLICE or node.inputs[0].op is not structural.RESHAPE:
        return None
    flat, a = node.inputs[0], node.attrs
    x = flat.inputs[0]
    size = x.shape[-1] if x.shape else 1
    square = x.shape[-2:] == (size, size) and flat.shape == (*x.shape[:-2], size * size)
    whole = (a.axis, a.start, a.step) == (-1, 0, size + 1) and a.stop == size * size
    return x if square and whole and size > 1 else None


def _diagonal(x: Node, size: int) -> Node:
    """Return the diagonal of matrices, any dim of which may be repeated."""
    if not x.shape:
        return x
    if x.shape[-2:] != (size, size):
        return b.reshape(x, (*x.shape[:-2], max(x.shape[-2:])))
    return b.slice_(b.reshape(x, (*x.shape[:-2], size * size)), -1, 0, size * size, size + 1)


def _diagonal_below(node: Node) -> Node | None:
    x = _read_diagonally(node)
    if x is None:
        return None
    size = x.shape[-1]
    if x.op is contraction.MATMUL:
        left, right = x.inputs
        products = b.mul(left, b.transpose(right))
        return b.reshape(b.reduce_sum(products, -1), node.shape)
    if x.op is structural.BROADCAST:
        return b.broadcast(_diagonal(x.inputs[0], size), node.shape)
    if x.op.kind is OpKind.ELEMENTWISE:
        return b.broadcast(rebuild(x, tuple(_diagonal(i, size) for i in x.inputs)), node.shape)
    return None


_RULES = (
    Rule("product-by-known", _by_known, exact=False),
    Rule("diagonal-below", _diagonal_below, exact=False),
)
