"""Index structure of a set of ops: which tensor dims run over the same index.

Every tensor dimension is an index; ops relate indices: elementwise ops unify them, a contraction or
a reduction removes one, a reshape splits or merges them. The analysis gives every dim a list of
*atoms*, outermost first, such that reshapes inside the region only regroup atoms: merged heads
`[batch * heads]` and split ones `[batch, heads]` end up as the same two atoms.

In: the nodes of a region. Out: `IndexSpace`. Raises `NotFusible` where the dims have no common
factorization.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Final, final

from superopt.ir.node import Node
from superopt.ir.ops import contraction, leaf, structural
from superopt.ir.ops.registry import OpKind
from superopt.search.errors import NotFusible

SHORT_ROW: Final = 512
"""Elements that are too few for a row of their own: vectors are filled badly, and rows are many."""

Atom = int
Layout = tuple[tuple[Atom, ...], ...]
"""Atoms per tensor dim, outermost first; a dim of size 1 has none."""


@final
@dataclass(slots=True)
class IndexSpace:
    """Atoms of a region: their extents, and the layout of every node."""

    _extent: list[int] = field(default_factory=list)
    _parent: list[Atom] = field(default_factory=list)
    _parts: dict[Atom, tuple[Atom, Atom]] = field(default_factory=dict)
    _whole: set[Atom] = field(default_factory=set)
    _reduced: set[Atom] = field(default_factory=set)
    _absorbed: set[Atom] = field(default_factory=set)
    _dims: dict[Node, list[list[Atom]]] = field(default_factory=dict)
    _layouts: dict[Node, Layout] = field(default_factory=dict)
    """What was asked for since a node was added: dims may be split then."""

    def layout(self, node: Node) -> Layout:
        """Return the atoms of each dim of `node`."""
        found = self._layouts.get(node)
        if found is None:
            found = tuple(tuple(self._resolve(dim)) for dim in self._dims[node])
            self._layouts[node] = found
        return found

    def atoms(self, node: Node) -> tuple[Atom, ...]:
        """Return all atoms of `node` in the order of its dims."""
        return tuple(a for dim in self.layout(node) for a in dim)

    def extent(self, atom: Atom) -> int:
        """Return the number of values of an atom."""
        return self._extent[self._root(atom)]

    @property
    def whole(self) -> frozenset[Atom]:
        """Atoms that no tile may cut: they are sliced, concatenated, scanned or flipped."""
        return frozenset(self._resolve(self._whole))

    @property
    def reduced(self) -> frozenset[Atom]:
        """Atoms that some op of the region reduces or contracts."""
        return frozenset(self._resolve(self._reduced))

    def reduced_by(self, node: Node) -> frozenset[Atom]:
        """Return the atoms that `node` removes from its operands."""
        op = node.op
        if op is contraction.MATMUL:
            return frozenset(self.layout(node.inputs[0])[-1])
        if op.kind is OpKind.REDUCTION:
            layout = self.layout(node.inputs[0])
            return frozenset(a for axis in reduction_axes(node) for a in layout[axis])
        return frozenset()

    def diagonal(self, nodes: Iterable[Node]) -> bool:
        """Say whether two dims of one tensor run over the same index, that is over its diagonal."""
        return any(len(set(a)) < len(a) for a in map(self.atoms, nodes))

    def absorb(self, outer: Atom, inner: Atom) -> None:
        """Make one index of two that always come together, once all nodes are there: `inner` holds both."""
        self._layouts.clear()
        self._extent[inner] *= self._extent[outer]
        self._absorbed.add(outer)

    # -- building ------------------------------------------------------------------------------

    def _fresh(self, extent: int) -> list[Atom]:
        if extent == 1:
            return []
        self._extent.append(extent)
        self._parent.append(len(self._parent))
        return [len(self._parent) - 1]

    def _root(self, atom: Atom) -> Atom:
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def _resolve(self, atoms: Iterable[Atom]) -> list[Atom]:
        result: list[Atom] = []
        stack = list(atoms)[::-1]
        while stack:
            atom = self._root(stack.pop())
            if atom in self._parts:
                stack += self._parts[atom][::-1]
            elif atom not in self._absorbed:
                result.append(atom)
        return result

    def _split(self, atom: Atom, outer: int) -> tuple[Atom, Atom]:
        extent = self._extent[atom]
        if atom in map(self._root, self._whole):
            raise NotFusible("a dim that is cut, joined or scanned is split afterwards")
        if extent % outer:
            raise NotFusible(f"a dim of {extent} does not split into parts of {extent}/{outer}")
        first, second = self._fresh(outer)[0], self._fresh(extent // outer)[0]
        self._parts[atom] = (first, second)
        return first, second

    def _unify(self, left: Sequence[Atom], right: Sequence[Atom]) -> None:
        a, b = self._resolve(left)[::-1], self._resolve(right)[::-1]
        while a and b:
            x, y = a.pop(), b.pop()
            if x == y:
                continue
            if self._extent[x] == self._extent[y]:
                self._parent[y] = x
            elif self._extent[x] < self._extent[y]:
                first, rest = self._split(y, self._extent[x])
                self._parent[first] = x
                b.append(rest)
            else:
                first, rest = self._split(x, self._extent[y])
                self._parent[first] = y
                a.append(rest)
        if a or b:
            raise NotFusible("dims of different extents are combined")

    def add_input(self, node: Node) -> None:
        """Give a tensor that the region reads an atom per dim."""
        self._layouts.clear()
        self._dims[node] = [self._fresh(d) for d in node.shape]

    def add(self, node: Node) -> None:
        """Relate the dims of `node` to those of its operands."""
        self._layouts.clear()
        op = node.op
        operands = [self._dims[i] for i in node.inputs]
        if op.kind is OpKind.ELEMENTWISE:
            self._dims[node] = self._merged(node.shape, operands)
        elif op is contraction.MATMUL:
            batch = self._merged(node.shape[:-2], [o[:-2] for o in operands])
            self._unify(operands[0][-1], operands[1][-2])
            self._reduced.update(operands[0][-1])
            self._dims[node] = [*batch, operands[0][-2], operands[1][-1]]
        elif op.kind is OpKind.REDUCTION:
            axes = {len(node.shape) + a for a in reduction_axes(node)}
            for axis in axes:
                self._reduced.update(operands[0][axis])
                if op in (contraction.ARGMAX, contraction.ARGMIN):
                    self._keep_whole(operands[0][axis])
            self._dims[node] = [[] if i in axes else d for i, d in enumerate(operands[0])]
        elif op is leaf.CONSTANT:
            self._dims[node] = []
        elif op is leaf.IOTA:
            self._dims[node] = [self._fresh(d) for d in node.shape]
        else:
            self._dims[node] = self._structural(node, operands)

    def _merged(
        self, shape: Sequence[int], operands: Sequence[list[list[Atom]]]
    ) -> list[list[Atom]]:
        result: list[list[Atom]] = []
        for i in range(len(shape)):
            dims = [o[i] for o in operands if o and o[i]]
            for other in dims[1:]:
                self._unify(dims[0], other)
            result.append(dims[0] if dims else [])
        return result

    def _keep_whole(self, atoms: list[Atom]) -> None:
        resolved = self._resolve(atoms)
        if len(resolved) > 1:
            raise NotFusible("a merged dim is cut, joined or scanned")
        self._whole.update(resolved)

    def _structural(self, node: Node, operands: list[list[list[Atom]]]) -> list[list[Atom]]:
        op = node.op
        if op is structural.PERMUTE:
            return [operands[0][p] for p in node.attrs.perm]
        if op is structural.RESHAPE:
            return self._regrouped(operands[0], node.shape)
        if op is structural.BROADCAST:
            return [d or self._fresh(n) for d, n in zip(operands[0], node.shape, strict=True)]
        if op in (structural.FLIP, contraction.SCAN):
            axes = getattr(node.attrs, "axes", None) or (node.attrs.axis,)
            for axis in axes:
                self._keep_whole(operands[0][axis])
            return operands[0]
        if op in (structural.SLICE, structural.PAD, structural.CONCAT):
            axis = len(node.shape) + node.attrs.axis
            for o in operands:
                self._keep_whole(o[axis])
            own = self._fresh(node.shape[axis])
            self._whole.update(own)
            merged = self._merged(
                node.shape, [[[] if i == axis else d for i, d in enumerate(o)] for o in operands]
            )
            return [own if i == axis else d for i, d in enumerate(merged)]
        if op is structural.GATHER:
            # places along the gathered axis are data, not an index: that axis stays whole
            axis = len(node.shape) + node.attrs.axis
            self._keep_whole(operands[0][axis])
            apart = [[[] if i == axis else d for i, d in enumerate(o)] for o in operands]
            merged = self._merged(node.shape, apart)
            return [operands[1][axis] if i == axis else d for i, d in enumerate(merged)]
        raise NotFusible(f"{op.name} runs as a kernel of its own")

    def _regrouped(self, dims: list[list[Atom]], shape: Sequence[int]) -> list[list[Atom]]:
        atoms = self._resolve([a for d in dims for a in d])[::-1]
        result: list[list[Atom]] = []
        for extent in shape:
            taken: list[Atom] = []
            missing = extent
            while missing > 1:
                atom = atoms.pop()
                if self._extent[atom] > missing:
                    atom, rest = self._split(atom, missing)
                    atoms.append(rest)
                elif missing % self._extent[atom]:
                    raise NotFusible("a reshape does not regroup whole dims")
                taken.append(atom)
                missing //= self._extent[atom]
            result.append(taken)
        return result


def reduction_axes(node: Node) -> tuple[int, ...]:
    """Return the axes (from the end) that a reduction removes."""
    axes: tuple[int, ...] | None = getattr(node.attrs, "axes", None)
    return (node.attrs.axis,) if axes is None else axes


def analyse(inputs: Iterable[Node], body: Iterable[Node]) -> IndexSpace:
    """Relate all dims of a region: `inputs` it reads, `body` in topological order."""
    space = IndexSpace()
    for node in inputs:
        space.add_input(node)
    for node in body:
        space.add(node)
    return space


def extent_of(space: IndexSpace, atoms: Iterable[Atom]) -> int:
    """Return the number of points of several atoms together."""
    return prod(space.extent(a) for a in atoms)
