"""Builders: one function per op, which aligns ranks and takes numbers where a scalar may stand.

Graphs by hand:

    x = input_("x", (16, 4096))
    g = kernel_graph("square", [x], [mul(x, x)])

Elementwise builders put leading 1s before the shape of the operand of lower rank, as PyTorch's
broadcasting does; element types must agree already (`cast`).
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from superopt.ir.errors import GraphError
from superopt.ir.graph import Axis, Bound, Graph, Level
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction, elementwise, leaf, library, structural, tile
from superopt.ir.ops.registry import Op
from superopt.ir.types import DType, TensorType

Scalar = float | int | bool
Operand = Node | Scalar


def input_(name: str, shape: Sequence[int], dtype: DType = DType.F32, **layout: Any) -> Node:
    """Return the graph input `name`; `strides=` gives a layout other than row-major."""
    type_ = TensorType(tuple(shape), dtype, **layout)
    return make(leaf.INPUT, (), leaf.InputAttrs(name, type_))


def constant(value: Scalar, dtype: DType = DType.F32) -> Node:
    """Return a scalar constant."""
    return make(leaf.CONSTANT, (), leaf.ConstantAttrs(value, dtype))


def full(shape: Sequence[int], value: Scalar, dtype: DType = DType.F32) -> Node:
    """Return a tensor of `shape` filled with `value`."""
    scalar = constant(value, dtype)
    return broadcast(reshape(scalar, (1,) * len(shape)), shape) if shape else scalar


def iota(shape: Sequence[int], axis: int, dtype: DType = DType.I64) -> Node:
    """Return the indices along `axis` (from the end) in a tensor of `shape`."""
    return make(leaf.IOTA, (), leaf.IotaAttrs(tuple(shape), axis, dtype))


def item(node: Node, index: int) -> Node:
    """Return result `index` of a node with several results."""
    return make(leaf.ITEM, (node,), leaf.ItemAttrs(index))


def elementwise_op(op: Op, *operands: Operand, attrs: Any = None) -> Node:
    """Apply an elementwise op; numbers take the element type of the tensor operands."""
    nodes = [o for o in operands if isinstance(o, Node)]
    if not nodes:
        raise GraphError(f"{op.name} needs at least one tensor operand")
    dtypes = [n.tensor.dtype for n in nodes]
    dtype = dtypes[-1] if op is elementwise.WHERE and len(dtypes) > 1 else dtypes[0]
    if op is elementwise.WHERE and len(dtypes) == 1:
        dtype = DType.F32
    lifted = [o if isinstance(o, Node) else constant(o, dtype) for o in operands]
    rank = max(n.tensor.rank for n in lifted)
    return make(op, [_to_rank(n, rank) for n in lifted], attrs)


def _to_rank(node: Node, rank: int) -> Node:
    missing = rank - node.tensor.rank
    if missing == 0 or node.tensor.rank == 0:
        return node
    return reshape(node, (1,) * missing + node.shape)


def _unary(op: Op) -> Callable[[Node], Node]:
    def build(x: Node) -> Node:
        return elementwise_op(op, x)

    build.__doc__ = f"Apply {op.name}: {op.meaning}."
    return build


def _binary(op: Op) -> Callable[[Operand, Operand], Node]:
    def build(x: Operand, y: Operand) -> Node:
        return elementwise_op(op, x, y)

    build.__doc__ = f"Apply {op.name}: {op.meaning}."
    return build


neg = _unary(elementwise.NEG)
abs_ = _unary(elementwise.ABS)
sign = _unary(elementwise.SIGN)
floor = _unary(elementwise.FLOOR)
exp = _unary(elementwise.EXP)
log = _unary(elementwise.LOG)
log1p = _unary(elementwise.LOG1P)
sqrt = _unary(elementwise.SQRT)
sin = _unary(elementwise.SIN)
cos = _unary(elementwise.COS)
tanh = _unary(elementwise.TANH)
sigmoid = _unary(elementwise.SIGMOID)
erf = _unary(elementwise.ERF)
not_ = _unary(elementwise.NOT)
add = _binary(elementwise.ADD)
sub = _binary(elementwise.SUB)
mul = _binary(elementwise.MUL)
div = _binary(elementwise.DIV)
pow_ = _binary(elementwise.POW)
maximum = _binary(elementwise.MAXIMUM)
minimum = _binary(elementwise.MINIMUM)
eq = _binary(elementwise.EQ)
ne = _binary(elementwise.NE)
lt = _binary(elementwise.LT)
le = _binary(elementwise.LE)
gt = _binary(elementwise.GT)
ge = _binary(elementwise.GE)
and_ = _binary(elementwise.AND)
or_ = _binary(elementwise.OR)


def where(condition: Node, yes: Operand, no: Operand) -> Node:
    """Return `yes` where the condition holds, else `no`."""
    return elementwise_op(elementwise.WHERE, condition, yes, no)


def cast(x: Node, dtype: DType, *, rounds: bool = False) -> Node:
    """Return `x` in another element type (`x` itself when it has that type).

    `rounds`: to 16-bit floats, as the program asks (`elementwise.CastAttrs`).
    """
    if x.tensor.dtype is dtype:
        return x
    return make(elementwise.CAST, (x,), elementwise.CastAttrs(dtype, rounds))


def matmul(a: Node, b: Node) -> Node:
    """Contract a: [..., M, K] with b: [..., K, N], batch dims broadcast."""
    rank = max(a.tensor.rank, b.tensor.rank)
    return make(contraction.MATMUL, (_to_rank(a, rank), _to_rank(b, rank)))


def _axes(x: Node, axes: int | Sequence[int]) -> tuple[int, ...]:
    rank = x.tensor.rank
    listed = (axes,) if isinstance(axes, int) else tuple(axes)
    return tuple(a if a < 0 else a - rank for a in listed)


def reduce(op: Op, x: Node, axes: int | Sequence[int]) -> Node:
    """Apply a reduction over `axes`, which stay as dims of size 1."""
    return make(op, (x,), contraction.ReduceAttrs(_axes(x, axes)))


def reduce_sum(x: Node, axes: int | Sequence[int]) -> Node:
    """Sum over `axes`, kept as 1."""
    return reduce(contraction.REDUCE_SUM, x, axes)


def reduce_max(x: Node, axes: int | Sequence[int]) -> Node:
    """Maximum over `axes`, kept as 1."""
    return reduce(contraction.REDUCE_MAX, x, axes)


def mean(x: Node, axes: int | Sequence[int]) -> Node:
    """Arithmetic mean over `axes`, kept as 1."""
    count = prod(x.shape[a] for a in _axes(x, axes))
    return div(reduce_sum(x, axes), float(count))


def arg_reduce(op: Op, x: Node, axis: int) -> Node:
    """Apply argmax or argmin along `axis`, kept as 1."""
    return make(op, (x,), contraction.AxisAttrs(_axes(x, axis)[0]))


def scan(x: Node, axis: int, kind: contraction.ScanKind) -> Node:
    """Inclusive scan along `axis`."""
    return make(contraction.SCAN, (x,), contraction.ScanAttrs(_axes(x, axis)[0], kind))


def reshape(x: Node, shape: Sequence[int]) -> Node:
    """Give `x` another shape of as many elements (row-major)."""
    if tuple(shape) == x.shape:
        return x
    return make(structural.RESHAPE, (x,), structural.ShapeAttrs(tuple(shape)))


def broadcast(x: Node, shape: Sequence[int]) -> Node:
    """Expand dims of size 1, after adding leading ones."""
    aligned = x if x.tensor.rank == len(shape) else reshape_to_rank(x, len(shape))
    if aligned.shape == tuple(shape):
        return aligned
    return make(structural.BROADCAST, (aligned,), structural.ShapeAttrs(tuple(shape)))


def reshape_to_rank(x: Node, rank: int) -> Node:
    """Add leading dims of size 1 up to `rank`."""
    return reshape(x, (1,) * (rank - x.tensor.rank) + x.shape)


def permute(x: Node, perm: Sequence[int]) -> Node:
    """Reorder dims: result dim i is operand dim perm[i]."""
    perm = tuple(p % x.tensor.rank for p in perm)
    if perm == tuple(range(x.tensor.rank)):
        return x
    return make(structural.PERMUTE, (x,), structural.PermuteAttrs(perm))


def transpose(x: Node) -> Node:
    """Swap the last two dims."""
    rank = x.tensor.rank
    return permute(x, (*range(rank - 2), rank - 1, rank - 2))


def slice_(x: Node, axis: int, start: int, stop: int, step: int = 1) -> Node:
    """Take elements start, start+step, … < stop of one axis."""
    axis = _axes(x, axis)[0]
    if (start, stop, step) == (0, x.shape[axis], 1):
        return x
    return make(structural.SLICE, (x,), structural.SliceAttrs(axis, start, stop, step))


def concat(parts: Sequence[Node], axis: int) -> Node:
    """Join tensors along `axis`."""
    if len(parts) == 1:
        return parts[0]
    return make(structural.CONCAT, parts, contraction.AxisAttrs(_axes(parts[0], axis)[0]))


def windows(
    x: Node,
    extents: Sequence[int],
    places: Sequence[int],
    stride: Sequence[int] | None = None,
    dilation: Sequence[int] | None = None,
) -> list[Node]:
    """Return, for each element of windows over the last dims, what `places` windows have there, row-major."""
    n = len(extents)
    stride, dilation = stride or (1,) * n, dilation or (1,) * n
    found = [x]
    for i, (extent, count, step) in enumerate(zip(extents, places, stride, strict=True)):
        starts = [at * dilation[i] for at in range(extent)]
        reach = (count - 1) * step + 1
        found = [slice_(f, i - n, s, s + reach, step) for f in found for s in starts]
    return found


def pad(x: Node, axis: int, before: int, after: int, value: float = 0.0) -> Node:
    """Put constant elements before and after along `axis`."""
    if before == after == 0:
        return x
    return make(structural.PAD, (x,), structural.PadAttrs(_axes(x, axis)[0], before, after, value))


def flip(x: Node, axes: int | Sequence[int]) -> Node:
    """Reverse the order of elements along `axes`."""
    return make(structural.FLIP, (x,), contraction.ReduceAttrs(_axes(x, axes)))


def take(x: Node, index: Node, axis: int) -> Node:
    """Select whole slices of `axis` by an integer tensor (embedding, index_select)."""
    return make(structural.TAKE, (x, index), contraction.AxisAttrs(_axes(x, axis)[0]))


def gather(x: Node, index: Node, axis: int) -> Node:
    """Select single elements along `axis` (torch.gather)."""
    return make(structural.GATHER, (x, index), contraction.AxisAttrs(_axes(x, axis)[0]))


def kernel_graph(name: str, inputs: Sequence[Node], outputs: Sequence[Node]) -> Graph:
    """Return a kernel-level graph."""
    return Graph(Level.KERNEL, name, tuple(inputs), tuple(outputs))


def thread_graph(name: str, inputs: Sequence[Node], outputs: Sequence[Node]) -> Graph:
    """Return a thread-level graph: scalar inputs, elementwise ops, one output."""
    return Graph(Level.THREAD, name, tuple(inputs), tuple(outputs))


def graph_inputs(outputs: Sequence[Node]) -> list[Node]:
    """List the input nodes under `outputs` in the order of first use."""
    return [n for n in topological(outputs) if n.op is leaf.INPUT]


def apply_graph(graph: Graph, operands: Sequence[Node]) -> tuple[Node, ...]:
    """Apply a block or thread graph as one node; return its results."""
    op = library.THREAD if graph.level is Level.THREAD else library.CUSTOM
    node = make(op, operands, library.GraphAttrs(graph))
    if len(graph.outputs) == 1:
        return (node,)
    return tuple(item(node, i) for i in range(len(graph.outputs)))


class BlockBuilder:
    """Build a block graph: name axes once, then load, compute, accumulate and store.

        b = BlockBuilder("scale", grid={"m": 8})
        x = b.load(input_("x", (64, 128)), ("m", 8), 128)
        b.store(mul(x, 2.0), (64, 128), ("m", 8), 128)
        graph = b.graph()

    A dim is given as its tile size, preceded by the axes that split it, outermost first.
    """

    def __init__(
        self,
        name: str,
        grid: Mapping[str, int] | None = None,
        loops: Mapping[str, int] | None = None,
    ) -> None:
        self.name = name
        self._grid = {n: Axis(n, c) for n, c in (grid or {}).items()}
        self._loops = {n: Axis(n, c) for n, c in (loops or {}).items()}
        self._inputs: dict[Node, None] = {}
        self._outputs: list[Node] = []

    def bound(self, loop: str, terms: Mapping[str, int], constant_: int) -> None:
        """Run an iteration of `loop` only where sum(terms) + constant >= 0."""
        axis = self._loops[loop]
        bound = Bound(tuple(terms.items()), constant_)
        self._loops[loop] = Axis(axis.name, axis.count, (*axis.bounds, bound))

    def dim(self, spec: "int | tuple[Any, ...]") -> tile.DimMap:
        """Return the index map of one dim from (axis, …, tile size)."""
        if isinstance(spec, int):
            return tile.DimMap((), spec)
        *names, size = spec
        axes = {**self._grid, **self._loops}
        return tile.DimMap(tuple((n, axes[n].count) for n in names), size)

    def load(self, x: Node, *dims: "int | tuple[Any, ...]") -> Node:
        """Load a tile of input `x`."""
        self._inputs.setdefault(x)
        return make(tile.LOAD, (x,), tile.LoadAttrs(tuple(self.dim(d) for d in dims)))

    def index(self, extent: int, dim: "int | tuple[Any, ...]", dtype: DType = DType.I64) -> Node:
        """Return the element indices of the tile of a dim."""
        return make(tile.TILE_INDEX, (), tile.TileIndexAttrs(self.dim(dim), extent, dtype))

    def store(self, x: Node, shape: Sequence[int], *dims: "int | tuple[Any, ...]") -> Node:
        """Store a tile as part of an output of `shape`."""
        maps = tuple(self.dim(d) for d in dims)
        node = make(tile.STORE, (x,), tile.StoreAttrs(maps, tuple(shape)))
        self._outputs.append(node)
        return node

    def graph(self) -> Graph:
        """Return the block graph; inputs stand in the order of their first load."""
        return Graph(
            Level.BLOCK,
            self.name,
            tuple(self._inputs),
            tuple(self._outputs),
            tuple(self._grid.values()),
            tuple(self._loops.values()),
        )


def accumulate(op: Op, x: Node, loop: str) -> Node:
    """Close `loop` over `x` with one of the accumulators."""
    return make(op, (x,), tile.LoopAttrs(loop))


def accum_sum(x: Node, loop: str) -> Node:
    """Sum of `x` over the iterations of `loop`."""
    return accumulate(tile.ACCUM_SUM, x, loop)


def accum_rescaled(x: Node, shift: Node, loop: str, power: float = 1) -> Node:
    """Sum of x_l * exp(power * (m_l - m_last)) over the iterations of `loop`."""
    return make(tile.ACCUM_RESCALED, (x, shift), tile.RescaleAttrs(loop, power))


def finite_or_zero(m: Node) -> Node:
    """Return `m`, and 0 where it is -inf: the shift that keeps exp(x - m) free of NaN."""
    return where(gt(m, constant(float("-inf"), m.tensor.dtype)), m, constant(0.0, m.tensor.dtype))
