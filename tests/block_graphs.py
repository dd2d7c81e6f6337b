"""Block graphs that every backend is tested with: found by the search, and edge cases by hand.

Sizes are tiny, since Triton's interpreter is slow, and ragged wherever they can be.
"""

from collections.abc import Callable
from typing import Final

from superopt.ir import build as b
from superopt.ir.build import BlockBuilder, accum_rescaled, accum_sum, accumulate, finite_or_zero
from superopt.ir.graph import Graph
from superopt.ir.node import make, topological
from superopt.ir.ops import contraction, elementwise, library, tile
from superopt.ir.ops.registry import OpKind
from superopt.ir.semantics import expand
from superopt.ir.types import DType
from superopt.search.algebra import FUSION_RULES, apply_rules
from superopt.search.emit import block_graph
from superopt.search.errors import NotFusible
from superopt.search.partition import is_compute
from superopt.search.region import make_region
from superopt.search.schedule import derive
from tests.codegen.edges import EDGES, running_maximum
from tests.search.programs import PROGRAMS

F32, F16, BF16, BOOL, I64 = DType.F32, DType.F16, DType.BF16, DType.BOOL, DType.I64


def searched(name: str, size: int) -> Graph:
    """Return the kernel that the search derives for a whole program, with ragged tiles."""
    graph = apply_rules(expand(PROGRAMS[name]), FUSION_RULES)
    region = make_region(graph, [n for n in topological(graph.outputs) if is_compute(n)])
    for schedule in derive(region):
        extent = schedule.space.extent
        tiles = {a: size if extent(a) > size else 1 for a in schedule.roles}
        try:
            return block_graph(schedule, tiles, name)
        except NotFusible:
            continue
    raise AssertionError(f"no schedule of {name}")


