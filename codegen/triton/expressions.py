"""Triton text of every elementwise op, and where the other ops are lowered.

In: a node and the text of its operands. Out: an expression. 16-bit floats are computed in float32 and
rounded once, as PyTorch does. Functions that Triton lacks come from the device's math library
(`libdevice`: CUDA's or ROCm's); Triton's interpreter has none, so the tests put numpy's in its place.
"""

import re
from collections.abc import Callable
from typing import Final

from superopt.ir.node import Node
from superopt.ir.ops import contraction, leaf, library, structural
from superopt.ir.ops import elementwise as e
from superopt.ir.ops.registry import OpKind, RuleTable, all_ops
from superopt.ir.types import DType

Rule = Callable[[Node, list[str]], str]

LOWER: Final[RuleTable[Rule | str]] = RuleTable("triton", "add it to codegen/triton/expressions.py")
"""Expressions of elementwise ops; for the other ops, where they are lowered."""

TYPES: Final = {
    DType.F64: "tl.float64",
    DType.F32: "tl.float32",
    DType.F16: "tl.float16",
    DType.BF16: "tl.bfloat16",
    DType.I64: "tl.int64",
    DType.I32: "tl.int32",
    DType.I16: "tl.int16",
    DType.I8: "tl.int8",
    DType.U8: "tl.uint8",
    DType.BOOL: "tl.int1",
}

