"""The one interpreter: it walks a graph over a domain.

A `Domain` says what a value is and what each primitive does to it: PyTorch tensors, residues in
a finite field, polynomial degrees, shapes, costs. Nested block and thread graphs are walked through
their meaning (`superopt.ir.semantics`), composites through their definition unless the domain
has a rule of its own. Values are dropped after their last use.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

from superopt.ir.build import input_
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph, Level
from superopt.ir.node import Node, topological
from superopt.ir.ops import leaf
from superopt.ir.ops.registry import Op, OpKind
from superopt.ir.semantics import to_primitives

V = TypeVar("V")


class Domain(Protocol[V]):
    """What values are, and what ops do to them."""

    def has_rule(self, op: Op) -> bool:
        """Say whether the domain evaluates `op` itself (asked for composites only)."""
        ...

    def apply(self, node: Node, args: Sequence[V]) -> V:
        """Return the value of `node` given those of its operands.

        Nodes with several results (opaque ones) have a value that `item` nodes project.
        """
        ...


def interpret(graph: Graph, args: Sequence[V], domain: Domain[V]) -> list[V]:
    """Evaluate `graph` on `args`, one per input; return one value per output."""
    if len(args) != len(graph.inputs):
        raise GraphError(f"graph {graph.name} takes {len(graph.inputs)} inputs, got {len(args)}")
    if graph.level is not Level.KERNEL:
        graph = meaning(graph)
    values: dict[Node, list[V]] = {i: [a] for i, a in zip(graph.inputs, args, strict=True)}
    order = [n for n in topological(graph.outputs) if n not in values]
    last_use = {i: position for position, n in enumerate(order) for i in n.inputs}
    keep = {*graph.outputs, *graph.inputs}
    for position, node in enumerate(order):
        values[node] = _evaluate(node, values, domain)
        for i in node.inputs:
            if last_use[i] == position and i not in keep:
                values.pop(i, None)
    return [values[o][0] for o in graph.outputs]


def _evaluate(node: Node, values: dict[Node, list[V]], domain: Domain[V]) -> list[V]:
    if node.op is leaf.ITEM and node.inputs[0].op.kind is OpKind.GRAPH:
        return [values[node.inputs[0]][node.attrs.index]]
    args = [values[i][0] for i in node.inputs]
    if node.op.kind is OpKind.GRAPH:
        return interpret(_nested(node), args, domain)
    if node.op.expand is not None and not domain.has_rule(node.op):
        return interpret(_definition(node), args, domain)
    return [domain.apply(node, args)]


def _nested(node: Node) -> Graph:
    graph: Graph = node.attrs.graph
    if graph.level is not Level.THREAD:
        return meaning(graph)
    # a thread graph has scalar inputs: its meaning depends on the operands' shapes
    inputs = _stand_ins(node)
    return Graph(Level.KERNEL, graph.name, inputs, to_primitives(graph, inputs))


def _definition(node: Node) -> Graph:
    assert node.op.expand is not None, node
    inputs = _stand_ins(node)
    return Graph(Level.KERNEL, node.op.name, inputs, (node.op.expand(inputs, node.attrs),))


def _stand_ins(node: Node) -> tuple[Node, ...]:
    return tuple(input_(f"operand{k}", i.shape, i.tensor.dtype) for k, i in enumerate(node.inputs))


@lru_cache(maxsize=256)
def meaning(graph: Graph) -> Graph:
    """Return the kernel graph of primitives that a block or thread graph stands for."""
    return Graph(Level.KERNEL, graph.name, graph.inputs, to_primitives(graph, graph.inputs))
