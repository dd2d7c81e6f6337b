"""Between which bounds the values of a block graph lie, as far as a look at their operations tells.

In: nodes, operands before what reads them. Out: least and greatest finite value of each; infinities and
NaN may come on top. Bounds are rounded as results are, which keeps their order; functions and sums may be off by
an error of their own.
"""

import math
import struct
from collections.abc import Callable, Mapping
from typing import Final

from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import Op
from superopt.ir.types import DType

Range = tuple[float, float]
UNKNOWN: Final[Range] = (-math.inf, math.inf)
_LEAST: Final = 2.0**-126
_GREATEST: Final = (2.0 - 2.0**-23) * 2.0**127
_WIDE: Final = (DType.F32, DType.BF16)
_KEEPING: Final = frozenset(
    {
        structural.BROADCAST,
        structural.RESHAPE,
        structural.PERMUTE,
        structural.SLICE,
        contraction.REDUCE_MAX,
        contraction.REDUCE_MIN,
    }
)


def range_of(node: Node, ranges: Mapping[Node, Range]) -> Range:
    """Return the bounds of one value, given those of its operands."""
    if node.tensor.dtype not in _WIDE:
        return UNKNOWN
    bounds = _range(node, [ranges.get(i, UNKNOWN) for i in node.inputs])
    low, high = (_rounded(bound, node.tensor.dtype) for bound in bounds)
    # what is smaller than a normal number may have become 0
    low = 0.0 if 0.0 < low < _LEAST else max(low, -_GREATEST)
    high = 0.0 if -_LEAST < high < 0.0 else min(high, _GREATEST)
    return low, high


def unscaled(node: Node) -> tuple[Node, float]:
    """Return x and c > 0 for x * c, or the value itself and 1."""
    if node.op is elementwise.MUL:
        for x, by in (node.inputs, node.inputs[::-1]):
            if by.op is leaf.CONSTANT and 0 < float(by.attrs.value) < math.inf:
                return x, float(by.attrs.value)
    return node, 1.0


def maximum_of(node: Node) -> Node | None:
    """Return max(x), over some axes, of x - max(x): that is at most 0, or NaN.

    The maximum may be a running one, and 0 where it is -inf. The difference may be multiplied by a positive number.
    """
    node = unscaled(node)[0]
    if node.op is not elementwise.SUB:
        return None
    x, by = node.inputs
    while by.op is not contraction.REDUCE_MAX:
        if by.op is elementwise.WHERE:
            test, kept, other = by.inputs
            low = test.op is elementwise.GT and test.inputs[0] is kept
            if not (low and _is(test.inputs[1], -math.inf) and _is(other, 0.0)):
                return None
            by = kept
        elif by.op in (structural.BROADCAST, tile.PREFIX_MAX):
            by = by.inputs[0]
        else:
            return None
    return by if by.inputs[0] is x else None


def _range(node: Node, inputs: list[Range]) -> Range:
    if node.op is leaf.CONSTANT:
        value = float(node.attrs.value)
        return (value, value) if math.isfinite(value) else UNKNOWN
    if node.op in _KEEPING or (
        node.op is elementwise.CAST and node.inputs[0].tensor.dtype in _WIDE
    ):
        return inputs[0]
    rule = _RULES.get(node.op)
    return UNKNOWN if rule is None else rule(node, inputs)


def _rounded(value: float, dtype: DType) -> float:
    """Return the nearest value of a type; the even one of two."""
    value = min(max(value, -_GREATEST), _GREATEST)
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    if dtype is DType.BF16:
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    (rounded,) = struct.unpack("<f", struct.pack("<I", bits))
    return float(rounded)


def _is(node: Node, value: float) -> bool:
    return node.op is leaf.CONSTANT and float(node.attrs.value) == value


def _sum(node: Node, inputs: list[Range]) -> Range:
    ((low, high),) = inputs
    if low < 0:
        return UNKNOWN
    (term,) = node.inputs
    below = unscaled(term.inputs[0])[0] if term.op is elementwise.EXP else None
    if below is not None and below.op is elementwise.SUB:
        x, by = below.inputs
        # exp(x - max(x)) is 1 where x is largest
        if by.op is contraction.REDUCE_MAX and by.inputs[0] is x and by.attrs == node.attrs:
            low = 1.0
    return low, high * (term.tensor.elements // max(node.tensor.elements, 1))


def _sub(node: Node, inputs: list[Range]) -> Range:
    (a, b), (c, d) = inputs
    return a - d, b - c if maximum_of(node) is None else 0.0


def _mul(node: Node, inputs: list[Range]) -> Range:
    (a, b), (c, d) = inputs
    corners = [0.0 if 0.0 in (x, y) else x * y for x in (a, b) for y in (c, d)]
    low = max(0.0, min(corners)) if node.inputs[0] is node.inputs[1] else min(corners)
    return low, max(corners)


def _div(_: Node, inputs: list[Range]) -> Range:
    (a, b), (c, d) = inputs
    if c <= 0 <= d:
        return UNKNOWN
    corners = [x / y for x in (a, b) for y in (c, d)]
    return min(corners), max(corners)


def _abs(_: Node, inputs: list[Range]) -> Range:
    ((low, high),) = inputs
    least = 0.0 if low <= 0.0 <= high else min(abs(low), abs(high))
    return least, max(abs(low), abs(high))


def _exp(_: Node, inputs: list[Range]) -> Range:
    low, high = (math.exp(min(value, 700.0)) for value in inputs[0])
    return low, high


def _sqrt(_: Node, inputs: list[Range]) -> Range:
    low, high = (math.sqrt(max(value, 0.0)) for value in inputs[0])
    return low, high


_RULES: Final[dict[Op, Callable[[Node, list[Range]], Range]]] = {
    contraction.REDUCE_SUM: _sum,
    elementwise.ADD: lambda _, r: (r[0][0] + r[1][0], r[0][1] + r[1][1]),
    elementwise.SUB: _sub,
    elementwise.MUL: _mul,
    elementwise.DIV: _div,
    elementwise.MAXIMUM: lambda _, r: (max(r[0][0], r[1][0]), max(r[0][1], r[1][1])),
    elementwise.MINIMUM: lambda _, r: (min(r[0][0], r[1][0]), min(r[0][1], r[1][1])),
    elementwise.NEG: lambda _, r: (-r[0][1], -r[0][0]),
    elementwise.SIGMOID: lambda _, r: (0.0, 1.0),
    elementwise.ABS: _abs,
    elementwise.EXP: _exp,
    elementwise.SQRT: _sqrt,
}
