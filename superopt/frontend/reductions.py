"""Lifting rules for contractions, reductions and scans."""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import torch

from superopt.frontend.rules import (
    Call,
    Decline,
    Scalar,
    as_dtype,
    axes_of,
    one_axis,
    rule,
    to,
)
from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.build import elementwise_op
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction as c
from superopt.ir.ops import elementwise as e
from superopt.ir.ops import structural
from superopt.ir.ops.contraction import AxisAttrs
from superopt.ir.ops.registry import Op, OpKind
from superopt.ir.types import DType

aten = torch.ops.aten
Dims = int | Sequence[int] | None


_COMBINED: Final = {
    c.REDUCE_SUM: b.add,
    c.REDUCE_PROD: b.mul,
    c.REDUCE_MAX: b.maximum,
    c.REDUCE_MIN: b.minimum,
}
_FEW: Final = 8
"""Elements that are combined one by one: as many vectors are live at once."""


def _reduce(op: Op, x: Node, axes: tuple[int, ...]) -> Node:
    if x.tensor.elements == 0:
        raise Decline("a reduction of no elements")
    if not axes:
        return x
    # of few elements that do not lie beside each other each is a tensor: vectors lie along what remains
    count = math.prod(x.shape[a] for a in axes)
    across = any(a < -1 and x.shape[a] > 1 for a in axes) and x.shape[-1] > 1
    dtype = x.tensor.dtype
    if 1 < count <= _FEW and across and dtype.is_float and _is_at_hand(x):
        parts = [b.cast(x, dtype.wide)]
        for axis in axes:
            parts = [b.slice_(p, axis, i, i + 1) for p in parts for i in range(x.shape[axis])]
        return b.cast(reduce(_COMBINED[op], parts), dtype)
    return b.reduce(op, x, axes)


def _is_at_hand(x: Node) -> bool:
    """Say whether elements are read, or computed from those of one place each: any may be asked for alone."""
    return all(
        n.op.kind in (OpKind.ELEMENTWISE, OpKind.LEAF, OpKind.STRUCTURAL) for n in topological((x,))
    )


def _shaped(call: Call, x: Node) -> Node:
    """Drop or keep the reduced dims as the call does."""
    return b.reshape(x, call.shape)


@rule(aten.sum.dim_IntList, aten.sum.default)
def _sum(call: Call, x: Node, dims: Any = None, *_: Any) -> Node:
    axes = axes_of(x, dims if call.target is aten.sum.dim_IntList else None)
    return _shaped(call, _reduce(c.REDUCE_SUM, to(x, call.dtype), axes))


def _mean_node(x: Node, axes: tuple[int, ...]) -> Node:
    if x.tensor.elements == 0:
        raise Decline("a mean of no elements")
    count = math.prod(x.shape[a] for a in axes)
    return b.div(_reduce(c.REDUCE_SUM, x, axes), float(count)) if axes else x


@rule(aten.mean.dim, aten.mean.default)
def _mean(call: Call, x: Node, dims: Any = None, *_: Any) -> Node:
    axes = axes_of(x, dims if call.target is aten.mean.dim else None)
    return _shaped(call, to(_mean_node(to(x, call.dtype.wide), axes), call.dtype))


def _variance(x: Node, dims: Dims, correction: Scalar | None) -> tuple[Node, Node]:
    axes = axes_of(x, dims)
    count = math.prod(x.shape[a] for a in axes)
    divisor = count - (1 if correction is None else correction)
    if divisor <= 0 or not axes:
        raise Decline("a variance of too few elements")
    mean = _mean_node(x, axes)
    centered = b.sub(x, mean)
    return b.div(b.reduce_sum(b.mul(centered, centered), axes), float(divisor)), mean


@rule(aten.var.correction)
def _var(call: Call, x: Node, dims: Dims, correction: Scalar | None, keepdim: bool) -> Node:
    variance, _ = _variance(to(x, call.dtype.wide), dims, correction)
    return _shaped(call, to(variance, call.dtype))


