"""C++ for each op: the `LOWER` table, and what a value of a type looks like in a kernel.

In: the C++ text of an op's operands. Out: the text of its result, over scalars or over vectors: the
runtime headers overload their functions for both, so most rules do not ask. 16-bit floats are
computed in float and rounded after every op, as the op on that type means.

Ops that are not elementwise have a word in the table instead of a rule: which part of the lowering
makes them.
"""

import math
from collections.abc import Callable, Mapping
from typing import Final

from superopt.codegen.cpu.ranges import UNKNOWN, Range
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, library, structural, tile
from superopt.ir.ops.registry import OpKind, RuleTable, all_ops
from superopt.ir.types import DType

Expression = Callable[[list[str], Node, bool], str]
"""(operands, node, vector) -> the result's text."""

LOWER: Final[RuleTable[Expression | str]] = RuleTable(
    "C++ lowering", "register an expression in codegen/cpu/expressions.py"
)
ELEMENT: Final = {
    DType.F64: "double",
    DType.F32: "float",
    DType.F16: "so::f16",
    DType.BF16: "so::bf16",
    DType.I64: "int64_t",
    DType.I32: "int32_t",
    DType.I16: "int16_t",
    DType.I8: "int8_t",
    DType.U8: "uint8_t",
    DType.BOOL: "bool",
}
"""What stands in memory."""
# These have a rule for scalars only, or a vector form that is right for floats only.
_SCALAR_INTEGER: Final = (
    elementwise.POW,
    elementwise.FLOORDIV,
    elementwise.TRUNCDIV,
    elementwise.REMAINDER,
    elementwise.FMOD,
    elementwise.SHL,
    elementwise.SHR,
    elementwise.SIGN,
)
_OVER_RANGE: Final = {
    elementwise.EXP: ("exp_nonpositive", -math.inf, 0.0),
    elementwise.LOG1P: ("log1p_unit", 0.0, 1.0),
}
"""Vector functions that need their operand to be between two bounds."""


def scalar_type(dtype: DType) -> str:
    """Return the C++ type in which scalars of `dtype` are computed and kept in scratch."""
    return "float" if dtype.is_half else ELEMENT[dtype]


def vector_type(dtype: DType) -> str:
    """Return the vector type for `dtype`: floats, or integers and masks."""
    return "vf" if dtype.is_float else "vi"


def literal(value: float | bool, dtype: DType) -> str:
    """Return a scalar constant of `dtype` as C++ text, exact."""
    if dtype is DType.BOOL:
        return "true" if value else "false"
    if not dtype.is_float:
        return f"{ELEMENT[dtype]}({int(value)}LL)" if value != -(2**63) else "INT64_MIN"
    suffix = "" if dtype is DType.F64 else "f"
    if math.isnan(value):
        return f'__builtin_nan{suffix}("")'
    if math.isinf(value):
        return f"{'-' if value < 0 else ''}__builtin_inf{suffix}()"
    if dtype is DType.F64:
        return f"{value!r}"
    text = f"{value!r}f" if abs(value) < 1e15 and abs(value) > 1e-4 else f"{value:.17g}"
    return f"static_cast<float>({value!r})" if "e" in text or value == 0.0 else text


def can_be_vector(node: Node, *, small: bool) -> bool:
    """Say whether an elementwise op has a vector form; `small`: its integers fit in 32 bits."""
    dtypes = {node.tensor.dtype, *(i.tensor.dtype for i in node.inputs)}
    if DType.F64 in dtypes or any(d.is_complex for d in dtypes):
        return False
    integers = [d for d in dtypes if d.is_integer]
    if not integers:
        return True
    if node.op is elementwise.CAST and node.inputs[0].tensor.dtype.is_float:
        return False
    return small and node.op not in _SCALAR_INTEGER


def _infix(symbol: str) -> Expression:
    def rule(args: list[str], node: Node, vector: bool) -> str:
        return _rounded(f"{args[0]} {symbol} {args[1]}", node, vector)

    return rule


def _call(name: str) -> Expression:
    def rule(args: list[str], node: Node, vector: bool) -> str:
        return _rounded(f"so::{name}({', '.join(args)})", node, vector)

    return rule


def _call_one(name: str) -> Expression:
    """Functions with a fast vector form: in scalar code one lane of it."""

    def rule(args: list[str], node: Node, vector: bool) -> str:
        suffix = "" if vector else "_one"
        return _rounded(f"so::{name}{suffix}({args[0]})", node, vector)

    return rule


def _rounded(text: str, node: Node, vector: bool) -> str:
    dtype = node.tensor.dtype
    if dtype.is_half:
        return f"so::round_to<{ELEMENT[dtype]}>({text})"
    if dtype.is_integer and not vector and dtype not in (DType.I64, DType.I32):
        return f"static_cast<{ELEMENT[dtype]}>({text})"
    return text


for _op, _symbol in (
    (elementwise.ADD, "+"),
    (elementwise.SUB, "-"),
    (elementwise.MUL, "*"),
    (elementwise.DIV, "/"),
):
    LOWER.register(_op)(_infix(_symbol))
