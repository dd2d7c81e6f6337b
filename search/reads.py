"""Tensors that a region reads by two index maps become two tensors.

In `x + x @ w` the sum reads `x` by row and column of the result, the product by row and contracted
index. With one index map for both, column and contracted index would be the same and `w` be read
along its diagonal. Read apart, as `x1 + x2 @ w`, the region is a kernel like any other.

In: a `Region`. Out: an equal one, which of the old inputs each new one reads, and its index space.
Raises `NotFusible` where no reading apart helps.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Final

from superopt.ir.node import Node, make, rebuild, topological
from superopt.ir.ops import leaf, structural
from superopt.ir.types import TensorType
from superopt.search.errors import NotFusible
from superopt.search.indices import IndexSpace, analyse
from superopt.search.region import Region, view_type

_COPIES: Final = (2, 16)
"""A region may grow to so many times its ops, and some: where a product's result is factor of both sides of the next,
again and again, what has to be computed once more doubles with each."""


def separated(region: Region) -> tuple[Region, tuple[int, ...], IndexSpace]:
    """Return a region without diagonals that computes the same, its reads and its index space.

    An operand that stands in the way is computed once more, from tensors of its own; of the operands
    of an op it is the one that is the least work. Costs O(log n) analyses of the n ops per operand
    taken apart, and one where there is none.

    Raises:
        NotFusible: the dims have no common factorization, two dims of one tensor share an index
            however its operands are read, or too much would be computed once more.
    """
    times, some = _COPIES
    most = times * len(region.body) + some
    sources = {node: position for position, node in enumerate(region.inputs)}
    region, again = _gathers_apart(region)
    sources |= {new: sources[old] for old, new in again.items()}
    while True:
        space = analyse(region.inputs, region.body)
        if not space.diagonal((*region.inputs, *region.body)):
            return region, tuple(sources[i] for i in region.inputs), space
        region, again = _apart(region, again)
        if len(region.body) > most:
            raise NotFusible("operands that are read apart multiply the ops")
        sources |= {new: sources[old] for old, new in again.items()}


def _gathers_apart(region: Region) -> tuple[Region, dict[Node, Node]]:
    """Let gathers read tensors of their own: along their axis no tile cuts what they read."""
    again: dict[Node, Node] = {}
    new = {i: i for i in region.inputs}
    for node in region.body:
        operands = [new.get(i, i) for i in node.inputs]
        if node.op is structural.GATHER and node.inputs[0] in region.inputs:
            data = node.inputs[0]
            if data not in again:
                again[data] = _reading(data, (*region.inputs, *again.values()))
            operands[0] = again[data]
        new[node] = rebuild(node, tuple(operands))
    if not again:
        return region, again
    body = tuple(new[n] for n in region.body)
    read = dict.fromkeys(i for n in body for i in n.inputs)
    inputs = tuple(i for i in (*region.inputs, *again.values()) if i in read)
    return Region(inputs, body, tuple(new[o] for o in region.outputs)), again


def _diagonal(region: Region, count: int) -> bool:
    body = region.body[:count]
    return analyse(region.inputs, body).diagonal((*region.inputs, *body))


def _apart(region: Region, again: Mapping[Node, Node]) -> tuple[Region, dict[Node, Node]]:
    """Give one operand of the first op that makes a diagonal tensors of its own.

    `again` holds second readings made before, which are used first. Returns those of the result too.
    """
    counts = range(len(region.body) + 1)
    upto = bisect_left(counts, True, key=lambda n: _diagonal(region, n))
    meeting = region.body[upto - 1]
    members = set(region.body)
    cones = [[n for n in topological([o]) if n in members] for o in meeting.inputs]
    for position in sorted(range(len(cones)), key=lambda p: len(cones[p])):
        cone = cones[position]
        touched = (meeting.inputs[position], *(i for n in cone for i in n.inputs))
        read = [i for i in dict.fromkeys(touched) if i in region.inputs]
        fresh: dict[Node, Node] = {}
        for i in read:
            fresh[i] = _reading(i, (*region.inputs, *again.values(), *fresh.values()))
        for readings in ({i: again.get(i, fresh[i]) for i in read}, fresh):
            found, where = _with(region, upto, position, cone, readings)
            if not _diagonal(found, where):
                return found, {**again, **readings}
    raise NotFusible("two dims of one tensor run over the same index")


def _with(
    region: Region,
    upto: int,
    position: int,
    cone: Sequence[Node],
    readings: Mapping[Node, Node],
) -> tuple[Region, int]:
    """Compute an operand of op `upto - 1` once more from `readings`; tell where that op is now."""
    copies = dict(readings)
    for node in cone:
        copies[node] = rebuild(node, tuple(copies.get(i, i) for i in node.inputs))
    before, meeting, after = region.body[: upto - 1], region.body[upto - 1], region.body[upto:]
    new = {n: n for n in (*region.inputs, *before)}
    operands = list(meeting.inputs)
    operands[position] = copies.get(operands[position], operands[position])
    new[meeting] = rebuild(meeting, tuple(operands))
    for node in after:
        new[node] = rebuild(node, tuple(new[i] for i in node.inputs))
    outputs = tuple(new[o] for o in region.outputs)
    made = [*before, *(copies[n] for n in cone), new[meeting], *(new[n] for n in after)]
    live = set(topological(outputs))
    body = tuple(dict.fromkeys(n for n in made if n in live))
    inputs = tuple(dict.fromkeys(i for i in (*region.inputs, *readings.values()) if i in live))
    return Region(inputs, body, outputs), body.index(new[meeting]) + 1


def _reading(node: Node, taken: Sequence[Node]) -> Node:
    """Return a tensor that lies in memory like `node` and is none of `taken`."""
    lies = view_type(node) or TensorType(node.shape, node.tensor.dtype)
    name = node.attrs.name if node.op is leaf.INPUT else "t"
    names = (f"{name}_{number}" for number in count(2))
    made = (make(leaf.INPUT, (), leaf.InputAttrs(n, lies)) for n in names)
    return next(m for m in made if m not in taken)
