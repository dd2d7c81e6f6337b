"""Which maxima that only shift exponentials need not be looked for before these are taken.

In: the values of a block graph. Out: maxima in whose place results allow another number, even one that is far
from them, and what tells whether a number is too far.

Only exponentials of which 16 bits count (`rough_functions`) take part: they are defined for all numbers.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, final

from superopt.codegen.cpu.ranges import maximum_of
from superopt.ir.homogeneity import cancels, largest_power, unseen
from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, tile
from superopt.ir.types import DType

FAR: Final = 14.0
"""How far such a number may be from a maximum: values grow by no more than its exponential."""


@final
@dataclass(frozen=True, slots=True)
class Shifts:
    """Maxima that cancel in all results: another shift does as well."""

    loose: frozenset[Node] = frozenset()
    """Running maxima, NaN included."""
    told: Mapping[Node, Node] = field(default_factory=dict)
    """Maxima, running or of whole rows, for which a number does unless it is far; the sum that tells."""


def find_shifts(nodes: Sequence[Node], rough: Collection[Node]) -> Shifts:
    """Return the maxima that cancel; `nodes`: those of a block graph, operands first."""
    loose = frozenset(n for n in nodes if n.op is tile.PREFIX_MAX and cancels(n, nodes))
    told: dict[Node, Node] = {}
    for node in nodes:
        if node in loose or node.op is contraction.REDUCE_MAX:
            total = _telling_sum(node, nodes, rough)
            if total is not None:
                told[node] = total
    return Shifts(loose, told)


def _telling_sum(shift: Node, nodes: Sequence[Node], rough: Collection[Node]) -> Node | None:
    """Return the sum of exp(c * (x - shift)), c > 0, over all that a maximum is taken of, if there is one.

    With another number it is neither very small nor very large, infinite or NaN unless that is too far. None
    also where one that is far would do harm: values leave the range of 16-bit floats with 5 bits of exponent,
    and the logarithm of their sum may be close to the shift that is then subtracted.
    """
    found = unseen(shift, nodes)
    if found is None or any(_is_harmed(n, rough) for n in found):
        return None
    top = shift if shift.op is contraction.REDUCE_MAX else shift.inputs[0]
    power = largest_power(found)
    for node in nodes:
        if node.op is contraction.REDUCE_SUM and node.attrs.axes == top.attrs.axes:
            (value,) = node.inputs
            grows_most = value in found and abs(found[value].power) == power
            if grows_most and value.op is elementwise.EXP and maximum_of(value.inputs[0]) is top:
                return node
    return None


def _is_harmed(node: Node, rough: Collection[Node]) -> bool:
    exact = node.op is elementwise.EXP and node not in rough
    return exact or node.op is elementwise.LOG or node.tensor.dtype is DType.F16
