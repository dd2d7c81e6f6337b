"""Divisions by what many elements share, as products: one division for all of them.

In and out: the outputs of a block graph, of the same meaning but for one rounding more (1 ulp instead of a half). A vector of
quotients takes some ten times as long as one of products. x / y becomes x * scale * (1 / (y * scale)),
where scale is a power of two for divisors whose inverse would overflow or lose bits, and else 1: no
quotient overflows, vanishes or turns into NaN that did not before. Divisors that are known to have an
inverse (the sum of a softmax, the root of a norm) need no scale: x * (1 / y). The square of a root, as a distance is
squared, is what the root is taken of, where that is known not to be negative.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from superopt.codegen.cpu.ranges import UNKNOWN, Range, range_of
from superopt.ir import build as b
from superopt.ir.node import Node, rebuild, rewrite
from superopt.ir.ops import elementwise, leaf
from superopt.ir.types import DType

_SHARED: Final = 4
"""Elements per divisor from which one division and two products each are cheaper."""
_LEAST: Final = 2.0**-126
_MOST: Final = 2.0**126
_SCALE: Final = 2.0**64


def shared_divisions(outputs: Sequence[Node]) -> tuple[Node, ...]:
    """Return the outputs with products for float32 divisions whose divisors repeat, and no squares of square roots."""
    ranges: dict[Node, Range] = {}

    def step(node: Node, inputs: tuple[Node, ...]) -> Node:
        fresh = rebuild(node, inputs)
        bounds = range_of(fresh, ranges)
        result = _squared_root(fresh, ranges) or _product(fresh, ranges)
        ranges[fresh] = bounds
        ranges.setdefault(result, bounds)
        return result

    return rewrite(outputs, step)


def _squared_root(node: Node, ranges: Mapping[Node, Range]) -> Node | None:
    if node.op is not elementwise.MUL or node.tensor.dtype is not DType.F32:
        return None
    root, other = node.inputs
    if root is not other or root.op is not elementwise.SQRT:
        return None
    (x,) = root.inputs
    return x if ranges.get(x, UNKNOWN)[0] >= 0 else None


def _product(node: Node, ranges: Mapping[Node, Range]) -> Node:
    if node.op is not elementwise.DIV or node.tensor.dtype is not DType.F32:
        return node
    x, y = node.inputs
    if y.tensor.elements * _SHARED > node.tensor.elements:
        return node
    if y.op is leaf.CONSTANT:
        value = float(y.attrs.value)
        usual = math.isfinite(value) and _LEAST <= abs(value) <= _MOST
        return b.mul(x, 1.0 / value) if usual else node
    least, most = ranges.get(y, UNKNOWN)
    if least >= _LEAST and most <= _MOST:
        return b.mul(x, b.div(1.0, y))
    size = b.abs_(y)
    unusual = b.where(b.gt(size, _MOST), 1.0 / _SCALE, 1.0)
    scale = b.where(b.lt(size, _LEAST), _SCALE, unusual)
    return b.mul(b.mul(x, scale), b.div(1.0, b.mul(y, scale)))
