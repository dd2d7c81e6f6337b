"""Composites: named functions with one definition in primitives.

They are lifted whole, so that graphs stay readable and a library kernel can be chosen for them;
search and verification expand them. Definitions follow torch.nn.functional.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.node import Node
from superopt.ir.ops.contraction import AxisAttrs
from superopt.ir.ops.library import ConvAttrs, conv_flops, conv_type
from superopt.ir.ops.registry import Op, OpKind, TypeRule, declare
from superopt.ir.ops.shapes import broadcast_shapes, check_axis, same_dtype, tensor
from superopt.ir.types import DType, TensorType, Type

Approximation = Literal["none", "tanh"]


@final
@dataclass(frozen=True, slots=True)
class GeluAttrs:
    """Which approximation of GELU (torch.nn.functional.gelu)."""

    approximate: Approximation


@final
@dataclass(frozen=True, slots=True)
class NormAttrs:
    """Axes (from the end) that are normalized together, and epsilon."""

    axes: tuple[int, ...]
    epsilon: float


@final
@dataclass(frozen=True, slots=True)
class AttentionAttrs:
    """Scale of the scores; `causal` masks keys behind the query as torch's is_causal does."""

    scale: float
    causal: bool


def _same(types: tuple[Type, ...], attrs: Any) -> Type:
    x = tensor(types[0])
    if not x.dtype.is_float:
        raise GraphError(f"needs a floating-point operand, got {x.dtype}")
    return x.with_shape(x.shape)


def _along_axis(types: tuple[Type, ...], attrs: AxisAttrs) -> Type:
    result = tensor(_same(types, attrs))
    check_axis(attrs.axis, result.rank)
    return result


def _gelu_type(types: tuple[Type, ...], attrs: GeluAttrs) -> Type:
    if attrs.approximate not in get_args(Approximation):
        raise GraphError(f"approximate is one of {get_args(Approximation)}")
    return _same(types, attrs)


def _norm(most: int) -> TypeRule:
    """Return the rule of a norm of x with at most `most - 1` factors that broadcast to x."""

    def rule(types: tuple[Type, ...], attrs: NormAttrs) -> Type:
        if not 1 <= len(types) <= most:
            raise GraphError(f"takes 1 to {most} operands, got {len(types)}")
        result = tensor(_same(types, attrs))
        for axis in attrs.axes:
            check_axis(axis, result.rank)
        for part in (tensor(t) for t in types[1:]):
            shape = (1,) * (result.rank - part.rank) + part.shape
            if broadcast_shapes([result.shape, shape]) != result.shape:
                raise GraphError(f"{part} does not broadcast to {result}")
        return result

    return rule


def _attention(types: tuple[Type, ...], attrs: AttentionAttrs) -> Type:
    if not 3 <= len(types) <= 4:
        raise GraphError(f"takes q, k, v and perhaps a mask, got {len(types)} operands")
    q, k, v, *mask = (tensor(t) for t in types)
    if not q.rank == k.rank == v.rank or q.rank < 3:
        raise GraphError("q, k and v need equal rank of at least 3")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise GraphError(f"q {q}, k {k} and v {v} do not fit")
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3] or k.shape[-3] != v.shape[-3]:
        raise GraphError("the heads of k and v must divide those of q")
    if mask:
        scores = (*q.shape[:-1], k.shape[-2])
        if broadcast_shapes([scores, mask[0].shape]) != scores:
            raise GraphError(f"the mask {mask[0]} does not broadcast to the scores {scores}")
    batch = broadcast_shapes([q.shape[:-3], k.shape[:-3], v.shape[:-3]])
    return TensorType((*batch, q.shape[-3], q.shape[-2], v.shape[-1]), same_dtype([q, k, v]))


def _depthwise(types: tuple[Type, ...], attrs: ConvAttrs) -> Type:
    x, weight = (tensor(t) for t in types)
    if attrs.transposed or weight.shape[1:2] != (1,) or attrs.groups != x.shape[1]:
        raise GraphError(f"each channel needs weights of its own, got {weight} for {x}")
    return conv_type(types, attrs)


