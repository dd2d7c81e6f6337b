"""Hypothesis strategies for random graphs: legal block graphs, and kernel graphs over every op.

Hypothesis draws a seed and a number of steps, and so shrinks a failure to few steps; the rest comes
from that seed, for graphs richer than its own choices give. A graph grows by one value at a time. A step proposes an op on what is there; a block graph keeps
the value when the graph that stores it passes the graph checker, so what is drawn is what the
checker calls legal. Sizes are a few elements, values small whole numbers: sums and products of
them are exact, and a wrong mask changes the result by a lot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
from hypothesis import assume, note
from hypothesis import strategies as st

from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.check import check_graph
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction, elementwise, leaf, library, tile
from superopt.ir.ops.registry import OpKind, all_ops
from superopt.ir.tiles import dim_sources, varying_axes
from superopt.ir.types import DType, TensorType, TupleType

Draw = Callable[[st.SearchStrategy[Any]], Any]

FLOAT_UNARY = (elementwise.EXP, elementwise.TANH, elementwise.SIGMOID, elementwise.ERF)
BINARY = (
    elementwise.ADD,
    elementwise.SUB,
    elementwise.MUL,
    elementwise.MAXIMUM,
    elementwise.MINIMUM,
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
    found = list(topological([node]))
    return not any(n.op in _ROUNDED or n.op.kind is OpKind.COMPOSITE for n in found)


def thread_body(random: Random, dtypes: Sequence[DType], *, branches: bool) -> Graph:
    """Return a thread graph that uses all of its scalar inputs, and compares them if `branches`."""
    scalars = [b.input_(f"s{i}", (), d) for i, d in enumerate(dtypes)]
    value = b.cast(scalars[0], DType.F64)
    for scalar in scalars[1:]:
        value = b.elementwise_op(random.choice(BINARY), value, b.cast(scalar, DType.F64))
    if branches:
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

    random: Random
    pool: list[Node] = field(default_factory=list)

    def pick(self, wanted: Callable[[Node], bool] = lambda n: True) -> Node:
        """Return a value, one of the newest more often than not."""
        found = [n for n in self.pool if wanted(n)]
        need(found)
        return self.random.choice(self.random.choice((found, found[-3:])))

    def axis(self, x: Node) -> int:
        need(x.shape)
        return self.random.randint(-len(x.shape), -1)

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
        if x.tensor.dtype.is_float and self.random.choice((False, True)):
            op = self.random.choice(FLOAT_UNARY)
            return make(op, [b.minimum(x, 4.0) if op is elementwise.EXP else x])
        smooth = (elementwise.NEG, elementwise.ABS)
        return make(self.random.choice((*smooth, elementwise.SIGN) if is_exact(x) else smooth), [x])

    def binary(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is not DType.BOOL)
        if self.random.randint(0, 3) == 0:
            return b.div(b.cast(x, DType.F64), 3.0)
        return make(self.random.choice(BINARY), [x, self.fitting(x)])

    def compare(self) -> Node:
        x = self.pick(is_exact)
        y = self.fitting(x)
        need(is_exact(y))
        return make(self.random.choice(elementwise.COMPARISONS), [x, y])

    def logic(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is DType.BOOL)
        op = self.random.choice((elementwise.AND, elementwise.OR, elementwise.NOT))
        return make(op, [x] if op is elementwise.NOT else [x, self.fitting(x)])

    def select(self) -> Node:
        condition = self.pick(lambda n: n.tensor.dtype is DType.BOOL)
        yes = self.pick(lambda n: n.shape == condition.shape or () in (n.shape, condition.shape))
        shapes = (condition.shape, yes.shape, ())
        no = self.pick(lambda n: n.tensor.dtype is yes.tensor.dtype and n.shape in shapes)
        return b.where(condition, yes, no)

    def cast(self) -> Node:
        x = self.pick(is_exact)
        to = self.random.choice((DType.F64, DType.I64, DType.BOOL))
        if to is DType.I64 and x.tensor.dtype.is_float:
            x = b.minimum(b.maximum(x, -9.0), 9.0)  # infinities have no integer
        return b.cast(x, to)

    def matmul(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is DType.F64 and len(n.shape) >= 2)
        if self.random.choice((False, True)):
            x = b.transpose(x)

        def fits(y: Node) -> bool:
            if y.tensor.dtype is not DType.F64 or len(y.shape) != len(x.shape):
                return False
            batch = zip(x.shape[:-2], y.shape[:-2], strict=True)
            return x.shape[-1] in y.shape[-2:] and all(m == n or 1 in (m, n) for m, n in batch)

        y = self.pick(fits)
        if y.shape[-2] != x.shape[-1] or (
            y.shape[-1] == x.shape[-1] and self.random.choice((False, True))
        ):
            y = b.transpose(y)
        return b.matmul(x, y)

    def reduce(self) -> Node:
        x = self.pick(lambda n: n.shape != ())
        op = self.random.choice(REDUCTIONS)
        need(x.tensor.dtype is not DType.BOOL or op in REDUCTIONS[1:3])
        axes = {self.axis(x) for _ in range(self.random.randint(1, 2))}
        return b.reduce(op, x, sorted(axes))

    def arg_reduce(self) -> Node:
        x = self.pick(lambda n: n.shape != () and n.tensor.dtype is DType.F64 and is_exact(n))
        op = self.random.choice((contraction.ARGMAX, contraction.ARGMIN))
        return b.arg_reduce(op, x, self.axis(x))

    def scan(self) -> Node:
        x = self.pick(lambda n: n.shape != () and n.tensor.dtype is not DType.BOOL)
        return b.scan(x, self.axis(x), self.random.choice(("sum", "prod", "max", "min")))

    def permute(self) -> Node:
        x = self.pick(lambda n: len(n.shape) >= 2)
        return b.permute(x, self.random.sample(range(len(x.shape)), len(x.shape)))

    def reshape(self) -> Node:
        x = self.pick()
        shape = list(x.shape)
        kind = self.random.randint(0, 2)
        if kind == 0 or not shape:
            shape.insert(self.random.randint(0, len(shape)), 1)
        elif kind == 1 and len(shape) >= 2:
            at = self.random.randint(0, len(shape) - 2)
            shape[at : at + 2] = [shape[at] * shape[at + 1]]
        elif 1 in shape:
            shape.remove(1)
        need(len(shape) <= 4)
        return b.reshape(x, shape)

    def broadcast(self) -> Node:
        x = self.pick(lambda n: 1 in n.shape)
        size = self.random.randint(2, 3)
        return b.broadcast(x, [size if n == 1 else n for n in x.shape])

    def slice(self) -> Node:
        x = self.pick(lambda n: any(s > 1 for s in n.shape))
        axis = self.axis(x)
        stop = self.random.randint(1, x.shape[axis])
        return b.slice_(x, axis, self.random.randint(0, stop - 1), stop)

    def concat(self) -> Node:
        x = self.pick(lambda n: n.shape != ())
        y = self.pick(lambda n: n.shape == x.shape and n.tensor.dtype is x.tensor.dtype)
        return b.concat([x, y], self.axis(x))

    def pad(self) -> Node:
        x = self.pick(lambda n: n.shape != () and n.tensor.dtype is not DType.BOOL)
        return b.pad(x, self.axis(x), self.random.randint(0, 1), 1, 2.0)

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
        if self.random.choice((False, True)):
            return b.constant(float(self.random.randint(-2, 3)), DType.F64)
        x = self.pick(lambda n: n.shape != ())
        return b.iota(x.shape, self.axis(x), DType.I64)

    def thread(self) -> Node:
        x = self.pick()
        operands = [x, self.fitting(x)] if self.random.choice((False, True)) else [x]
        dtypes = [o.tensor.dtype for o in operands]
        body = thread_body(self.random, dtypes, branches=all(is_exact(o) for o in operands))
        return b.apply_graph(body, operands)[0]


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
        picked = [self.random.choice(self.dims) for _ in range(self.random.randint(1, 3))]
        used = [name for _, spec in picked for name in spec[:-1]]
        need(len(used) == len(set(used)))
        dtype = self.random.choice((DType.F64, DType.F64, DType.F64, DType.I64, DType.BOOL))
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
            extent, spec = self.random.choice(self.dims)
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
        op = self.random.choice(kinds)
        return b.accumulate(op, x, self.random.choice(self.loops_of(x)))

    def rescaled(self) -> Node:
        """Propose a sum rescaled by a running maximum over the same loop."""
        x = self.pick(lambda n: n.tensor.dtype is DType.F64 and self.varies_in_loop(n))
        loop = self.random.choice(self.loops_of(x))
        tops = [n for n in self.pool if n.op is tile.PREFIX_MAX and n.attrs.loop == loop]
        tops = [n for n in tops if n.tensor.dtype is DType.F64 and _covers(x.shape, n.shape)]
        if tops:
            top = self.random.choice(tops)
        else:
            top = b.accumulate(tile.PREFIX_MAX, b.reduce_max(x, -1) if x.shape else x, loop)
        return b.accum_rescaled(x, top, loop, self.random.randint(1, 2))

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


def _covers(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Say whether `other` broadcasts to `shape`."""
    if len(other) != len(shape):
        return other == ()
    return all(n in (1, m) for m, n in zip(shape, other, strict=True))


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
    steps = draw(st.integers(1, max_steps))
    graph = random_block_graph(draw(st.randoms(use_true_random=True)), steps)
    assume(graph is not None)
    note(str(graph))
    return graph