@rule(aten.var_mean.correction)
def _var_mean(
    call: Call, x: Node, dims: Dims, correction: Scalar | None, keepdim: bool
) -> tuple[Node, ...]:
    both = _variance(to(x, call.dtype.wide), dims, correction)
    return tuple(_shaped(call, to(v, call.dtype)) for v in both)


@rule(aten.amax.default, aten.max.default)
def _amax(call: Call, x: Node, dims: Dims = None, *_: Any) -> Node:
    return _shaped(call, _reduce(c.REDUCE_MAX, x, axes_of(x, dims)))


@rule(aten.amin.default, aten.min.default)
def _amin(call: Call, x: Node, dims: Dims = None, *_: Any) -> Node:
    return _shaped(call, _reduce(c.REDUCE_MIN, x, axes_of(x, dims)))


def _with_index(call: Call, x: Node, dim: int, value: Op, index: Op) -> tuple[Node, ...]:
    axis = one_axis(x, dim)
    return (
        _shaped(call, _reduce(value, x, (axis,))),
        _shaped(call, b.arg_reduce(index, x, axis)),
    )


@rule(aten.max.dim)
def _max_dim(call: Call, x: Node, dim: int, keepdim: bool) -> tuple[Node, ...]:
    return _with_index(call, x, dim, c.REDUCE_MAX, c.ARGMAX)


@rule(aten.min.dim)
def _min_dim(call: Call, x: Node, dim: int, keepdim: bool) -> tuple[Node, ...]:
    return _with_index(call, x, dim, c.REDUCE_MIN, c.ARGMIN)


@rule(aten.argmax.default, aten.argmin.default)
def _argmax(call: Call, x: Node, dim: int | None, keepdim: bool) -> Node:
    op = c.ARGMAX if call.target is aten.argmax.default else c.ARGMIN
    if dim is None:
        x, dim = b.reshape(x, (x.tensor.elements,)), 0
    return _shaped(call, b.arg_reduce(op, x, one_axis(x, dim)))


@rule(aten.any.default, aten.any.dim, aten.any.dims)
def _any(call: Call, x: Node, dims: Dims = None, *_: Any) -> Node:
    truth = _reduce(c.REDUCE_MAX, to(x, DType.BOOL), axes_of(x, dims))
    return _shaped(call, to(truth, call.dtype))


@rule(aten.all.default, aten.all.dim, aten.all.dims)
def _all(call: Call, x: Node, dims: Dims = None, *_: Any) -> Node:
    truth = _reduce(c.REDUCE_MIN, to(x, DType.BOOL), axes_of(x, dims))
    return _shaped(call, to(truth, call.dtype))


@rule(aten.prod.default)
def _prod(call: Call, x: Node, *_: Any) -> Node:
    flat = b.reshape(to(x, call.dtype), (x.tensor.elements,))
    return _shaped(call, _reduce(c.REDUCE_PROD, flat, (-1,)))


@rule(aten.prod.dim_int)
def _prod_dim(call: Call, x: Node, dim: int, *_: Any) -> Node:
    return _shaped(call, _reduce(c.REDUCE_PROD, to(x, call.dtype), axes_of(x, dim)))


@rule(aten.cumsum.default, aten.cumprod.default)
def _cumulative(call: Call, x: Node, dim: int, *_: Any) -> Node:
    x = to(x, call.dtype)
    if call.target is aten.cumsum.default:
        return b.scan(x, one_axis(x, dim), "sum")
    return b.scan(x, one_axis(x, dim), "prod")


@rule(aten.logsumexp.default)
def _logsumexp(call: Call, x: Node, dims: Dims, keepdim: bool) -> Node:
    x = to(x, call.dtype)
    axes = axes_of(x, dims)
    if len(axes) != 1:
        kept = [i - x.tensor.rank for i in range(x.tensor.rank) if i - x.tensor.rank not in axes]
        moved = b.permute(x, [*kept, *axes])
        x = b.reshape(moved, (*(x.shape[k] for k in kept), math.prod(x.shape[a] for a in axes)))
        axes = (-1,)
    return _shaped(call, make(composite.LOGSUMEXP, (x,), AxisAttrs(axes[0])))


