"""Nodes: one immutable, interned record per operation; equal nodes are the same object.

A `Node` is made only by `make`, which runs the op's type rule and looks in a weak table, so
structural equality is `is` and common subexpressions are shared by construction (as in
tinygrad's UOp). Walks are iterative: graphs may be deep.
"""

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from superopt.ir.errors import GraphError
from superopt.ir.types import TensorType, Type

if TYPE_CHECKING:
    from superopt.ir.ops.registry import Op


@final
@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Node:
    """One operation applied to earlier nodes, with the type of its result."""

    op: "Op"
    inputs: tuple["Node", ...]
    attrs: Any
    type: Type

    def __repr__(self) -> str:
        return f"<{self.op.name}/{len(self.inputs)} : {self.type}>"

    @property
    def tensor(self) -> TensorType:
        """The result type of a node with one result."""
        if not isinstance(self.type, TensorType):
            raise GraphError(f"{self.op.name} has several results {self.type}; take item i of it")
        return self.type

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the single result."""
        return self.tensor.shape

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.op.name, self.inputs, self.attrs, self.type)


def _rebuild(name: str, inputs: tuple[Node, ...], attrs: Any, type_: Type) -> Node:
    from superopt.ir.ops.registry import op_named

    return intern(op_named(name), inputs, attrs, type_)


_table: "weakref.WeakValueDictionary[tuple[Any, ...], Node]" = weakref.WeakValueDictionary()


def intern(op: "Op", inputs: tuple[Node, ...], attrs: Any, type_: Type) -> Node:
    """Return the node with exactly these parts, made once."""
    key = (op.name, tuple(id(i) for i in inputs), _hashable(attrs), type_)
    found = _table.get(key)
    if found is not None:
        return found
    node = Node(op, inputs, attrs, type_)
    _table[key] = node
    return node


def _hashable(attrs: Any) -> Any:
    # 0.0 == -0.0 and nan != nan would merge or split constants: key floats by their text
    if not isinstance(getattr(attrs, "value", None), float):
        return attrs
    values = (getattr(attrs, name) for name in attrs.__slots__)
    return attrs.__class__, *(repr(v) if isinstance(v, float) else v for v in values)


def make(op: "Op", inputs: Sequence[Node], attrs: Any = None) -> Node:
    """Apply `op`: check arity and attributes, infer the result type, intern.

    Raises:
        GraphError: the op's type rule refuses the operands; the message names op and types.
    """
    inputs = tuple(inputs)
    if op.arity is not None and len(inputs) != op.arity:
        raise GraphError(f"{op.name} takes {op.arity} operands, got {len(inputs)}")
    if not isinstance(attrs, op.attrs_class or type(None)):
        wanted = op.attrs_class.__name__ if op.attrs_class else "no attributes"
        raise GraphError(f"{op.name} needs {wanted}, got {attrs!r}")
    try:
        result = op.infer(tuple(i.type for i in inputs), attrs)
    except GraphError as error:
        types = ", ".join(str(i.type) for i in inputs)
        shown = "" if attrs is None else f" {attrs}"
        raise GraphError(f"{op.name}({types}){shown}: {error}") from None
    return intern(op, inputs, attrs, result)


def topological(roots: Iterable[Node], *, stop: Container[Node] = ()) -> Iterator[Node]:
    """Yield every node that `roots` need, operands first, in a deterministic order.

    Nodes in `stop` are yielded, but what they need is not visited.
    """
    done: set[int] = set()
    for root in roots:
        stack: list[tuple[Node, int]] = [(root, 0)]
        while stack:
            node, position = stack.pop()
            if id(node) in done:
                continue
            if position < len(node.inputs) and node not in stop:
                stack.append((node, position + 1))
                child = node.inputs[position]
                if id(child) not in done:
                    stack.append((child, 0))
                continue
            done.add(id(node))
            yield node


def users_of(roots: Iterable[Node]) -> dict[Node, list[Node]]:
    """Map every node under `roots` to the nodes that read it, in topological order."""
    users: dict[Node, list[Node]] = {}
    for node in topological(roots):
        users.setdefault(node, [])
        for child in dict.fromkeys(node.inputs):
            users[child].append(node)
    return users


def rewrite(
    roots: Sequence[Node], rule: Callable[[Node, tuple[Node, ...]], Node]
) -> tuple[Node, ...]:
    """Rebuild bottom-up: `rule(node, new_inputs)` gives the replacement of each node."""
    new: dict[Node, Node] = {}
    for node in topological(roots):
        new[node] = rule(node, tuple(new[i] for i in node.inputs))
    return tuple(new[root] for root in roots)


def rebuild(node: Node, inputs: tuple[Node, ...]) -> Node:
    """Return `node` over other operands (the node itself when they are the same)."""
    if all(a is b for a, b in zip(node.inputs, inputs, strict=True)):
        return node
    return make(node.op, inputs, node.attrs)
