"""Elementwise primitives: operands of rank 0 or equal rank, broadcasting dims of size 1."""

from dataclasses import dataclass
from typing import Any, final

from superopt.ir.errors import GraphError
from superopt.ir.ops.registry import Op, OpKind, declare
from superopt.ir.ops.shapes import broadcast_shapes, elements, same_dtype, tensor
from superopt.ir.types import DType, TensorType, Type


@final
@dataclass(frozen=True, slots=True)
class CastAttrs:
    """Target element type of a cast (torch's conversion rules).

    `rounds`: the program itself asks for a rounding to 16-bit floats, which a kernel keeps. Other casts to them say
    how the result of an operator is stored: a kernel that does not store it may go on in float32.
    """

    dtype: DType
    rounds: bool = False


def _arithmetic(types: tuple[Type, ...], attrs: Any) -> Type:
    operands = [tensor(t) for t in types]
    return TensorType(broadcast_shapes([t.shape for t in operands]), same_dtype(operands))


def _float_only(types: tuple[Type, ...], attrs: Any) -> Type:
    result = tensor(_arithmetic(types, attrs))
    if not result.dtype.is_float:
        raise GraphError(f"needs a floating-point operand, got {result.dtype}; cast first")
    return result


def _comparison(types: tuple[Type, ...], attrs: Any) -> Type:
    return TensorType(tensor(_arithmetic(types, attrs)).shape, DType.BOOL)


def _predicate(types: tuple[Type, ...], attrs: Any) -> Type:
    return TensorType(tensor(types[0]).shape, DType.BOOL)


def _bitwise(types: tuple[Type, ...], attrs: Any) -> Type:
    result = tensor(_arithmetic(types, attrs))
    if result.dtype.is_float:
        raise GraphError(f"needs integer or bool operands, got {result.dtype}")
    return result


def _select(types: tuple[Type, ...], attrs: Any) -> Type:
    condition, yes, no = (tensor(t) for t in types)
    if condition.dtype is not DType.BOOL:
        raise GraphError(f"the condition must be bool, got {condition.dtype}")
    shape = broadcast_shapes([condition.shape, yes.shape, no.shape])
    return TensorType(shape, same_dtype([yes, no]))


def _cast(types: tuple[Type, ...], attrs: CastAttrs) -> Type:
    if attrs.rounds and not attrs.dtype.is_half:
        raise GraphError(f"only a cast to 16-bit floats rounds, this one goes to {attrs.dtype}")
    return TensorType(tensor(types[0]).shape, attrs.dtype)


def _count(types: tuple[Type, ...], result: Type) -> int:
    return elements(result)


def _unary(name: str, meaning: str, rule: Any = _float_only, linear: bool = False) -> Op:
    linear_in = frozenset({0}) if linear else frozenset()
    op = Op(name, OpKind.ELEMENTWISE, 1, None, rule, meaning, flops=_count, linear_in=linear_in)
    return declare(op)


def _binary(
    name: str,
    meaning: str,
    rule: Any = _arithmetic,
    *,
    laws: bool = False,
    linear: tuple[int, ...] = (),
) -> Op:
    op = Op(
        name,
        OpKind.ELEMENTWISE,
        2,
        None,
        rule,
        meaning,
        commutative=laws,
        associative=laws,
        linear_in=frozenset(linear),
        flops=_count,
    )
    return declare(op)


NEG = _unary("neg", "torch.neg", _arithmetic, linear=True)
ABS = _unary("abs", "torch.abs", _arithmetic)
SIGN = _unary("sign", "torch.sign", _arithmetic)
FLOOR = _unary("floor", "torch.floor")
CEIL = _unary("ceil", "torch.ceil")
ROUND = _unary("round", "torch.round (half to even)")
TRUNC = _unary("trunc", "torch.trunc")
EXP = _unary("exp", "torch.exp")
EXPM1 = _unary("expm1", "torch.expm1")
LOG = _unary("log", "torch.log")
LOG1P = _unary("log1p", "torch.log1p")
LOG2 = _unary("log2", "torch.log2 (exact for powers of 2)")
LOG10 = _unary("log10", "torch.log10 (exact for powers of 10)")
SQRT = _unary("sqrt", "torch.sqrt")
SIN = _unary("sin", "torch.sin")
COS = _unary("cos", "torch.cos")
TAN = _unary("tan", "torch.tan")
ASIN = _unary("asin", "torch.asin")
ACOS = _unary("acos", "torch.acos")
ATAN = _unary("atan", "torch.atan")
SINH = _unary("sinh", "torch.sinh")
COSH = _unary("cosh", "torch.cosh")
ASINH = _unary("asinh", "torch.asinh")
ACOSH = _unary("acosh", "torch.acosh")
ATANH = _unary("atanh", "torch.atanh")
TANH = _unary("tanh", "torch.tanh")
SIGMOID = _unary("sigmoid", "torch.sigmoid: 1 / (1 + exp(-x))")
ERF = _unary("erf", "torch.erf")
ERFINV = _unary("erfinv", "torch.erfinv")
LGAMMA = _unary("lgamma", "torch.lgamma")
ISNAN = _unary("isnan", "torch.isnan", _predicate)
ISINF = _unary("isinf", "torch.isinf", _predicate)
NOT = _unary("not", "torch.bitwise_not; logical_not on bool", _bitwise)

ADD = _binary("add", "torch.add", laws=True)
SUB = _binary("sub", "torch.sub")
MUL = _binary("mul", "torch.mul", laws=True, linear=(0, 1))
DIV = _binary("div", "torch.div (true division)", _float_only, linear=(0,))
FLOORDIV = _binary("floordiv", "torch.div(rounding_mode='floor')")
TRUNCDIV = _binary("truncdiv", "torch.div(rounding_mode='trunc')")
REMAINDER = _binary("remainder", "torch.remainder (sign of the divisor)")
FMOD = _binary("fmod", "torch.fmod (sign of the dividend)")
POW = _binary("pow", "torch.pow")
ATAN2 = _binary("atan2", "torch.atan2", _float_only)
COPYSIGN = _binary("copysign", "torch.copysign", _float_only)
MAXIMUM = _binary("maximum", "torch.maximum (NaN propagates)", laws=True)
MINIMUM = _binary("minimum", "torch.minimum (NaN propagates)", laws=True)
EQ = _binary("eq", "torch.eq", _comparison)
NE = _binary("ne", "torch.ne", _comparison)
LT = _binary("lt", "torch.lt", _comparison)
LE = _binary("le", "torch.le", _comparison)
GT = _binary("gt", "torch.gt", _comparison)
GE = _binary("ge", "torch.ge", _comparison)
COMPARISONS = (EQ, NE, LT, LE, GT, GE)
AND = _binary("and", "torch.bitwise_and", _bitwise, laws=True)
OR = _binary("or", "torch.bitwise_or", _bitwise, laws=True)
XOR = _binary("xor", "torch.bitwise_xor", _bitwise, laws=True)
SHL = _binary("shl", "torch.bitwise_left_shift", _bitwise)
SHR = _binary("shr", "torch.bitwise_right_shift", _bitwise)

WHERE = declare(
    Op(
        "where",
        OpKind.ELEMENTWISE,
        3,
        None,
        _select,
        "torch.where(condition, x, y)",
        linear_in=frozenset(),
        flops=_count,
    )
)
CAST = declare(
    Op("cast", OpKind.ELEMENTWISE, 1, CastAttrs, _cast, "tensor.to(dtype)", flops=_count)
)