def _declare(
    name: str,
    arity: int | None,
    attrs: type | None,
    rule: Any,
    meaning: str,
    definition: Callable[..., Node],
    flops: Callable[..., int] | None = None,
) -> Op:
    return declare(
        Op(name, OpKind.COMPOSITE, arity, attrs, rule, meaning, expand=definition, flops=flops)
    )


def _softmax(inputs: tuple[Node, ...], attrs: AxisAttrs) -> Node:
    x = inputs[0]
    e = b.exp(b.sub(x, b.reduce_max(x, attrs.axis)))
    return b.div(e, b.reduce_sum(e, attrs.axis))


def _log_softmax(inputs: tuple[Node, ...], attrs: AxisAttrs) -> Node:
    x = inputs[0]
    shifted = b.sub(x, b.reduce_max(x, attrs.axis))
    return b.sub(shifted, b.log(b.reduce_sum(b.exp(shifted), attrs.axis)))


def _logsumexp(inputs: tuple[Node, ...], attrs: AxisAttrs) -> Node:
    x = inputs[0]
    top = b.reduce_max(x, attrs.axis)
    shift = b.finite_or_zero(top)
    total = b.add(shift, b.log(b.reduce_sum(b.exp(b.sub(x, shift)), attrs.axis)))
    # infinity less itself is not a number, but the logarithm of its exponential is infinity
    return b.where(b.eq(top, float("inf")), top, total)


def _kept(types: tuple[Type, ...], attrs: AxisAttrs) -> Type:
    x = tensor(_same(types, attrs))
    axis = check_axis(attrs.axis, x.rank)
    return x.with_shape(tuple(1 if i == axis else d for i, d in enumerate(x.shape)))


def _silu(inputs: tuple[Node, ...], attrs: None) -> Node:
    return b.mul(inputs[0], b.sigmoid(inputs[0]))


def _gelu(inputs: tuple[Node, ...], attrs: GeluAttrs) -> Node:
    x = inputs[0]
    if attrs.approximate == "tanh":
        cubic = b.mul(b.mul(x, x), x)
        inner = b.mul(b.add(x, b.mul(cubic, 0.044715)), 0.7978845608028654)
        return b.mul(b.mul(x, 0.5), b.add(b.tanh(inner), 1.0))
    return b.mul(b.mul(x, 0.5), b.add(b.erf(b.mul(x, 0.7071067811865476)), 1.0))


def _in_float32(definition: Callable[..., Node]) -> Callable[..., Node]:
    # torch computes norms of 16-bit tensors in float32 and rounds once at the end
    def wrapped(inputs: tuple[Node, ...], attrs: Any) -> Node:
        dtype = inputs[0].tensor.dtype
        return b.cast(definition(tuple(b.cast(i, dtype.wide) for i in inputs), attrs), dtype)

    return wrapped


def _layer_norm(inputs: tuple[Node, ...], attrs: NormAttrs) -> Node:
    x = inputs[0]
    centered = b.sub(x, b.mean(x, attrs.axes))
    variance = b.mean(b.mul(centered, centered), attrs.axes)
    result = b.div(centered, b.sqrt(b.add(variance, attrs.epsilon)))
    if len(inputs) > 1:
        result = b.mul(result, inputs[1])
    return b.add(result, inputs[2]) if len(inputs) > 2 else result


def _rms_norm(inputs: tuple[Node, ...], attrs: NormAttrs) -> Node:
    x = inputs[0]
    square = b.mean(b.mul(x, x), attrs.axes)
    result = b.div(x, b.sqrt(b.add(square, attrs.epsilon)))
    return b.mul(result, inputs[1]) if len(inputs) > 1 else result


