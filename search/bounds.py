"""Loop bounds from masks: iterations in which every accumulator would receive nothing are skipped.

Where a comparison of element indices is false for a whole tile, `where(cond, x, -inf)` is -inf,
its exp is 0 and the sums and maxima of that iteration receive nothing. The comparison's affine
form then bounds the loop. (Finite operands are assumed behind the mask: a NaN there would otherwise
surface as 0 * NaN.)
"""

from superopt.ir.graph import Axis, Bound, Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.tiles import varying_axes
from superopt.ir.types import DType

_COMPARES = (elementwise.GE, elementwise.GT, elementwise.LE, elementwise.LT)
_NEGATION = {
    elementwise.GE: elementwise.LT,
    elementwise.GT: elementwise.LE,
    elementwise.LE: elementwise.GT,
    elementwise.LT: elementwise.GE,
}
_KEEPS = (
    elementwise.CAST,
    structural.PERMUTE,
    structural.RESHAPE,
    structural.BROADCAST,
)
Outcome = tuple[Node, bool]
"""A comparison, and the value that it has everywhere in a tile."""
Outcomes = dict[Node, set[Outcome]]
Affine = tuple[dict[tile.DimMap, int], int]
"""Coefficient per tile index map, and a constant."""


def with_bounds(graph: Graph) -> Graph:
    """Return `graph` with the loop bounds that its masks allow."""
    if not graph.loops:
        return graph
    varies = varying_axes(graph)
    zero, lowest = _vanishing(graph)
    compares = [n for n in graph.nodes() if n.op in _COMPARES]
    order = [(n, value) for n in compares for value in (False, True)]
    loops = []
    for axis in graph.loops:
        conditions: set[Outcome] | None = None
        for node in graph.nodes():
            if node.op.kind is not OpKind.TILE or getattr(node.attrs, "loop", None) != axis.name:
                continue
            if node.op is tile.ACCUM_LAST:
                continue
            table = lowest if node.op in (tile.PREFIX_MAX, tile.ACCUM_MAX) else zero
            found = set(table[node.inputs[0]])
            conditions = found if conditions is None else conditions & found
        stored = any(axis.name in varies[o.inputs[0]] for o in graph.outputs)
        chosen = [] if stored else [c for c in order if c in (conditions or ())]
        bounds = dict.fromkeys(b for c in chosen for b in _bounds(*c, axis.name))
        loops.append(Axis(axis.name, axis.count, (*axis.bounds, *bounds)))
    return Graph(graph.level, graph.name, graph.inputs, graph.outputs, graph.grid, tuple(loops))


def _vanishing(graph: Graph) -> tuple[Outcomes, Outcomes]:
    """Map nodes to the outcomes that make them 0, and to those that make them -inf."""
    zero: Outcomes = {}
    lowest: Outcomes = {}
    for node in graph.nodes():
        zero[node], lowest[node] = _conditions(node, zero, lowest)
    return zero, lowest


def _conditions(node: Node, zero: Outcomes, lowest: Outcomes) -> tuple[set[Outcome], set[Outcome]]:
    op = node.op
    inputs = node.inputs
    if node.tensor.dtype is DType.BOOL:
        return _forced(node, False), set()
    if op is elementwise.WHERE:
        return _select(node, zero, 0.0), _select(node, lowest, float("-inf"))
    if op is elementwise.EXP:
        return set(lowest[inputs[0]]), set()
    if op in (elementwise.MUL, contraction.MATMUL):
        scaled = lowest[inputs[0]] if _is_positive(inputs[1]) else set()
        return zero[inputs[0]] | zero[inputs[1]], set(scaled)
    if op is elementwise.DIV:
        return set(zero[inputs[0]]), lowest[inputs[0]] if _is_positive(inputs[1]) else set()
    if op is elementwise.SUB:
        return zero[inputs[0]] & zero[inputs[1]], set(lowest[inputs[0]])
    if op is elementwise.ADD:
        return zero[inputs[0]] & zero[inputs[1]], lowest[inputs[0]] | lowest[inputs[1]]
    if op is contraction.REDUCE_SUM:
        return set(zero[inputs[0]]), set()
    if op is contraction.REDUCE_MAX:
        return set(), set(lowest[inputs[0]])
    if op in _KEEPS:
        return set(zero[inputs[0]]), set(lowest[inputs[0]])
    if op is elementwise.NEG:
        return set(zero[inputs[0]]), set()
    return set(), set()


