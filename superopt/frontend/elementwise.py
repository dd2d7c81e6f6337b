"""Lifting rules for elementwise operators: type promotion made explicit by casts."""

import math
from collections.abc import Callable
from typing import Any, Final

import torch

from superopt.frontend.rules import (
    Call,
    Decline,
    Operand,
    Scalar,
    as_dtype,
    common_dtype,
    converted,
    nearest,
    rounded,
    rule,
    to,
)
from superopt.ir import build as b
from superopt.ir import composite
from superopt.ir.build import elementwise_op
from superopt.ir.node import Node, make
from superopt.ir.ops import elementwise as e
from superopt.ir.ops import leaf
from superopt.ir.ops.registry import Op
from superopt.ir.types import DType

aten = torch.ops.aten


def _float_unary(target: Any, op: Op) -> None:
    def lift(call: Call, x: Node, *_: Any) -> Node:
        return elementwise_op(op, to(x, call.dtype))

    rule(target.default)(lift)


for _target, _op in (
    (aten.exp, e.EXP),
    (aten.expm1, e.EXPM1),
    (aten.log, e.LOG),
    (aten.log1p, e.LOG1P),
    (aten.log2, e.LOG2),
    (aten.log10, e.LOG10),
    (aten.sqrt, e.SQRT),
    (aten.sin, e.SIN),
    (aten.cos, e.COS),
    (aten.tan, e.TAN),
    (aten.asin, e.ASIN),
    (aten.acos, e.ACOS),
    (aten.atan, e.ATAN),
    (aten.sinh, e.SINH),
    (aten.cosh, e.COSH),
    (aten.asinh, e.ASINH),
    (aten.acosh, e.ACOSH),
    (aten.atanh, e.ATANH),
    (aten.tanh, e.TANH),
    (aten.sigmoid, e.SIGMOID),
    (aten.erf, e.ERF),
    (aten.erfinv, e.ERFINV),
    (aten.lgamma, e.LGAMMA),
):
    _float_unary(_target, _op)


def _same_unary(target: Any, op: Op, *, identity_on_integers: bool = False) -> None:
    def lift(call: Call, x: Node) -> Node:
        if not x.tensor.dtype.is_float and identity_on_integers:
            return x
        if x.tensor.dtype is DType.BOOL:
            raise Decline("arithmetic on bool")
        return elementwise_op(op, x)

    rule(target.default)(lift)


for _target, _op in ((aten.neg, e.NEG), (aten.abs, e.ABS), (aten.sign, e.SIGN)):
    _same_unary(_target, _op)
_same_unary(aten.sgn, e.SIGN)
for _target, _op in (
    (aten.floor, e.FLOOR),
    (aten.ceil, e.CEIL),
    (aten.round, e.ROUND),
    (aten.trunc, e.TRUNC),
):
    _same_unary(_target, _op, identity_on_integers=True)


@rule(aten.round.decimals)
def _round_decimals(call: Call, x: Node, decimals: int) -> Node:
    if not call.dtype.is_float:
        raise Decline("integers rounded to decimals")
    power = 10.0 ** abs(decimals)
    before, after = (b.div, b.mul) if decimals < 0 else (b.mul, b.div)
    y = to(x, call.dtype.wide)
    return to(after(elementwise_op(e.ROUND, before(y, power)), power), call.dtype)


def _in_wide(target: Any, function: Callable[[Node], Node]) -> None:
    """Lift an operator to an expression that is rounded once, as the operator is."""

    def lift(call: Call, x: Node) -> Node:
        return to(function(to(x, call.dtype.wide)), call.dtype)

    rule(target.default)(lift)


_in_wide(aten.rsqrt, lambda x: b.div(1.0, b.sqrt(x)))
_in_wide(aten.reciprocal, lambda x: b.div(1.0, x))
_in_wide(aten.exp2, lambda x: b.pow_(2.0, x))


@rule(aten.isnan.default)
def _isnan(call: Call, x: Node) -> Node:
    return elementwise_op(e.ISNAN, x)


@rule(aten.isinf.default)
def _isinf(call: Call, x: Node) -> Node:
    return elementwise_op(e.ISINF, x)


@rule(aten.logical_not.default)
def _logical_not(call: Call, x: Node) -> Node:
    return b.not_(to(x, DType.BOOL))


