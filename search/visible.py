"""What masks leave of a loop: the share of its iterations that run, for any tile sizes.

In: a schedule. Out: a `Visible`, made of the bounds that its block graph gets with tiles of one element.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, final

from superopt.ir.errors import GraphError
from superopt.ir.graph import Axis
from superopt.ir.ops import leaf
from superopt.search.emit import axis_names, block_graph
from superopt.search.errors import NotFusible
from superopt.search.indices import Atom
from superopt.search.schedule import Role, Schedule

_SAMPLES: Final = 32
"""Blocks at which iterations are counted."""


@final
@dataclass(frozen=True, slots=True)
class Visible:
    """Iterations run where, for every bound, sum(weight * element index) + constant can be >= 0.

    `grid` is the one other atom in the bounds; without bounds everything runs.
    """

    loop: Atom | None
    grid: Atom | None
    bounds: tuple[tuple[int, int, int], ...]
    """Weight of the loop's atom, of the grid's atom, and the constant."""
    extents: tuple[int, int]

    def share(self, tiles: Mapping[Atom, int]) -> float:
        """Return the share of iterations that run, over all blocks."""
        if not self.bounds:
            return 1.0
        step, size = (tiles.get(a, 1) if a else 1 for a in (self.loop, self.grid))
        trips, blocks = (-(-e // t) for e, t in zip(self.extents, (step, size), strict=True))
        count = min(blocks, _SAMPLES)
        found = 0
        for sample in range(count):
            block = (2 * sample + 1) * blocks // (2 * count)
            low, high = 0, trips
            for weight, other, constant in self.bounds:
                most = other * size * block + constant
                most += max(0, weight) * (step - 1) + max(0, other) * (size - 1)
                # weight * step * l + most >= 0
                if weight < 0:
                    high = min(high, most // (-weight * step) + 1)
                else:
                    low = max(low, -(most // (weight * step)))
            found += max(0, high - low)
        return found / (count * trips)


def visible(schedule: Schedule) -> Visible:
    """Return what the masks of a schedule leave of its loop."""
    everything = Visible(None, None, (), (1, 1))
    loop, space = schedule.loop, schedule.space
    counted = [n for n in schedule.region.body if n.op is leaf.IOTA]
    # a bound compares positions along the loop with something
    if loop is None or not any(loop in space.layout(n)[n.attrs.axis] for n in counted):
        return everything
    try:
        graph = block_graph(schedule, dict.fromkeys(schedule.roles, 1), "elements")
    except (NotFusible, GraphError):
        return everything
    names = {name: atom for atom, name in axis_names(schedule).items()}
    passes = [_weights(axis) for axis in graph.loops]
    shared = set(passes[0]).intersection(*passes)
    others = {name for terms, *_ in shared for name, _ in terms}
    if not shared or len(others) > 1:
        return everything
    grid = next((names[n] for n in others), None)
    bounds = [(weight, sum(w for _, w in terms), constant) for terms, weight, constant in shared]
    assert grid is None or schedule.roles[grid] is Role.GRID
    extents = (space.extent(loop), 1 if grid is None else space.extent(grid))
    return Visible(loop, grid, tuple(sorted(bounds)), extents)


def _weights(axis: Axis) -> list[tuple[tuple[tuple[str, int], ...], int, int]]:
    """Return the bounds of a loop: terms of other axes, the weight of its own, the constant."""
    return [
        (
            tuple(term for term in bound.terms if term[0] != axis.name),
            dict(bound.terms)[axis.name],
            bound.constant,
        )
        for bound in axis.bounds
    ]
