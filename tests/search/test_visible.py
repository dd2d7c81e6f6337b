"""What masks leave of loops: predicted as block graphs have it, and believed by the cost model."""

from collections.abc import Callable
from itertools import product

import pytest

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.target import Target
from superopt.search.cost import KernelModel
from superopt.search.emit import block_graph
from superopt.search.partition import is_compute
from superopt.search.region import make_region
from superopt.search.schedule import Role, Schedule, derive
from superopt.search.tiling import best_tiles
from superopt.search.visible import visible

MASKS: dict[str, Callable[[Node, Node], Node]] = {
    "earlier": lambda r, c: b.le(c, r),
    "later": lambda r, c: b.ge(c, b.add(r, 5)),
    "window": lambda r, c: b.and_(b.ge(r, c), b.lt(b.sub(r, c), 17)),
    "slanted": lambda r, c: b.lt(b.add(c, c), r),
    "first": lambda r, c: b.and_(b.lt(c, 21), b.ge(r, r)),
}


def masked(
    mask: Callable[[Node, Node], Node] | None, rows: int, columns: int, projected: int = 0
) -> Graph:
    """Exponentials behind a mask, times a matrix, in one loop over columns; `projected`: times another."""
    x = b.input_("x", (rows, 16))
    y = b.input_("y", (16, columns))
    v = b.input_("v", (columns, 16))
    scores = b.matmul(x, y)
    if mask is not None:
        visible = mask(b.iota((rows, 1), -2), b.iota((1, columns), -1))
        scores = b.where(visible, scores, b.constant(float("-inf")))
    result = b.matmul(b.exp(scores), v)
    if projected:
        w = b.input_("w", (16, projected))
        return b.kernel_graph("masked", [x, y, v, w], [b.matmul(result, w)])
    return b.kernel_graph("masked", [x, y, v], [result])


def looped(graph: Graph, extent: int) -> Schedule:
    """Return the schedule whose loop runs over the dim of that extent."""
    region = make_region(graph, [n for n in topological(graph.outputs) if is_compute(n)])
    (found,) = (
        s for s in derive(region) if s.loop is not None and s.space.extent(s.loop) == extent
    )
    return found


def runs(graph: Graph) -> float:
    """Count the share of iterations that the bounds of a block graph let run."""
    (loop,) = graph.loops
    names = [a.name for a in (*graph.grid, loop)]
    points = list(product(*(range(a.count) for a in (*graph.grid, loop))))
    active = 0
    for point in points:
        at = dict(zip(names, point, strict=True))
        totals = (sum(c * at[n] for n, c in x.terms) + x.constant for x in loop.bounds)
        active += all(total >= 0 for total in totals)
    return active / len(points)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (24, 7), (5, 33), (90, 120)])
def test_shares_are_those_of_the_block_graph(name: str, rows: int, columns: int) -> None:
    schedule = looped(masked(MASKS[name], 90, 120), 120)
    sizes = {90: rows, 120: columns, 16: 16}
    tiles = {a: sizes[schedule.space.extent(a)] for a in schedule.roles}
    wanted = runs(block_graph(schedule, tiles, "k"))
    assert visible(schedule).share(tiles) == pytest.approx(wanted)
    assert wanted < 1 or (rows, columns) == (90, 120)


def test_no_mask_leaves_everything() -> None:
    schedule = looped(masked(None, 90, 120), 120)
    assert visible(schedule).share(dict.fromkeys(schedule.roles, 8)) == 1.0


def test_the_cost_model_counts_what_runs() -> None:
    plain, half = (looped(masked(m, 2048, 2047), 2047) for m in (None, MASKS["earlier"]))
    machine = Target()
    (seconds, _), (masked_s, tiles) = (best_tiles(s, machine, 1)[0] for s in (plain, half))
    assert masked_s < 0.7 * seconds
    # one block of all rows would hide nothing
    (rows,) = (a for a in half.grid if half.space.extent(a) == 2048)
    assert half.roles[rows] is Role.GRID
    assert tiles[rows] <= 512
    whole = KernelModel(half, machine).seconds({**tiles, rows: 2048})
    assert whole > 1.2 * masked_s


def test_a_mask_hides_nothing_of_products_behind_the_loop() -> None:
    def seconds(name: str | None, projected: int) -> float:
        mask = MASKS[name] if name else None
        schedule = looped(masked(mask, 2048, 2047, projected), 2047)
        sizes = {2048: 1024, 2047: 2047, 16: 16, projected: projected}
        tiles = {a: sizes[schedule.space.extent(a)] for a in schedule.roles}
        return KernelModel(schedule, Target()).seconds(tiles)

    of_all, of_half = (seconds(name, 8192) - seconds(name, 0) for name in (None, "earlier"))
    assert of_half == pytest.approx(of_all, rel=0.1)