@rule(aten.bitwise_not.default)
def _bitwise_not(call: Call, x: Node) -> Node:
    return b.not_(x)


# -- two operands --------------------------------------------------------------------------------


def _arithmetic(op: Op, x: Operand, y: Operand, dtype: DType) -> Node:
    if dtype is DType.BOOL:
        table = {e.ADD: e.OR, e.MUL: e.AND, e.MAXIMUM: e.OR, e.MINIMUM: e.AND}
        if op not in table and op not in (e.AND, e.OR, e.XOR):
            raise Decline("arithmetic on bool")
        op = table.get(op, op)
    return elementwise_op(op, as_dtype(x, dtype), as_dtype(y, dtype))


def _scaled(op: Op, call: Call, x: Operand, y: Operand, alpha: Scalar) -> Node:
    if alpha == 1:
        # numbers that PyTorch adds are of the tensor's type, those that it multiplies with are not
        x, y = (o if isinstance(o, Node) else nearest(o, call.dtype) for o in (x, y))
        return _arithmetic(op, x, y, call.dtype)
    inner = call.dtype.wide
    product = elementwise_op(e.MUL, as_dtype(y, inner), as_dtype(alpha, inner))
    return to(elementwise_op(op, as_dtype(x, inner), product), call.dtype)


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(call: Call, x: Operand, y: Operand, alpha: Scalar = 1) -> Node:
    return _scaled(e.ADD, call, x, y, alpha)


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(call: Call, x: Operand, y: Operand, alpha: Scalar = 1) -> Node:
    return _scaled(e.SUB, call, x, y, alpha)


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(call: Call, x: Operand, y: Operand, alpha: Scalar = 1) -> Node:
    return _scaled(e.SUB, call, y, x, alpha)


def _binary(op: Op, *targets: Any) -> None:
    def lift(call: Call, x: Operand, y: Operand) -> Node:
        return _arithmetic(op, x, y, call.dtype)

    rule(*targets)(lift)


_binary(e.MUL, aten.mul.Tensor, aten.mul.Scalar)
_binary(e.DIV, aten.div.Tensor, aten.div.Scalar)
_binary(e.MAXIMUM, aten.maximum.default)
_binary(e.MINIMUM, aten.minimum.default)
_binary(e.ATAN2, aten.atan2.default)
_binary(e.COPYSIGN, aten.copysign.Tensor, aten.copysign.Scalar)
_binary(e.AND, aten.bitwise_and.Tensor, aten.bitwise_and.Scalar)
_binary(e.OR, aten.bitwise_or.Tensor, aten.bitwise_or.Scalar)
_binary(e.XOR, aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar)


def _divided(op: Op, x: Operand, y: Operand, dtype: DType) -> Node:
    """Divide, where nothing but a number that is known not to be 0 divides integers.

    PyTorch raises for an integer divided by 0: kernels cannot, the operator itself can.
    """
    divisor = as_dtype(y, dtype)
    if not dtype.is_float and (divisor.op is not leaf.CONSTANT or divisor.attrs.value == 0):
        raise Decline("a division of integers by what may be 0")
    return _arithmetic(op, x, divisor, dtype)


def _division(op: Op, *targets: Any) -> None:
    number = as_dtype if op is e.FLOORDIV else rounded

    def lift(call: Call, x: Operand, y: Operand) -> Node:
        return _divided(op, number(x, call.dtype), number(y, call.dtype), call.dtype)

    rule(*targets)(lift)


