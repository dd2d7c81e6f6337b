"""Products in another order: (a b) c => a (b c) where that takes at most half of the operations.

Keys that are a projection of a narrow cache cost a product per token; the projection can be applied
to the few queries. And sum(a b) => sum(a) b, which leaves other readers of a product free to be
reordered. How dims are grouped and ordered in memory plays no part: products are taken as sums over
indices, through the reshapes, permutations and broadcasts between them.

In: a kernel graph. Out: an equal one, up to rounding. A product that others read too stays.
"""

from collections.abc import Collection, Mapping, Sequence
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
    for node in graph.nodes():
        if not isinstance(node.type, TensorType) or not node.tensor.dtype.is_float:
            continue
        for side in range(len(node.inputs)):
            found = None
            if node.op is contraction.MATMUL:
                found = _reordered(node, side, graph, users)
            elif node.op is contraction.REDUCE_SUM:
                found = _summed_first(node, graph, users)
            if found is not None:
                return node, found
    return None


def _reordered(
    outer: Node, side: int, graph: Graph, users: Mapping[Node, Sequence[Node]]
) -> Node | None:
    """Return `outer` made by multiplying its other operand with one factor of the product `side` first."""
    chain = _chain(outer.inputs[side])
    if chain[-1].op is not contraction.MATMUL or _shared(chain, graph, users):
        return None
    product = _products(outer, side, chain)
    if product is None:
        return None
    atoms, removed = product.space.atoms, product.space.reduced_by(product.result)
    left, right, other = product.factors
    before = product.work(other, product.operand) + product.work(left, right)
    for first, last in ((left, right), (right, left)):
        if not removed <= set(atoms(first)) or not removed.isdisjoint(atoms(last)):
            continue
        middle = [a for n in (other, first) for a in atoms(n) if a not in removed]
        after = product.work(other, first) + product.points({*middle, *atoms(last)})
        if 2 * after <= before:
            return product.through(other, first, last)
    return None


def _summed_first(total: Node, graph: Graph, users: Mapping[Node, Sequence[Node]]) -> Node | None:
    """Return a sum over rows or columns of a product as a product with a sum."""
    chain = _chain(total.inputs[0])
    product = _products(total, 0, chain) if chain[-1].op is contraction.MATMUL else None
    if product is None:
        return None
    atoms, removed = product.space.atoms, product.space.reduced_by(product.result)
    left, right = product.factors
    before = product.points(set(atoms(product.operand)))
    if not _shared(chain, graph, users):
        before += product.work(left, right)
    for first, last in ((left, right), (right, left)):
        if not removed <= set(atoms(first)) or not removed.isdisjoint(atoms(last)):
            continue
        rest = {*atoms(first), *atoms(last)} - removed
        if 2 * (product.points(set(atoms(first))) + product.points(rest)) <= before:
            return product.summed(first, last, removed)
    return None


def _chain(value: Node) -> list[Node]:
    """Return the views that lead to `value`, last first, and what they look at."""
    chain = [value]
    while chain[-1].op in _VIEWS:
        chain.append(chain[-1].inputs[0])
    return chain


def _shared(chain: Sequence[Node], graph: Graph, users: Mapping[Node, Sequence[Node]]) -> bool:
    return any(len(users[n]) > 1 or n in graph.outputs for n in chain)


def _products(outer: Node, side: int, chain: Sequence[Node]) -> "_Products | None":
    """Relate the indices of `outer`, of the product that its operand `side` views, and of what they read."""
    inner = chain[-1]
    read = (*inner.inputs, *(n for i, n in enumerate(outer.inputs) if i != side))
    # each reading of a tensor has indices of its own
    factors = [
        make(leaf.INPUT, (), leaf.InputAttrs(f"x{number}", TensorType(n.shape, n.tensor.dtype)))
        for number, n in enumerate(read)
    ]
    body = [rebuild(inner, tuple(factors[:2]))]
    for view in reversed(chain[:-1]):
        body.append(rebuild(view, (body[-1],)))
    operands = factors[2:]
    operands.insert(side, body[-1])
    result = rebuild(outer, tuple(operands))
    try:
        space = analyse(factors, [*body, result])
    except NotFusible:
        return None
    if space.diagonal((*factors, *body, result)):
        return None
    return _Products(space, factors, dict(zip(factors, read, strict=True)), body[-1], result)


@final
@dataclass(frozen=True, slots=True)
class _Products:
    """A product of products, or a sum of one, as sums over atoms; `factors` stand for what is `read`."""

    space: IndexSpace
    factors: Sequence[Node]
    read: Mapping[Node, Node]
    operand: Node
    result: Node

    def points(self, atoms: set[Atom]) -> int:
        """Return the number of points that some atoms have together."""
        return prod(self.space.extent(a) for a in atoms)

    def work(self, left: Node, right: Node) -> int:
        """Return the multiplications of a product."""
        return self.points({*self.space.atoms(left), *self.space.atoms(right)})

    def through(self, other: Node, first: Node, last: Node) -> Node:
        """Multiply `other` with `first`, and that with `last`."""
        atoms = self.space.atoms
        needed = {*atoms(self.result), *atoms(last)}
        middle = self._product(
            self.read[other], atoms(other), self.read[first], atoms(first), needed
        )
        return self._last(*middle, last)

    def summed(self, first: Node, last: Node, removed: frozenset[Atom]) -> Node:
        """Multiply the sum of `first` over some atoms with `last`."""
        atoms = self.space.atoms(first)
        split = b.reshape(self.read[first], self._extents(atoms))
        total = b.reduce_sum(split, [n for n, a in enumerate(atoms) if a in removed])
        rest = [a for a in atoms if a not in removed]
        return self._last(b.reshape(total, self._extents(rest)), rest, last)

    def _last(self, value: Node, order: Sequence[Atom], last: Node) -> Node:
        """Multiply with `last`, and lay the product out as the result is."""
        kept = self.space.atoms(self.result)
        value, order = self._product(value, order, self.read[last], self.space.atoms(last), kept)
        return b.reshape(b.permute(value, [order.index(a) for a in kept]), self.result.shape)

    def _product(
        self,
        left: Node,
        rows: Sequence[Atom],
        right: Node,
        columns: Sequence[Atom],
        kept: Collection[Atom],
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
