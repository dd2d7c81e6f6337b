"""Numbers by which values are multiplied, taken behind their maxima and what these are taken off.

In and out: the roots of a block graph, of the same meaning. exp(x * c - max(x * c)) becomes
exp((x - max(x)) * c) for a positive number c: the pass that finds maxima multiplies nothing, and the exponential's
own factor and c are one. What is rounded is the difference, not the terms of it.
"""

import math
from collections.abc import Sequence
from typing import Final

from superopt.codegen.cpu.ranges import unscaled
from superopt.ir import build as b
from superopt.ir.node import Node, make, rebuild, rewrite
from superopt.ir.ops import contraction, elementwise, leaf, tile
from superopt.ir.types import DType

_MAXIMA: Final = (contraction.REDUCE_MAX, tile.PREFIX_MAX, tile.ACCUM_LAST)
_WHATEVER_SCALE: Final = (0.0, math.inf, -math.inf)
_LEAST: Final = 2.0**-126
_GREATEST: Final = (2.0 - 2.0**-23) * 2.0**127


def scales_behind_maxima(roots: Sequence[Node]) -> tuple[Node, ...]:
    """Return the roots with positive float32 factors behind maxima, masks and differences."""
    return rewrite(roots, _step)


def _step(node: Node, inputs: tuple[Node, ...]) -> Node:
    fresh = rebuild(node, inputs)
    if node.op is tile.ACCUM_RESCALED:
        shift, factor = unscaled(inputs[1])
        if factor == 1.0:
            return fresh
        power = factor * node.attrs.power
        return make(node.op, (inputs[0], shift), tile.RescaleAttrs(node.attrs.loop, power))
    if not inputs or inputs[-1].tensor.dtype is not DType.F32:
        return fresh
    if node.op is elementwise.GT:
        x, factor = unscaled(inputs[0])
        return b.gt(x, inputs[1]) if factor != 1.0 and _is(inputs[1], *_WHATEVER_SCALE) else fresh
    if node.op in _MAXIMA:
        x, factor = unscaled(inputs[0])
        return fresh if factor == 1.0 else b.mul(rebuild(node, (x,)), factor)
    if node.op is elementwise.SUB:
        (x, factor), (y, other) = map(unscaled, inputs)
        return fresh if not factor == other != 1.0 else b.mul(b.sub(x, y), factor)
    return _choice(fresh) if node.op is elementwise.WHERE else fresh


def _choice(node: Node) -> Node:
    """Take the factor of one side of a choice behind it, if the other has it, too, or is a number."""
    test, yes, no = node.inputs
    (x, factor), (y, other) = unscaled(yes), unscaled(no)
    if factor == other != 1.0:
        return b.mul(b.where(test, x, y), factor)
    if factor != 1.0 and (number := _divided(no, factor)) is not None:
        return b.mul(b.where(test, x, number), factor)
    if other != 1.0 and (number := _divided(yes, other)) is not None:
        return b.mul(b.where(test, number, y), other)
    return node


def _divided(node: Node, factor: float) -> float | None:
    """Return a number divided by a factor, if it is a number that a float can hold after that."""
    if node.op is not leaf.CONSTANT:
        return None
    value = float(node.attrs.value) / factor
    return value if value in _WHATEVER_SCALE or _LEAST <= abs(value) <= _GREATEST else None


def _is(node: Node, *values: float) -> bool:
    return node.op is leaf.CONSTANT and float(node.attrs.value) in values
