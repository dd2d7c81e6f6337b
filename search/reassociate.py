"""Products in another order: (a b) c => a (b c) where that takes at most half of the operations.

Keys that are a projection of a narrow cache cost a product per token; the projection can be applied
to the few queries. Which operand comes first is not a matter of how dims are grouped and ordered in
memory: products are taken as sums over indices, through the reshapes, permutations and broadcasts
between them.

In: a kernel graph. Out: an equal one, up to rounding. A product that others read too stays.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import final

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, rebuild, users_of
from superopt.ir.ops import contraction, leaf, structural
from superopt.ir.types import TensorType
from superopt.search.errors import NotFusible
from superopt.search.indices import Atom, IndexSpace, analyse
from superopt.search.region import substitute

_VIEWS = (structural.RESHAPE, structural.PERMUTE, structural.BROADCAST)


def reassociated(graph: Graph) -> Graph:
    """Return the graph with its products of products in the cheaper order; every step halves the work."""
    while True:
        step = _next_step(graph)
        if step is None:
            return graph
        graph = substitute(graph, dict([step]))


def _next_step(graph: Graph) -> tuple[Node, Node] | None:
    users = users_of(graph.outputs)
    for outer in graph.nodes():
        if outer.op is not contraction.MATMUL or not outer.tensor.dtype.is_float:
            continue
        for side in (0, 1):
            found = _reordered(outer, side, graph, users)
            if found is not None:
                return outer, found
    return None


def _reordered(
    outer: Node, side: int, graph: Graph, users: Mapping[Node, Sequence[Node]]
) -> Node | None:
    """Return `outer` made by multiplying its other operand with one factor of the product `side` first."""
    operand, other = outer.inputs[side], outer.inputs[1 - side]
    chain = [operand]
    while chain[-1].op in _VIEWS:
        chain.append(chain[-1].inputs[0])
    inner = chain[-1]
    shared = any(len(users[n]) > 1 or n in graph.outputs for n in chain)
    if inner.op is not contraction.MATMUL or shared:
        return None
    # each reading of a tensor has indices of its own
    read = (other, *inner.inputs)
    inputs = [
        make(leaf.INPUT, (), leaf.InputAttrs(f"x{number}", TensorType(n.shape, n.tensor.dtype)))
        for number, n in enumerate(read)
    ]
    body = [rebuild(inner, tuple(inputs[1:]))]
    for view in reversed(chain[:-1]):
        body.append(rebuild(view, (body[-1],)))
    result = rebuild(outer, (inputs[0], body[-1]) if side else (body[-1], inputs[0]))
    try:
        space = analyse(inputs, [*body, result])
    except NotFusible:
        return None
    if space.diagonal((*inputs, *body, result)):
        return None
    removed = space.reduced_by(result)
    product = _Products(space, frozenset(space.atoms(result)), dict(zip(inputs, read, strict=True)))
    apart, *factors = inputs
    before = product.work(apart, body[-1]) + product.work(*factors)
    for first, last in (factors, factors[::-1]):
        if not removed <= set(space.atoms(first)) or not removed.isdisjoint(space.atoms(last)):
            continue
        middle = [a for n in (apart, first) for a in space.atoms(n) if a not in removed]
        after = product.work(apart, first) + product.points({*middle, *space.atoms(last)})
        if 2 * after <= before:
            return product.through(apart, first, last, result)
    return None


@final
@dataclass(frozen=True, slots=True)
class _Products:
    """Products of tensors as sums over atoms: `kept` are the result's; what is read stands for `read`."""

    space: IndexSpace
    kept: frozenset[Atom]
    read: Mapping[Node, Node]

    def points(self, atoms: set[Atom]) -> int:
        """Return the number of points that some atoms have together."""
        return prod(self.space.extent(a) for a in atoms)

    def work(self, left: Node, right: Node) -> int:
        """Return the multiplications of a product."""
        return self.points({*self.space.atoms(left), *self.space.atoms(right)})

    def through(self, other: Node, first: Node, last: Node, outer: Node) -> Node:
        """Multiply `other` with `first`, the result with `last`, and lay that out like `outer`."""
        atoms = self.space.atoms
        needed = self.kept | set(atoms(last))
        middle = self._product(
            self.read[other], atoms(other), self.read[first], atoms(first), needed
        )
        value, order = self._product(*middle, self.read[last], atoms(last), self.kept)
        return b.reshape(b.permute(value, [order.index(a) for a in atoms(outer)]), outer.shape)

    def _product(
        self,
        left: Node,
        rows: Sequence[Atom],
        right: Node,
        columns: Sequence[Atom],
        kept: frozenset[Atom] | set[Atom],
    ) -> tuple[Node, list[Atom]]:
        """Multiply two tensors of given atoms; return the result with a dim per atom, and these."""
        batch = [a for a in rows if a in columns and a in kept]
        summed = [a for a in rows if a in columns and a not in kept]
        above = [a for a in rows if a not in columns]
        beside = [a for a in columns if a not in rows]
        x = self._arranged(left, rows, batch, above, summed)
        y = self._arranged(right, columns, batch, summed, beside)
        order = [*batch, *above, *beside]
        return b.reshape(b.matmul(x, y), self._extents(order)), order

    def _arranged(
        self,
        value: Node,
        atoms: Sequence[Atom],
        batch: Sequence[Atom],
        rows: Sequence[Atom],
        columns: Sequence[Atom],
    ) -> Node:
        """Return a tensor as matrices of given rows and columns."""
        order = [atoms.index(a) for a in (*batch, *rows, *columns)]
        value = b.permute(b.reshape(value, self._extents(atoms)), order)
        sides = (prod(self._extents(rows)), prod(self._extents(columns)))
        return b.reshape(value, (*self._extents(batch), *sides))

    def _extents(self, atoms: Sequence[Atom]) -> tuple[int, ...]:
        return tuple(self.space.extent(a) for a in atoms)
