"""Programs and correct kernels for them, which the mutation tests damage.

Each function returns the original and a block graph of the same inputs. Tiles are ragged wherever
the kernel can have it.
"""

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import tile
from superopt.ir.types import DType

INFINITY = float("inf")


def attention(
    heads: int = 2,
    queries: int = 20,
    keys: int = 20,
    dim: int = 8,
    *,
    tile_q: int = 8,
    tile_k: int = 6,
    causal: bool = True,
) -> tuple[Graph, Graph]:
    """Online softmax over tiles of keys; causal tiles that hold nothing are skipped."""
    q = b.input_("q", (heads, queries, dim))
    k = b.input_("k", (heads, keys, dim))
    v = b.input_("v", (heads, keys, dim))
    scale = dim**-0.5
    scores = b.mul(b.matmul(q, b.transpose(k)), scale)
    if causal:
        rows = b.iota((1, queries, 1), -2)
        columns = b.iota((1, 1, keys), -1)
        scores = b.where(b.ge(rows, columns), scores, b.constant(-INFINITY))
    e = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    result = b.matmul(b.div(e, b.reduce_sum(e, -1)), v)
    original = b.kernel_graph("attention", [q, k, v], [result])

    blocks, steps = -(-queries // tile_q), -(-keys // tile_k)
    block = b.BlockBuilder("flash", grid={"h": heads, "m": blocks}, loops={"n": steps})
    tq = block.load(q, ("h", 1), ("m", tile_q), dim)
    tk = block.load(k, ("h", 1), ("n", tile_k), dim)
    tv = block.load(v, ("h", 1), ("n", tile_k), dim)
    s = b.mul(b.matmul(tq, b.transpose(tk)), scale)
    if causal:
        i = b.reshape(block.index(queries, ("m", tile_q)), (1, tile_q, 1))
        j = b.reshape(block.index(keys, ("n", tile_k)), (1, 1, tile_k))
        s = b.where(b.ge(i, j), s, b.constant(-INFINITY))
        block.bound("n", {"m": tile_q, "n": -tile_k}, tile_q - 1)
    m = b.accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), "n")
    p = b.exp(b.sub(s, b.finite_or_zero(m)))
    total = b.accum_rescaled(b.reduce_sum(p, -1), m, "n")
    mixed = b.accum_rescaled(b.matmul(p, tv), m, "n")
    block.store(b.div(mixed, total), (heads, queries, dim), ("h", 1), ("m", tile_q), dim)
    return original, block.graph()


def _rms(x: Node) -> Node:
    return b.sqrt(b.add(b.mean(b.mul(x, x), -1), 1e-5))


def rms_linear() -> tuple[Graph, Graph]:
    """RMSNorm with a weight and a linear layer: the division after the sum."""
    x, g, w = b.input_("x", (6, 20)), b.input_("g", (1, 20)), b.input_("w", (20, 14))
    result = b.matmul(b.mul(b.div(x, _rms(x)), g), w)
    original = b.kernel_graph("rms_linear", [x, g, w], [result])
    block = b.BlockBuilder("fused", grid={"m": 2, "n": 2}, loops={"k": 3})
    tx = block.load(x, ("m", 4), ("k", 8))
    tg = block.load(g, 1, ("k", 8))
    tw = block.load(w, ("k", 8), ("n", 8))
    square = b.div(b.accum_sum(b.reduce_sum(b.mul(tx, tx), -1), "k"), 20.0)
    product = b.accum_sum(b.matmul(b.mul(tx, tg), tw), "k")
    result = b.div(product, b.sqrt(b.add(square, 1e-5)))
    block.store(result, (6, 14), ("m", 4), ("n", 8))
    return original, block.graph()