_FUNCTIONS: Final = {
    "_max": """
def _max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "_min": """
def _min(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
""",
    "_mul": """
def _mul(a, b):
    return a * b
""",
    "_argmax": """
def _argmax(a, i, b, j):
    nan_first = (a != a) & ((b == b) | (i < j))
    first = tl.where((a != a) | (b != b), nan_first, (a > b) | ((a == b) & (i < j)))
    return tl.where(first, a, b), tl.where(first, i, j)
""",
    "_argmin": """
def _argmin(a, i, b, j):
    nan_first = (a != a) & ((b == b) | (i < j))
    first = tl.where((a != a) | (b != b), nan_first, (a < b) | ((a == b) & (i < j)))
    return tl.where(first, a, b), tl.where(first, i, j)
""",
    "_floor_remainder": """
def _floor_remainder(remainder, b):
    return tl.where((remainder != 0) & ((remainder < 0) != (b < 0)), remainder + b, remainder)
""",
    "_floor_divide": """
def _floor_divide(a, b):
    remainder = a % b
    below = (remainder != 0) & ((remainder < 0) != (b < 0))
    return a // b - below.to(a.dtype)
""",
    "_floor_divide_real": """
def _floor_divide_real(a, b):
    remainder = libdevice.fmod(a, b)
    quotient = (a - remainder) / b
    below = (remainder != 0) & ((remainder < 0) != (b < 0))
    quotient = tl.where(below, quotient - 1, quotient)
    whole = tl.floor(quotient)
    whole = tl.where(quotient - whole > 0.5, whole + 1, whole)
    return tl.where(b == 0, a / b, tl.where(quotient != 0, whole, a / b * 0))
""",
    "_power_integer": """
def _power_integer(base, exponent):
    odd = (exponent & 1) != 0
    result = tl.where(base == 1, base, tl.where(base == -1, tl.where(odd, base, -base), base * 0))
    result = tl.where(exponent < 0, result, base * 0 + 1)
    for _ in range(0, 63):
        use = (exponent > 0) & ((exponent & 1) != 0)
        result = tl.where(use, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result
""",
}

_REAL_FORMS: Final = {
    e.EXP: "tl.exp({0})",
    e.EXPM1: "libdevice.expm1({0})",
    e.LOG: "tl.log({0})",
    e.LOG1P: "libdevice.log1p({0})",
    e.LOG2: "libdevice.log2({0})",
    e.LOG10: "libdevice.log10({0})",
    e.SQRT: "tl.sqrt({0})",
    e.SIN: "tl.sin({0})",
    e.COS: "tl.cos({0})",
    e.TAN: "libdevice.tan({0})",
    e.ASIN: "libdevice.asin({0})",
    e.ACOS: "libdevice.acos({0})",
    e.ATAN: "libdevice.atan({0})",
    e.SINH: "libdevice.sinh({0})",
    e.COSH: "libdevice.cosh({0})",
    e.ASINH: "libdevice.asinh({0})",
    e.ACOSH: "libdevice.acosh({0})",
    e.ATANH: "libdevice.atanh({0})",
    e.TANH: "libdevice.tanh({0})",
    e.SIGMOID: "(1.0 / (1.0 + tl.exp(-{0})))",
    e.ERF: "tl.erf({0})",
    e.ERFINV: "libdevice.erfinv({0})",
    e.LGAMMA: "libdevice.lgamma({0})",
    e.FLOOR: "tl.floor({0})",
    e.CEIL: "tl.ceil({0})",
    e.ROUND: "libdevice.rint({0})",
    e.TRUNC: "libdevice.trunc({0})",
    e.DIV: "({0} / {1})",
    e.ATAN2: "libdevice.atan2({0}, {1})",
    e.COPYSIGN: "libdevice.copysign({0}, {1})",
}
_PLAIN_FORMS: Final = {
    e.NEG: "(-{0})",
    e.ABS: "tl.abs({0})",
    e.ISNAN: "({0} != {0})",
    e.ADD: "({0} + {1})",
    e.SUB: "({0} - {1})",
    e.MUL: "({0} * {1})",
    e.EQ: "({0} == {1})",
    e.NE: "({0} != {1})",
    e.LT: "({0} < {1})",
    e.LE: "({0} <= {1})",
    e.GT: "({0} > {1})",
    e.GE: "({0} >= {1})",
    e.AND: "({0} & {1})",
    e.OR: "({0} | {1})",
    e.XOR: "({0} ^ {1})",
    e.SHL: "({0} << {1})",
    e.SHR: "({0} >> {1})",
    e.WHERE: "tl.where({0}, {1}, {2})",
}
_BY_CLASS: Final = {
    e.ISINF: ('(tl.abs({0}) == float("inf"))', "({0} != {0})"),
    e.FMOD: ("libdevice.fmod({0}, {1})", "({0} % {1})"),
    e.TRUNCDIV: ("libdevice.trunc(tl.div_rn({0}, {1}))", "({0} // {1})"),
    e.FLOORDIV: ("_floor_divide_real({0}, {1})", "_floor_divide({0}, {1})"),
    e.REMAINDER: (
        "_floor_remainder(libdevice.fmod({0}, {1}), {1})",
        "_floor_remainder({0} % {1}, {1})",
    ),
}
_POWERS: Final = {
    1.0: "{0}",
    2.0: "({0} * {0})",
    3.0: "({0} * {0} * {0})",
    0.5: "tl.sqrt({0})",
    -1.0: "(1.0 / {0})",
    -2.0: "(1.0 / ({0} * {0}))",
    -0.5: "(1.0 / tl.sqrt({0}))",
}


def functions_of(text: str) -> str:
    """Return the definitions of the device functions that `text` names."""
    used = [d for n, d in _FUNCTIONS.items() if re.search(rf"\b{n}\b", text)]
    return "\n".join(f"\n@triton.jit{definition}" for definition in used)


def literal(value: float | int | bool, dtype: DType) -> str:
    """Return a constant as Triton reads it: plain numbers are float32 or an integer there."""
    if value != value or value in (float("inf"), float("-inf")):
        text = f'float("{value}")'
    else:
        text = f"({value!r})" if value < 0 else repr(value)
    return f"tl.full([], {text}, tl.float64)" if dtype is DType.F64 else text


def _formatted(form: str, node: Node, operands: list[str]) -> str:
    result = node.tensor.dtype
    if any(i.tensor.dtype.is_half for i in node.inputs):
        operands = [
            o if i.op is leaf.CONSTANT or not i.tensor.dtype.is_half else f"{o}.to(tl.float32)"
            for o, i in zip(operands, node.inputs, strict=True)
        ]
    text = form.format(*operands)
    # what is made of plain numbers alone has their type
    numbers = any(i.op is leaf.CONSTANT for i in node.inputs)
    if result.is_half or (numbers and result not in (DType.F32, DType.F64, DType.BOOL)):
        return f"({text}).to({TYPES[result]})"
    return text


@LOWER.register(*_REAL_FORMS)
def _real(node: Node, operands: list[str]) -> str:
    if node.tensor.dtype.is_integer:
        return operands[0]  # rounding an integer
    return _formatted(_REAL_FORMS[node.op], node, operands)


@LOWER.register(*_PLAIN_FORMS)
def _plain(node: Node, operands: list[str]) -> str:
    return _formatted(_PLAIN_FORMS[node.op], node, operands)


@LOWER.register(*_BY_CLASS)
def _by_class(node: Node, operands: list[str]) -> str:
    real, integer = _BY_CLASS[node.op]
    form = real if node.inputs[0].tensor.dtype.is_float else integer
    if node.tensor.dtype is DType.F64:
        form = form.replace("tl.div_rn({0}, {1})", "({0} / {1})")  # which is exact there
    return _formatted(form, node, operands)


@LOWER.register(e.SIGN)
def _sign(node: Node, operands: list[str]) -> str:
    kind = "tl.float32" if node.tensor.dtype.is_half else TYPES[node.tensor.dtype]
    return _formatted(f"(({{0}} > 0).to({kind}) - ({{0}} < 0).to({kind}))", node, operands)


@LOWER.register(e.NOT)
def _not(node: Node, operands: list[str]) -> str:
    return f"({operands[0]} == 0)" if node.tensor.dtype is DType.BOOL else f"(~{operands[0]})"


@LOWER.register(e.MAXIMUM, e.MINIMUM)
def _extreme(node: Node, operands: list[str]) -> str:
    greater = node.op is e.MAXIMUM
    if node.tensor.dtype is DType.BOOL:
        return f"({operands[0]} {'|' if greater else '&'} {operands[1]})"
    if node.tensor.dtype.is_float:
        return _formatted("_max({0}, {1})" if greater else "_min({0}, {1})", node, operands)
    return _formatted("tl.maximum({0}, {1})" if greater else "tl.minimum({0}, {1})", node, operands)


@LOWER.register(e.POW)
def _power(node: Node, operands: list[str]) -> str:
    if not node.tensor.dtype.is_float:
        wide = [
            f"tl.full([], {o}, {TYPES[node.tensor.dtype]})" if i.op is leaf.CONSTANT else o
            for o, i in zip(operands, node.inputs, strict=True)
        ]
        return _formatted("_power_integer(*tl.broadcast({0}, {1}))", node, wide)
    exponent = node.inputs[1]
    value = exponent.attrs.value if exponent.op is leaf.CONSTANT else None
    form = None if value is None else _POWERS.get(value)
    return _formatted(form or "libdevice.pow({0}, {1})", node, operands)


@LOWER.register(e.CAST)
def _cast(node: Node, operands: list[str]) -> str:
    to, of = node.tensor.dtype, node.inputs[0].tensor.dtype
    if to is DType.BOOL:
        wide = ".to(tl.float32)" if of.is_half else ""
        return f"({operands[0]}{wide} != 0)"
    # PyTorch goes through float32 between 16-bit floats and everything else
    through = DType.F32 not in (of, to) and (of.is_half or to.is_half)
    return f"{operands[0]}{'.to(tl.float32)' if through else ''}.to({TYPES[to]})"


LOWER.register(
    structural.RESHAPE,
    structural.BROADCAST,
    structural.PERMUTE,
    structural.SLICE,
    structural.CONCAT,
    structural.PAD,
    structural.FLIP,
    structural.GATHER,
)("moves of elements: codegen/triton/moves.py")
LOWER.register(
    contraction.MATMUL,
    contraction.REDUCE_SUM,
    contraction.REDUCE_MAX,
    contraction.REDUCE_MIN,
    contraction.REDUCE_PROD,
    contraction.ARGMAX,
    contraction.ARGMIN,
    contraction.SCAN,
)("on whole tiles: codegen/triton/lower.py")
LOWER.register(*(op for op in all_ops() if op.kind is OpKind.TILE))("codegen/triton/lower.py")
LOWER.register(leaf.INPUT, leaf.CONSTANT, leaf.IOTA)("codegen/triton/lower.py")
LOWER.register(library.THREAD)("inlined: codegen/tile_program.py")
LOWER.refuse("blocks of a batch have no common index; gather does what it does", structural.TAKE)
LOWER.refuse("kernels are not nested", library.CUSTOM)
LOWER.refuse("tiles have one value each", leaf.ITEM)
LOWER.refuse("expanded before lowering", *(o for o in all_ops() if o.kind is OpKind.COMPOSITE))
LOWER.refuse(
    "runs as a library kernel, not on tiles", *(o for o in all_ops() if o.kind is OpKind.LIBRARY)
)
