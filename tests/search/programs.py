"""Small programs that the search tests share; none of them is a benchmark workload."""

from superopt.ir import build as b
from superopt.ir.composite import (
    ATTENTION,
    GELU,
    LAYER_NORM,
    RMS_NORM,
    AttentionAttrs,
    GeluAttrs,
    NormAttrs,
)
from superopt.ir.graph import Graph
from superopt.ir.node import make
from superopt.ir.types import DType


def grouped_attention(*, causal: bool) -> Graph:
    q = b.input_("q", (2, 4, 25, 16))
    k = b.input_("k", (2, 2, 35, 16))
    v = b.input_("v", (2, 2, 35, 8))
    return b.kernel_graph(
        "gqa", [q, k, v], [make(ATTENTION, (q, k, v), AttentionAttrs(0.25, causal))]
    )


def shared_keys(*, merged: bool) -> Graph:
    """Attention of heads that all have the same keys, as rows of one product or of one each."""
    q, k, v = b.input_("q", (9, 25, 8)), b.input_("k", (35, 8)), b.input_("v", (35, 6))
    rows = (9 * 25,) if merged else (9, 25)
    s = b.reshape(b.matmul(b.reshape(q, (*rows, 8)), b.transpose(k)), (9, 25, 35))
    e = b.exp(b.sub(s, b.reduce_max(s, -1)))
    weights = b.reshape(b.div(e, b.reduce_sum(e, -1)), (*rows, 35))
    return b.kernel_graph("shared_keys", [q, k, v], [b.reshape(b.matmul(weights, v), (9, 25, 6))])


def windowed_attention() -> Graph:
    """A sliding window with soft-capped scores: nothing that has a name."""
    q, k, v = (b.input_(n, (3, 40, 8)) for n in "qkv")
    s = b.matmul(q, b.transpose(k))
    s = b.mul(b.tanh(b.div(s, 5.0)), 5.0)
    rows, columns = b.iota((1, 40, 1), -2), b.iota((1, 1, 40), -1)
    near = b.and_(b.ge(rows, columns), b.le(rows, b.add(columns, 9)))
    s = b.where(near, s, float("-inf"))
    e = b.exp(b.sub(s, b.reduce_max(s, -1)))
    return b.kernel_graph("window", [q, k, v], [b.matmul(b.div(e, b.reduce_sum(e, -1)), v)])


def squared_weights() -> Graph:
    """Sum of squared softmax weights times values: homogeneous of degree two in the shift."""
    x, v = b.input_("x", (12, 50)), b.input_("v", (50, 6))
    e = b.exp(b.sub(x, b.reduce_max(x, -1)))
    total = b.reduce_sum(e, -1)
    weights = b.div(b.mul(e, e), b.mul(total, total))
    return b.kernel_graph("squares", [x, v], [b.matmul(weights, v)])


def norm_linear() -> Graph:
    x, g, w = b.input_("x", (9, 40)), b.input_("g", (40,)), b.input_("w", (30, 40))
    normed = make(RMS_NORM, (x, g), NormAttrs((-1,), 1e-5))
    return b.kernel_graph("norm_linear", [x, g, w], [b.matmul(normed, b.transpose(w))])


def pixel_gate() -> Graph:
    """Channels scaled by a gate made of their means over short rows of pixels."""
    x, w = b.input_("x", (3, 10, 6, 7)), b.input_("w", (10, 1, 1))
    gate = b.sigmoid(b.mul(b.mean(x, (-2, -1)), w))
    return b.kernel_graph("pixel_gate", [x, w], [b.mul(x, gate)])


def square_layer() -> Graph:
    """A square layer around a norm: its input is read by column and by contracted index."""
    x, g, w = b.input_("x", (9, 40)), b.input_("g", (40,)), b.input_("w", (40, 40))
    normed = make(RMS_NORM, (x, g), NormAttrs((-1,), 1e-5))
    return b.kernel_graph("square_layer", [x, g, w], [b.add(x, b.matmul(normed, b.transpose(w)))])


def gated_residual() -> Graph:
    x, w = b.input_("x", (9, 24)), b.input_("w", (24, 24))
    y = b.tanh(x)
    return b.kernel_graph("gated", [x, w], [b.add(b.mul(b.matmul(y, w), y), y)])


def square() -> Graph:
    x = b.input_("x", (24, 24))
    return b.kernel_graph("square", [x], [b.matmul(x, x)])


def norm_mlp() -> Graph:
    x, g, w = b.input_("x", (10, 24)), b.input_("g", (24,)), b.input_("w", (24, 48))
    normed = make(LAYER_NORM, (x, g, g), NormAttrs((-1,), 1e-5))
    hidden = make(GELU, (b.matmul(normed, w),), GeluAttrs("none"))
    return b.kernel_graph("norm_mlp", [x, g, w], [hidden])


def heads_linear() -> Graph:
    """A projection split into heads: the columns are two indices."""
    x, w = b.input_("x", (2, 10, 16)), b.input_("w", (1, 16, 24))
    y = b.reshape(b.matmul(x, w), (2, 10, 4, 6))
    return b.kernel_graph("heads", [x, w], [b.sigmoid(b.permute(y, (0, 2, 1, 3)))])


def label_loss() -> Graph:
    x = b.input_("x", (14, 37))
    label = b.input_("label", (14, 1), DType.I64)
    shifted = b.sub(x, b.reduce_max(x, -1))
    loss = b.sub(shifted, b.log(b.reduce_sum(b.exp(shifted), -1)))
    return b.kernel_graph("loss", [x, label], [b.neg(b.gather(loss, label, -1))])


def rotated() -> Graph:
    x, c, s = b.input_("x", (4, 12, 8)), b.input_("c", (12, 8)), b.input_("s", (12, 8))
    first, second = b.slice_(x, -1, 0, 4), b.slice_(x, -1, 4, 8)
    turned = b.concat([b.neg(second), first], -1)
    return b.kernel_graph("rotated", [x, c, s], [b.add(b.mul(x, c), b.mul(turned, s))])


def two_results() -> Graph:
    """A residual sum that is returned along with its norm."""
    x, r = b.input_("x", (6, 33)), b.input_("r", (6, 33))
    total = b.add(x, r)
    return b.kernel_graph(
        "residual", [x, r], [total, make(RMS_NORM, (total,), NormAttrs((-1,), 1e-6))]
    )


PROGRAMS = {
    "gqa": grouped_attention(causal=False),
    "causal_gqa": grouped_attention(causal=True),
    "window": windowed_attention(),
    "shared_keys": shared_keys(merged=False),
    "merged_rows": shared_keys(merged=True),
    "squares": squared_weights(),
    "norm_linear": norm_linear(),
    "norm_mlp": norm_mlp(),
    "heads": heads_linear(),
    "loss": label_loss(),
    "rotated": rotated(),
    "residual": two_results(),
    "pixel_gate": pixel_gate(),
    "square_layer": square_layer(),
    "gated_residual": gated_residual(),
    "square": square(),
}
