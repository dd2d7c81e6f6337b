"""Schedules of a region: which index is split over blocks, which is looped over, which stays whole.

A region with loop index n is one kernel when no op inside the loop needs the finished value of a
reduction over n. Where one does, either the loop runs again (another *pass* that recomputes what
it needs) or, for maxima, a running value and rescaling accumulators carry (see
`superopt.ir.homogeneity`). All schedules of a region follow from its index structure; nothing
looks for a named pattern.

In: a `Region`. Out: `Schedule`s; `superopt.search.emit` makes the block graph of one for given tile
sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import final

from superopt.ir.homogeneity import Homogeneity, homogeneity, is_reduction
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, leaf
from superopt.search.coalesce import coalesce
from superopt.search.errors import NotFusible
from superopt.search.indices import Atom, IndexSpace
from superopt.search.reads import separated
from superopt.search.region import Region

MAX_PASSES = 3


@final
class Role(Enum):
    """What becomes of an index."""

    GRID = "grid"
    LOOP = "loop"
    WHOLE = "whole"


@final
@dataclass(frozen=True, slots=True)
class Passes:
    """When each node of a region is computed, relative to the loop.

    `varies` holds the nodes that change from iteration to iteration; `number` the pass in which a
    varying node first can run, and for the others the last pass that they wait for (-1: none).
    `shifts` maps each maximum that is kept as a running value to its analysis.
    """

    varies: frozenset[Node]
    number: dict[Node, int]
    shifts: dict[Node, Homogeneity]
    count: int


@final
@dataclass(frozen=True, slots=True)
class Schedule:
    """One way to run a region as one kernel; tile sizes are still open.

    Input i of `region` is input `reads[i]` of the region that was asked for: one that is read by two
    index maps is here twice.
    """

    region: Region
    reads: tuple[int, ...]
    space: IndexSpace = field(repr=False)
    roles: Mapping[Atom, Role]
    loop: Atom | None
    passes: Passes = field(repr=False)

    @property
    def grid(self) -> tuple[Atom, ...]:
        """Atoms that are split over blocks, in the order of the first output's dims."""
        order = self.space.atoms(self.region.outputs[0])
        return tuple(a for a in order if self.roles[a] is Role.GRID)

    def describe(self) -> str:
        """Return a line for reports."""
        parts = [f"{self.space.extent(a)}:{role.value}" for a, role in self.roles.items()]
        online = f", {len(self.passes.shifts)} running maxima" if self.passes.shifts else ""
        return f"indices {' '.join(parts)}; {self.passes.count} pass(es){online}"


def derive(region: Region) -> list[Schedule]:
    """Return all schedules of a region; the empty list when it cannot be one kernel."""
    if any(0 in n.shape for n in (*region.inputs, *region.body)):
        return []
    try:
        region, reads, space = separated(region)
    except NotFusible:
        return []
    coalesce(region, space)
    atoms = dict.fromkeys(a for n in (*region.inputs, *region.body) for a in space.atoms(n))
    common = set(atoms)
    for output in region.outputs:
        common &= set(space.atoms(output))
    fixed = space.whole | space.reduced
    gridable = {a for a in common if a not in fixed}
    loops = [a for a in atoms if a in space.reduced and a not in space.whole]
    schedules = []
    for loop in (None, *loops):
        passes = _passes(region, space, loop)
        if passes is None:
            continue
        roles = {
            a: Role.LOOP if a == loop else Role.GRID if a in gridable else Role.WHOLE for a in atoms
        }
        schedules.append(Schedule(region, reads, space, roles, loop, passes))
    return schedules


def _passes(region: Region, space: IndexSpace, loop: Atom | None) -> Passes | None:
    if loop is None:
        return Passes(frozenset(), dict.fromkeys((*region.inputs, *region.body), -1), {}, 0)
    varies = _varying(region, space, loop)
    if any(loop in space.atoms(o) and o not in varies for o in region.outputs):
        # the same in every iteration, but stored along the loop: leave that to another schedule
        return None
    closes = frozenset(
        n for n in region.body if loop in space.reduced_by(n) and any(i in varies for i in n.inputs)
    )
    shifts = _running_maxima(region, varies, closes)
    number = _numbers(region, varies, shifts)
    count = 1 + max((number[n] for n in varies if n in region.body), default=0)
    for output in region.outputs:
        if output in varies:
            count = max(count, number[output] + 1)
    return Passes(varies, number, shifts, count) if count <= MAX_PASSES else None


def _varying(region: Region, space: IndexSpace, loop: Atom) -> frozenset[Node]:
    varies = {n for n in region.inputs if loop in space.atoms(n)}
    for node in region.body:
        if node.op is leaf.IOTA:
            if loop in space.layout(node)[node.attrs.axis]:
                varies.add(node)
        elif any(i in varies for i in node.inputs) and loop not in space.reduced_by(node):
            varies.add(node)
    return frozenset(varies)


def _running_maxima(
    region: Region, varies: frozenset[Node], closes: frozenset[Node]
) -> dict[Node, Homogeneity]:
    """Choose the maxima over the loop that can be running values, all of them compatible."""
    chosen: dict[Node, Homogeneity] = {}
    for node in region.body:
        if node.op is not contraction.REDUCE_MAX or node not in closes:
            continue
        found = homogeneity(node, region.body, region.outputs, closes)
        if not _usable(node, region, varies, found):
            continue
        if any(set(found.rescale) & set(other.rescale) for other in chosen.values()):
            continue
        if found.rescale:
            chosen[node] = found
    return chosen


def _usable(shift: Node, region: Region, varies: frozenset[Node], found: Homogeneity) -> bool:
    inside = {n for n in varies if n in found.degree}
    for node in region.body:
        if node not in inside and not (is_reduction(node) and node in found.rescale):
            continue
        if found.degree[node] is None:
            return False
    # a value stored from inside the loop would be stored with the wrong shift
    for output in region.outputs:
        state = found.degree.get(output)
        if output in varies and (state is None or state.power != 0 or state.additive):
            return False
    # what only reads the final maximum may do with it what it likes
    feeds = set(topological([n for n in region.body if n in varies]))
    return all(found.degree[n] is not None for n in _consumers(shift, region) if n in feeds)


def _consumers(shift: Node, region: Region) -> list[Node]:
    reached = {shift}
    result = []
    for node in region.body:
        if any(i in reached for i in node.inputs) and not is_reduction(node):
            reached.add(node)
            result.append(node)
    return [n for n in result if n in reached]


def _numbers(
    region: Region, varies: frozenset[Node], shifts: Mapping[Node, Homogeneity]
) -> dict[Node, int]:
    number: dict[Node, int] = {i: 0 if i in varies else -1 for i in region.inputs}
    running: dict[Node, int] = {}
    for node in region.body:
        waits = [0] if node in varies else [-1]
        for i in node.inputs:
            if node in varies and i not in varies:
                waits.append(running[i] if i in running else number[i] + 1)
            else:
                waits.append(number[i])
        number[node] = max(waits)
        if node in shifts:
            running[node] = number[node]
        elif (
            node not in varies and not is_reduction(node) and any(i in running for i in node.inputs)
        ):
            # computed from running values: it can itself be read inside the loop
            running[node] = max(running[i] if i in running else number[i] + 1 for i in node.inputs)
    return number