def gated_mlp() -> tuple[Graph, Graph]:
    """silu(x w1) * (x w2) in one kernel."""
    x, w1, w2 = b.input_("x", (6, 20)), b.input_("w1", (20, 14)), b.input_("w2", (20, 14))
    gate = b.matmul(x, w1)
    result = b.mul(b.mul(gate, b.sigmoid(gate)), b.matmul(x, w2))
    original = b.kernel_graph("gated_mlp", [x, w1, w2], [result])
    block = b.BlockBuilder("fused", grid={"n": 2}, loops={"k": 3})
    tx = block.load(x, 6, ("k", 8))
    gate = b.accum_sum(b.matmul(tx, block.load(w1, ("k", 8), ("n", 8))), "k")
    up = b.accum_sum(b.matmul(tx, block.load(w2, ("k", 8), ("n", 8))), "k")
    block.store(b.mul(b.mul(gate, b.sigmoid(gate)), up), (6, 14), 6, ("n", 8))
    return original, block.graph()


def softmax() -> tuple[Graph, Graph]:
    """Two passes over the row: running maximum and sum, then the division."""
    x = b.input_("x", (6, 20))
    e = b.exp(b.sub(x, b.reduce_max(x, -1)))
    original = b.kernel_graph("softmax", [x], [b.div(e, b.reduce_sum(e, -1))])
    block = b.BlockBuilder("two_pass", grid={"m": 2}, loops={"n": 3, "o": 3})
    first = block.load(x, ("m", 4), ("n", 8))
    m = b.accumulate(tile.PREFIX_MAX, b.reduce_max(first, -1), "n")
    p = b.exp(b.sub(first, b.finite_or_zero(m)))
    total = b.accum_rescaled(b.reduce_sum(p, -1), m, "n")
    top = b.accumulate(tile.ACCUM_MAX, b.reduce_max(first, -1), "n")
    again = block.load(x, ("m", 4), ("o", 8))
    result = b.div(b.exp(b.sub(again, top)), total)
    block.store(result, (6, 20), ("m", 4), ("o", 8))
    return original, block.graph()


def layer_norm() -> tuple[Graph, Graph]:
    """Mean and mean square in one pass, then the affine part."""
    x, g, c = b.input_("x", (6, 20)), b.input_("g", (1, 20)), b.input_("c", (1, 20))
    mean = b.mean(x, -1)
    centered = b.sub(x, mean)
    variance = b.mean(b.mul(centered, centered), -1)
    result = b.add(b.mul(b.div(centered, b.sqrt(b.add(variance, 1e-5))), g), c)
    original = b.kernel_graph("layer_norm", [x, g, c], [result])
    block = b.BlockBuilder("two_pass", grid={"m": 2}, loops={"n": 3, "o": 3})
    first = block.load(x, ("m", 4), ("n", 8))
    mean = b.div(b.accum_sum(b.reduce_sum(first, -1), "n"), 20.0)
    square = b.div(b.accum_sum(b.reduce_sum(b.mul(first, first), -1), "n"), 20.0)
    deviation = b.sqrt(b.add(b.sub(square, b.mul(mean, mean)), 1e-5))
    again = block.load(x, ("m", 4), ("o", 8))
    tg, tc = block.load(g, 1, ("o", 8)), block.load(c, 1, ("o", 8))
    result = b.add(b.mul(b.div(b.sub(again, mean), deviation), tg), tc)
    block.store(result, (6, 20), ("m", 4), ("o", 8))
    return original, block.graph()


def maximum() -> tuple[Graph, Graph]:
    """Largest element of each row of a scaled matrix: one wrong element in 20 must show."""
    x = b.input_("x", (1, 20))
    original = b.kernel_graph("amax", [x], [b.reduce_max(b.mul(x, 2.0), -1)])
    block = b.BlockBuilder("amax", grid={}, loops={"n": 3})
    t = b.mul(block.load(x, 1, ("n", 8)), 2.0)
    top = b.accumulate(tile.ACCUM_MAX, b.reduce_max(t, -1), "n")
    block.store(top, (1, 1), 1, 1)
    return original, block.graph()


WORKLOADS = {
    "attention": attention,
    "rms_linear": rms_linear,
    "gated_mlp": gated_mlp,
    "softmax": softmax,
    "layer_norm": layer_norm,
    "maximum": maximum,
}

__all__ = ["WORKLOADS", "DType", "attention"]
