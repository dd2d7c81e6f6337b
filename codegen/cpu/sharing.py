"""What blocks in turn leave to each other, so that blocks of few rows do not compute it again.

In: the values of one scope, and the axes over which they vary. Out: groups of them that the first block
computes which needs them, for a place of the loops, and values that nothing but the right operand of one product needs:
where that operand is left to others in pairs, they are computed as seldom.

Blocks that follow each other in a thread differ in the innermost grid axis: what does not vary over it is the same.
"""

from collections.abc import Iterator, Sequence
from math import prod

from superopt.codegen.cpu.inline import Plan
from superopt.ir.graph import Axis, Graph
from superopt.ir.node import Node
from superopt.ir.ops.registry import OpKind
from superopt.ir.target import KEPT_BYTES
from superopt.ir.tiles import varying_axes


def shared_over(graph: Graph, axes: frozenset[str]) -> tuple[list[Axis], list[Axis]] | None:
    """Return which loop and which grid axes those are over which a value varies, if blocks in turn share it."""
    inner = [a for a in graph.grid if a.count > 1][-1:]
    if not inner or inner[0].name in axes:
        return None
    return [a for a in graph.loops if a.name in axes], [a for a in graph.grid if a.name in axes]


def only_right_of(plan: Plan, product: Node, nodes: Sequence[Node]) -> list[Node]:
    """Return those of `nodes` that nothing but the right operand of one product needs."""
    found: set[Node] = set()
    left = {product.inputs[0]}
    for node in reversed(nodes):
        if node in left:
            left.update(node.inputs)
            continue
        users = set(plan.users[node])
        # states are carried through loops, by every block for itself
        if users and users <= found | {product} and node.op.kind is not OpKind.TILE:
            found.add(node)
    return [n for n in nodes if n in found]


def is_kept(node: Node, places: int) -> bool:
    """Say whether there is room for a value at every place of the loops."""
    return 4 * node.tensor.elements * places <= KEPT_BYTES


def left_to_others(plan: Plan, nodes: Sequence[Node]) -> list[list[Node]]:
    """Return groups of `nodes`, each all that small results need, reductions among it."""
    graph, here = plan.program.graph, set(nodes)
    axes = varying_axes(graph)
    loops = {a.name for a in graph.loops}
    slots = {n: prod(a.count for a in graph.loops if a.name in axes[n]) for n in nodes}
    inside = {
        n
        for n in nodes
        if n in plan.memory
        and n.op.kind not in (OpKind.TILE, OpKind.CONTRACTION)
        and axes[n] & loops
        and shared_over(graph, axes[n]) is not None
    }

    def fits(node: Node) -> bool:
        own = {n for n in inside if axes[n] == axes[node]}
        seen = not all(r in own for r in _readers(plan, node))
        whole = all(s in own for s in _sources(plan, node) if s in here)
        return whole and (not seen or is_kept(node, slots[node]))

    while failed := {n for n in inside if not fits(n)}:
        inside -= failed
    groups: list[list[Node]] = []
    for node in (n for n in nodes if n in inside):
        sources = set(_sources(plan, node))
        joined = [g for g in groups if sources.intersection(g)]
        groups = [g for g in groups if g not in joined]
        groups.append([n for g in joined for n in g] + [node])
    return [g for g in groups if any(n.op.kind is OpKind.REDUCTION for n in g)]


def _readers(plan: Plan, node: Node) -> Iterator[Node]:
    """Yield what reads a value in memory, by values that are computed where they are read."""
    stack = list(plan.users[node])
    while stack:
        user = stack.pop()
        if user in plan.memory or user.op.kind is OpKind.TILE or user in plan.merged:
            yield user
        else:
            stack += plan.users[user]


def _sources(plan: Plan, node: Node) -> Iterator[Node]:
    """Yield the values in memory that one is computed of."""
    stack = list(node.inputs)
    while stack:
        source = stack.pop()
        if source in plan.memory:
            yield source
        else:
            stack += source.inputs