@rule(aten.softmax.int, aten._softmax.default)
def _softmax(call: Call, x: Node, dim: int, *_: Any) -> Node:
    x = to(x, call.dtype)
    return make(composite.SOFTMAX, (x,), AxisAttrs(one_axis(x, dim)))


@rule(aten.log_softmax.int, aten._log_softmax.default)
def _log_softmax(call: Call, x: Node, dim: int, *_: Any) -> Node:
    x = to(x, call.dtype)
    return make(composite.LOG_SOFTMAX, (x,), AxisAttrs(one_axis(x, dim)))


@rule(aten.linalg_vector_norm.default)
def _vector_norm(call: Call, x: Node, order: Scalar, dims: Dims, *_: Any) -> Node:
    axes = axes_of(x, dims)
    y = to(x, call.dtype.wide)
    return _shaped(call, to(_norm(y, float(order), axes), call.dtype))


def _norm(x: Node, order: float, axes: tuple[int, ...]) -> Node:
    if order == 2.0:
        return b.sqrt(_reduce(c.REDUCE_SUM, b.mul(x, x), axes))
    size = b.abs_(x)
    if order == 1.0:
        return _reduce(c.REDUCE_SUM, size, axes)
    if math.isinf(order):
        return _reduce(c.REDUCE_MAX if order > 0 else c.REDUCE_MIN, size, axes)
    if order == 0.0:
        return _reduce(c.REDUCE_SUM, to(b.ne(x, 0.0), x.tensor.dtype), axes)
    power = elementwise_op(e.POW, size, order)
    return elementwise_op(e.POW, _reduce(c.REDUCE_SUM, power, axes), 1.0 / order)


# -- contractions --------------------------------------------------------------------------------


def _product(x: Node, y: Node) -> Node:
    """torch.matmul for any ranks; rows that one matrix multiplies are one dim, whatever they were."""
    if 0 in (*x.shape, *y.shape):
        raise Decline("a product without elements")
    left = b.reshape(x, (1, *x.shape)) if x.tensor.rank == 1 else x
    right = b.reshape(y, (*y.shape, 1)) if y.tensor.rank == 1 else y
    if left.tensor.rank > 2 and all(d == 1 for d in right.shape[:-2]):
        rank = max(left.tensor.rank, right.tensor.rank)
        return _rows_product(
            b.reshape(left, (1,) * (rank - left.tensor.rank) + left.shape),
            b.reshape(right, right.shape[-2:]),
        )
    return b.matmul(left, right)


def _rows_product(rows: Node, matrix: Node) -> Node:
    """Multiply rows [..., K] by a matrix [K, N]; their order is changed after it, not before."""
    if rows.op is structural.PERMUTE and rows.attrs.perm[-1] == rows.tensor.rank - 1:
        return b.permute(_rows_product(rows.inputs[0], matrix), rows.attrs.perm)
    merged = b.reshape(rows, (math.prod(rows.shape[:-1]), rows.shape[-1]))
    return b.reshape(b.matmul(merged, matrix), (*rows.shape[:-1], matrix.shape[-1]))


@rule(aten.mm.default, aten.bmm.default, aten.matmul.default, aten.mv.default, aten.dot.default)
def _matmul(call: Call, x: Node, y: Node, *_: Any) -> Node:
    return _shaped(call, _product(x, y))


@rule(aten.linear.default)
def _linear(call: Call, x: Node, weight: Node, bias: Node | None) -> Node:
    if weight.tensor.rank != 2:
        raise Decline("linear with a weight that is a vector")
    result = _shaped(call, _product(x, b.transpose(weight)))
    return result if bias is None else b.add(result, bias)


@rule(aten.addmm.default, aten.baddbmm.default, aten.addmv.default)
def _addmm(call: Call, bias: Node, x: Node, y: Node, beta: Scalar, alpha: Scalar) -> Node:
    product = _shaped(call, _product(x, y))
    if alpha != 1:
        product = b.mul(product, as_dtype(alpha, call.dtype))
    if beta == 0:
        return product
    if beta != 1:
        bias = b.mul(bias, as_dtype(beta, call.dtype))
    return b.add(product, bias)