def _is_constant(node: Node, value: float) -> bool:
    return node.op is leaf.CONSTANT and node.attrs.value == value


def _is_positive(node: Node) -> bool:
    return node.op is leaf.CONSTANT and node.attrs.value > 0


def _select(node: Node, table: Outcomes, value: float) -> set[Outcome]:
    """Outcomes that make a `where` the constant `value` all over."""
    condition, yes, no = node.inputs
    sides = []
    for side, picked in ((yes, True), (no, False)):
        if _is_constant(side, value):
            # all of it is `value` where the other side is, or where only this side is picked
            other = no if picked else yes
            return _forced(condition, picked) | table[other]
        sides.append(table[side])
    return sides[0] & sides[1]


def _forced(condition: Node, value: bool) -> set[Outcome]:
    """Outcomes of comparisons that make the whole condition `value`."""
    result: set[Outcome] = set()
    stack = [(condition, value)]
    while stack:
        node, wanted = stack.pop()
        if node.op is (elementwise.OR if wanted else elementwise.AND):
            stack += [(i, wanted) for i in node.inputs]
        elif node.op is elementwise.NOT:
            stack.append((node.inputs[0], not wanted))
        elif node.op in (structural.RESHAPE, structural.BROADCAST):
            stack.append((node.inputs[0], wanted))
        elif node.op in _COMPARES:
            result.add((node, wanted))
    return result


def _affine(node: Node) -> Affine | None:
    if node.op is tile.TILE_INDEX:
        return {node.attrs.dim: 1}, 0
    if node.op is leaf.CONSTANT:
        return ({}, int(node.attrs.value)) if node.attrs.dtype.is_integer else None
    if node.op in (structural.RESHAPE, structural.BROADCAST, structural.PERMUTE):
        return _affine(node.inputs[0])
    if node.op is elementwise.CAST and node.tensor.dtype.is_integer:
        return _affine(node.inputs[0])
    if node.op in (elementwise.ADD, elementwise.SUB, elementwise.MUL):
        left, right = _affine(node.inputs[0]), _affine(node.inputs[1])
        return None if left is None or right is None else _combine(node, left, right)
    return None


def _combine(node: Node, left: Affine, right: Affine) -> Affine | None:
    if node.op is elementwise.MUL:
        if left[0] and right[0]:
            return None
        scale = right[1] if left[0] else left[1]
        terms, constant = left if left[0] else right
        return {k: v * scale for k, v in terms.items()}, constant * scale
    sign = -1 if node.op is elementwise.SUB else 1
    terms = dict(left[0])
    for key, value in right[0].items():
        terms[key] = terms.get(key, 0) + sign * value
    return terms, left[1] + sign * right[1]


def _bounds(condition: Node, value: bool, loop: str) -> list[Bound]:
    """Bound the loop by "the comparison is not `value` everywhere"; none if it is not affine."""
    left, right = _affine(condition.inputs[0]), _affine(condition.inputs[1])
    if left is None or right is None:
        return []
    op = _NEGATION[condition.op] if value else condition.op
    if op in (elementwise.LE, elementwise.LT):
        left, right = right, left
    strict = op in (elementwise.GT, elementwise.LT)
    terms: dict[str, int] = {}
    largest = left[1] - right[1] - (1 if strict else 0)
    for sign, (maps, _) in ((1, left), (-1, right)):
        for dim, coefficient in maps.items():
            weight = sign * coefficient
            stride = dim.tile
            for name, count in reversed(dim.axes):
                terms[name] = terms.get(name, 0) + weight * stride
                stride *= count
            # the largest value that the tile's own positions can add
            largest += max(0, weight) * (dim.tile - 1)
    terms = {n: c for n, c in terms.items() if c}
    if loop not in terms:
        return []
    return [Bound(tuple(terms.items()), largest)]