_division(e.REMAINDER, aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
_division(e.FMOD, aten.fmod.Tensor, aten.fmod.Scalar)
_division(e.FLOORDIV, aten.floor_divide.default, aten.floor_divide.Scalar)


@rule(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(call: Call, x: Operand, y: Operand, rounding_mode: str | None) -> Node:
    op = {None: e.DIV, "floor": e.FLOORDIV, "trunc": e.TRUNCDIV}[rounding_mode]
    return _divided(op, x, y, call.dtype)


def _shift(op: Op, *targets: Any) -> None:
    """Lift a shift as PyTorch has it: by fewer than 0 or all bits, nothing but the sign is left."""

    def lift(call: Call, x: Operand, y: Operand) -> Node:
        dtype = call.dtype
        value, count = as_dtype(x, dtype), as_dtype(y, dtype)
        last = 8 * dtype.size_bytes - 1
        if isinstance(y, int) and 0 <= y <= last:
            return elementwise_op(op, value, count)
        inside = b.and_(b.ge(count, 0), b.le(count, last))
        if op is e.SHR and dtype is not DType.U8:
            return elementwise_op(op, value, b.where(inside, count, as_dtype(last, dtype)))
        shifted = elementwise_op(op, value, b.where(inside, count, as_dtype(0, dtype)))
        return b.where(inside, shifted, as_dtype(0, dtype))

    rule(*targets)(lift)


for _name, _op in (("left", e.SHL), ("right", e.SHR)):
    _packet = getattr(aten, f"bitwise_{_name}_shift")
    _shift(_op, _packet.Tensor, _packet.Tensor_Scalar, _packet.Scalar_Tensor)
_shift(e.SHL, aten.__lshift__.Tensor, aten.__lshift__.Scalar)
_shift(e.SHR, aten.__rshift__.Tensor, aten.__rshift__.Scalar)


def _compare(op: Op, name: str) -> None:
    packet = getattr(aten, name)

    def lift(call: Call, x: Operand, y: Operand) -> Node:
        dtype = common_dtype(x, y)
        return elementwise_op(op, rounded(x, dtype), rounded(y, dtype))

    rule(packet.Tensor, packet.Scalar)(lift)


for _name, _op in (
    ("eq", e.EQ),
    ("ne", e.NE),
    ("lt", e.LT),
    ("le", e.LE),
    ("gt", e.GT),
    ("ge", e.GE),
):
    _compare(_op, _name)


def _logical(op: Op, target: Any) -> None:
    def lift(call: Call, x: Node, y: Node) -> Node:
        return elementwise_op(op, to(x, DType.BOOL), to(y, DType.BOOL))

    rule(target)(lift)


_logical(e.AND, aten.logical_and.default)
_logical(e.OR, aten.logical_or.default)
_logical(e.XOR, aten.logical_xor.default)


def _ignoring_nan(op: Op, target: Any) -> None:
    def lift(call: Call, x: Node, y: Node) -> Node:
        x, y = as_dtype(x, call.dtype), as_dtype(y, call.dtype)
        result = _arithmetic(op, x, y, call.dtype)
        if not call.dtype.is_float:
            return result
        other = b.where(elementwise_op(e.ISNAN, y), x, result)
        return b.where(elementwise_op(e.ISNAN, x), y, other)

    rule(target)(lift)


_ignoring_nan(e.MAXIMUM, aten.fmax.default)
_ignoring_nan(e.MINIMUM, aten.fmin.default)


@rule(aten.pow.Tensor_Scalar)
def _pow_scalar(call: Call, x: Node, exponent: Scalar) -> Node:
    if not call.dtype.is_float and exponent < 0:
        raise Decline("an integer to a negative power is an error")
    y = to(x, call.dtype.wide)
    exponent = nearest(exponent, call.dtype)
    result = _small_power(y, exponent)
    if result is None:
        result = elementwise_op(e.POW, y, as_dtype(exponent, call.dtype.wide))
    return to(result, call.dtype)


_SMALL_POWER: Final = 4
"""Up to here powers are so few products that these err by hardly more than the function."""


def _small_power(x: Node, exponent: Scalar) -> Node | None:
    """Return the products and roots that PyTorch uses for common exponents."""
    if exponent in (1, 2, 3):
        return _halves_power(x, exponent)
    if not x.tensor.dtype.is_float:
        return None
    roots: dict[float, Callable[[], Node]] = {
        0.5: lambda: b.sqrt(x),
        -0.5: lambda: b.div(1.0, b.sqrt(x)),
        -2.0: lambda: b.div(1.0, b.mul(x, x)),
    }
    if exponent in roots:
        return roots[exponent]()
    if exponent % 0.5 == 0 and 0 < abs(exponent) <= _SMALL_POWER:
        return _halves_power(x, exponent)
    return None


def _halves_power(x: Node, exponent: Scalar) -> Node:
    """Return products and a root instead of the power, which costs ten times as much."""
    base = x if exponent > 0 else b.div(1.0, x)
    result = base
    for _ in range(int(abs(exponent)) - 1):
        result = b.mul(result, base)
    if exponent % 1 == 0:
        return result
    root = b.sqrt(x)
    # roots of -0.0 are -0.0, powers of it are not negative
    result = b.abs_(b.mul(result, root) if exponent > 0 else b.div(result, root))
    return b.where(b.eq(x, -math.inf), math.inf if exponent > 0 else 0.0, result)


@rule(aten.pow.Tensor_Tensor, aten.pow.Scalar)
def _pow(call: Call, x: Operand, y: Operand) -> Node:
    return _arithmetic(e.POW, rounded(x, call.dtype), rounded(y, call.dtype), call.dtype)


# -- selection and clamping ----------------------------------------------------------------------


@rule(aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
def _where(call: Call, condition: Node, x: Operand, y: Operand) -> Node:
    return b.where(to(condition, DType.BOOL), rounded(x, call.dtype), rounded(y, call.dtype))


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(call: Call, x: Node, mask: Node, value: Operand) -> Node:
    return b.where(mask, rounded(value, call.dtype), x)


@rule(aten.clamp.default, aten.clamp.Tensor)
def _clamp(call: Call, x: Node, low: Operand | None = None, high: Operand | None = None) -> Node:
    result = to(x, call.dtype)
    if low is not None:
        result = b.maximum(result, rounded(low, call.dtype))
    return result if high is None else b.minimum(result, rounded(high, call.dtype))


@rule(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(call: Call, x: Node, low: Operand) -> Node:
    return _clamp(call, x, low, None)


@rule(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(call: Call, x: Node, high: Operand) -> Node:
    return _clamp(call, x, None, high)


@rule(aten.hardtanh.default)
def _hardtanh(call: Call, x: Node, low: Scalar, high: Scalar) -> Node:
    return _clamp(call, x, low, high)


# -- activations ---------------------------------------------------------------------------------


@rule(aten.relu.default)
def _relu(call: Call, x: Node) -> Node:
    return b.maximum(x, as_dtype(0, call.dtype))


@rule(aten.threshold.default)
def _threshold(call: Call, x: Node, limit: Scalar, value: Scalar) -> Node:
    inner = call.dtype.wide
    y = to(x, inner)
    below = b.le(y, as_dtype(limit, inner))
    return to(b.where(below, as_dtype(value, inner), y), call.dtype)


@rule(aten.leaky_relu.default)
def _leaky_relu(call: Call, x: Node, slope: Scalar) -> Node:
    return b.where(b.gt(x, 0.0), x, b.mul(x, float(slope)))


@rule(aten.rrelu.default)
def _rrelu(call: Call, x: Node, low: Scalar, high: Scalar, training: bool = False, *_: Any) -> Node:
    if training:
        raise Decline("random slopes")
    return _leaky_relu(call, x, (low + high) / 2)


@rule(aten.elu.default)
def _elu(call: Call, x: Node, alpha: Scalar, scale: Scalar, input_scale: Scalar) -> Node:
    y = to(x, call.dtype.wide)
    inner = y if input_scale == 1 else b.mul(y, float(input_scale))
    low = b.mul(elementwise_op(e.EXPM1, inner), float(alpha * scale))
    high = y if scale == 1 else b.mul(y, float(scale))
    return to(b.where(b.gt(y, 0.0), high, low), call.dtype)


@rule(aten.silu.default)
def _silu(call: Call, x: Node) -> Node:
    return make(composite.SILU, (x,))


@rule(aten.gelu.default)
def _gelu(call: Call, x: Node, approximate: str) -> Node:
    if approximate == "tanh":
        return make(composite.GELU, (x,), composite.GeluAttrs("tanh"))
    return make(composite.GELU, (x,), composite.GeluAttrs("none"))


# -- conversions ---------------------------------------------------------------------------------


@rule(aten._to_copy.default, torch.ops.prims.convert_element_type.default)
def _to_copy(call: Call, x: Node, *_: Any) -> Node:
    return converted(x, call.dtype)


@rule(
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
)
def _identity(call: Call, x: Node, *_: Any) -> Node:
    return x


@rule(aten.copy.default)
def _copy(call: Call, x: Node, source: Node, *_: Any) -> Node:
    return b.broadcast(converted(source, call.dtype), call.shape)