def _sdpa(inputs: tuple[Node, ...], attrs: AttentionAttrs) -> Node:
    q, k, v, *mask = inputs
    given, dtype = q.tensor.dtype, q.tensor.dtype.wide
    heads, kv_heads = q.shape[-3], k.shape[-3]
    if heads != kv_heads:
        q = b.reshape(q, (*q.shape[:-3], kv_heads, heads // kv_heads, *q.shape[-2:]))
        k = b.reshape(k, (*k.shape[:-2], 1, *k.shape[-2:]))
        v = b.reshape(v, (*v.shape[:-2], 1, *v.shape[-2:]))
    # torch keeps scores of 16-bit tensors in float32, and rounds what multiplies the values
    scores = b.mul(b.matmul(b.cast(q, dtype), b.cast(b.transpose(k), dtype)), attrs.scale)
    if mask:
        m = b.reshape_to_rank(mask[0], len(inputs[0].shape))
        if heads != kv_heads:
            group = (kv_heads, heads // kv_heads) if m.shape[-3] != 1 else (1, 1)
            m = b.reshape(m, (*m.shape[:-3], *group, *m.shape[-2:]))
        if m.tensor.dtype is DType.BOOL:
            scores = b.where(m, scores, b.constant(float("-inf"), dtype))
        else:
            scores = b.add(scores, b.cast(m, dtype))
    if attrs.causal:
        shape = (1,) * (scores.tensor.rank - 2) + scores.shape[-2:]
        rows = b.iota((*shape[:-1], 1), -2)
        columns = b.iota((*shape[:-2], 1, shape[-1]), -1)
        scores = b.where(b.ge(rows, columns), scores, b.constant(float("-inf"), dtype))
    result = b.matmul(b.cast(_softmax((scores,), AxisAttrs(-1)), given), v)
    return (
        b.reshape(result, (*result.shape[:-4], heads, *result.shape[-2:]))
        if (heads != kv_heads)
        else result
    )


def _depthwise_conv(inputs: tuple[Node, ...], attrs: ConvAttrs) -> Node:
    x, weight = inputs
    channels, filters, extents = x.shape[1], weight.shape[0], weight.shape[2:]
    n = len(extents)
    places = conv_type((x.type, weight.type), attrs).shape[2:]  # type: ignore[union-attr]
    for i, padding in enumerate(attrs.padding):
        x = b.pad(x, i - n, padding, padding)
    total: Node | None = None
    seen_by = b.windows(x, extents, places, attrs.stride, attrs.dilation)
    for seen, factor in zip(seen_by, b.windows(weight, extents, (1,) * n), strict=True):
        each = b.reshape(seen, (seen.shape[0], channels, 1, *places))
        term = b.mul(each, b.reshape(factor, (channels, filters // channels, *(1,) * n)))
        total = term if total is None else b.add(total, term)
    assert total is not None, "a convolution has weights"
    return b.reshape(total, (total.shape[0], filters, *places))


SOFTMAX = _declare("softmax", 1, AxisAttrs, _along_axis, "torch.softmax(axis)", _softmax)
LOG_SOFTMAX = _declare(
    "log_softmax", 1, AxisAttrs, _along_axis, "torch.log_softmax(axis)", _log_softmax
)
LOGSUMEXP = _declare(
    "logsumexp", 1, AxisAttrs, _kept, "torch.logsumexp(axis, keepdim=True)", _logsumexp
)
SILU = _declare("silu", 1, None, _same, "torch.nn.functional.silu", _silu)
GELU = _declare("gelu", 1, GeluAttrs, _gelu_type, "torch.nn.functional.gelu", _gelu)
LAYER_NORM = _declare(
    "layer_norm",
    None,
    NormAttrs,
    _norm(3),
    "layer_norm(x[, weight[, bias]]) over the axes",
    _in_float32(_layer_norm),
)
RMS_NORM = _declare(
    "rms_norm",
    None,
    NormAttrs,
    _norm(2),
    "rms_norm(x[, weight]) over the axes",
    _in_float32(_rms_norm),
)
ATTENTION = _declare(
    "attention",
    None,
    AttentionAttrs,
    _attention,
    "scaled_dot_product_attention(q, k, v[, mask]); the kv heads may divide the q heads",
    _sdpa,
)
DEPTHWISE_CONV = _declare(
    "depthwise_conv",
    2,
    ConvAttrs,
    _depthwise,
    "torch.convolution without bias, groups=channels: a sum of shifted products",
    _in_float32(_depthwise_conv),
    conv_flops,
)
