"""Ways to damage a block graph. Each yields every graph that its one mistake can make of a graph."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.graph import Axis, Bound, Graph
from superopt.ir.node import Node, make, rebuild, rewrite, topological
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile

Change = Callable[[Node], Node | None]


def at_each_node(change: Change) -> Callable[[Graph], Iterator[Graph]]:
    """Apply `change` to one node at a time."""

    def mutate(graph: Graph) -> Iterator[Graph]:
        for target in list(topological(graph.outputs)):
            if target.op is leaf.INPUT or change(target) is None:
                continue

            def rule(node: Node, inputs: tuple[Node, ...], target: Node = target) -> Node:
                if node.op is leaf.INPUT:
                    return node
                rebuilt = rebuild(node, inputs)
                return (change(rebuilt) or rebuilt) if node is target else rebuilt

            try:
                outputs = rewrite(graph.outputs, rule)
            except GraphError:
                continue
            if [o.type for o in outputs] == [o.type for o in graph.outputs]:
                yield graph.with_outputs(outputs)

    return mutate


def becomes(op: object, change: Callable[[Node], Node]) -> Callable[[Graph], Iterator[Graph]]:
    return at_each_node(lambda n: change(n) if n.op is op else None)


def _wrong_constant(n: Node) -> Node | None:
    if n.op is not leaf.CONSTANT or n.attrs.value in (0.0, float("inf"), float("-inf")):
        return None
    return b.constant(n.attrs.value * 1.125, n.attrs.dtype)


def _other_axis(n: Node) -> Node | None:
    """Reduce over the dim before the last, and give the result the shape that was expected."""
    if n.op not in (contraction.REDUCE_SUM, contraction.REDUCE_MAX):
        return None
    x = n.inputs[0]
    wrong = b.reduce(n.op, x, -2)
    return b.slice_(b.broadcast(wrong, x.shape), -1, 0, 1)


def _only_first(n: Node) -> Node | None:
    if n.op not in (contraction.REDUCE_SUM, contraction.REDUCE_MAX):
        return None
    return b.slice_(n.inputs[0], -1, 0, 1)


def _without_source(n: Node) -> Node | None:
    """Make a tile forget which of its elements lie past the edge."""
    if n.op is not tile.LOAD:
        return None
    ragged = any(m.padded > e for m, e in zip(n.attrs.dims, n.inputs[0].shape, strict=True))
    if not ragged or len(n.shape) < 2:
        return None
    flat = b.reshape(n, (n.tensor.elements,))
    return make(structural.RESHAPE, (flat,), structural.ShapeAttrs(n.shape))


def _swapped(n: Node) -> Node | None:
    if n.op not in (elementwise.SUB, elementwise.DIV):
        return None
    return make(n.op, tuple(reversed(n.inputs)), n.attrs)


def _replace_op(old: object, new: object) -> Callable[[Graph], Iterator[Graph]]:
    return becomes(old, lambda n: make(new, n.inputs, n.attrs))  # type: ignore[arg-type]


def wrong_input(graph: Graph) -> Iterator[Graph]:
    """Load another input of the same type."""
    for other in graph.inputs:

        def change(n: Node, other: Node = other) -> Node | None:
            if n.op is not tile.LOAD or n.inputs[0] is other or n.inputs[0].type != other.type:
                return None
            return make(n.op, (other,), n.attrs)

        yield from at_each_node(change)(graph)


def swapped_axes(graph: Graph) -> Iterator[Graph]:
    """Let one load follow another axis of the same count."""
    axes = (*graph.grid, *graph.loops)
    for old in axes:
        for new in axes:
            if old is new or old.count != new.count:
                continue

            def change(n: Node, old: Axis = old, new: Axis = new) -> Node | None:
                if n.op is not tile.LOAD:
                    return None
                dims = tuple(
                    replace(
                        d,
                        axes=tuple((new.name if a == old.name else a, c) for a, c in d.axes),
                    )
                    for d in n.attrs.dims
                )
                return None if dims == n.attrs.dims else make(n.op, n.inputs, tile.LoadAttrs(dims))

            yield from at_each_node(change)(graph)


def swapped_store(graph: Graph) -> Iterator[Graph]:
    """Exchange two axes of the same count in the store."""

    def change(n: Node) -> Node | None:
        if n.op is not tile.STORE:
            return None
        used = [a for d in n.attrs.dims for a in d.axes]
        for first in used:
            for second in used:
                if first[0] != second[0] and first[1] == second[1]:
                    names = {first[0]: second[0], second[0]: first[0]}
                    dims = tuple(
                        replace(d, axes=tuple((names.get(a, a), c) for a, c in d.axes))
                        for d in n.attrs.dims
                    )
                    return make(n.op, n.inputs, tile.StoreAttrs(dims, n.attrs.shape))
        return None

    yield from at_each_node(change)(graph)


def _with_bound(graph: Graph, bound: Callable[[Axis], Bound]) -> Iterator[Graph]:
    for index, axis in enumerate(graph.loops):
        changed = replace(axis, bounds=(*axis.bounds, bound(axis)))
        loops = (*graph.loops[:index], changed, *graph.loops[index + 1 :])
        yield replace(graph, loops=loops)


def skips_last(graph: Graph) -> Iterator[Graph]:
    yield from _with_bound(graph, lambda a: Bound(((a.name, -1),), a.count - 2))


def skips_first(graph: Graph) -> Iterator[Graph]:
    yield from _with_bound(graph, lambda a: Bound(((a.name, 1),), -1))


def tighter_bound(graph: Graph) -> Iterator[Graph]:
    """Move a bound so that the last tile it let through is skipped."""
    for index, axis in enumerate(graph.loops):
        for bound in axis.bounds:
            step = max(abs(c) for name, c in bound.terms if name == axis.name)
            changed = replace(axis, bounds=(replace(bound, constant=bound.constant - step),))
            yield replace(graph, loops=(*graph.loops[:index], changed, *graph.loops[index + 1 :]))


MUTATORS: dict[str, Callable[[Graph], Iterator[Graph]]] = {
    "dropped accumulator": _replace_op(tile.ACCUM_SUM, tile.ACCUM_LAST),
    "maximum instead of sum over the loop": _replace_op(tile.ACCUM_SUM, tile.ACCUM_MAX),
    "sum instead of maximum over the loop": _replace_op(tile.ACCUM_MAX, tile.ACCUM_SUM),
    "last instead of maximum over the loop": _replace_op(tile.ACCUM_MAX, tile.ACCUM_LAST),
    "missing rescale": becomes(
        tile.ACCUM_RESCALED, lambda n: b.accum_sum(n.inputs[0], n.attrs.loop)
    ),
    "rescaled twice": becomes(
        tile.ACCUM_RESCALED,
        lambda n: b.accum_rescaled(n.inputs[0], n.inputs[1], n.attrs.loop, 2),
    ),
    "wrong constant": at_each_node(_wrong_constant),
    "swapped operands": at_each_node(_swapped),
    "sum instead of difference": _replace_op(elementwise.SUB, elementwise.ADD),
    "difference instead of sum": _replace_op(elementwise.ADD, elementwise.SUB),
    "product instead of quotient": _replace_op(elementwise.DIV, elementwise.MUL),
    "sum instead of product": _replace_op(elementwise.MUL, elementwise.ADD),
    "wrong reduced axis": at_each_node(_other_axis),
    "missing reduction": at_each_node(_only_first),
    "maximum instead of sum": _replace_op(contraction.REDUCE_SUM, contraction.REDUCE_MAX),
    "sum instead of maximum": _replace_op(contraction.REDUCE_MAX, contraction.REDUCE_SUM),
    "off-by-one mask": _replace_op(elementwise.GE, elementwise.GT),
    "forgotten mask": becomes(elementwise.WHERE, lambda n: b.broadcast(n.inputs[1], n.shape)),
    "off-by-one index": becomes(tile.TILE_INDEX, lambda n: b.add(n, 1)),
    "forgotten exponential": becomes(elementwise.EXP, lambda n: n.inputs[0]),
    "forgotten square root": becomes(elementwise.SQRT, lambda n: n.inputs[0]),
    "forgotten activation": becomes(elementwise.SIGMOID, lambda n: n.inputs[0]),
    "forgotten epilogue": becomes(elementwise.DIV, lambda n: b.broadcast(n.inputs[0], n.shape)),
    "missing ragged mask": at_each_node(_without_source),
    "wrong input": wrong_input,
    "swapped maps": swapped_axes,
    "swapped output maps": swapped_store,
    "last tile skipped": skips_last,
    "first tile skipped": skips_first,
    "bound skips one tile too many": tighter_bound,
}
