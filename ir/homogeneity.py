"""Which maxima may be replaced by running ones inside the loop that reduces over them.

A value computed with a shift m, such as exp(x - m), is *homogeneous* when another shift only
multiplies it by a power of exp(m): v(m') = v(m) * exp(c * (m' - m)). Sums and contractions of
homogeneous values can be accumulated with the running maximum and rescaled when it grows, which
is the online softmax (Milakov & Gimelshein, 2018) for every program whose values have that
property, whatever it is called. The analysis computes c, the *degree*, node by node.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan
from typing import final

from superopt.ir.node import Node
from superopt.ir.ops import contraction, elementwise, leaf, structural, tile
from superopt.ir.ops.registry import OpKind


@final
@dataclass(frozen=True, slots=True)
class Degree:
    """How a value depends on the shift: plus `power` times it, or times exp(power * shift)."""

    additive: bool
    power: float


_NONE = Degree(False, 0.0)
_KEEPS = (
    elementwise.NEG,
    elementwise.CAST,
    structural.PERMUTE,
    structural.RESHAPE,
    structural.BROADCAST,
    structural.SLICE,
    structural.FLIP,
)


_VIEWS = (elementwise.CAST, structural.PERMUTE, structural.RESHAPE, structural.BROADCAST)
_PASS_NAN_ON = (
    elementwise.EXP,
    elementwise.MUL,
    elementwise.ADD,
    contraction.MATMUL,
    contraction.REDUCE_SUM,
    *_VIEWS,
)


def degree(node: Node, operands: list[Degree | None]) -> Degree | None:
    """Return the degree of `node` from those of its operands; None when it has none."""
    if any(o is None for o in operands):
        return None
    known = [o for o in operands if o is not None]
    if all(o == _NONE for o in known):
        return _NONE
    op = node.op
    if op in (elementwise.ADD, elementwise.SUB):
        return _sum_degree(op is elementwise.SUB, known)
    if op is elementwise.NEG and known[0].additive:
        return Degree(True, -known[0].power)
    if op in _KEEPS:
        return known[0]
    if op is elementwise.MUL and any(k.additive for k in known):
        return _scaled(node, known)
    if any(k.additive for k in known):
        return _of_additive(node, known)
    if op in (elementwise.MUL, contraction.MATMUL):
        return Degree(False, known[0].power + known[1].power)
    if op is elementwise.DIV:
        return Degree(False, known[0].power - known[1].power)
    if op is contraction.REDUCE_SUM:
        return known[0]
    if op is elementwise.LOG:
        return Degree(True, known[0].power)
    if op is elementwise.WHERE and known[0] == _NONE:
        return _select_degree(node, known)
    return None


def _sum_degree(subtract: bool, known: list[Degree]) -> Degree | None:
    left, right = known
    if left.additive or right.additive:
        if any(not k.additive and k != _NONE for k in known):
            return None
        a = left.power if left.additive else 0.0
        b = right.power if right.additive else 0.0
        total = a - b if subtract else a + b
        return Degree(True, total) if total else _NONE
    return left if left == right else None


def _scaled(node: Node, known: list[Degree]) -> Degree | None:
    for k, other in ((0, 1), (1, 0)):
        scale = node.inputs[other]
        if known[k].additive and scale.op is leaf.CONSTANT:
            return Degree(True, known[k].power * float(scale.attrs.value))
    return None


def _of_additive(node: Node, known: list[Degree]) -> Degree | None:
    if node.op is elementwise.EXP:
        return Degree(False, known[0].power)
    if node.op is elementwise.GT and known[1] == _NONE and _is_minus_infinity(node.inputs[1]):
        # the guard "is there a finite maximum" is the same for every shift
        return _NONE
    if node.op is elementwise.WHERE and known[0] == _NONE:
        condition, yes, no = node.inputs
        if condition.op is elementwise.GT and condition.inputs[0] is yes and known[1].additive:
            return known[1]
        # -inf stays -inf under every shift
        if known[1].additive and _is_minus_infinity(no):
            return known[1]
        if known[2].additive and _is_minus_infinity(yes):
            return known[2]
    return None


def _is_minus_infinity(node: Node) -> bool:
    return node.op is leaf.CONSTANT and node.attrs.value == -inf


def _select_degree(node: Node, known: list[Degree]) -> Degree | None:
    yes, no = known[1], known[2]
    if yes == no:
        return yes
    for one, other in ((1, 2), (2, 1)):
        if node.inputs[other].op is leaf.CONSTANT:
            value = float(node.inputs[other].attrs.value)
            # what times any number is itself
            if value == 0 or isnan(value):
                return known[one]
    return None


@final
@dataclass(frozen=True, slots=True)
class Homogeneity:
    """Degrees of a region's nodes in one shift, and the power to rescale by where the loop closes.

    A node with degree None cannot be computed from a running maximum. The sums in `lost` are NaN where there is
    no maximum but -inf, and 0 if a running one is guarded.
    """

    degree: dict[Node, Degree | None]
    rescale: dict[Node, int]
    lost: frozenset[Node]


def homogeneity(
    shift: Node, body: Sequence[Node], outputs: Sequence[Node], closes: frozenset[Node]
) -> Homogeneity:
    """Analyse a region for `shift`; `closes` holds the reductions over the loop.

    After a reduction in `closes` the true maximum is in force: the accumulator rescales.
    """
    found: dict[Node, Degree | None] = {shift: Degree(True, 1.0)}
    rescale: dict[Node, int] = {}
    lowest = _lowest(shift, body)
    for node in body:
        if node is shift:
            continue
        operands = [found.get(i, _NONE) for i in node.inputs]
        total = degree(node, operands)
        if node in closes and total != _NONE:
            summing = node.op in (contraction.REDUCE_SUM, contraction.MATMUL)
            # exp(m - x) has grown to inf before the first maximum
            falls = total is not None and not total.additive and total.power < 0
            known = summing and lowest.get(node) is not None
            if total is None or not falls or not known or not total.power.is_integer():
                total = None
            else:
                rescale[node] = -int(total.power)
                total = _NONE
        found[node] = total
    sums = {n for n in rescale if lowest[n] == _NAN}
    return Homogeneity(found, rescale, _lost(body, sums, outputs))


_LOW, _NAN, _SAME = "-inf", "nan", "the same"


def _lowest(shift: Node, body: Iterable[Node]) -> dict[Node, str | None]:
    """Return what the values made with a maximum are where it is -inf: itself, NaN or what a guard makes of them.

    A program without a guard has exp(-inf - -inf) = NaN there, a running maximum a guard of its own. None: either.
    """
    found: dict[Node, str | None] = {shift: _LOW}
    infinite = {shift.inputs[0]}
    for node in body:
        states = [found[i] for i in node.inputs if i in found]
        scales = node.op is elementwise.MUL and any(map(_is_positive, node.inputs))
        if not infinite.isdisjoint(node.inputs) and (scales or node.op in _VIEWS):
            infinite.add(node)
        if node is shift or not states:
            continue
        if _LOW in states and (scales or node.op in _VIEWS):
            found[node] = _LOW
        elif _is_guarded(node, found):
            found[node] = found.get(node.inputs[-1], _SAME)
        elif node.op is elementwise.SUB and states == [_LOW]:
            found[node] = _NAN if node.inputs[0] in infinite else None
        elif _NAN in states and node.op in (*_PASS_NAN_ON, elementwise.SUB, elementwise.DIV):
            found[node] = _NAN
        else:
            found[node] = _SAME if set(states) == {_SAME} else None
    return found


def _is_positive(node: Node) -> bool:
    return node.op is leaf.CONSTANT and 0 < float(node.attrs.value) < inf


def _is_guarded(node: Node, found: dict[Node, str | None]) -> bool:
    """Recognize "more than -inf", and a choice by that, where -inf is not."""
    if node.op is elementwise.WHERE:
        node = node.inputs[0]
    low = node.op is elementwise.GT and found.get(node.inputs[0]) == _LOW
    return low and _is_minus_infinity(node.inputs[1])


def _lost(body: Iterable[Node], sums: set[Node], outputs: Sequence[Node]) -> frozenset[Node]:
    """Return the sums of NaN that are more than an end of a quotient of two of them: 0 / 0 is NaN by itself."""
    of = {n: n for n in sums}
    lost = set[Node]()
    for node in body:
        read = [of[i] for i in node.inputs if i in of]
        if read and node.op in _VIEWS:
            of[node] = read[0]
        elif len(read) < 2 or node.op is not elementwise.DIV:
            lost.update(read)
    return frozenset(lost.union(of[o] for o in outputs if o in of))


def may_lag(shift: Node, nodes: Iterable[Node], lag: float = 2.0) -> float:
    """Return how far behind the maximum `shift`, a prefix_max, may stay in each iteration of its loop.

    Another shift would do where all that is made of it is homogeneous and ends in accum_rescaled of the same
    degree, or in the maximum itself after the loop. No value gets larger than by exp(lag) for it.
    `nodes`: those of its block graph, operands first.
    """
    found = _degrees(shift, nodes, {shift: Degree(True, 1.0)})
    if found is None:
        return 0.0
    return lag / largest_power(found)


def largest_power(found: Mapping[Node, Degree]) -> float:
    """Return the size of the largest power of exp(shift) that values have; 1 if they have none."""
    return max((abs(d.power) for d in found.values() if not d.additive), default=0.0) or 1.0


def cancels(shift: Node, nodes: Sequence[Node]) -> bool:
    """Say whether the results of a block graph are the same if another shift is in force after the loop, too.

    A softmax and the logarithm of a sum of exponentials are. NaN among what the maximum is taken of is then in all
    sums that are made with it, so that the shift may be a number. `nodes` as for `may_lag`.
    """
    return unseen(shift, nodes) is not None and _passes_nan_on(shift, nodes)


def unseen(shift: Node, nodes: Sequence[Node]) -> dict[Node, Degree] | None:
    """Return the degrees of what depends on a maximum, after its loop, too; None if results do.

    `nodes` as for `may_lag`.
    """
    after = {shift: Degree(True, 1.0)}
    for node in nodes:
        if node.op is tile.ACCUM_RESCALED and node.inputs[1] is shift:
            after[node] = Degree(False, -node.attrs.power)
        elif node.op is tile.ACCUM_LAST and node.inputs[0] is shift:
            after[node] = Degree(True, 1.0)
    found = _degrees(shift, nodes, after)
    if found is None or any(found.get(n, _NONE) != _NONE for n in nodes if n.op is tile.STORE):
        return None
    return {n: d for n, d in found.items() if d != _NONE}


def _passes_nan_on(shift: Node, nodes: Sequence[Node]) -> bool:
    """Say whether NaN in an element of the maximum is NaN in every sum over the loop that is made with the shift."""
    (top,) = shift.inputs
    if top.op is not contraction.REDUCE_MAX:
        return False
    guards, shifted, summed = {shift}, set[Node](), set[Node]()
    for node in nodes:
        if node.op is tile.ACCUM_RESCALED and node.inputs[1] is shift:
            if node.inputs[0] not in summed:
                return False
        elif node.op is elementwise.SUB and node.inputs[1] in guards:
            if node.inputs[0] is not top.inputs[0]:
                return False
            shifted.add(node)
        elif node.op in (elementwise.GT, elementwise.WHERE) and not guards.isdisjoint(node.inputs):
            guards.add(node)  # 0 where there is no maximum
        elif not shifted.isdisjoint(node.inputs):
            if node.op not in _PASS_NAN_ON:
                return False
            shifted.add(node)
            # what is not summed along the maximum's axes has NaN in some of its elements only
            sums = node.op is contraction.REDUCE_SUM and node.attrs.axes == top.attrs.axes
            if sums or node.op is contraction.MATMUL or not summed.isdisjoint(node.inputs):
                summed.add(node)
    return True


def _degrees(
    shift: Node, nodes: Iterable[Node], known: dict[Node, Degree]
) -> dict[Node, Degree] | None:
    """Return the degrees of what depends on a shift; None where a value has none."""
    found = dict(known)
    for node in nodes:
        operands = [found.get(i, _NONE) for i in node.inputs]
        if node is shift or all(o == _NONE for o in operands):
            continue
        if node.op is tile.ACCUM_RESCALED and node.inputs[1] is shift:
            if operands[0] != Degree(False, -node.attrs.power):
                return None
        elif not (node.op is tile.ACCUM_LAST and node.inputs[0] is shift):
            total = operands[0] if node.op is tile.STORE else degree(node, list(operands))
            if total is None:
                return None
            found[node] = total
    return found


def is_reduction(node: Node) -> bool:
    """Say whether a node is a reduction or a contraction."""
    return node.op.kind in (OpKind.REDUCTION, OpKind.CONTRACTION)
