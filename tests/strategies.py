"""Hypothesis strategies for random graphs: legal block graphs, and kernel graphs over every op.

A graph grows by one value at a time. A step proposes an op on what is there; a block graph keeps
the value when the graph that stores it passes the graph checker, so what is drawn is what the
checker calls legal. Sizes are a few elements, values small whole numbers: sums and products of
them are exact, and a wrong mask changes the result by a lot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import assume, note
from hypothesis import strategies as st

from superopt.ir import build as b
from superopt.ir.check import check_graph
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction, elementwise, leaf, tile
from superopt.ir.tiles import dim_sources, varying_axes
from superopt.ir.types import DType

Draw = Callable[[st.SearchStrategy[Any]], Any]

FLOAT_UNARY = (elementwise.EXP, elementwise.TANH, elementwise.SIGMOID, elementwise.ERF)
EXACT_UNARY = (elementwise.NEG, elementwise.ABS, elementwise.SIGN)
BINARY = (
    elementwise.ADD,
    elementwise.SUB,
    elementwise.MUL,
    elementwise.MAXIMUM,
    elementwise.MINIMUM,
)
COMPARISONS = (
    elementwise.EQ,
    elementwise.NE,
    elementwise.LT,
    elementwise.LE,
    elementwise.GT,
    elementwise.GE,
)
REDUCTIONS = (
    contraction.REDUCE_SUM,
    contraction.REDUCE_MAX,
    contraction.REDUCE_MIN,
    contraction.REDUCE_PROD,
)
ACCUMULATORS = (
    tile.ACCUM_LAST,
    tile.ACCUM_MAX,
    tile.ACCUM_MIN,
    tile.ACCUM_PROD,
    tile.ACCUM_SUM,
)
_ROUNDED = frozenset({*FLOAT_UNARY, elementwise.DIV, tile.ACCUM_RESCALED})
NUMPY = {DType.F64: np.float64, DType.F32: np.float32, DType.I64: np.int64, DType.BOOL: np.bool_}


def arrays_for(graph: Graph, seed: int, *, infinite: bool = False) -> list[Any]:
    """Return one array of small whole numbers per input; `infinite` puts some infinities among them."""
    random = np.random.default_rng(seed)
    arrays = []
    for node in graph.inputs:
        dtype = NUMPY[node.tensor.dtype]
        whole = random.integers(-3, 4, node.shape)
        array = whole > 0 if dtype is np.bool_ else np.asarray(whole, dtype)
        if infinite and node.tensor.dtype.is_float:
            array = np.where(random.random(node.shape) < 0.15, -np.inf, array)
        arrays.append(array)
    return arrays


def is_exact(node: Node) -> bool:
    """Say whether a value is free of rounding, so that comparisons of it do not hang by a hair."""
    return not any(n.op in _ROUNDED for n in topological([node]))


def thread_body(draw: Draw, dtypes: Sequence[DType]) -> Graph:
    """Return a thread graph that uses all of its scalar inputs."""
    scalars = [b.input_(f"s{i}", (), d) for i, d in enumerate(dtypes)]
    value = b.cast(scalars[0], DType.F64)
    for scalar in scalars[1:]:
        value = b.elementwise_op(draw(st.sampled_from(BINARY)), value, b.cast(scalar, DType.F64))
    if draw(st.booleans()):
        value = b.where(b.gt(value, 1.0), b.neg(value), b.add(value, 2.0))
    return b.thread_graph("body", scalars, [value])


class DoesNotApply(Exception):
    """No value so far has what a proposed op wants."""


def need(condition: object) -> None:
    if not condition:
        raise DoesNotApply


@dataclass
class Grower:
    """Values so far, and how to propose another; what both levels share.

    A proposal that does not apply raises `DoesNotApply`.
    """

    draw: Draw
    pool: list[Node] = field(default_factory=list)

    def pick(self, wanted: Callable[[Node], bool] = lambda n: True) -> Node:
        """Draw a value, the newest ones first."""
        found = [n for n in self.pool if wanted(n)]
        need(found)
        return self.draw(st.sampled_from(found[::-1]))

    def axis(self, x: Node) -> int:
        need(x.shape)
        return self.draw(st.integers(-len(x.shape), -1))

    def fitting(self, x: Node) -> Node:
        """Draw a value of the same type that broadcasts with `x`."""

        def fits(y: Node) -> bool:
            same = y.tensor.dtype is x.tensor.dtype
            if not same or (y.shape and len(y.shape) != len(x.shape)):
                return same and not x.shape
            return all(
                m == n or 1 in (m, n) for m, n in zip(y.shape, x.shape, strict=bool(y.shape))
            )

        return self.pick(fits)

    def unary(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is not DType.BOOL)
        if x.tensor.dtype.is_float and self.draw(st.booleans()):
            op = self.draw(st.sampled_from(FLOAT_UNARY))
            return make(op, [b.minimum(x, 4.0) if op is elementwise.EXP else x])
        op = self.draw(st.sampled_from(EXACT_UNARY))
        return make(op, [x if op is not elementwise.SIGN or is_exact(x) else b.neg(x)])

    def binary(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is not DType.BOOL)
        if self.draw(st.integers(0, 3)) == 0:
            return b.div(b.cast(x, DType.F64), 3.0)
        return make(self.draw(st.sampled_from(BINARY)), [x, self.fitting(x)])

    def compare(self) -> Node:
        x = self.pick(is_exact)
        y = self.fitting(x)
        need(is_exact(y))
        return make(self.draw(st.sampled_from(COMPARISONS)), [x, y])

    def logic(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is DType.BOOL)
        op = self.draw(st.sampled_from((elementwise.AND, elementwise.OR, elementwise.NOT)))
        return make(op, [x] if op is elementwise.NOT else [x, self.fitting(x)])

    def select(self) -> Node:
        condition = self.pick(lambda n: n.tensor.dtype is DType.BOOL)
        yes = self.pick(lambda n: n.shape == condition.shape or () in (n.shape, condition.shape))
        return b.where(condition, yes, self.fitting(yes))

    def cast(self) -> Node:
        x = self.pick(is_exact)
        to = self.draw(st.sampled_from((DType.F64, DType.I64, DType.BOOL)))
        if to is DType.I64 and x.tensor.dtype.is_float:
            x = b.minimum(b.maximum(x, -9.0), 9.0)  # infinities have no integer
        return b.cast(x, to)

    def matmul(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is DType.F64 and len(n.shape) >= 2)
        if self.draw(st.booleans()):
            x = b.transpose(x)

        def fits(y: Node) -> bool:
            if y.tensor.dtype is not DType.F64 or len(y.shape) != len(x.shape):
                return False
            batch = zip(x.shape[:-2], y.shape[:-2], strict=True)
            return x.shape[-1] in y.shape[-2:] and all(m == n or 1 in (m, n) for m, n in batch)

        y = self.pick(fits)
        if y.shape[-2] != x.shape[-1] or (y.shape[-1] == x.shape[-1] and self.draw(st.booleans())):
            y = b.transpose(y)
        return b.matmul(x, y)

    def reduce(self) -> Node:
        x = self.pick(lambda n: n.shape != ())
        op = self.draw(st.sampled_from(REDUCTIONS))
        need(x.tensor.dtype is not DType.BOOL or op in REDUCTIONS[1:3])
        axes = {self.axis(x) for _ in range(self.draw(st.integers(1, 2)))}
        return b.reduce(op, x, sorted(axes))

    def arg_reduce(self) -> Node:
        x = self.pick(lambda n: n.shape != () and n.tensor.dtype is DType.F64 and is_exact(n))
        op = self.draw(st.sampled_from((contraction.ARGMAX, contraction.ARGMIN)))
        return b.arg_reduce(op, x, self.axis(x))

    def scan(self) -> Node:
        x = self.pick(lambda n: n.shape != () and n.tensor.dtype is not DType.BOOL)
        return b.scan(x, self.axis(x), self.draw(st.sampled_from(("sum", "prod", "max", "min"))))

    def permute(self) -> Node:
        x = self.pick(lambda n: len(n.shape) >= 2)
        return b.permute(x, self.draw(st.permutations(range(len(x.shape)))))

    def reshape(self) -> Node:
        x = self.pick()
        shape = list(x.shape)
        kind = self.draw(st.integers(0, 2))
        if kind == 0 or not shape:
            shape.insert(self.draw(st.integers(0, len(shape))), 1)
        elif kind == 1 and len(shape) >= 2:
            at = self.draw(st.integers(0, len(shape) - 2))
            shape[at : at + 2] = [shape[at] * shape[at + 1]]
        elif 1 in shape:
            shape.remove(1)
        need(len(shape) <= 4)
        return b.reshape(x, shape)

    def broadcast(self) -> Node:
        x = self.pick(lambda n: 1 in n.shape)
        size = self.draw(st.integers(2, 3))
        return b.broadcast(x, [size if n == 1 else n for n in x.shape])

    def slice(self) -> Node:
        x = self.pick(lambda n: any(s > 1 for s in n.shape))
        axis = self.axis(x)
        stop = self.draw(st.integers(1, x.shape[axis]))
        return b.slice_(x, axis, self.draw(st.integers(0, stop - 1)), stop)

    def concat(self) -> Node:
        x = self.pick(lambda n: n.shape != ())
        y = self.pick(lambda n: n.shape == x.shape and n.tensor.dtype is x.tensor.dtype)
        return b.concat([x, y], self.axis(x))

    def pad(self) -> Node:
        x = self.pick(lambda n: n.shape != () and n.tensor.dtype is not DType.BOOL)
        return b.pad(x, self.axis(x), self.draw(st.integers(0, 1)), 1, 2.0)

    def flip(self) -> Node:
        x = self.pick(lambda n: n.shape != ())
        return b.flip(x, self.axis(x))

    def gather(self) -> Node:
        x = self.pick(lambda n: n.shape != ())
        axis = self.axis(x)

        def fits(y: Node) -> bool:
            same = len(y.shape) == len(x.shape) and y.tensor.dtype is DType.I64
            places = enumerate(zip(x.shape, y.shape, strict=False))
            return same and all(m == n or i == axis + len(x.shape) for i, (m, n) in places)

        known = [n for n in self.pool if fits(n)]
        index = self.pick(fits) if known else b.iota(x.shape, axis)
        return b.gather(x, b.minimum(b.maximum(index, 0), x.shape[axis] - 1), axis)

    def leaf(self) -> Node:
        if self.draw(st.booleans()):
            return b.constant(float(self.draw(st.integers(-2, 3))), DType.F64)
        x = self.pick(lambda n: n.shape != ())
        return b.iota(x.shape, self.axis(x), DType.I64)

    def thread(self) -> Node:
        x = self.pick()
        operands = [x, self.fitting(x)] if self.draw(st.booleans()) else [x]
        return b.apply_graph(thread_body(self.draw, [o.tensor.dtype for o in operands]), operands)[
            0
        ]


_SHARED = (
    Grower.unary,
    Grower.binary,
    Grower.compare,
    Grower.logic,
    Grower.select,
    Grower.cast,
    Grower.matmul,
    Grower.reduce,
    Grower.arg_reduce,
    Grower.scan,
    Grower.permute,
    Grower.reshape,
    Grower.broadcast,
    Grower.slice,
    Grower.concat,
    Grower.pad,
    Grower.flip,
    Grower.gather,
    Grower.leaf,
    Grower.thread,
)


# -- block graphs ----------------------------------------------------------------------------------


@dataclass
class BlockGrower(Grower):
    """Tiles of a block graph: the shared ops, and loads, masks and accumulators."""

    builder: b.BlockBuilder = field(default_factory=lambda: b.BlockBuilder("g"))
    grid: tuple[str, ...] = ()
    loops: tuple[str, ...] = ()
    dims: list[tuple[int, tuple[Any, ...]]] = field(default_factory=list)
    loads: int = 0

    def load(self) -> Node:
        picked = self.draw(st.lists(st.sampled_from(self.dims), min_size=1, max_size=3))
        used = [name for _, spec in picked for name in spec[:-1]]
        need(len(used) == len(set(used)))
        dtype = self.draw(st.sampled_from((DType.F64, DType.F64, DType.F64, DType.I64, DType.BOOL)))
        self.loads += 1
        x = b.input_(f"x{self.loads}", [extent for extent, _ in picked], dtype)
        return self.builder.load(x, *(spec for _, spec in picked))

    def index(self) -> Node:
        """Propose the element indices of a dim of some tile, beside that tile."""
        x = self.pick(lambda n: n.shape != ())
        sources = dim_sources(self.partial([x]))[x]
        axis = self.axis(x)
        source = sources[axis]
        if source is None:
            extent, spec = self.draw(st.sampled_from(self.dims))
            return self.builder.index(extent, spec)
        index = make(tile.TILE_INDEX, [], tile.TileIndexAttrs(source.map, source.extent, DType.I64))
        shape = [1] * len(x.shape)
        shape[axis] = source.map.tile
        need(source.map.tile == x.shape[axis])
        return b.reshape(index, shape)

    def accumulate(self) -> Node:
        x = self.pick(self.varies_in_loop)
        numeric = x.tensor.dtype is not DType.BOOL
        kinds = (*ACCUMULATORS, *[tile.PREFIX_MAX] * 2) if numeric else ACCUMULATORS[:3]
        op = self.draw(st.sampled_from(kinds))
        return b.accumulate(op, x, self.draw(st.sampled_from(self.loops_of(x))))

    def rescaled(self) -> Node:
        """Propose a sum rescaled by a running maximum over the same loop."""
        x = self.pick(lambda n: n.tensor.dtype is DType.F64 and self.varies_in_loop(n))
        loop = self.draw(st.sampled_from(self.loops_of(x)))
        tops = [n for n in self.pool if n.op is tile.PREFIX_MAX and n.attrs.loop == loop]
        tops = [n for n in tops if n.tensor.dtype is DType.F64]
        if tops:
            top = self.draw(st.sampled_from(tops))
        else:
            top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(x, -1) if x.shape else x, loop)
        return b.accum_rescaled(x, top, loop, self.draw(st.integers(1, 2)))

    def partial(self, values: list[Node]) -> Graph:
        return self.builder.graph().with_outputs(values)

    def loops_of(self, x: Node) -> list[str]:
        axes = varying_axes(self.partial([x]))[x]
        return [name for name in self.loops if name in axes]

    def varies_in_loop(self, x: Node) -> bool:
        return bool(self.loops_of(x))

    def stored(self, x: Node, choose: Callable[[Sequence[Any]], Any]) -> Node:
        """Close the loops over `x`, innermost first, or store inside them; name every axis."""
        inside = [
            name
            for name in self.loops_of(x)
            if not self.builder.graph().axis(name).bounds and choose((False, True))
        ]
        for loop in reversed([name for name in self.loops_of(x) if name not in inside]):
            kinds = (tile.ACCUM_MAX, tile.ACCUM_MIN)
            if x.tensor.dtype is not DType.BOOL:
                kinds = (tile.ACCUM_SUM, *kinds, tile.ACCUM_PROD)
            x = b.accumulate(choose(kinds), x, loop)
        unnamed = varying_axes(self.partial([x]))[x]
        maps: list[tile.DimMap | None] = []
        shape = list(x.shape)
        for i, source in enumerate(dim_sources(self.partial([x]))[x]):
            free = source is not None and {n for n, _ in source.map.axes} <= unnamed
            fits = source is not None and source.map.tile == x.shape[i]
            maps.append(source.map if source is not None and free and fits else None)
            if source is not None and maps[-1] is not None:
                unnamed -= {n for n, _ in source.map.axes}
                shape[i] = source.extent
        if unnamed and None not in maps:
            x, maps, shape = b.reshape(x, (1, *x.shape)), [None, *maps], [1, *shape]
        for i, known in enumerate(maps):
            if known is None:
                maps[i] = self.builder.dim((*sorted(unnamed), x.shape[i]))
                shape[i] = maps[i].padded
                unnamed = frozenset()
        return make(tile.STORE, [x], tile.StoreAttrs(tuple(maps), tuple(shape)))


_BLOCK = (
    *[BlockGrower.accumulate] * 4,
    *[BlockGrower.rescaled] * 3,
    *[BlockGrower.index] * 2,
    *_SHARED,
)


def _first(options: Sequence[Any]) -> Any:
    return options[0]


@st.composite
def block_graphs(draw: Draw, max_steps: int = 12) -> Graph:
    """Draw a block graph that the graph checker accepts."""
    grid = {n: draw(st.integers(1, 3)) for n in ("m", "p")[: draw(st.integers(0, 2))]}
    loops = {n: draw(st.integers(1, 3)) for n in ("n", "k")[: draw(st.sampled_from((1, 2, 0)))]}
    grower = BlockGrower(draw, builder=b.BlockBuilder("g", grid, loops))
    grower.grid, grower.loops = tuple(grid), tuple(loops)
    for loop in loops:
        if draw(st.integers(0, 3)) == 0:
            terms = {n: draw(st.sampled_from((-1, 1, 2))) for n in (*tuple(grid)[:1], loop)}
            grower.builder.bound(loop, terms, draw(st.integers(-1, 1)))
    for number in range(draw(st.integers(2, 4))):
        names = list(grid) if number == 0 else list(loops) if number == 1 else [*grid, *loops]
        chosen = draw(st.permutations(names))[: draw(st.integers(1 if number < 2 else 0, 2))]
        map_ = grower.builder.dim((*chosen, draw(st.integers(1, 3))))
        extent = draw(st.integers(max(1, map_.padded - map_.tile - 1), map_.padded))
        grower.dims.append((extent, (*chosen, map_.tile)))
    for _ in range(draw(st.integers(1, 3))):
        try:
            grower.pool.append(grower.load())
        except DoesNotApply:
            continue
    assume(grower.pool)
    for _ in range(draw(st.integers(3, max_steps))):
        try:
            value = draw(st.sampled_from(_BLOCK))(grower)
        except DoesNotApply:
            continue
        graph = grower.partial([grower.stored(value, _first)])
        if check_graph(graph) == []:
            grower.pool.append(value)
    kept = grower.pool[-draw(st.integers(1, 3)) :]
    stores = [grower.stored(x, lambda options: draw(st.sampled_from(options))) for x in kept]
    legal = [s for s in stores if check_graph(grower.partial([s])) == []]
    assume(legal)
    needed = [n for n in topological(legal) if n.op is leaf.INPUT]
    axes = grower.builder.graph()
    graph = Graph(axes.level, "g", tuple(needed), tuple(legal), axes.grid, axes.loops)
    note(str(graph))
    return graph