for _op, _name in (
    (elementwise.ABS, "abs"),
    (elementwise.FLOOR, "floor"),
    (elementwise.CEIL, "ceil"),
    (elementwise.ROUND, "round"),
    (elementwise.TRUNC, "trunc"),
    (elementwise.SQRT, "sqrt"),
    (elementwise.SIN, "sin"),
    (elementwise.COS, "cos"),
    (elementwise.TAN, "tan"),
    (elementwise.ASIN, "asin"),
    (elementwise.ACOS, "acos"),
    (elementwise.ATAN, "atan"),
    (elementwise.SINH, "sinh"),
    (elementwise.COSH, "cosh"),
    (elementwise.ASINH, "asinh"),
    (elementwise.ACOSH, "acosh"),
    (elementwise.ATANH, "atanh"),
    (elementwise.ERFINV, "erfinv"),
    (elementwise.LGAMMA, "lgamma"),
    (elementwise.ATAN2, "atan2"),
    (elementwise.COPYSIGN, "copysign"),
):
    LOWER.register(_op)(_call(_name))
for _op, _name in (
    (elementwise.EXP, "exp"),
    (elementwise.EXPM1, "expm1"),
    (elementwise.LOG, "log"),
    (elementwise.LOG1P, "log1p"),
    (elementwise.LOG2, "log2"),
    (elementwise.LOG10, "log10"),
    (elementwise.TANH, "tanh"),
    (elementwise.SIGMOID, "sigmoid"),
    (elementwise.ERF, "erf"),
):
    LOWER.register(_op)(_call_one(_name))


def over_range(args: list[str], node: Node, ranges: Mapping[Node, Range]) -> str | None:
    """Return a function of vectors that is cheaper where its operand stays within known bounds, if there is one."""
    if node.op not in _OVER_RANGE:
        return None
    name, least, most = _OVER_RANGE[node.op]
    low, high = ranges.get(node.inputs[0], UNKNOWN)
    return _rounded(f"so::{name}({args[0]})", node, True) if least <= low and high <= most else None


@LOWER.register(elementwise.NEG)
def _neg(args: list[str], node: Node, vector: bool) -> str:
    return _rounded(f"-({args[0]})", node, vector)  # of a literal: --1.0 is another operator


@LOWER.register(elementwise.SIGN)
def _sign(args: list[str], node: Node, vector: bool) -> str:
    if node.tensor.dtype.is_float:
        return f"so::sign({args[0]})"
    return f"static_cast<{ELEMENT[node.tensor.dtype]}>(({args[0]} > 0) - ({args[0]} < 0))"


@LOWER.register(elementwise.ISNAN)
def _isnan(args: list[str], node: Node, vector: bool) -> str:
    return f"({args[0]} != {args[0]})"


@LOWER.register(elementwise.ISINF)
def _isinf(args: list[str], node: Node, vector: bool) -> str:
    dtype = node.inputs[0].tensor.dtype
    if not dtype.is_float:
        return f"({args[0]} != {args[0]})"
    infinity = "__builtin_inf()" if dtype is DType.F64 else "__builtin_inff()"
    return f"so::abs({args[0]}) == {infinity}"


@LOWER.register(elementwise.NOT)
def _not(args: list[str], node: Node, vector: bool) -> str:
    if node.tensor.dtype is DType.BOOL:
        return f"so::mask_not({args[0]})"
    return _rounded(f"~{args[0]}", node, vector)


def _extreme(name: str, symbol: str) -> Expression:
    def rule(args: list[str], node: Node, vector: bool) -> str:
        if node.tensor.dtype.is_float:
            return f"so::{name}({args[0]}, {args[1]})"
        if node.tensor.dtype is DType.BOOL:
            return f"so::mask_{'or' if name == 'max' else 'and'}({args[0]}, {args[1]})"
        if vector:
            return f"so::{name}_integers({args[0]}, {args[1]})"
        return f"({args[0]} {symbol} {args[1]} ? {args[0]} : {args[1]})"

    return rule


LOWER.register(elementwise.MAXIMUM)(_extreme("max", ">"))
LOWER.register(elementwise.MINIMUM)(_extreme("min", "<"))


def _comparison(symbol: str) -> Expression:
    def rule(args: list[str], node: Node, vector: bool) -> str:
        if vector and node.inputs[0].tensor.dtype is DType.BOOL:
            # masks are 0 and -1: their order as integers is the opposite of that of bools
            return f"({args[1]} {symbol} {args[0]})"
        return f"({args[0]} {symbol} {args[1]})"

    return rule


for _op, _symbol in (
    (elementwise.EQ, "=="),
    (elementwise.NE, "!="),
    (elementwise.LT, "<"),
    (elementwise.LE, "<="),
    (elementwise.GT, ">"),
    (elementwise.GE, ">="),
):
    LOWER.register(_op)(_comparison(_symbol))


def _bitwise(symbol: str) -> Expression:
    def rule(args: list[str], node: Node, vector: bool) -> str:
        text = f"({args[0]} {symbol} {args[1]})"
        if node.tensor.dtype is DType.BOOL and not vector:
            return f"static_cast<bool>{text}"
        return _rounded(text, node, vector)

    return rule


