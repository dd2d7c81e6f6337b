"""Thread graphs: chains of elementwise ops in a block graph gathered into `thread` nodes, and back.

In and out: a block graph of the same meaning. A `thread` node says that what it applies stays in
registers: one pass over a tile, nothing of it stored in between. `form_threads` makes a long graph
short to read; backends read graphs through `inline_threads` and decide for themselves what to fuse.
"""

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, rebuild, topological, users_of
from superopt.ir.ops import leaf, library
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import to_primitives
from superopt.ir.tiles import varying_axes


def inline_threads(graph: Graph) -> Graph:
    """Return the block graph with the elementwise ops of its `thread` nodes in their places."""
    new: dict[Node, Node] = {}
    for node in topological(graph.outputs):
        inputs = tuple(new[i] for i in node.inputs)
        if node.op is library.THREAD:
            (new[node],) = to_primitives(node.attrs.graph, inputs)
        else:
            new[node] = rebuild(node, inputs)
    return graph.with_outputs([new[o] for o in graph.outputs])


def form_threads(graph: Graph) -> Graph:
    """Return the block graph with every chain of at least two elementwise ops as a `thread` node.

    An op joins its users when all of them are in one chain and it has their shape and varies
    over the same axes, so that nothing is computed more often than before.
    """
    graph = inline_threads(graph)
    roots = _roots(graph)
    members: dict[Node, list[Node]] = {}
    for node in topological(graph.outputs):
        if node in roots:
            members.setdefault(roots[node], []).append(node)
    new: dict[Node, Node] = {}
    for node in topological(graph.outputs):
        if roots.get(node, node) is not node:
            continue
        chain = members.get(node, [node])
        new[node] = (
            _thread(f"t{len(new)}", chain, new)
            if len(chain) > 1
            else rebuild(node, tuple(new[i] for i in node.inputs))
        )
    return graph.with_outputs([new[o] for o in graph.outputs])


def _roots(graph: Graph) -> dict[Node, Node]:
    """Map every elementwise node to the last op of its chain."""
    axes = varying_axes(graph)
    users = users_of(graph.outputs)
    roots: dict[Node, Node] = {}
    for node in reversed(users):
        if node.op.kind is not OpKind.ELEMENTWISE:
            continue
        found = {roots.get(user) for user in users[node]}
        root = found.pop() if len(found) == 1 else None
        joins = root is not None and (root.shape, axes[root]) == (node.shape, axes[node])
        roots[node] = root if root is not None and joins else node
    return roots


def _thread(name: str, chain: list[Node], new: dict[Node, Node]) -> Node:
    """Return the thread node of a chain, given in topological order."""
    scalars: dict[Node, Node] = {}
    body: dict[Node, Node] = {}
    for node in chain:
        for i in node.inputs:
            if i.op is leaf.CONSTANT:
                body[i] = i
            elif i not in body:
                body[i] = scalars[i] = b.input_(f"s{len(scalars)}", (), i.tensor.dtype)
        body[node] = make(node.op, [body[i] for i in node.inputs], node.attrs)
    thread = b.thread_graph(name, list(scalars.values()), [body[chain[-1]]])
    return b.apply_graph(thread, [new[i] for i in scalars])[0]
