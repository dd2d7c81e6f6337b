"""The meaning of block graphs: a translation to primitives on batched tensors.

Every grid and loop axis becomes a leading batch dimension of size 1 (the value does not vary over
it) or of its count, so that a kernel with 4096 blocks is a few large array operations. Loads pad
and reshape, accumulators reduce over their loop's batch dimension, stores put tiles together and
cut the padding off. Positions past a dim's extent are filled with copies of the last element
(never with zeros, which could be divided by) and masked wherever tiles are reduced or
contracted over them.

In: a block graph and the nodes that its inputs stand for. Out: one node per output, made of
primitives only. The code generators implement the same meaning; this is their oracle.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import final

from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.graph import Axis, Bound, Graph, Level
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction, leaf, library, structural, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.tiles import DimSource, dim_sources
from superopt.ir.types import DType

_IDENTITY = {
    contraction.REDUCE_SUM: 0.0,
    contraction.REDUCE_PROD: 1.0,
    contraction.REDUCE_MAX: float("-inf"),
    contraction.REDUCE_MIN: float("inf"),
    tile.ACCUM_SUM: 0.0,
    tile.ACCUM_PROD: 1.0,
    tile.ACCUM_MAX: float("-inf"),
    tile.ACCUM_MIN: float("inf"),
    tile.ACCUM_RESCALED: 0.0,
    tile.PREFIX_MAX: float("-inf"),
    contraction.ARGMAX: float("-inf"),
    contraction.ARGMIN: float("inf"),
}
_REDUCTION_OF = {
    tile.ACCUM_SUM: contraction.REDUCE_SUM,
    tile.ACCUM_PROD: contraction.REDUCE_PROD,
    tile.ACCUM_MAX: contraction.REDUCE_MAX,
    tile.ACCUM_MIN: contraction.REDUCE_MIN,
}


def to_primitives(graph: Graph, operands: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return nodes of primitives that compute what `graph` computes on `operands`.

    Block graphs are translated as described above, thread graphs applied element by element,
    kernel graphs by substituting inputs and translating every nested graph.
    """
    if graph.level is Level.BLOCK:
        return _Batch(graph, operands).run()
    return _translated(graph.outputs, dict(zip(graph.inputs, operands, strict=True)))


def _translated(outputs: tuple[Node, ...], known: Mapping[Node, Node]) -> tuple[Node, ...]:
    """Translate what lies above the nodes that are `known`."""
    values: dict[Node, tuple[Node, ...]] = {node: (new,) for node, new in known.items()}
    for node in topological(outputs, stop=known.keys()):
        if node in values:
            continue
        inputs = tuple(values[i][0] for i in node.inputs)
        if node.op.kind is OpKind.GRAPH:
            values[node] = to_primitives(node.attrs.graph, inputs)
        elif node.op is leaf.ITEM and node.inputs[0].op.kind is OpKind.GRAPH:
            values[node] = (values[node.inputs[0]][node.attrs.index],)
        elif node.op.expand is not None:
            # its operands are primitives already: to look below them takes the square of a program's length
            defined = node.op.expand(inputs, node.attrs)
            values[node] = _translated((defined,), dict(zip(inputs, inputs, strict=True)))
        else:
            values[node] = (make(node.op, inputs, node.attrs),)
    return tuple(values[o][0] for o in outputs)


def expand(graph: Graph) -> Graph:
    """Return a kernel graph in which composites and nested graphs are primitives."""
    outputs = to_primitives(graph, graph.inputs)
    return Graph(Level.KERNEL, graph.name, graph.inputs, outputs)


