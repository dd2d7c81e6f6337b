"""Regions: the sets of ops that become one kernel, and how their tensors lie in memory."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph, Level
from superopt.ir.node import Node, make, rebuild, topological, users_of
from superopt.ir.ops import leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.ir.types import TensorType, reshape_strides
from superopt.search.errors import NotFusible
from superopt.search.indices import analyse


@final
@dataclass(frozen=True, slots=True)
class Region:
    """A convex set of ops: what it reads, its ops in topological order, what others read of it."""

    inputs: tuple[Node, ...]
    body: tuple[Node, ...]
    outputs: tuple[Node, ...]


def is_leaf(node: Node) -> bool:
    """Say whether every kernel makes `node` itself: constants, indices, masks made of them."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or current.op in (leaf.CONSTANT, leaf.IOTA):
            continue
        if not current.inputs:
            return False
        if current.op.kind is not OpKind.ELEMENTWISE and current.op not in structural.VIEWS:
            return False
        seen.add(current)
        stack += current.inputs
    return True


@lru_cache(maxsize=8)
def _structure(graph: Graph) -> tuple[tuple[Node, ...], Mapping[Node, list[Node]]]:
    """Return the nodes in topological order and the users of each."""
    return tuple(topological(graph.outputs)), users_of(graph.outputs)


def make_region(graph: Graph, members: Iterable[Node], elsewhere: Collection[Node] = ()) -> Region:
    """Return the region of the ops `members`, with the leaves and the views between them.

    What other kernels make is `elsewhere`: it is read as they leave it.
    """
    chosen = set(members)
    order, users = _structure(graph)
    feeds: set[Node] = set()
    for node in reversed(order):
        # a view is inside when it leads from one member to another
        if node in chosen or (node.op in structural.VIEWS and any(u in feeds for u in users[node])):
            feeds.add(node)
    for node in order:
        if node in feeds and node.op in structural.VIEWS and node.inputs[0] in chosen:
            chosen.add(node)
    copied = _copied_views(order, chosen, users, elsewhere)
    chosen |= copied
    body = [n for n in order if n in chosen]
    made_by = dict.fromkeys(i for n in body for i in n.inputs if is_leaf(i))
    leaves = set(topological(made_by))
    inputs = dict.fromkeys(i for n in body for i in n.inputs if i not in chosen and i not in leaves)
    results = [
        n
        for n in body
        if n not in copied
        and (n in graph.outputs or any(u not in chosen for u in users.get(n, ())))
    ]
    made = [n for n in order if n in leaves]
    return Region(tuple(inputs), (*made, *body), tuple(results))


def _copied_views(
    order: Sequence[Node],
    chosen: set[Node],
    users: Mapping[Node, list[Node]],
    elsewhere: Collection[Node],
) -> set[Node]:
    """Return the views under members that would cost a copy as inputs, such as repeated heads.

    Inside the region they are index arithmetic; whoever else reads them makes its own.
    """
    copied: set[Node] = set()
    for node in reversed(order):
        needed = any(u in chosen or u in copied for u in users[node])
        made = node in chosen or node in elsewhere
        if needed and node.op in structural.VIEWS and not made and not is_view(node):
            copied.add(node)
    return copied


def view_type(node: Node) -> TensorType | None:
    """Return how a chain of views over a tensor in memory lies there; None if it must be copied.

    The strides are those of the view; a broadcast dim has stride 0. The tensor at the end of the
    chain is a graph input (with its own strides) or a kernel's result (row-major), as is a copy on the way
    that no kernel can make where it reads it.
    """
    if node.op not in structural.VIEWS:
        return node.tensor
    operand = node.inputs[0]
    base = view_type(operand)
    if base is None and _follows(node):
        return None
    if base is None:
        base = TensorType(operand.shape, operand.tensor.dtype)
    strides = _view_strides(node, base)
    return None if strides is None else TensorType(node.shape, base.dtype, strides)


@lru_cache(maxsize=1024)
def _follows(node: Node) -> bool:
    """Say whether kernels can follow a view and the copies under it by index.

    Not where a slice cuts a dim that a reshape made of several: no tile of it is one of what it is made of.
    """
    chain = [node]
    while chain[-1].inputs[0].op in structural.VIEWS and not is_view(chain[-1].inputs[0]):
        chain.append(chain[-1].inputs[0])
    try:
        analyse(chain[-1].inputs, chain[::-1])
    except NotFusible:
        return False
    return True


def view_base(node: Node) -> Node:
    """Return the tensor that a chain of views looks at."""
    while node.op in structural.VIEWS:
        node = node.inputs[0]
    return node


def is_view(node: Node) -> bool:
    """Say whether `node` is free: a view of a tensor in memory."""
    return node.op in structural.VIEWS and view_type(node) is not None


def _view_strides(node: Node, base: TensorType) -> tuple[int, ...] | None:
    strides = base.element_strides
    if node.op is structural.PERMUTE:
        return tuple(strides[p] for p in node.attrs.perm)
    if node.op is structural.BROADCAST:
        pairs = zip(base.shape, node.shape, strides, strict=True)
        return tuple(0 if a != b else s for a, b, s in pairs)
    if node.op is structural.SLICE:
        axis = len(base.shape) + node.attrs.axis
        return tuple(s * node.attrs.step if i == axis else s for i, s in enumerate(strides))
    return reshape_strides(base.shape, strides, node.shape)


def substitute(graph: Graph, replacements: Mapping[Node, Node]) -> Graph:
    """Return `graph` with some nodes replaced by others of the same type.

    Replacements may read nodes of the graph; these are replaced too.

    Raises:
        GraphError: a replacement needs its own result.
    """
    new: dict[Node, Node] = {}
    opened: set[Node] = set()
    stack = list(graph.outputs)
    while stack:
        node = stack[-1]
        target = replacements.get(node, node)
        needed = [target] if target is not node else list(node.inputs)
        missing = [n for n in needed if n not in new]
        if node in new:
            stack.pop()
        elif missing:
            if node in opened:
                raise GraphError(f"what replaces {node.op.name} needs its own result")
            opened.add(node)
            stack += missing
        else:
            stack.pop()
            inputs = tuple(new[i] for i in node.inputs) if target is node else ()
            new[node] = rebuild(node, inputs) if target is node else new[target]
    return graph.with_outputs([new[o] for o in graph.outputs])


def extract(region: Region, name: str) -> Graph:
    """Return the region as a kernel graph of its own; inputs keep their layouts."""
    new: dict[Node, Node] = {}
    for position, node in enumerate(region.inputs):
        type_ = view_type(node) or TensorType(node.shape, node.tensor.dtype)
        attrs = leaf.InputAttrs(f"t{position}", type_)
        new[node] = make(leaf.INPUT, (), attrs)
    inputs = tuple(new.values())
    for node in region.body:
        new[node] = rebuild(node, tuple(new[i] for i in node.inputs))
    return Graph(Level.KERNEL, name, inputs, tuple(new[o] for o in region.outputs))
