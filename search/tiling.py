"""Tile sizes: the choices per index and the most promising combinations under the cost model."""

from collections.abc import Iterable, Mapping
from itertools import product
from math import inf
from typing import Final

from superopt.ir.ops import contraction
from superopt.ir.target import Target
from superopt.search.cost import KernelModel
from superopt.search.indices import Atom
from superopt.search.region import view_type
from superopt.search.schedule import Role, Schedule

_ROWS: Final = (1, 4, 8, 16, 32, 64, 128)
_MANY_ROWS: Final = (256, 512)
"""On a CPU too: an operand that a block transposes pays by the rows that use it."""
_COLUMNS: Final = (16, 32, 64, 128, 256, 512, 1024, 2048)
_LOOP: Final = (32, 64, 128, 256, 512, 1024)
MAX_COMBINATIONS: Final = 512


def choices(schedule: Schedule, machine: Target) -> dict[Atom, tuple[int, ...]]:
    """Return the tile sizes worth trying for each grid and loop atom.

    On a CPU also those that give every core as much to do, in one block or two.
    """
    cpu = machine.kind == "cpu"
    space = schedule.space
    columns = _fastest(schedule)
    rows: set[Atom] = set()
    for node in schedule.region.body:
        if node.op is contraction.MATMUL:
            # of columns merged from several dims only the last lie side by side: tiles of more are copied
            across = space.layout(node)[-1]
            columns.update(across[-1:])
            rows.update(space.layout(node)[-2], across[:-1])
    if not rows:
        rows = {o for n in schedule.region.outputs for o in space.atoms(n)[-2:]}
    result: dict[Atom, tuple[int, ...]] = {}
    for atom, role in schedule.roles.items():
        extent = space.extent(atom)
        if role is Role.LOOP:
            options: tuple[int, ...] = _LOOP
        elif role is Role.WHOLE:
            continue
        elif atom in columns:
            found = {*_COLUMNS, *(_ROWS if atom in rows else ())}
            if cpu:
                found.update(_even(extent, machine.cores, machine.vector_lanes))
            options = tuple(sorted(found))
        elif atom in rows:
            options = _ROWS
            if cpu:
                options = (*_ROWS, *_MANY_ROWS, *_even(extent, machine.cores, 1))
                options = tuple(sorted(set(options)))
        else:
            options = (1,)
        result[atom] = tuple(dict.fromkeys(min(o, extent) for o in options))
    return result


def _even(extent: int, cores: int, step: int) -> Iterable[int]:
    """Return tile sizes, multiples of `step`, of which one or two per core cover the extent."""
    return (-(-extent // (parts * step)) * step for parts in (cores, 2 * cores))


def _fastest(schedule: Schedule) -> set[Atom]:
    """Atoms along which some tensor is dense in memory."""
    space = schedule.space
    found: set[Atom] = set()
    for node in schedule.region.inputs:
        lies = view_type(node)
        if lies is None:
            continue
        for dim, stride in zip(space.layout(node), lies.element_strides, strict=True):
            if stride == 1 and dim:
                found.add(dim[-1])
    for node in schedule.region.outputs:
        found.update(space.layout(node)[-1][-1:] if node.shape else ())
    return found


def best_tiles(
    schedule: Schedule, machine: Target, count: int, limit: int = MAX_COMBINATIONS
) -> list[tuple[float, dict[Atom, int]]]:
    """Return the `count` cheapest tile assignments with their predicted seconds.

    At most `limit` combinations are estimated; the choices of every atom are thinned to fit.
    """
    table = choices(schedule, machine)
    while _size(table) > limit and any(len(o) > 2 for o in table.values()):
        widest = max(table, key=lambda a: len(table[a]))
        table[widest] = table[widest][::-2][::-1]
    atoms = list(table)
    model = KernelModel(schedule, machine)
    found = []
    for sizes in product(*table.values()):
        tiles = dict(zip(atoms, sizes, strict=True))
        seconds = model.seconds(tiles)
        if seconds < inf:
            found.append((seconds, tiles))
    found.sort(key=lambda pair: (pair[0], tuple(pair[1].values())))
    return found[:count]


def _size(table: Mapping[Atom, tuple[int, ...]]) -> int:
    total = 1
    for options in table.values():
        total *= len(options)
    return total