def attention(
    queries: int, keys: int, q_tile: int, k_tile: int, *, causal: bool = False, dtype: DType = F32
) -> Graph:
    heads, width = 2, 12
    shapes = {"q": queries, "k": keys, "v": keys}
    q, k, v = (b.input_(n, (heads, s, width), dtype) for n, s in shapes.items())
    bias = b.input_("bias", (keys,))
    grid = {"h": heads, "m": -(-queries // q_tile)}
    build = BlockBuilder("attention", grid=grid, loops={"n": -(-keys // k_tile)})
    if causal:
        build.bound("n", {"m": q_tile, "n": -k_tile}, q_tile - 1)
    q, k, v = (
        b.cast(build.load(t, ("h", 1), split, width), F32)
        for t, split in ((q, ("m", q_tile)), (k, ("n", k_tile)), (v, ("n", k_tile)))
    )
    s = b.mul(b.matmul(q, b.transpose(k)), width**-0.5)
    # far below 0 except where there is no key
    low = b.mul(b.sign(b.abs_(build.load(bias, ("n", k_tile)))), -120.0)
    s = b.add(s, b.reshape(low, (1, 1, k_tile)))
    if causal:
        i = b.reshape(build.index(queries, ("m", q_tile)), (1, q_tile, 1))
        j = b.reshape(build.index(keys, ("n", k_tile)), (1, 1, k_tile))
        s = b.where(b.le(j, i), s, float("-inf"))
    m = accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), "n")
    p = b.exp(b.sub(s, finite_or_zero(m)))
    o = accum_rescaled(b.matmul(p, v), m, "n")
    y = b.cast(b.div(o, accum_rescaled(b.reduce_sum(p, -1), m, "n")), dtype)
    build.store(y, (heads, queries, width), ("h", 1), ("m", q_tile), width)
    return build.graph()


def gated_mlp(dtype: DType) -> Graph:
    x, g, u = (b.input_(n, (r, 40), dtype) for n, r in (("x", 5), ("g", 20), ("u", 20)))
    build = BlockBuilder("gated", grid={"m": 2, "n": 3}, loops={"k": 3})
    t = b.cast(build.load(x, ("m", 3), ("k", 18)), F32)
    gate, up = (
        accum_sum(b.matmul(t, b.transpose(b.cast(build.load(w, ("n", 7), ("k", 18)), F32))), "k")
        for w in (g, u)
    )
    y = b.cast(b.mul(b.mul(gate, b.sigmoid(gate)), up), dtype)
    build.store(y, (5, 20), ("m", 3), ("n", 7))
    return build.graph()


def norm_linear(dtype: DType) -> Graph:
    x, w = b.input_("x", (5, 50), dtype), b.input_("w", (50, 21), dtype)
    build = BlockBuilder("norm_linear", grid={"m": 2, "n": 2}, loops={"k": 3})
    t = b.cast(build.load(x, ("m", 3), ("k", 19)), F32)
    e = b.div(1.0, b.sqrt(b.abs_(t)))  # infinite at 0
    y = accum_sum(b.matmul(e, b.cast(build.load(w, ("k", 19), ("n", 11)), F32)), "k")
    squares = accum_sum(b.reduce_sum(b.mul(e, e), -1), "k")
    y = b.div(y, b.sqrt(b.add(b.div(squares, 50.0), 1e-6)))
    build.store(b.cast(y, dtype), (5, 21), ("m", 3), ("n", 11))
    return build.graph()


def two_loops() -> Graph:
    x = b.input_("x", (5, 29), strides=(1, 5))
    build = BlockBuilder("normalize", grid={"m": 3}, loops={"k": 4, "j": 3})
    mean = b.div(accum_sum(b.reduce_sum(build.load(x, ("m", 2), ("k", 9)), -1), "k"), 29.0)
    build.store(b.sub(build.load(x, ("m", 2), ("j", 11)), mean), (5, 29), ("m", 2), ("j", 11))
    return build.graph()


def three_passes() -> Graph:
    x = b.input_("x", (5, 23))
    build = BlockBuilder("softmax", grid={"m": 3}, loops={"i": 3, "j": 3, "k": 3})
    i, j, k = (build.load(x, ("m", 2), (loop, 9)) for loop in "ijk")
    top = accumulate(tile.ACCUM_MAX, b.reduce_max(i, -1), "i")
    total = accum_sum(b.reduce_sum(b.exp(b.sub(j, top)), -1), "j")
    build.store(b.div(b.exp(b.sub(k, top)), total), (5, 23), ("m", 2), ("k", 9))
    return build.graph()


def nested_loops() -> Graph:
    x, w = b.input_("x", (6, 20)), b.input_("w", (20, 19))
    build = BlockBuilder("nested", grid={"m": 2}, loops={"n": 3, "k": 2})
    y = accum_sum(
        b.matmul(build.load(x, ("m", 4), ("k", 17)), build.load(w, ("k", 17), ("n", 7))), "k"
    )
    build.store(y, (6, 19), ("m", 4), ("n", 7))
    build.store(accum_sum(b.reduce_sum(b.exp(y), -1), "n"), (6, 1), ("m", 4), 1)
    return build.graph()


def reductions(dtype: DType) -> Graph:
    x = b.input_("x", (3, 3, 11), dtype)
    build = BlockBuilder("reduce", grid={"a": 2})
    t = build.load(x, ("a", 2), 3, 12)
    if dtype is F32:
        t = b.add(b.mul(t, 0.02), 1.0)
    elif dtype.is_float:
        t = b.where(b.gt(t, 0.0), b.constant(1.5, dtype), 0.75)  # products are nearly exact
    for name in ("MAX", "MIN") if dtype is BOOL else ("SUM", "MAX", "MIN", "PROD"):
        y = b.reduce(getattr(contraction, f"REDUCE_{name}"), t, (-1, -2))
        build.store(y, (3, 1, 1), ("a", 2), 1, 1)
    return build.graph()


def positions() -> Graph:
    x = b.input_("x", (3, 5, 7))
    build = BlockBuilder("positions", grid={"a": 2})
    t = build.load(x, ("a", 2), 5, 7)
    t = b.where(b.gt(t, 1.2), float("nan"), t)
    for op in (contraction.ARGMAX, contraction.ARGMIN):
        build.store(b.arg_reduce(op, t, -1), (3, 5, 1), ("a", 2), 5, 1)
        build.store(b.arg_reduce(op, t, -2), (3, 1, 7), ("a", 2), 1, 7)
    for kind in ("sum", "prod", "max", "min"):
        build.store(b.scan(t, -1, kind), (3, 5, 7), ("a", 2), 5, 7)
    return build.graph()


def accumulators(dtype: DType) -> Graph:
    x = b.input_("x", (5, 22), dtype)
    build = BlockBuilder("accumulate", grid={"m": 2}, loops={"k": 3})
    t = build.load(x, ("m", 3), ("k", 9))
    sums = () if dtype is BOOL else (tile.ACCUM_SUM, tile.ACCUM_PROD)
    for op in (tile.ACCUM_MAX, tile.ACCUM_MIN, *sums):
        build.store(accumulate(op, t, "k"), (5, 9), ("m", 3), 9)
    if dtype is not BOOL:
        m = accumulate(tile.PREFIX_MAX, b.reduce_max(t, -1), "k")
        build.store(accumulate(tile.ACCUM_LAST, m, "k"), (5, 1), ("m", 3), 1)
    return build.graph()


def rescaled_twice() -> Graph:
    """Rescaled sums of power one and two under a bounded loop, with rows that see nothing."""
    x = b.input_("x", (6, 25))
    build = BlockBuilder("rescaled", grid={"m": 3}, loops={"k": 4})
    build.bound("k", {"m": 8, "k": -7}, 5)
    build.bound("k", {"k": 7, "m": -2}, 6)
    index = b.reshape(build.index(25, ("k", 7)), (1, 7))
    rows = b.reshape(build.index(6, ("m", 2)), (2, 1))
    hidden = b.gt(index, b.mul(rows, 4))
    t = b.where(hidden, float("-inf"), build.load(x, ("m", 2), ("k", 7)))
    m = accumulate(tile.PREFIX_MAX, b.reduce_max(t, -1), "k")
    e = b.exp(b.sub(t, finite_or_zero(m)))
    build.store(accum_rescaled(b.reduce_sum(e, -1), m, "k"), (6, 1), ("m", 2), 1)
    build.store(accum_rescaled(b.reduce_sum(b.mul(e, e), -1), m, "k", 2), (6, 1), ("m", 2), 1)
    return build.graph()


def split_k() -> Graph:
    x, w = b.input_("x", (3, 50)), b.input_("w", (50, 9))
    build = BlockBuilder("split", grid={"s": 3})
    y = b.matmul(build.load(x, 3, ("s", 17)), build.load(w, ("s", 17), 9))
    build.store(b.reshape(y, (1, 3, 9)), (3, 3, 9), ("s", 1), 3, 9)
    return build.graph()


def two_axes_on_one_dim() -> Graph:
    x = b.input_("x", (50, 3))
    build = BlockBuilder("split_twice", grid={"s": 3}, loops={"k": 3})
    t = build.load(x, ("s", "k", 6), 3)
    build.store(accum_sum(b.reduce_sum(b.exp(t), -2), "k"), (3, 3), ("s", 1), 3)
    return build.graph()


def batched_products(dtype: DType) -> Graph:
    q, k = b.input_("q", (2, 3, 3, 16), dtype), b.input_("k", (2, 1, 13, 16), dtype)
    build = BlockBuilder("grouped", grid={"b": 2, "n": 2})
    kt = b.cast(b.permute(build.load(k, ("b", 1), 1, ("n", 7), 16), (0, 1, 3, 2)), F32)
    s = b.matmul(b.cast(build.load(q, ("b", 1), 3, 3, 16), F32), kt)
    build.store(s, (2, 3, 3, 13), ("b", 1), 3, 3, ("n", 7))
    return build.graph()


def other_products() -> Graph:
    """Products of integers, truth values, float64, single rows and short depths."""
    build = BlockBuilder("products", grid={"m": 2})
    for dtype in (I64, DType.I8, BOOL, DType.F64, F16):
        x, w = b.input_(f"x_{dtype}", (3, 5), dtype), b.input_(f"w_{dtype}", (5, 3), dtype)
        y = b.matmul(build.load(x, ("m", 2), 5), build.load(w, 5, 3))
        build.store(y, (3, 3), ("m", 2), 3)
    x, w = b.input_("row", (2, 19)), b.input_("w", (19, 5))
    y = b.matmul(b.exp(build.load(x, ("m", 1), 19)), build.load(w, 19, 5))
    build.store(y, (2, 5), ("m", 1), 5)
    return build.graph()


def masks_and_labels() -> Graph:
    x = b.input_("x", (5, 20))
    label = b.input_("label", (5, 1), I64)
    keep = b.input_("keep", (5, 20), BOOL)
    build = BlockBuilder("pick", grid={"m": 3}, loops={"c": 3})
    t = build.load(x, ("m", 2), ("c", 7))
    # label 1 stands first in the second tile, and where the first one is padded
    wanted = b.mul(build.load(label, ("m", 2), 1), 7)
    at = b.eq(b.reshape(build.index(20, ("c", 7)), (1, 7)), wanted)
    k = build.load(keep, ("m", 2), ("c", 7))
    picked = b.where(b.and_(at, k), t, 0.0)
    build.store(accum_sum(b.reduce_sum(picked, -1), "c"), (5, 1), ("m", 2), 1)
    build.store(accumulate(tile.ACCUM_MAX, b.reduce_max(k, -1), "c"), (5, 1), ("m", 2), 1)
    build.store(b.and_(at, b.not_(k)), (5, 20), ("m", 2), ("c", 7))
    return build.graph()


def moves(dtype: DType) -> Graph:
    x = b.input_("x", (3, 5, 6), dtype)
    build = BlockBuilder("moves", grid={"a": 2})
    t = build.load(x, ("a", 2), 5, 6)
    n = b.not_(t) if dtype is BOOL else b.neg(t)
    build.store(b.permute(n, (1, 0, 2)), (5, 3, 6), 5, ("a", 2), 6)
    build.store(b.slice_(n, -1, 1, 6, 2), (3, 5, 3), ("a", 2), 5, 3)
    build.store(b.flip(n, (-1, -2)), (3, 5, 6), ("a", 2), 5, 6)
    build.store(b.reshape(n, (2, 30)), (3, 30), ("a", 2), 30)
    build.store(b.reshape(n, (2, 3, 10)), (3, 3, 10), ("a", 2), 3, 10)
    build.store(b.concat([t, n, b.slice_(t, -1, 0, 1)], -1), (3, 5, 13), ("a", 2), 5, 13)
    build.store(b.concat([n, t], -2), (3, 10, 6), ("a", 2), 10, 6)
    build.store(b.pad(n, -2, 1, 2, 1.0), (3, 8, 6), ("a", 2), 8, 6)
    build.store(b.broadcast(b.slice_(n, -2, 2, 3), (2, 3, 6)), (3, 3, 6), ("a", 2), 3, 6)
    return build.graph()


def halves(dtype: DType) -> Graph:
    """Slices and concatenations of two equal parts, each as wide as its block."""
    x = b.input_("x", (3, 4, 8), dtype)
    build = BlockBuilder("halves", grid={"a": 2})
    t = build.load(x, ("a", 2), 4, 8)
    t = b.not_(t) if dtype is BOOL else b.neg(t)
    first, second = (b.slice_(t, -1, start, start + 4) for start in (0, 4))
    build.store(b.concat([second, first], -1), (3, 4, 8), ("a", 2), 4, 8)
    upper, lower = (b.slice_(first, -2, start, start + 2) for start in (0, 2))
    build.store(b.concat([lower, upper], -2), (3, 4, 4), ("a", 2), 4, 4)
    build.store(b.slice_(upper, -1, 1, 3), (3, 2, 2), ("a", 2), 2, 2)
    return build.graph()


def lookups() -> Graph:
    x = b.input_("x", (3, 5, 6))
    at = b.input_("at", (3, 5, 4), I64)
    build = BlockBuilder("lookups", grid={"a": 2})
    t = b.exp(build.load(x, ("a", 2), 5, 6))
    at = build.load(at, ("a", 2), 5, 4)
    build.store(b.gather(t, at, -1), (3, 5, 4), ("a", 2), 5, 4)
    build.store(b.iota((2, 5), -1, F32), (3, 5), ("a", 2), 5)
    return build.graph()


UNARY: Final = [
    o for o in vars(elementwise).values() if getattr(o, "arity", None) == 1 and not o.attrs_class
]
BINARY: Final = [o for o in vars(elementwise).values() if getattr(o, "arity", None) == 2]
BITS: Final = frozenset(getattr(elementwise, n) for n in ("AND", "OR", "XOR", "SHL", "SHR", "NOT"))


def float_ops(dtype: DType) -> Graph:
    x, y = b.input_("x", (2, 13), dtype), b.input_("y", (2, 13), dtype)
    build = BlockBuilder("floats", grid={"m": 2})
    s, t = build.load(x, ("m", 1), 13), build.load(y, ("m", 1), 13)
    values = [b.elementwise_op(op, s) for op in UNARY if op not in BITS]
    values += [b.elementwise_op(op, s, t) for op in BINARY if op not in BITS]
    values += [b.pow_(s, p) for p in (3.0, 0.5, -2.0, 1.7)]
    values += [b.elementwise_op(o, s, 0.7) for o in (elementwise.SUB, elementwise.FLOORDIV)]
    values += [b.maximum(s, 0.25), b.where(b.lt(s, t), 1.0, s), b.where(b.lt(s, t), s, 0.1)]
    values += [b.cast(s, d) for d in DType if not d.is_complex and d is not DType.U8]
    for value in values:
        build.store(value, (2, 13), ("m", 1), 13)
    return build.graph()


def integer_ops(dtype: DType) -> Graph:
    x, y = b.input_("x", (2, 13), dtype), b.input_("y", (2, 13), dtype)
    build = BlockBuilder("integers", grid={"m": 2})
    s = build.load(x, ("m", 1), 13)
    t = b.add(b.minimum(build.load(y, ("m", 1), 13), 3), 9)  # never 0
    small = b.minimum(t, 4)
    values = []
    for op in (*BINARY, *(o for o in UNARY if o.infer is elementwise.NEG.infer), elementwise.NOT):
        if op.infer is elementwise.DIV.infer:
            continue
        shifts = op in (elementwise.POW, elementwise.SHL, elementwise.SHR)
        operands = (s, small if shifts else t)[: op.arity]
        values.append(b.elementwise_op(op, *operands))
    values += [b.mul(s, 3), b.elementwise_op(elementwise.FLOORDIV, s, 3)]
    values += [b.cast(s, d) for d in DType if not d.is_complex]
    for value in values:
        build.store(value, (2, 13), ("m", 1), 13)
    build.store(b.reduce_sum(s, -1), (2, 1), ("m", 1), 1)
    build.store(b.reduce_max(b.sub(s, 50), -1), (2, 1), ("m", 1), 1)
    build.store(b.scan(s, -1, "sum"), (2, 13), ("m", 1), 13)
    return build.graph()


def half_arithmetic(dtype: DType) -> Graph:
    """16-bit tiles that are not widened: every op rounds once."""
    x, w = b.input_("x", (3, 37), dtype), b.input_("w", (37, 5), dtype)
    build = BlockBuilder("half", grid={"m": 2}, loops={"k": 2})
    t = build.load(x, ("m", 2), ("k", 20))
    s = b.add(b.mul(t, 0.3), b.sign(b.abs_(b.div(1.0, t))))  # no number at 0
    build.store(accum_sum(b.matmul(s, build.load(w, ("k", 20), 5)), "k"), (3, 5), ("m", 2), 5)
    build.store(accum_sum(b.reduce_sum(b.exp(s), -1), "k"), (3, 1), ("m", 2), 1)
    build.store(accumulate(tile.ACCUM_MAX, b.reduce_max(s, -1), "k"), (3, 1), ("m", 2), 1)
    return build.graph()


def threads() -> Graph:
    x, y = b.input_("x", (), F32), b.input_("y", (), F32)
    inner = b.thread_graph("silu_mul", [x, y], [b.mul(b.mul(x, b.sigmoid(x)), b.add(y, 2.0))])
    u, v = b.input_("u", (3, 13)), b.input_("v", (3, 1))
    build = BlockBuilder("threads", grid={"m": 2})
    operands = (build.load(u, ("m", 2), 13), build.load(v, ("m", 2), 1))
    value = make(library.THREAD, operands, library.GraphAttrs(inner))
    build.store(b.reduce_sum(value, -1), (3, 1), ("m", 2), 1)
    build.store(value, (3, 13), ("m", 2), 13)
    return build.graph()


def scalars() -> Graph:
    """Tensors without dims, constants alone, and tiles of one element."""
    x, y = b.input_("x", ()), b.input_("y", (3, 1, 1))
    build = BlockBuilder("scalars", grid={"m": 3})
    s, t = build.load(x), build.load(y, ("m", 1), 1, 1)
    build.store(b.mul(b.reshape(s, (1, 1, 1)), t), (3, 1, 1), ("m", 1), 1, 1)
    build.store(b.reshape(b.constant(2.5), (1,)), (3,), ("m", 1))
    build.store(b.add(b.reduce_sum(t, -1), b.exp(b.constant(1.0))), (3, 1, 1), ("m", 1), 1, 1)
    return build.graph()


BLOCK_GRAPHS: Final[dict[str, Callable[[], Graph]]] = {
    **{f"searched-{name}": (lambda name=name: searched(name, 7)) for name in PROGRAMS},
    "attention": lambda: attention(7, 23, 5, 9),
    "attention-causal": lambda: attention(20, 20, 8, 7, causal=True),
    "attention-row": lambda: attention(3, 40, 1, 33),
    "attention-f16": lambda: attention(7, 23, 5, 17, dtype=F16),
    "attention-bf16": lambda: attention(7, 23, 5, 17, causal=False, dtype=BF16),
    "gated-mlp": lambda: gated_mlp(F32),
    "gated-mlp-bf16": lambda: gated_mlp(BF16),
    "norm-linear": lambda: norm_linear(F32),
    "norm-linear-f16": lambda: norm_linear(F16),
    "two-loops": two_loops,
    "three-passes": three_passes,
    "nested-loops": nested_loops,
    "reductions": lambda: reductions(F32),
    "reductions-bf16": lambda: reductions(BF16),
    "reductions-i64": lambda: reductions(I64),
    "reductions-u8": lambda: reductions(DType.U8),
    "reductions-bool": lambda: reductions(BOOL),
    "positions": positions,
    "accumulators": lambda: accumulators(F32),
    "accumulators-f16": lambda: accumulators(F16),
    "accumulators-i32": lambda: accumulators(DType.I32),
    "accumulators-bool": lambda: accumulators(BOOL),
    "rescaled-twice": rescaled_twice,
    "split-k": split_k,
    "two-axes-on-one-dim": two_axes_on_one_dim,
    "batched-products": lambda: batched_products(F32),
    "batched-products-bf16": lambda: batched_products(BF16),
    "other-products": other_products,
    "masks-and-labels": masks_and_labels,
    "moves": lambda: moves(F32),
    "moves-bf16": lambda: moves(BF16),
    "moves-bool": lambda: moves(BOOL),
    "halves": lambda: halves(F32),
    "halves-bf16": lambda: halves(BF16),
    "halves-bool": lambda: halves(BOOL),
    "lookups": lookups,
    "float-ops": lambda: float_ops(F32),
    "float-ops-f64": lambda: float_ops(DType.F64),
    "float-ops-bf16": lambda: float_ops(BF16),
    "integer-ops-i64": lambda: integer_ops(I64),
    "integer-ops-i8": lambda: integer_ops(DType.I8),
    "half-arithmetic-f16": lambda: half_arithmetic(F16),
    "half-arithmetic-bf16": lambda: half_arithmetic(BF16),
    "threads": threads,
    "scalars": scalars,
    **EDGES,
    "running_maximum": running_maximum,
}


def is_product(graph: Graph) -> bool:
    """Say whether a graph has a contraction."""
    return any(n.op.kind is OpKind.CONTRACTION for n in graph.nodes())
