"""Triton text of every elementwise op, or the written reason why there is none.

In: a node and the text of its operands. Out: an expression that Triton compiles and that its
interpreter runs. Functions that exist only in libdevice are refused: the interpreter cannot run
them, so a rule for them could not be tested.
"""

from collections.abc import Callable
from typing import Final

from superopt.codegen.errors import CodegenError
from superopt.ir.node import Node
from superopt.ir.ops import elementwise as e
from superopt.ir.ops import leaf
from superopt.ir.ops.registry import Op, OpKind, RuleTable, all_ops
from superopt.ir.types import DType

Rule = Callable[[Node, list[str]], str]

LOWER: Final[RuleTable[Rule]] = RuleTable("triton", "add it to codegen/triton/expressions.py")

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

# x - x³/3 + … keeps relative accuracy where (1 - t) / (1 + t) would cancel
_TANH = (
    "tl.where(tl.abs({0}) < 0.1, {0} * (1.0 + {0} * {0} * (-1.0 / 3 + {0} * {0} * (2.0 / 15 "
    "+ {0} * {0} * (-17.0 / 315 + {0} * {0} * (62.0 / 2835))))), "
    "tl.where({0} < 0, -1.0, 1.0) * (1.0 - tl.exp(-2.0 * tl.abs({0}))) "
    "/ (1.0 + tl.exp(-2.0 * tl.abs({0}))))"
)
_FLOAT_FORMS = {
    e.EXP: "tl.exp({0})",
    e.LOG: "tl.log({0})",
    e.SQRT: "tl.sqrt({0})",
    e.SIN: "tl.sin({0})",
    e.COS: "tl.cos({0})",
    e.ERF: "tl.erf({0})",
    e.SIGMOID: "(1.0 / (1.0 + tl.exp(-{0})))",
    e.TANH: _TANH,
    e.FLOOR: "tl.floor({0})",
    e.CEIL: "tl.ceil({0})",
    e.TRUNC: "tl.where({0} < 0, tl.ceil({0}), tl.floor({0}))",
    e.DIV: "({0} / {1})",
}
_PLAIN_FORMS = {
    e.NEG: "(-{0})",
    e.ABS: "tl.abs({0})",
    e.ISNAN: "({0} != {0})",
    e.ISINF: '(tl.abs({0}) == float("inf"))',
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


def literal(value: float | int | bool) -> str:
    """Return a constant as Triton reads it."""
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return f'float("{value}")'
    return repr(value)


@LOWER.register(*_FLOAT_FORMS)
def _float(node: Node, operands: list[str]) -> str:
    form = _FLOAT_FORMS[node.op]
    dtype = node.tensor.dtype
    if dtype.is_integer:
        return operands[0]
    if dtype in (DType.F16, DType.BF16):
        # Triton's functions take float32 and float64
        wide = [
            o if n.op is leaf.CONSTANT else f"{o}.to(tl.float32)"
            for o, n in zip(operands, node.inputs, strict=True)
        ]
        return f"({form.format(*wide)}).to({TYPES[dtype]})"
    return form.format(*operands)


@LOWER.register(*_PLAIN_FORMS)
def _plain(node: Node, operands: list[str]) -> str:
    return _PLAIN_FORMS[node.op].format(*operands)


@LOWER.register(e.NOT)
def _not(node: Node, operands: list[str]) -> str:
    return f"({operands[0]} == 0)" if node.tensor.dtype is DType.BOOL else f"(~{operands[0]})"


@LOWER.register(e.MAXIMUM, e.MINIMUM)
def _extreme(node: Node, operands: list[str]) -> str:
    name = node.op.name
    if node.tensor.dtype is DType.BOOL:
        return f"({operands[0]} {'|' if name == 'maximum' else '&'} {operands[1]})"
    keep = ", propagate_nan=tl.PropagateNan.ALL" if node.tensor.dtype.is_float else ""
    return f"tl.{name}({operands[0]}, {operands[1]}{keep})"


@LOWER.register(e.POW)
def _power(node: Node, operands: list[str]) -> str:
    x, exponent = operands[0], node.inputs[1]
    value = exponent.attrs.value if exponent.op is leaf.CONSTANT else None
    if value in (1, 2, 3, 4):
        return f"({' * '.join([x] * int(value))})"
    raise CodegenError("pow: only constant exponents 1 to 4 have a Triton form")


@LOWER.register(e.CAST)
def _cast(node: Node, operands: list[str]) -> str:
    if node.tensor.dtype is DType.BOOL:
        return f"({operands[0]} != 0)"
    return f"{operands[0]}.to({TYPES[node.tensor.dtype]})"


def _refuse_the_rest() -> None:
    library_only: list[Op] = []
    for op in all_ops():
        if op in LOWER or op.kind is not OpKind.ELEMENTWISE:
            continue
        library_only.append(op)
    reason = "no form that runs both on the device and in Triton's interpreter"
    LOWER.refuse(reason, *library_only)


_refuse_the_rest()
