"""Which residues of each value the field test has to compute.

Outputs need their residue mod p. Only what flows into an exponential needs one mod q, and what is used
in exponentials alone needs none mod p. Exponents that are exponentials need one mod r of their exponents.
Computing exactly what is needed halves the work of the field test or better.

In: a kernel graph of primitives. Out: per node a set of residues ("p", "q", "r") to compute.
"""

from collections.abc import Sequence
from math import isinf

from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, elementwise, leaf, structural
from superopt.ir.ops.registry import OpKind

EXPONENTIAL = (
    elementwise.EXP,
    elementwise.EXPM1,
    elementwise.SIGMOID,
    elementwise.TANH,
    elementwise.SINH,
    elementwise.COSH,
)
UNKNOWN = (
    elementwise.ABS,
    elementwise.SIGN,
    elementwise.FLOOR,
    elementwise.CEIL,
    elementwise.ROUND,
    elementwise.TRUNC,
    elementwise.LOG,
    elementwise.LOG1P,
    elementwise.LOG2,
    elementwise.LOG10,
    elementwise.SQRT,
    elementwise.SIN,
    elementwise.COS,
    elementwise.TAN,
    elementwise.ASIN,
    elementwise.ACOS,
    elementwise.ATAN,
    elementwise.ASINH,
    elementwise.ACOSH,
    elementwise.ATANH,
    elementwise.ERF,
    elementwise.ERFINV,
    elementwise.LGAMMA,
    elementwise.FLOORDIV,
    elementwise.TRUNCDIV,
    elementwise.REMAINDER,
    elementwise.FMOD,
    elementwise.ATAN2,
    elementwise.COPYSIGN,
)
LARGEST_POWER = 64

Needs = dict[Node, frozenset[str]]
_P = frozenset({"p"})
_Q = frozenset({"q"})


def real_valued(node: Node) -> bool:
    """Say whether values of this node are field elements (floating-point in the program)."""
    return hasattr(node.type, "dtype") and node.tensor.dtype.is_float


def infinite_constant(node: Node) -> bool:
    """Say whether this is a constant ±inf, also behind reshapes, broadcasts and casts."""
    while node.op in (structural.RESHAPE, structural.BROADCAST, elementwise.CAST):
        node = node.inputs[0]
    return node.op is leaf.CONSTANT and isinf(node.attrs.value)


def constant_power(node: Node) -> int | None:
    """Return the exponent of a `pow` by a small integer constant."""
    exponent = node.inputs[1]
    if exponent.op is not leaf.CONSTANT or float(exponent.attrs.value) % 1:
        return None
    value = int(exponent.attrs.value)
    return value if abs(value) <= LARGEST_POWER else None


def _operand_needs(node: Node, own: frozenset[str], by_order: bool) -> Sequence[frozenset[str]]:
    op = node.op
    if op in EXPONENTIAL:
        # a power mod p comes of the exponent mod q, one mod q of it mod r; mod r it is a hash of that mod p
        return [frozenset({"p": "q", "q": "r", "r": "q"}[residue] for residue in own)]
    if op in elementwise.COMPARISONS:
        if any(infinite_constant(i) for i in node.inputs):
            return [_Q] * len(node.inputs)
        return [_P] * len(node.inputs)
    if op in UNKNOWN or op.kind is OpKind.LIBRARY or not real_valued(node):
        return [_P] * len(node.inputs)
    if op is elementwise.POW and constant_power(node) is None:
        return [_P] * len(node.inputs)
    if by_order and op in (elementwise.MAXIMUM, elementwise.MINIMUM):
        return [own | _P] * len(node.inputs)
    if op in (contraction.ARGMAX, contraction.ARGMIN):
        return [_P]
    return [own] * len(node.inputs)


def needed_residues(graph: Graph, *, by_order: bool = False) -> Needs:
    """Map each node to the residues that the outputs need of it (empty for unused inputs)."""
    needs: dict[Node, frozenset[str]] = {}
    for output in graph.outputs:
        needs[output] = _P
    for node in reversed(list(topological(graph.outputs))):
        own = needs.setdefault(node, _P)
        for child, need in zip(node.inputs, _operand_needs(node, own, by_order), strict=True):
            if real_valued(child):
                needs[child] = needs.get(child, frozenset()) | need
    return needs
