"""A naive oracle for block graphs: Python loops over blocks and iterations, numpy on single tiles.

Written from the docstrings of the ops; it shares no code with `superopt.ir.semantics` and
`superopt.ir.tiles`. Every tile knows for each of its dims which positions exist (lie inside the
tensor); the others are poisoned after every op, so that a use of one shows in the result. Output
elements that no block writes stay poisoned too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import erf, prod
from typing import Any

import numpy as np

from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, library, structural, tile
from superopt.ir.types import DType

Array = Any
Point = Mapping[str, int]

NUMPY = {
    DType.F64: np.float64,
    DType.F32: np.float32,
    DType.I64: np.int64,
    DType.I32: np.int32,
    DType.BOOL: np.bool_,
}
ELEMENTWISE: dict[Any, Callable[..., Array]] = {
    elementwise.NEG: np.negative,
    elementwise.ABS: np.abs,
    elementwise.SIGN: lambda x: np.where(x == x, np.sign(x), 0),  # torch: the sign of NaN is 0
    elementwise.EXP: np.exp,
    elementwise.TANH: np.tanh,
    elementwise.SIN: np.sin,
    elementwise.ERF: np.vectorize(erf, otypes=[np.float64]),
    elementwise.SIGMOID: lambda x: 1 / (1 + np.exp(-x)),
    elementwise.NOT: np.logical_not,
    elementwise.ADD: np.add,
    elementwise.SUB: np.subtract,
    elementwise.MUL: np.multiply,
    elementwise.DIV: np.divide,
    elementwise.MAXIMUM: np.maximum,
    elementwise.MINIMUM: np.minimum,
    elementwise.EQ: np.equal,
    elementwise.NE: np.not_equal,
    elementwise.LT: np.less,
    elementwise.LE: np.less_equal,
    elementwise.GT: np.greater,
    elementwise.GE: np.greater_equal,
    elementwise.AND: np.logical_and,
    elementwise.OR: np.logical_or,
    elementwise.WHERE: np.where,
}
FOLDS: dict[Any, tuple[Callable[..., Array], float]] = {
    contraction.REDUCE_SUM: (np.add, 0.0),
    contraction.REDUCE_PROD: (np.multiply, 1.0),
    contraction.REDUCE_MAX: (np.maximum, -np.inf),
    contraction.REDUCE_MIN: (np.minimum, np.inf),
    tile.ACCUM_SUM: (np.add, 0.0),
    tile.ACCUM_PROD: (np.multiply, 1.0),
    tile.ACCUM_MAX: (np.maximum, -np.inf),
    tile.ACCUM_MIN: (np.minimum, np.inf),
    tile.PREFIX_MAX: (np.maximum, -np.inf),
    tile.ACCUM_RESCALED: (np.add, 0.0),
}
SCANS = {
    "sum": np.add.accumulate,
    "prod": np.multiply.accumulate,
    "max": np.maximum.accumulate,
    "min": np.minimum.accumulate,
}


@dataclass
class Dim:
    """Which positions of a tile dim exist, and the axes along which that changes."""

    exists: Array
    axes: frozenset[str] = frozenset()


@dataclass
class Tile:
    """The value of a node in one block and iteration."""

    value: Array
    dims: tuple[Dim, ...]


def run_naive(graph: Graph, arrays: Sequence[Array]) -> list[Array]:
    """Run a block graph, block by block and iteration by iteration."""
    outputs = [poison(o.shape, NUMPY[o.tensor.dtype]) for o in graph.outputs]
    inputs = dict(zip(graph.inputs, arrays, strict=True))
    for numbers in product(*(range(a.count) for a in graph.grid)):
        block = _Block(graph, inputs, {})
        at = dict(zip([a.name for a in graph.grid], numbers, strict=True))
        for node, output in zip(graph.outputs, outputs, strict=True):
            block.store(node, at, output)
    return outputs


def poison(shape: tuple[int, ...], dtype: Any) -> Array:
    """An array of a value that nothing right contains."""
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 99991, dtype)


@dataclass
class _Block:
    graph: Graph
    inputs: dict[Node, Array]
    known: dict[Any, Tile]

    def store(self, node: Node, at: Point, output: Array) -> None:
        """Write the tiles of a store, one per iteration of the loops that its map names."""
        named = {name for dim in node.attrs.dims for name, _ in dim.axes}
        loops = [a for a in self.graph.loops if a.name in named]
        for numbers in product(*(range(a.count) for a in loops)):
            here = {**at, **dict(zip([a.name for a in loops], numbers, strict=True))}
            stored = self.value(node.inputs[0], here)
            starts = [start(dim, here) for dim in node.attrs.dims]
            for index in np.ndindex(stored.value.shape):
                place = tuple(s + i for s, i in zip(starts, index, strict=True))
                inside = all(p < n for p, n in zip(place, node.attrs.shape, strict=True))
                if inside and all(d.exists[i] for d, i in zip(stored.dims, index, strict=True)):
                    output[place] = stored.value[index]

    def value(self, node: Node, at: Point) -> Tile:
        """Return the tile of `node` at a grid point and, inside loops, an iteration of each."""
        key = (node, tuple(sorted(at.items())))
        if key not in self.known:
            found = self.compute(node, at)
            assert found.value.shape == node.shape, node
            value = found.value.astype(NUMPY[node.tensor.dtype])
            value = np.where(existing(found), value, poison((), value.dtype))
            self.known[key] = Tile(value, found.dims)
        return self.known[key]

    def compute(self, node: Node, at: Point) -> Tile:
        op, attrs = node.op, node.attrs
        if op is leaf.CONSTANT:
            return Tile(np.array(attrs.value), ())
        if op is leaf.IOTA:
            shape = [1] * len(attrs.shape)
            shape[attrs.axis] = attrs.shape[attrs.axis]
            indices = np.arange(attrs.shape[attrs.axis]).reshape(shape)
            return whole(np.broadcast_to(indices, attrs.shape))
        if op is tile.TILE_INDEX:
            index = start(attrs.dim, at) + np.arange(attrs.dim.tile)
            return Tile(index, (Dim(index < attrs.extent, axes_of(attrs.dim)),))
        if op is tile.LOAD:
            return load(self.inputs[node.inputs[0]], attrs.dims, at)
        if hasattr(attrs, "loop"):
            return self.accumulate(node, at)
        return apply(node, [self.value(i, at) for i in node.inputs])

    def runs(self, loop: str, at: Point) -> bool:
        """Say whether this iteration of the loop is run: all of its bounds hold."""
        return all(
            sum(c * at[name] for name, c in bound.terms) + bound.constant >= 0
            for bound in self.graph.axis(loop).bounds
        )

    def accumulate(self, node: Node, at: Point) -> Tile:
        loop = node.attrs.loop
        steps = [{**at, loop: i} for i in range(self.graph.axis(loop).count)]
        last = steps[-1]
        if node.op is tile.ACCUM_LAST:
            return self.value(node.inputs[0], last)
        if node.op is tile.PREFIX_MAX:
            steps = steps[: at[loop] + 1]
        combine, neutral = FOLDS[node.op]
        dtype = node.tensor.dtype
        total = np.full(node.shape, limit(neutral, dtype), NUMPY[dtype])
        for step in (s for s in steps if self.runs(loop, s)):
            part = self.value(node.inputs[0], step)
            value = part.value
            if node.op is tile.ACCUM_RESCALED:
                value = value * self.factor(node, step, last)
            total = np.where(existing(part), combine(total, value), total)
        dims = self.value(node.inputs[0], steps[-1]).dims
        # tiles at different places were put together: every position of such a dim exists
        everywhere = [np.ones(n, bool) for n in node.shape]
        dims = tuple(Dim(e) if loop in d.axes else d for d, e in zip(dims, everywhere, strict=True))
        return Tile(total, dims)

    def factor(self, node: Node, step: Point, last: Point) -> Array:
        """exp(power * (m - m of the last iteration)); nothing is shifted by -inf."""
        now, final = (self.value(node.inputs[1], s).value for s in (step, last))
        final = np.where(final == -np.inf, 0.0, final)
        factor = np.exp(node.attrs.power * (now - final))
        return factor.reshape(factor.shape or (1,) * len(node.shape))


# -- tiles -----------------------------------------------------------------------------------------


def start(dim: tile.DimMap, at: Point) -> int:
    """First element that a tile covers: ((i_1 * c_2 + i_2) * c_3 + …) * tile."""
    number = 0
    for name, count in dim.axes:
        number = number * count + at[name]
    return number * dim.tile


def axes_of(dim: tile.DimMap) -> frozenset[str]:
    return frozenset(name for name, _ in dim.axes)


def whole(value: Array, shape: tuple[int, ...] | None = None) -> Tile:
    """A tile of which every position exists."""
    return Tile(value, tuple(Dim(np.ones(n, bool)) for n in value.shape))


def existing(t: Tile) -> Array:
    """Which elements exist: the outer product over dims."""
    found = np.ones(t.value.shape, bool)
    for axis, dim in enumerate(t.dims):
        shape = [1] * found.ndim
        shape[axis] = len(dim.exists)
        found &= dim.exists.reshape(shape)
    return found


def load(source: Array, maps: Sequence[tile.DimMap], at: Point) -> Tile:
    value = poison(tuple(m.tile for m in maps), source.dtype)
    covered = [start(m, at) + np.arange(m.tile) for m in maps]
    for index in np.ndindex(value.shape):
        place = tuple(int(c[i]) for c, i in zip(covered, index, strict=True))
        if all(p < n for p, n in zip(place, source.shape, strict=True)):
            value[index] = source[place]
    dims = [Dim(c < n, axes_of(m)) for c, n, m in zip(covered, source.shape, maps, strict=True)]
    return Tile(value, tuple(dims))


def limit(neutral: float, dtype: DType) -> Any:
    """The neutral element as a value of `dtype`."""
    if dtype is DType.BOOL:
        return neutral > 0
    if dtype.is_float:
        return neutral
    if np.isfinite(neutral):
        return int(neutral)
    bounds = np.iinfo(NUMPY[dtype])
    return bounds.max if neutral > 0 else bounds.min


def apply(node: Node, operands: list[Tile]) -> Tile:
    """Apply an op that is not a matter of blocks and loops."""
    op, attrs = node.op, node.attrs
    values = [t.value for t in operands]
    rank = len(node.shape)
    first = operands[0]
    if op in ELEMENTWISE:
        return Tile(ELEMENTWISE[op](*widened(values, rank)), common(node.shape, operands))
    if op is elementwise.CAST:
        return Tile(values[0].astype(NUMPY[attrs.dtype]), first.dims)
    if op is library.THREAD:
        scalars = dict(zip(attrs.graph.inputs, widened(values, rank), strict=True))
        value = np.broadcast_to(thread(attrs.graph.outputs[0], scalars), node.shape)
        return Tile(value, common(node.shape, operands))
    if op in FOLDS:
        combine, neutral = FOLDS[op]
        hidden = np.where(existing(first), values[0], limit(neutral, node.tensor.dtype))
        axes = tuple(a + rank for a in attrs.axes)
        return Tile(reduce(lambda v, a: fold(combine, v, a), axes, hidden), kept(first, axes))
    if op in (contraction.ARGMAX, contraction.ARGMIN):
        sign = 1.0 if op is contraction.ARGMAX else -1.0
        hidden = np.where(existing(first), sign * values[0], -np.inf)
        index = np.expand_dims(np.argmax(hidden, attrs.axis), attrs.axis)
        return Tile(index, kept(first, (attrs.axis + rank,)))
    if op is contraction.MATMUL:
        return matmul(node, *operands)
    if op is contraction.SCAN:
        return Tile(SCANS[attrs.kind](values[0], axis=attrs.axis), first.dims)
    if op is structural.PERMUTE:
        return Tile(values[0].transpose(attrs.perm), tuple(first.dims[p] for p in attrs.perm))
    if op is structural.RESHAPE:
        return Tile(values[0].reshape(attrs.shape), reshaped(first, attrs.shape))
    if op is structural.BROADCAST:
        return Tile(np.broadcast_to(values[0], attrs.shape), common(attrs.shape, operands))
    if op is structural.FLIP:
        return Tile(np.flip(values[0], attrs.axes), first.dims)
    return along_axis(node, operands)


def along_axis(node: Node, operands: list[Tile]) -> Tile:
    """Apply an op that gives one axis another length; no dim that it touches is cut short."""
    op, attrs = node.op, node.attrs
    values = [t.value for t in operands]
    axis = attrs.axis + len(node.shape)
    if op is structural.SLICE:
        value = np.take(values[0], range(attrs.start, attrs.stop, attrs.step), axis)
    elif op is structural.CONCAT:
        value = np.concatenate(values, axis)
    elif op is structural.PAD:
        widths = [(0, 0)] * len(node.shape)
        widths[axis] = (attrs.before, attrs.after)
        value = np.pad(values[0], widths, constant_values=attrs.value)
    elif op is structural.GATHER:
        index = np.where(existing(operands[1]), values[1], 0)
        value = np.take_along_axis(values[0], index, axis)
        dims = common(node.shape, [Tile(value, kept(operands[0], (axis,))), operands[1]])
        return Tile(value, dims)
    else:
        raise AssertionError(f"the oracle does not know {op.name}")
    same = [Tile(value, kept(t, (axis,), node.shape)) for t in operands]
    return Tile(value, common(node.shape, same))


def thread(node: Node, scalars: dict[Node, Array]) -> Array:
    if node.op is leaf.CONSTANT:
        return np.array(node.attrs.value, NUMPY[node.tensor.dtype])
    if node in scalars:
        return scalars[node]
    operands = [thread(i, scalars) for i in node.inputs]
    if node.op is elementwise.CAST:
        return operands[0].astype(NUMPY[node.attrs.dtype])
    return ELEMENTWISE[node.op](*operands)


def widened(values: list[Array], rank: int) -> list[Array]:
    return [v.reshape(v.shape or (1,) * rank) for v in values]


def common(shape: tuple[int, ...], operands: list[Tile]) -> tuple[Dim, ...]:
    """Dims of a combination: a position exists if it does in every operand."""
    dims = [Dim(np.ones(n, bool)) for n in shape]
    for t in operands:
        for dim, other in zip(dims, t.dims, strict=bool(t.dims)):
            dim.exists = dim.exists & other.exists
            dim.axes |= other.axes
    return tuple(dims)


def kept(
    t: Tile, removed: tuple[int, ...], shape: tuple[int, ...] | None = None
) -> tuple[Dim, ...]:
    """The dims of a tile, whole where removed (of size 1, or as in `shape`)."""
    return tuple(
        Dim(np.ones(1 if shape is None else shape[i], bool)) if i in removed else d
        for i, d in enumerate(t.dims)
    )


def fold(combine: Any, value: Array, axis: int) -> Array:
    return combine.reduce(value, axis=axis, keepdims=True)


def matmul(node: Node, a: Tile, b: Tile) -> Tile:
    exists = a.dims[-1].exists & b.dims[-2].exists
    left, right = a.value[..., :, :, None], b.value[..., None, :, :]
    terms = np.where(exists[:, None], left * right, 0)
    dims = common(node.shape[:-2], [Tile(None, a.dims[:-2]), Tile(None, b.dims[:-2])])
    return Tile(terms.sum(-2), (*dims, a.dims[-2], b.dims[-1]))


def reshaped(t: Tile, shape: tuple[int, ...]) -> tuple[Dim, ...]:
    """Carry cut dims over to the dims of equal size that have as many elements behind them."""
    dims = [Dim(np.ones(n, bool)) for n in shape]
    taken: set[int] = set()
    for i, dim in enumerate(t.dims):
        behind = prod(t.value.shape[i + 1 :])
        for j, n in enumerate(shape):
            fits = (n, prod(shape[j + 1 :])) == (len(dim.exists), behind)
            if fits and j not in taken:
                dims[j] = dim
                taken.add(j)
                break
    return tuple(dims)