def random_block_graph(random: Random, steps: int, *, widest: int = 3) -> Graph | None:
    """Return a legal block graph grown in so many steps, or None where nothing can be stored.

    Tiles have up to 3 elements per dim; one dim of the graph has up to `widest`.
    """
    grid = {n: random.randint(1, 3) for n in ("m", "p")[: random.randint(0, 2)]}
    loops = {n: random.randint(1, 3) for n in ("n", "k")[: random.choice((1, 2, 0))]}
    grower = BlockGrower(random, builder=b.BlockBuilder("g", grid, loops))
    grower.grid, grower.loops = tuple(grid), tuple(loops)
    for loop in loops:
        if random.randint(0, 3) == 0:
            terms = {n: random.choice((-1, 1, 2)) for n in (*tuple(grid)[:1], loop)}
            grower.builder.bound(loop, terms, random.randint(-1, 1))
    wide = random.randrange(2) if widest > 3 else None
    for number in range(random.randint(2, 4)):
        names = list(grid) if number == 0 else list(loops) if number == 1 else [*grid, *loops]
        chosen = random.sample(names, min(len(names), random.randint(1 if number < 2 else 0, 2)))
        size = random.randint(1, widest if number == wide else 3)
        map_ = grower.builder.dim((*chosen, size))
        extent = random.randint(max(1, map_.padded - map_.tile - 1), map_.padded)
        grower.dims.append((extent, (*chosen, map_.tile)))
    for _ in range(random.randint(1, 3)):
        try:
            grower.pool.append(grower.load())
        except DoesNotApply:
            continue
    if not grower.pool:
        return None
    for _ in range(2 * steps):
        try:
            value = random.choice(_BLOCK)(grower)
        except DoesNotApply:
            continue
        if check_graph(grower.partial([grower.stored(value, _first)])) == []:
            grower.pool.append(value)
    kept = grower.pool[-random.randint(1, 3) :]
    stores = [grower.stored(x, random.choice) for x in kept]
    legal = [s for s in dict.fromkeys(stores) if check_graph(grower.partial([s])) == []]
    if not legal:
        return None
    needed = [n for n in topological(legal) if n.op is leaf.INPUT]
    axes = grower.builder.graph()
    return Graph(axes.level, "g", tuple(needed), tuple(legal), axes.grid, axes.loops)


