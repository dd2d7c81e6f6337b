"""Numbers by which scores are multiplied, taken behind their maxima and what these are taken off.

In and out: the roots of a block graph. exp(x * c - max(x * c)) becomes exp((x - max(x)) * c) for a number c of at
most 1: the pass that finds maxima multiplies nothing, and the exponential's own factor and c are one. Maxima and
choices of what is scaled keep their bits, since rounding keeps the order of numbers; only in the exponential the
difference is rounded, and not the terms of it.
"""

import struct
from collections.abc import Sequence
from typing import Final

from superopt.codegen.cpu.ranges import maximum_of, unscaled
from superopt.ir import build as b
from superopt.ir.node import Node, make, rebuild, rewrite, users_of
from superopt.ir.ops import contraction, elementwise, leaf, tile
from superopt.ir.types import DType

_MAXIMA: Final = (contraction.REDUCE_MAX, tile.PREFIX_MAX, tile.ACCUM_LAST)
_LEAST: Final = 2.0**-60
"""A difference that overflows is one whose exponential is 0 with such factors, too."""


def scales_behind_maxima(roots: Sequence[Node]) -> tuple[Node, ...]:
    """Return the roots with float32 factors behind maxima, and behind differences that exponentials alone read."""
    users = users_of(roots)

    def step(node: Node, inputs: tuple[Node, ...]) -> Node:
        fresh = rebuild(node, inputs)
        if node.op is tile.ACCUM_RESCALED:
            shift, factor = _scaled(inputs[1])
            if factor == 1.0:
                return fresh
            attrs = tile.RescaleAttrs(node.attrs.loop, factor * node.attrs.power)
            return make(node.op, (inputs[0], shift), attrs)
        if not inputs or inputs[-1].tensor.dtype is not DType.F32:
            return fresh
        x, factor = _scaled(inputs[0])
        if node.op is elementwise.GT and factor != 1.0:
            # whether there is a maximum at all
            return b.gt(x, inputs[1]) if x.op in _MAXIMA and _is_lowest(inputs[1]) else fresh
        if node.op in _MAXIMA and factor != 1.0:
            return b.mul(rebuild(node, (x,)), factor)
        if node.op is elementwise.SUB and factor == _scaled(inputs[1])[1] != 1.0:
            difference = b.sub(x, _scaled(inputs[1])[0])
            readers = {user.op for user in users[node]}
            if maximum_of(difference) and readers == {elementwise.EXP}:
                return b.mul(difference, factor)
        return _choice(fresh) if node.op is elementwise.WHERE else fresh

    return rewrite(roots, step)


def _scaled(node: Node) -> tuple[Node, float]:
    """Return x and c for x * c, which is never larger than x, or the value itself and 1."""
    x, factor = unscaled(node)
    usual = _LEAST <= factor < 1.0 and node.tensor.dtype is DType.F32
    return (x, factor) if usual else (node, 1.0)


def _choice(node: Node) -> Node:
    """Take the factor of one side of a choice behind it, if the other has it, too, or is a number."""
    test, yes, no = node.inputs
    (x, factor), (y, other) = _scaled(yes), _scaled(no)
    if factor == other != 1.0:
        return b.mul(b.where(test, x, y), factor)
    if factor != 1.0 and (number := _divided(no, factor)) is not None:
        return b.mul(b.where(test, x, number), factor)
    if other != 1.0 and (number := _divided(yes, other)) is not None:
        return b.mul(b.where(test, number, y), other)
    return node


def _divided(node: Node, factor: float) -> float | None:
    """Return the float32 that multiplied by a factor is this very number, if there is one."""
    if node.op is not leaf.CONSTANT:
        return None
    value = float(node.attrs.value)
    try:
        found = _float32(value / factor)
        return found if _float32(found * _float32(factor)) == value else None
    except OverflowError:
        return None


def _float32(value: float) -> float:
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    return float(rounded)


def _is_lowest(node: Node) -> bool:
    return node.op is leaf.CONSTANT and node.attrs.value == float("-inf")
