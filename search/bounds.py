"""Loop bounds from masks: iterations in which every accumulator would receive nothing are skipped.

In: a block graph. Out: the same with a bound for every single comparison of element indices that, by
its outcome in a whole tile, leaves a loop nothing (`superopt.ir.masks`).
"""

from superopt.ir.graph import Axis, Bound, Graph
from superopt.ir.masks import Linear, nothing_new
from superopt.ir.ops.registry import OpKind
from superopt.ir.tiles import varying_axes


def with_bounds(graph: Graph) -> Graph:
    """Return `graph` with the loop bounds that its masks allow."""
    if not graph.loops:
        return graph
    varies = varying_axes(graph)
    loops = []
    for axis in graph.loops:
        stored = any(axis.name in varies[o.inputs[0]] for o in graph.outputs)
        states = [
            n
            for n in graph.nodes()
            if n.op.kind is OpKind.TILE and getattr(n.attrs, "loop", None) == axis.name
        ]
        cases = set() if stored else nothing_new(states)
        single = (number for case in cases if len(case) == 1 for number in case)
        found = {_bound(number, axis.name) for number in single}
        bounds = sorted((b for b in found if b is not None), key=repr)
        loops.append(Axis(axis.name, axis.count, (*axis.bounds, *bounds)))
    return Graph(graph.level, graph.name, graph.inputs, graph.outputs, graph.grid, tuple(loops))


def _bound(excess: Linear, loop: str) -> Bound | None:
    """Bound a loop by "this number is not positive"; None if it does not depend on the loop."""
    terms: dict[str, int] = {}
    for dim, weight in excess.offsets:
        stride = dim.tile
        for name, count in reversed(dim.axes):
            terms[name] = terms.get(name, 0) - weight * stride
            stride *= count
    terms = {n: c for n, c in terms.items() if c}
    return Bound(tuple(terms.items()), -excess.constant) if loop in terms else None
