"""Lifting rules for normalization, attention, convolution and pooling."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import torch

from superopt.frontend.rules import Call, Decline, rule, to
from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.composite import AttentionAttrs, NormAttrs
from superopt.ir.node import Node, make
from superopt.ir.ops import library
from superopt.ir.ops.library import ConvAttrs, PoolAttrs
from superopt.ir.types import DType

aten = torch.ops.aten


def _trailing(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(-len(shape), 0))


def _layer_norm_node(
    x: Node, shape: Sequence[int], weight: Node | None, bias: Node | None, epsilon: float
) -> Node:
    dtype = x.tensor.dtype
    if weight is None and bias is not None:
        weight = b.full(tuple(shape), 1.0, dtype)
    operands = [x, *(to(p, dtype) for p in (weight, bias) if p is not None)]
    return make(composite.LAYER_NORM, operands, NormAttrs(_trailing(shape), float(epsilon)))


@rule(aten.layer_norm.default)
def _layer_norm(
    call: Call,
    x: Node,
    shape: Sequence[int],
    weight: Node | None,
    bias: Node | None,
    epsilon: float,
    *_: Any,
) -> Node:
    return _layer_norm_node(x, shape, weight, bias, epsilon)


@rule(aten.native_layer_norm.default)
def _native_layer_norm(
    call: Call,
    x: Node,
    shape: Sequence[int],
    weight: Node | None,
    bias: Node | None,
    epsilon: float,
) -> tuple[Node, ...]:
    axes = _trailing(shape)
    y = to(x, call.dtype.wide)
    mean = b.mean(y, axes)
    centered = b.sub(y, mean)
    deviation = b.sqrt(b.add(b.mean(b.mul(centered, centered), axes), float(epsilon)))
    result = _layer_norm_node(x, shape, weight, bias, epsilon)
    stats = (to(mean, call.results[1].dtype), to(b.div(1.0, deviation), call.results[2].dtype))
    return (result, *stats)


@rule(aten.rms_norm.default)
def _rms_norm(
    call: Call, x: Node, shape: Sequence[int], weight: Node | None, epsilon: float | None
) -> Node:
    if epsilon is None:
        # PyTorch takes the epsilon of the type that it computes in
        narrow = call.dtype.wide is DType.F32
        epsilon = torch.finfo(torch.float32 if narrow else torch.float64).eps
    operands = [x] if weight is None else [x, to(weight, x.tensor.dtype)]
    return make(composite.RMS_NORM, operands, NormAttrs(_trailing(shape), float(epsilon)))


def _per_channel(x: Node, parameter: Node) -> Node:
    """Shape a parameter [C] to stand beside x: [N, C, …]."""
    return b.reshape(parameter, (1, parameter.shape[0], *(1,) * (x.tensor.rank - 2)))


def _grouped(
    call: Call, x: Node, groups: int, weight: Node | None, bias: Node | None, epsilon: float
) -> Node:
    if x.tensor.elements == 0:
        raise Decline("a norm of no elements")
    inner = call.dtype.wide
    rest = x.tensor.elements // (x.shape[0] * groups)
    y = b.reshape(to(x, inner), (x.shape[0], groups, rest))
    y = make(composite.LAYER_NORM, (y,), NormAttrs((-1,), float(epsilon)))
    y = b.reshape(y, x.shape)
    if weight is not None:
        y = b.mul(y, _per_channel(x, to(weight, inner)))
    if bias is not None:
        y = b.add(y, _per_channel(x, to(bias, inner)))
    return to(y, call.dtype)


@rule(aten.group_norm.default)
def _group_norm(
    call: Call,
    x: Node,
    groups: int,
    weight: Node | None,
    bias: Node | None,
    epsilon: float,
    *_: Any,
) -> Node:
    return _grouped(call, x, groups, weight, bias, epsilon)


@rule(aten.native_group_norm.default)
def _native_group_norm(
    call: Call,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    n: int,
    channels: int,
    size: int,
    groups: int,
    epsilon: float,
) -> tuple[Node, ...]:
    if call.used - {0}:
        raise Decline("the statistics of a group norm")
    return (_grouped(call, x, groups, weight, bias, epsilon),)


@rule(aten.instance_norm.default)
def _instance_norm(
    call: Call,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    running_mean: Node | None,
    running_var: Node | None,
    use_input_stats: bool,
    momentum: float,
    epsilon: float,
    *_: Any,
) -> Node:
    if use_input_stats:
        return _grouped(call, x, x.shape[1], weight, bias, epsilon)
    if running_mean is None or running_var is None:
        raise Decline("an instance norm without statistics")
    return _affine(call, x, weight, bias, running_mean, running_var, epsilon)


def _affine(
    call: Call,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    mean: Node,
    variance: Node,
    epsilon: float,
) -> Node:
    inner = call.dtype.wide
    scale = b.div(1.0, b.sqrt(b.add(to(variance, inner), float(epsilon))))
    if weight is not None:
        scale = b.mul(scale, to(weight, inner))
    shift = b.neg(b.mul(to(mean, inner), scale))
    if bias is not None:
        shift = b.add(to(bias, inner), shift)
    y = b.mul(to(x, inner), _per_channel(x, scale))
    return to(b.add(y, _per_channel(x, shift)), call.dtype)


@rule(aten._native_batch_norm_legit_no_training.default)
def _batch_norm(
    call: Call,
    x: Node,
    weight: Node | None,
    bias: Node | None,
    mean: Node,
    variance: Node,
    momentum: float,
    epsilon: float,
) -> tuple[Node, ...]:
    if call.used - {0}:
        raise Decline("the statistics of a batch norm")
    return (_affine(call, x, weight, bias, mean, variance, epsilon),)


@rule(aten._native_batch_norm_legit_functional.default, aten._native_batch_norm_legit.no_stats)
def _batch_norm_of_batch(
    call: Call, x: Node, weight: Node | None, bias: Node | None, *rest: Any
) -> tuple[Node, ...]:
    *running, training, momentum, epsilon = rest
    axes = tuple(a for a in range(-x.tensor.rank, 0) if a != 1 - x.tensor.rank)
    count = math.prod(x.shape[a] for a in axes)
    if not training or count < 2:
        raise Decline("a batch norm without a batch")
    inner = call.dtype.wide
    mean = b.mean(to(x, inner), axes)
    centered = b.sub(to(x, inner), mean)
    variance = b.mean(b.mul(centered, centered), axes)
    scale = b.div(1.0, b.sqrt(b.add(variance, float(epsilon))))
    y = b.mul(centered, scale)
    if weight is not None:
        y = b.mul(y, _per_channel(x, to(weight, inner)))
    if bias is not None:
        y = b.add(y, _per_channel(x, to(bias, inner)))
    unbiased = b.mul(variance, count / (count - 1))
    found = [to(y, call.dtype), *(b.reshape(s, (x.shape[1],)) for s in (mean, scale))]
    for old, new in zip(running, (mean, unbiased), strict=False):
        kept = b.mul(to(old, inner), 1.0 - momentum)
        found.append(b.add(kept, b.mul(b.reshape(new, (x.shape[1],)), float(momentum))))
    return tuple(to(f, t.dtype) for f, t in zip(found, call.results, strict=True))


# -- attention -----------------------------------------------------------------------------------


@rule(aten.scaled_dot_product_attention.default)
def _attention(
    call: Call,
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Node:
    if dropout != 0:
        raise Decline("attention with dropout is random")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise Decline("attention without elements")
    rank = max(3, *(x.tensor.rank for x in (q, k, v)))
    operands = [b.reshape_to_rank(x, rank) for x in (q, k, v)]
    heads, *kv_heads = (x.shape[-3] for x in operands)
    if not gqa and kv_heads not in ([heads, heads], [1, 1]):
        raise Decline("broadcast heads")
    if mask is not None:
        operands.append(b.reshape_to_rank(mask, rank))
    factor = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    result = make(composite.ATTENTION, operands, AttentionAttrs(factor, bool(causal)))
    if mask is not None:
        result = _zero_without_keys(result, operands[3])
    return b.reshape(result, call.shape)


def _zero_without_keys(result: Node, mask: Node) -> Node:
    """Give 0, as PyTorch does, for queries that the mask lets see no key."""
    seen = mask
    if mask.tensor.dtype is not DType.BOOL:
        seen = b.gt(mask, b.constant(float("-inf"), mask.tensor.dtype))
    return b.where(b.reduce_max(seen, -1), result, b.constant(0.0, result.tensor.dtype))


@rule(aten._scaled_dot_product_flash_attention_for_cpu.default)
def _flash_attention(
    call: Call,
    q: Node,
    k: Node,
    v: Node,
    dropout: float,
    causal: bool,
    mask: Node | None,
    scale: float | None,
) -> tuple[Node, ...]:
    if call.used - {0}:
        raise Decline("the log-sum-exp of attention")
    return (_attention(call, q, k, v, mask, dropout, causal, scale, True),)


# -- convolution and pooling ---------------------------------------------------------------------


_TAPS: Final = 16
"""Elements of a window up to which kernels shift: for sums of products as fast as a library (5 x 5: 0.34 ms, 0.36)."""


def _per_dim(values: Sequence[int], count: int) -> tuple[int, ...]:
    return tuple(values) * count if len(values) == 1 else tuple(values)


def _product_per_place(x: Node, weight: Node) -> Node:
    """Convolve with windows of one element: a product of channels, which kernels can hold."""
    batch, channels, *places = x.tensor.shape
    factor = b.reshape(weight, weight.tensor.shape[:2])
    shape = (batch, weight.tensor.shape[0], *places)
    if math.prod(places) == 1:  # rows share the weights, where a product each would read them anew
        return b.reshape(b.matmul(b.reshape(x, (batch, channels)), b.transpose(factor)), shape)
    columns = b.reshape(x, (batch, channels, math.prod(places)))
    return b.reshape(b.matmul(factor, columns), shape)


@rule(aten.convolution.default)
def _convolution(
    call: Call,
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Node:
    n = weight.tensor.rank - 2
    if x.tensor.rank != n + 2 or 0 in call.shape:
        raise Decline("a convolution without a batch")
    attrs = ConvAttrs(
        _per_dim(stride, n),
        _per_dim(padding, n),
        _per_dim(dilation, n),
        transposed,
        _per_dim(output_padding, n),
        groups,
    )
    if (
        n
        and groups == 1
        and not (transposed or any(attrs.padding))
        and all(e == 1 for e in (*attrs.stride, *weight.tensor.shape[2:]))
    ):
        result = _product_per_place(x, weight)
    else:
        own = groups == x.shape[1] and weight.shape[1] == 1 and not transposed
        few = n and math.prod(weight.shape[2:]) <= _TAPS
        op = composite.DEPTHWISE_CONV if own and few else library.CONV
        result = make(op, (x, weight), attrs)
    return result if bias is None else b.add(result, _per_channel(x, bias))


def _pooled(x: Node, attrs: PoolAttrs) -> Node:
    """Pool by combining shifted tensors where windows are small; average where all are of one size."""
    pooled = make(library.POOL, (x,), attrs)
    n, dtype = len(attrs.kernel), x.tensor.dtype
    places = pooled.shape[-n:]
    spans = [
        (count - 1) * stride + (size - 1) * dilation + 1
        for count, stride, size, dilation in zip(
            places, attrs.stride, attrs.kernel, attrs.dilation, strict=True
        )
    ]
    # how far windows reach beyond the last element, less where no window reaches it
    beyond = [s - p - e for s, p, e in zip(spans, attrs.padding, x.shape[-n:], strict=True)]
    whole = attrs.include_pad or not any(attrs.padding)
    within = all(after <= p for after, p in zip(beyond, attrs.padding, strict=True))
    counted = attrs.kind == "max" or attrs.divisor is not None or (whole and within)
    if math.prod(attrs.kernel) > _TAPS or not (dtype.is_float and counted):
        return pooled
    empty = float("-inf") if attrs.kind == "max" else 0.0
    x = b.cast(x, dtype.wide)
    for i, (before, after) in enumerate(zip(attrs.padding, beyond, strict=True)):
        x = b.pad(x, i - n, before, max(after, 0), empty)
    combine = b.maximum if attrs.kind == "max" else b.add
    result = reduce(combine, b.windows(x, attrs.kernel, places, attrs.stride, attrs.dilation))
    if attrs.kind == "avg":
        result = b.div(result, float(attrs.divisor or math.prod(attrs.kernel)))
    return b.cast(result, dtype)


@rule(aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default)
def _max_pool(
    call: Call,
    x: Node,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Node, ...]:
    if call.used - {0} or 0 in call.shape:
        raise Decline("the indices of a max pool, or no elements")
    n = 2 if call.target is aten.max_pool2d_with_indices.default else 3
    sizes = _per_dim(kernel, n)
    attrs = PoolAttrs(
        "max",
        sizes,
        _per_dim(stride, n) or sizes,
        _per_dim(padding, n),
        _per_dim(dilation, n),
        ceil_mode,
        True,
    )
    return (_pooled(x, attrs),)


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(
    call: Call,
    x: Node,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    include_pad: bool,
    divisor: int | None = None,
) -> Node:
    if 0 in call.shape:
        raise Decline("a pool without elements")
    counts = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
    n = counts[call.target]
    sizes = _per_dim(kernel, n)
    attrs = PoolAttrs(
        "avg",
        sizes,
        _per_dim(stride, n) or sizes,
        _per_dim(padding, n),
        (1,) * n,
        ceil_mode,
        include_pad,
        divisor,
    )
    return _pooled(x, attrs)


@rule(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default)
def _adaptive_avg_pool(call: Call, x: Node, size: Sequence[int]) -> Node:
    n = len(size)
    extents = x.shape[-n:]
    if 0 in call.shape or any(extent % want for extent, want in zip(extents, size, strict=True)):
        raise Decline("windows of different sizes")
    kernel = tuple(extent // want for extent, want in zip(extents, size, strict=True))
    attrs = PoolAttrs("avg", kernel, kernel, (0,) * n, (1,) * n, False, True)
    return _pooled(x, attrs)