@final
@dataclass(slots=True)
class _Batch:
    graph: Graph
    operands: tuple[Node, ...]
    values: dict[Node, Node] = field(default_factory=dict)
    sources: dict[Node, tuple[DimSource | None, ...]] = field(default_factory=dict)
    axes: tuple[Axis, ...] = ()

    def run(self) -> tuple[Node, ...]:
        self.axes = (*self.graph.grid, *self.graph.loops)
        self.sources = dim_sources(self.graph)
        bound = dict(zip(self.graph.inputs, self.operands, strict=True))
        for node in topological(self.graph.outputs):
            self.values[node] = bound[node] if node in bound else self._value(node)
        return tuple(self.values[o] for o in self.graph.outputs)

    # -- one rule per kind of op ---------------------------------------------------------------

    def _value(self, node: Node) -> Node:
        op = node.op
        inputs = [self.values[i] for i in node.inputs]
        if op.kind is not OpKind.ELEMENTWISE and op is not library.THREAD:
            # constants have no batch dims: only elementwise ops take them as they are
            inputs = [b.reshape(i, (1,) * len(self.axes)) if i.shape == () else i for i in inputs]
        if op is leaf.INPUT:
            raise GraphError(f"input {node.attrs.name} is not among the graph's inputs")
        if op is tile.LOAD:
            return self._load(inputs[0], node.attrs.dims)
        if op is tile.STORE:
            return self._store(node, inputs[0])
        if op is tile.TILE_INDEX:
            return self._indices(node.attrs.dim, 0, 1, node.attrs.dtype)
        if op.kind is OpKind.TILE:
            return self._accumulate(node, inputs)
        if op is library.THREAD:
            return to_primitives(node.attrs.graph, self._align(node, inputs))[0]
        if op.expand is not None:
            raise GraphError(f"composite {op.name} stands in a block graph; expand it first")
        if op is contraction.MATMUL:
            inputs = self._mask_contracted(node, inputs)
        if op.kind is OpKind.REDUCTION:
            axes = getattr(node.attrs, "axes", None) or (node.attrs.axis,)
            for axis in axes:
                valid = self._inside(self.sources[node.inputs[0]][axis], inputs[0], axis)
                inputs[0] = self._mask(valid, inputs[0], _IDENTITY[op])
        if op is structural.GATHER:
            for axis, source in enumerate(self.sources[node.inputs[1]], -len(node.shape)):
                # an index that does not exist may be any number
                inputs[1] = self._mask(self._inside(source, inputs[1], axis), inputs[1], 0.0)
        if op is structural.CONCAT or op is structural.GATHER:
            inputs = self._same_batch(inputs)
        if op.kind is OpKind.ELEMENTWISE:
            return make(op, self._align(node, inputs), node.attrs)
        batch = tuple(inputs[0].shape[: len(self.axes)]) if inputs else ()
        attrs = node.attrs
        if op.batched is not None:
            attrs = op.batched(attrs, batch or (1,) * len(self.axes))
        elif not inputs and node.shape == ():
            return make(op, (), attrs)
        return make(op, inputs, attrs)

    def _align(self, node: Node, inputs: list[Node]) -> tuple[Node, ...]:
        # tiles of rank 0 stand beside tiles of any rank: give them trailing dims of size 1
        rank = len(self.axes) + len(node.shape)
        return tuple(
            b.reshape(i, i.shape + (1,) * (rank - len(i.shape))) if 0 < len(i.shape) < rank else i
            for i in inputs
        )

    def _same_batch(self, inputs: list[Node]) -> list[Node]:
        count = len(self.axes)
        batch = tuple(max(dims) for dims in zip(*(i.shape[:count] for i in inputs), strict=True))
        return [b.broadcast(i, (*batch, *i.shape[count:])) for i in inputs]

    def _load(self, x: Node, dims: tuple[tile.DimMap, ...]) -> Node:
        for axis, dim in enumerate(dims):
            x = extended(x, axis - len(dims), dim.padded)
        split = [c for dim in dims for c in (*(n for _, n in dim.axes), dim.tile)]
        x = b.reshape(x, split)
        order: dict[str, int] = {}
        tiles = []
        position = 0
        for dim in dims:
            for name, _ in dim.axes:
                order[name] = position
                position += 1
            tiles.append(position)
            position += 1
        present = [a for a in self.axes if a.name in order]
        x = b.permute(x, [*(order[a.name] for a in present), *tiles])
        batch = tuple(a.count if a.name in order else 1 for a in self.axes)
        return b.reshape(x, (*batch, *(d.tile for d in dims)))

    def _store(self, node: Node, value: Node) -> Node:
        dims = node.attrs.dims
        used = {name for dim in dims for name, _ in dim.axes}
        count = len(self.axes)
        for i, axis in enumerate(self.axes):
            if axis.name not in used and value.shape[i] > 1:
                raise GraphError(f"store writes a value that varies over axis {axis.name} once")
        batch = tuple(a.count if a.name in used else 1 for a in self.axes)
        value = b.broadcast(value, (*batch, *value.shape[count:]))
        value = b.reshape(value, (*(n for n in batch if n > 1), *value.shape[count:]))
        kept = [a.name for a, n in zip(self.axes, batch, strict=True) if n > 1]
        order = []
        for i, dim in enumerate(dims):
            order += [kept.index(name) for name, _ in dim.axes if name in kept]
            order.append(len(kept) + i)
        value = b.permute(value, order)
        value = b.reshape(value, [dim.padded for dim in dims])
        for i, extent in enumerate(node.attrs.shape):
            value = b.slice_(value, i - len(dims), 0, extent)
        return value

    def _accumulate(self, node: Node, inputs: list[Node]) -> Node:
        loop = node.attrs.loop
        position = next(i for i, a in enumerate(self.axes) if a.name == loop)
        count = self.axes[position].count
        value = inputs[0]
        shape = [*value.shape[:position], count, *value.shape[position + 1 :]]
        value = b.broadcast(value, shape)
        if node.op is not tile.ACCUM_LAST:
            active = self._active(self.axes[position], len(node.shape))
            value = self._mask(active, value, _IDENTITY[node.op])
        axis = position - value.tensor.rank
        if node.op is tile.ACCUM_LAST:
            return b.slice_(value, axis, count - 1, count)
        for i, source in enumerate(self.sources[node.inputs[0]]):
            if source is not None and any(a == loop for a, _ in source.map.axes):
                dim = i - len(node.shape)
                valid = self._inside(source, value, dim)
                value = self._mask(valid, value, _IDENTITY[node.op])
        if node.op is tile.PREFIX_MAX:
            return b.scan(value, axis, "max")
        if node.op is tile.ACCUM_RESCALED:
            value, shift = self._align(node, [value, inputs[1]])
            last = b.slice_(shift, axis, shift.shape[position] - 1, shift.shape[position])
            scale = b.sub(shift, b.finite_or_zero(last))
            if node.attrs.power != 1:
                scale = b.mul(scale, float(node.attrs.power))
            return b.reduce_sum(b.mul(value, b.exp(scale)), axis)
        return b.reduce(_REDUCTION_OF[node.op], value, axis)

    # -- masks ---------------------------------------------------------------------------------

    def _mask(self, valid: Node | None, value: Node, otherwise: float) -> Node:
        if valid is None:
            return value
        if value.tensor.dtype is DType.BOOL:
            return b.where(valid, value, b.constant(bool(otherwise > 0), DType.BOOL))
        if not value.tensor.dtype.is_float and otherwise not in (0.0, 1.0):
            otherwise = _integer_limit(value.tensor.dtype, low=otherwise < 0)
        return b.where(valid, value, b.constant(otherwise, value.tensor.dtype))

    def _mask_contracted(self, node: Node, inputs: list[Node]) -> list[Node]:
        # both operands wherever either's positions are padding: 0 * inf would not be 0
        axes = (-1, -2)
        sources = [self.sources[i][a] for i, a in zip(node.inputs, axes, strict=True)]
        for source in dict.fromkeys(sources):
            inputs = [
                self._mask(self._inside(source, value, axis), value, 0.0)
                for value, axis in zip(inputs, axes, strict=True)
            ]
        return inputs

    def _inside(self, source: DimSource | None, value: Node, axis: int) -> Node | None:
        """Return which positions along the tile dim `axis` (from the end) lie inside the tensor."""
        if source is None or not source.ragged:
            return None
        tile_rank = value.tensor.rank - len(self.axes)
        indices = self._indices(source.map, tile_rank + axis, tile_rank, DType.I64)
        return b.lt(indices, source.extent)

    def _indices(self, dim: tile.DimMap, position: int, tile_rank: int, dtype: DType) -> Node:
        """Element indices that tiles of `dim` cover, along tile dim `position`."""
        count = len(self.axes)
        shape = [1] * (count + tile_rank)
        shape[count + position] = dim.tile
        total = b.iota(shape, position - tile_rank, dtype)
        stride = dim.tile
        for name, size in reversed(dim.axes):
            total = b.add(total, b.mul(self._axis_index(name, tile_rank, dtype), stride))
            stride *= size
        return total

    def _axis_index(self, name: str, tile_rank: int, dtype: DType) -> Node:
        position = next(i for i, a in enumerate(self.axes) if a.name == name)
        shape = [1] * (len(self.axes) + tile_rank)
        shape[position] = self.axes[position].count
        return b.iota(shape, position - len(shape), dtype)

    def _active(self, axis: Axis, tile_rank: int) -> Node | None:
        """Return in which iterations of a bounded loop the body runs."""
        active: Node | None = None
        for bound in axis.bounds:
            holds = self._bound_holds(bound)
            active = holds if active is None else b.and_(active, holds)
        return None if active is None else b.reshape(active, active.shape + (1,) * tile_rank)

    def _bound_holds(self, bound: Bound) -> Node:
        total: Node | None = None
        for name, coefficient in bound.terms:
            term = b.mul(self._axis_index(name, 0, DType.I64), coefficient)
            total = term if total is None else b.add(total, term)
        if total is None:
            raise GraphError("a loop bound names no axis")
        return b.ge(b.add(total, bound.constant), 0)


def _integer_limit(dtype: DType, *, low: bool) -> int:
    bits = dtype.size_bytes * 8
    if dtype is DType.U8:
        return 0 if low else (1 << bits) - 1
    return -(1 << (bits - 1)) if low else (1 << (bits - 1)) - 1


def extended(x: Node, axis: int, size: int) -> Node:
    """Repeat the last element along `axis` until the dim has `size` elements."""
    missing = size - x.shape[axis]
    if missing == 0:
        return x
    if x.shape[axis] == 0:
        raise GraphError("a dim without elements cannot be tiled")
    last = b.slice_(x, axis, x.shape[axis] - 1, x.shape[axis])
    shape = list(last.shape)
    shape[axis] = missing
    return b.concat([x, b.broadcast(last, shape)], axis)


def batch_elements(graph: Graph) -> int:
    """Count the number of blocks times the number of iterations of all loops, for estimates."""
    return prod(a.count for a in (*graph.grid, *graph.loops))