# -- kernel graphs ---------------------------------------------------------------------------------


@dataclass
class KernelGrower(Grower):
    """Tensors of a kernel graph: the shared ops, and every other op of the registry."""

    inputs: int = 0

    def input(self, *shape: int, dtype: DType = DType.F64) -> Node:
        self.inputs += 1
        return b.input_(f"x{self.inputs}", shape, dtype)

    def floating(self, rank: int = 0) -> Node:
        return self.pick(lambda n: n.tensor.dtype is DType.F64 and len(n.shape) >= rank)

    def elementwise(self) -> Node:
        ops = [o for o in all_ops() if o.kind is OpKind.ELEMENTWISE and o is not elementwise.CAST]
        op = self.random.choice(ops)
        if op is elementwise.WHERE:
            return self.select()
        bits = "bitwise" in op.meaning
        x = self.pick(
            lambda n: n.tensor.dtype is (DType.I64 if bits else DType.F64) and is_exact(n)
        )
        return make(op, [x] if op.arity == 1 else [x, self.fitting(x)])

    def composite(self) -> Node:
        x = self.floating(1)
        axis = self.axis(x)
        along = (composite.SOFTMAX, composite.LOG_SOFTMAX, composite.LOGSUMEXP)
        norms = {composite.LAYER_NORM: 3, composite.RMS_NORM: 2}
        op = self.random.choice((composite.SILU, composite.GELU, *along, *norms))
        if op in along:
            return make(op, [x], contraction.AxisAttrs(axis))
        if op in norms:
            shape = x.shape[axis:]
            count = self.random.randint(0, norms[op] - 1)
            factors = [self.input(*shape) for _ in range(count)]
            attrs = composite.NormAttrs(tuple(range(axis, 0)), 0.5)
            return make(op, [x, *factors], attrs)
        approximate = self.random.choice(("none", "tanh"))
        return make(op, [x], composite.GeluAttrs(approximate) if op is composite.GELU else None)

    def attention(self) -> Node:
        queries, keys, width, group = (self.random.randint(1, 3) for _ in range(4))
        q, k = self.input(2 * group, queries, width), self.input(2, keys, width)
        mask = [self.input(1, queries, keys)] if self.random.choice((False, True)) else []
        attrs = composite.AttentionAttrs(0.5, not mask and self.random.choice((False, True)))
        return make(composite.ATTENTION, [q, k, self.input(2, keys, 2), *mask], attrs)

    def library(self) -> Node:
        kind = self.random.choice(("max", "avg", "conv", "depthwise"))
        if kind == "conv":
            attrs = library.ConvAttrs((2,), (1,), (1,), False, (0,), 1)
            return make(library.CONV, [self.input(1, 2, 4), self.input(3, 2, 2)], attrs)
        if kind == "depthwise":
            attrs = library.ConvAttrs((2,), (1,), (2,), False, (0,), 2)
            return make(composite.DEPTHWISE_CONV, [self.input(2, 2, 5), self.input(4, 1, 3)], attrs)
        pool = library.PoolAttrs(kind, (2,), (1,), (0,), (1,), False, True)
        return make(library.POOL, [self.input(1, 2, 4)], pool)

    def opaque(self) -> Node:
        x = self.pick(lambda n: n.tensor.dtype is DType.F64 and n.shape != () and is_exact(n))
        result = TupleType((x.tensor, TensorType(x.shape, DType.I64)))
        arguments = '{"args":[{"t":0}],"kwargs":{}}'
        attrs = library.OpaqueAttrs("aten.sort.default", arguments, result)
        return b.item(make(library.OPAQUE, [x], attrs), self.random.randint(0, 1))

    def take(self) -> Node:
        x = self.pick(lambda n: n.shape != () and len(n.shape) < 4)
        axis = self.axis(x)
        return b.take(x, b.iota([self.random.randint(1, x.shape[axis])], -1), axis)

    def custom(self) -> Node:
        graph = random_block_graph(self.random, 4)
        if graph is None:
            raise DoesNotApply
        operands = [self.input(*i.shape, dtype=i.tensor.dtype) for i in graph.inputs]
        return self.random.choice(b.apply_graph(graph, operands))


_KERNEL = (
    *_SHARED,
    *[Grower.reduce] * 4,
    *[KernelGrower.elementwise] * 4,
    *[KernelGrower.composite] * 4,
    KernelGrower.attention,
    *[KernelGrower.library] * 2,
    *[KernelGrower.opaque] * 2,
    KernelGrower.take,
    KernelGrower.custom,
)


@st.composite
def kernel_graphs(draw: Draw, max_steps: int = 12) -> Graph:
    """Draw a kernel graph over every op of the registry, block graphs included."""
    steps = draw(st.integers(1, max_steps))
    random = draw(st.randoms(use_true_random=True))
    grower = KernelGrower(random)
    for dtype in (DType.F64, DType.I64):
        shape = [random.randint(1, 3) for _ in range(random.randint(1, 3))]
        grower.pool.append(grower.input(*shape, dtype=dtype))
    for _ in range(2 * steps):
        try:
            grower.pool.append(random.choice(_KERNEL)(grower))
        except DoesNotApply:
            continue
    outputs = grower.pool[-random.randint(1, 3) :]
    graph = b.kernel_graph("g", b.graph_inputs(outputs), outputs)
    note(str(graph))
    return graph