for _op, _symbol in (
    (elementwise.AND, "&"),
    (elementwise.OR, "|"),
    (elementwise.XOR, "^"),
    (elementwise.SHL, "<<"),
    (elementwise.SHR, ">>"),
):
    LOWER.register(_op)(_bitwise(_symbol))


def _by_class(real: str, integer: str) -> Expression:
    def rule(args: list[str], node: Node, vector: bool) -> str:
        name = real if node.tensor.dtype.is_float else integer
        text = name.replace("$0", args[0]).replace("$1", args[1])
        return _rounded(text, node, vector)

    return rule


LOWER.register(elementwise.POW)(_by_class("so::pow($0, $1)", "so::power_integer($0, $1)"))
LOWER.register(elementwise.FMOD)(_by_class("so::fmod($0, $1)", "$0 % $1"))
LOWER.register(elementwise.TRUNCDIV)(_by_class("so::trunc($0 / $1)", "$0 / $1"))
LOWER.register(elementwise.REMAINDER)(
    _by_class("so::remainder($0, $1)", "so::floor_modulo($0, $1)")
)
LOWER.register(elementwise.FLOORDIV)(
    _by_class("so::floor_divide_real($0, $1)", "so::floor_divide($0, $1)")
)


@LOWER.register(elementwise.WHERE)
def _where(args: list[str], node: Node, vector: bool) -> str:
    if vector and node.tensor.dtype is DType.BOOL:
        return f"(({args[0]} & {args[1]}) | (~{args[0]} & {args[2]}))"
    if not vector:
        return f"({args[0]} ? {args[1]} : {args[2]})"
    return f"so::select({args[0]}, {args[1]}, {args[2]})"


def _was_float(node: Node) -> bool:
    """Say whether an integer is a float that was converted, and since then moved or widened."""
    while node.tensor.dtype.is_integer:
        if node.op is not elementwise.CAST and node.op.kind is not OpKind.STRUCTURAL:
            return False
        node = node.inputs[0]
    return node.tensor.dtype.is_float


@LOWER.register(elementwise.CAST)
def _cast(args: list[str], node: Node, vector: bool) -> str:
    before, after = node.inputs[0].tensor.dtype, node.tensor.dtype
    if after is DType.BOOL:
        zero = "0.0f" if before.is_float else "0"
        return args[0] if before is DType.BOOL else f"({args[0]} != {zero})"
    if not vector:
        if before.is_float and after.is_integer:
            # as PyTorch: NaN and what does not fit become the smallest integer of the instruction's type
            through = "int64_t" if after in (DType.I64, DType.U8) else "int32_t"
            wide = f"static_cast<{through}>({args[0]})"
            return f"static_cast<{ELEMENT[after]}>({wide})"
        text = args[0]
        if before.is_integer and after.is_float and _was_float(node.inputs[0]):
            text = f"so::unrelated({text})"
        text = f"static_cast<{scalar_type(after)}>({text})"
    elif after.is_float:
        if before is DType.BOOL:
            return f"so::mask_value({args[0]})"
        text = args[0] if before.is_float else f"so::to_float({args[0]})"
    else:
        return f"({args[0]} & 1)" if before is DType.BOOL else args[0]
    return _rounded(text, node, vector)


for _op in (leaf.CONSTANT, leaf.IOTA, tile.TILE_INDEX, structural.BROADCAST, structural.PERMUTE):
    LOWER.register(_op)("read in place: codegen/cpu/environment.py")
for _op in (structural.SLICE, structural.FLIP, structural.GATHER):
    LOWER.register(_op)("read in place: codegen/cpu/environment.py")
for _op in (structural.RESHAPE, structural.CONCAT, structural.PAD):
    LOWER.register(_op)("read in place or copied: codegen/cpu/environment.py")
for _op in (leaf.INPUT, leaf.ITEM, tile.LOAD, tile.STORE):
    LOWER.register(_op)("memory access: codegen/cpu/lower.py")
for _op in all_ops():
    if _op.kind is OpKind.TILE and _op not in LOWER:
        LOWER.register(_op)("state of a loop: codegen/cpu/lower.py")
LOWER.register(
    contraction.REDUCE_SUM,
    contraction.REDUCE_MAX,
    contraction.REDUCE_MIN,
    contraction.REDUCE_PROD,
    contraction.ARGMAX,
    contraction.ARGMIN,
    contraction.SCAN,
)("fused loop: codegen/cpu/fused.py")
LOWER.register(contraction.MATMUL)("tile product: codegen/cpu/contraction.py")
LOWER.refuse("the library's: its index has dims of its own; gather is lowered", structural.TAKE)
LOWER.refuse("expanded to elementwise ops before lowering", library.THREAD)
for _op in all_ops():
    known = _op in LOWER or _op in LOWER.unsupported
    if _op.kind in (OpKind.LIBRARY, OpKind.COMPOSITE, OpKind.GRAPH) and not known:
        LOWER.refuse("not a primitive on tiles", _op)
