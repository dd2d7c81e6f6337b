"""Every schedule of every program, with ragged tiles, means what the program means."""

from collections.abc import Callable
from math import inf

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.check import check_graph
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, elementwise, leaf, tile
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.ir.text import parse_graph, print_graph
from superopt.ir.types import DType
from superopt.search.algebra import FUSION_RULES, apply_rules
from superopt.search.cost import KernelModel
from superopt.search.emit import block_graph, place
from superopt.search.errors import NotFusible
from superopt.search.indices import analyse
from superopt.search.partition import is_compute
from superopt.search.region import Region, make_region, substitute
from superopt.search.schedule import Role, Schedule, derive
from superopt.search.tiling import best_tiles, choices
from superopt.verify.equivalence import verify_field
from superopt.verify.reference import run_reference
from tests.search.programs import PROGRAMS


def prepared(graph: Graph) -> Graph:
    return apply_rules(expand(graph), FUSION_RULES)


def whole_region(graph: Graph) -> Region:
    return make_region(graph, [n for n in topological(graph.outputs) if is_compute(n)])


def tensors(graph: Graph) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    made = []
    for node in graph.inputs:
        if node.tensor.dtype is DType.I64:
            made.append(torch.randint(0, 30, node.shape, generator=generator))
        else:
            made.append(torch.randn(node.shape, generator=generator, dtype=torch.float64))
    return made


def tiles(schedule: Schedule, size: int) -> dict[int, int]:
    return {a: size if schedule.space.extent(a) > 4 else 1 for a in schedule.roles}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("size", [8, 7])
def test_every_schedule_keeps_the_meaning(name: str, size: int) -> None:
    original = PROGRAMS[name]
    graph = prepared(original)
    region = whole_region(graph)
    values = tensors(original)
    wanted = run_reference(original, values, dtype_override=torch.float64)
    emitted = 0
    for schedule in derive(region):
        try:
            block = block_graph(schedule, tiles(schedule, size), "kernel")
        except NotFusible:
            continue
        assert check_graph(block) == []
        assert parse_graph(print_graph(block)) == block
        results = place(schedule, block, region.inputs)
        candidate = substitute(graph, dict(zip(region.outputs, results, strict=True)))
        got = run_reference(candidate, values, dtype_override=torch.float64)
        for x, y in zip(got, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
        emitted += 1
    assert emitted > 0


@pytest.mark.parametrize("name", ["gqa", "causal_gqa", "window", "squares", "loss"])
def test_running_maxima_make_one_pass(name: str) -> None:
    region = whole_region(prepared(PROGRAMS[name]))
    assert any(s.passes.count == 1 and s.passes.shifts for s in derive(region))


def test_without_the_rules_a_second_pass_is_needed() -> None:
    region = whole_region(expand(PROGRAMS["gqa"]))
    online = [s for s in derive(region) if s.passes.shifts]
    assert online
    assert all(s.passes.count == 2 for s in online)


@pytest.mark.parametrize(("name", "bounds"), [("causal_gqa", 1), ("window", 2), ("gqa", 0)])
def test_masks_bound_the_loop(name: str, bounds: int) -> None:
    region = whole_region(prepared(PROGRAMS[name]))
    schedule = next(s for s in derive(region) if s.passes.shifts)
    block = block_graph(schedule, tiles(schedule, 8), "kernel")
    assert [len(axis.bounds) for axis in block.loops] == [bounds]


def shifted(kind: str) -> Graph:
    """Exponentials of differences to a maximum, of rows that may be -inf alone."""
    x, v = b.input_("x", (6, 24)), b.input_("v", (24, 5))
    top = b.reduce_max(x, -1)
    if kind == "guarded":
        top = b.finite_or_zero(top)
    e = b.exp(b.sub(x, top))
    total = b.reduce_sum(e, -1)
    made = {
        "sum": [total],
        "guarded": [total, b.matmul(e, v)],
        "logarithm": [b.add(b.log(total), top)],
        "product": [b.matmul(e, v)],
        "quotient": [b.matmul(b.div(e, total), v)],
        "divisor": [b.div(b.matmul(e, v), b.add(total, 1e-6))],
        "scaled": [b.reduce_sum(b.exp(b.sub(b.mul(x, 2.0), b.mul(top, 2.0))), -1)],
        "chosen": [b.reduce_sum(b.where(b.gt(x, 0.0), e, 0.0), -1)],
        "another": [b.reduce_sum(b.exp(b.sub(b.neg(x), top)), -1)],
    }[kind]
    return b.kernel_graph("shifted", b.graph_inputs(made), made)


@pytest.mark.parametrize(
    "kind", ["sum", "guarded", "logarithm", "product", "quotient", "divisor", "scaled"]
)
def test_a_row_without_a_maximum_is_what_it_is_in_the_program(kind: str) -> None:
    graph = shifted(kind)
    values = tensors(graph)
    values[0][2] = values[0][3, :10] = values[0][4, 20] = -inf
    values[0][5, 12] = inf
    wanted = run_reference(graph, values, dtype_override=torch.float64)
    graph = prepared(graph)
    region = whole_region(graph)
    online = [s for s in derive(region) if s.passes.shifts]
    assert online
    for schedule in online:
        block = block_graph(schedule, tiles(schedule, 8), "kernel")
        kept = any(n.op is tile.ACCUM_LAST for n in block.nodes())
        assert kept == (kind not in ("guarded", "quotient")), "a quotient is NaN by itself"
        results = place(schedule, block, region.inputs)
        candidate = substitute(graph, dict(zip(region.outputs, results, strict=True)))
        found = run_reference(expand(candidate), values, dtype_override=torch.float64)
        torch.testing.assert_close(found, wanted, equal_nan=True)


@pytest.mark.parametrize("kind", ["chosen", "another"])
def test_no_running_maximum_where_a_row_without_one_may_be_anything(kind: str) -> None:
    assert not any(s.passes.shifts for s in derive(whole_region(shifted(kind))))


def test_squared_weights_rescale_by_the_square() -> None:
    region = whole_region(prepared(PROGRAMS["squares"]))
    schedule = next(s for s in derive(region) if s.passes.shifts)
    block = block_graph(schedule, tiles(schedule, 8), "kernel")
    powers = {n.attrs.power for n in block.nodes() if n.op is tile.ACCUM_RESCALED}
    assert powers == {1, 2}


def test_a_sum_over_the_shifted_values_is_not_online() -> None:
    # sum(x - max(x)) depends on the shift additively: rescaling cannot repair it
    x = b.input_("x", (4, 20))
    graph = b.kernel_graph("g", [x], [b.reduce_sum(b.sub(x, b.reduce_max(x, -1)), -1)])
    looped = [s for s in derive(whole_region(graph)) if s.loop is not None]
    assert looped
    assert all(not s.passes.shifts and s.passes.count == 2 for s in looped)


def test_what_grows_with_the_maximum_is_not_online() -> None:
    # exp(max(x) - x) is inf before the first maximum, and nothing scales that back
    x = b.input_("x", (4, 20))
    grown = b.exp(b.sub(b.reduce_max(x, -1), x))
    graph = b.kernel_graph("g", [x], [b.reduce_sum(grown, -1)])
    assert all(not s.passes.shifts for s in derive(whole_region(graph)))


def test_stored_weights_need_the_final_maximum() -> None:
    x = b.input_("x", (4, 20))
    e = b.exp(b.sub(x, b.reduce_max(x, -1)))
    graph = b.kernel_graph("g", [x], [e, b.reduce_sum(e, -1)])
    looped = [s for s in derive(whole_region(graph)) if s.loop is not None]
    assert all(not s.passes.shifts for s in looped)


def test_merged_and_split_heads_share_atoms() -> None:
    graph = prepared(PROGRAMS["heads"])
    region = whole_region(graph)
    space = analyse(region.inputs, region.body)
    assert [space.extent(a) for a in space.atoms(region.outputs[0])] == [2, 4, 10, 6]


@pytest.mark.parametrize(
    ("make", "extents"),
    [
        (lambda x: b.mul(x, b.mean(x, (-2, -1))), [15, 42]),
        (lambda x: b.div(b.exp(x), b.reduce_sum(b.exp(x), -3)), [3, 5, 42]),
        (lambda x: b.exp(x), [630]),
        # together in one tensor and not in another, or numbered along one of them
        (lambda x: b.mul(x, b.input_("w", (1, 1, 1, 7))), [90, 7]),
        (lambda x: b.where(b.ge(b.iota((1, 1, 1, 7), -1), 3), x, 0.0), [90, 7]),
        # not next to each other in memory
        (lambda x: b.exp(b.permute(x, (0, 2, 3, 1))), [3, 42, 5]),
        (lambda x: b.exp(b.slice_(b.input_("y", (3, 5, 6, 9)), -1, 0, 7)), [90, 7]),
    ],
)
def test_short_indices_that_always_come_together_are_one(
    make: Callable[[Node], Node], extents: list[int]
) -> None:
    result = make(b.input_("x", (3, 5, 6, 7)))
    inputs = [n for n in topological([result]) if n.op is leaf.INPUT]
    graph = b.kernel_graph("g", inputs, [result])
    schedule = derive(make_region(graph, [n for n in graph.nodes() if is_compute(n)]))[0]
    space = schedule.space
    assert [space.extent(a) for a in space.atoms(schedule.region.outputs[0])] == extents


def test_long_indices_stay_apart() -> None:
    x = b.input_("x", (30, 1024))
    (schedule,) = derive(whole_region(b.kernel_graph("g", [x], [b.exp(x)])))
    assert len(schedule.grid) == 2


def test_a_reshape_that_cuts_across_dims_is_no_kernel() -> None:
    x = b.input_("x", (6, 4))
    y = b.reshape(b.exp(x), (8, 3))
    z = b.mul(b.reduce_sum(y, -1), 2.0)
    graph = b.kernel_graph("g", [x], [z])
    assert derive(whole_region(graph)) == []


def test_steps_of_orthogonalization_are_no_kernel_once_copies_multiply() -> None:
    # each step reads what the last one made by row and by column, in both factors
    x = b.input_("x", (20, 30))
    made: Node = x
    sizes = []
    for _ in range(4):
        square = b.matmul(made, b.permute(made, (1, 0)))
        made = b.matmul(b.add(square, b.matmul(square, square)), made)
        found = derive(whole_region(b.kernel_graph("g", [x], [made])))
        sizes.append(len(found[0].region.body) if found else 0)
    assert sizes[0] > 0
    assert sizes[-1] == 0
    assert max(sizes) < 60


def test_a_tensor_read_by_row_and_by_column_is_read_twice() -> None:
    region = whole_region(prepared(PROGRAMS["square_layer"]))
    schedules = derive(region)
    assert {tuple(sorted(s.reads)) for s in schedules} == {(0, 0, 1, 2)}
    assert any(s.loop is not None for s in schedules)


def test_a_value_read_by_row_and_by_column_is_computed_twice() -> None:
    region = whole_region(prepared(PROGRAMS["gated_residual"]))
    schedule = derive(region)[0]
    assert len(schedule.region.body) == len(region.body) + 1
    assert not schedule.space.diagonal((*schedule.region.inputs, *schedule.region.body))


def test_a_diagonal_that_no_second_reading_avoids_is_no_kernel() -> None:
    # rows and columns of one table of indices, which is no tensor in memory
    x = b.input_("x", (8, 8))
    index = b.iota((8, 8), -1, DType.F32)
    graph = b.kernel_graph("g", [x], [b.matmul(b.mul(x, index), index)])
    assert derive(whole_region(graph)) == []


def test_every_output_index_may_be_split() -> None:
    region = whole_region(prepared(PROGRAMS["norm_linear"]))
    schedule = derive(region)[0]
    assert [schedule.space.extent(a) for a in schedule.grid] == [9, 30]
    assert set(schedule.roles.values()) <= set(Role)


def test_a_reduction_of_another_kernel_is_an_input_like_any_other() -> None:
    x = b.input_("x", (8, 64))
    shift = b.reduce_max(b.mul(x, 2.0), -1)
    weight = b.exp(b.sub(x, shift))
    graph = b.kernel_graph("g", [x], [b.div(weight, b.reduce_sum(weight, -1))])
    rest = [n for n in graph.nodes() if is_compute(n) and n not in topological([shift])]
    region = make_region(graph, rest)
    assert shift in region.inputs
    looped = [s for s in derive(region) if s.loop is not None]
    assert looped
    for schedule in looped:
        assert block_graph(schedule, dict.fromkeys(schedule.roles, 4), "g").loops


def test_tensors_read_twice_stay_apart() -> None:
    """Second readings of two results of one type are two tensors."""
    x, y, w = b.input_("x", (8, 16)), b.input_("y", (8, 16)), b.input_("w", (16, 16))
    first, second = b.exp(x), b.exp(y)
    product = b.sub(first, second)
    result = b.add(product, b.matmul(product, w))
    original = b.kernel_graph("twice", [x, y, w], [result])
    region = make_region(original, [product, result, *result.inputs])
    for schedule in derive(region):
        for _, tiles in best_tiles(schedule, Target(), 1):
            placed = place(schedule, block_graph(schedule, tiles, "kernel"), region.inputs)
            candidate = substitute(original, dict(zip(region.outputs, placed, strict=True)))
            assert verify_field(original, candidate, seed=1)


def test_what_reads_only_the_final_maximum_leaves_it_a_running_one() -> None:
    x = b.input_("x", (8, 64))
    top = b.reduce_max(x, -1)
    total = b.reduce_sum(b.exp(b.sub(x, top)), -1)
    graph = b.kernel_graph("g", [x], [b.where(b.eq(top, 3.0), top, b.add(top, b.log(total)))])
    (looped,) = [s for s in derive(whole_region(graph)) if s.loop is not None]
    assert looped.passes.count == 1
    assert looped.passes.shifts


@pytest.mark.parametrize("joined", [True, False])
def test_a_joined_dim_that_is_split_afterwards_is_no_kernel(joined: bool) -> None:
    x = b.input_("x", (12, 32))
    parts = [b.slice_(x, -2, 3, 12), b.slice_(x, -2, 0, 3)]
    rolled = b.concat(parts, -2) if joined else b.exp(x)
    windows = b.exp(b.reshape(rolled, (3, 4, 32)))
    schedules = derive(whole_region(b.kernel_graph("windows", [x], [windows])))
    assert bool(schedules) != joined
    for schedule in schedules:
        assert block_graph(schedule, dict.fromkeys(schedule.roles, 4), "windows")


def test_columns_merged_from_two_dims_may_be_taken_one_row_at_a_time() -> None:
    x, w = b.input_("x", (32, 64)), b.input_("w", (8, 64, 256))
    merged = b.reshape(b.permute(w, (1, 0, 2)), (64, 8 * 256))
    product = b.reshape(b.matmul(x, merged), (32, 8, 256))
    graph = b.kernel_graph("experts", [x, w], [b.exp(product)])
    members = [n for n in graph.nodes() if n.op in (contraction.MATMUL, elementwise.EXP)]
    schedule = derive(make_region(graph, members))[0]
    found = {schedule.space.extent(a): sizes for a, sizes in choices(schedule, Target()).items()}
    assert 1 in found[8]
    assert 256 in found[256]


def test_blocks_of_a_linear_layer_share_columns_evenly_and_transpose_weights_once() -> None:
    x, w = b.input_("x", (300, 520)), b.input_("w", (777, 520))
    graph = b.kernel_graph("linear", [x, w], [b.matmul(x, b.transpose(w))])
    (schedule,) = [s for s in derive(whole_region(graph)) if s.loop is None]
    ((_, tiles),) = best_tiles(schedule, Target(), 1)
    extents = {schedule.space.extent(a): size for a, size in tiles.items()}
    assert extents == {300: 300, 777: 400}


@pytest.mark.parametrize(("size", "alone"), [(64, True), (1 << 16, False)])
def test_few_elements_wake_no_other_thread(size: int, alone: bool) -> None:
    x = b.input_("x", (size,))
    graph = b.kernel_graph("g", [x], [b.tanh(x)])
    (schedule,) = derive(make_region(graph, filter(is_compute, graph.nodes())))
    (atom,) = schedule.roles
    _, tiles = best_tiles(schedule, Target(), 1)[0]
    assert (tiles[atom] >= size) is alone


def test_what_pairs_of_rows_make_stays_in_registers() -> None:
    """However large their tile; vectors lie along the second rows, and are to be full."""
    x, y = b.input_("x", (389, 1, 37)), b.input_("y", (1, 517, 37))
    total = b.reduce_sum(b.abs_(b.mul(b.sub(x, y), 0.5)), -1)
    schedules = derive(whole_region(b.kernel_graph("apart", [x, y], [b.exp(b.neg(total))])))
    (schedule,) = [s for s in schedules if s.loop is None]
    first, second = sorted(schedule.grid, key=schedule.space.extent)
    model = KernelModel(schedule, Target(vector_lanes=16))
    seconds = {
        (i, j): model.seconds({first: i, second: j}) for i, j in ((195, 259), (8, 130), (195, 8))
    }
    assert seconds[195, 259] < seconds[8, 130]
    assert seconds[195, 8] > 1.5 * seconds[195, 259]


def test_widened_numbers_leave_a_kernel_rounded() -> None:
    """Their largest, found by another kernel, is among them: whoever compares with it rounds as the program does."""
    x, w = b.input_("x", (8, 16), DType.BF16), b.input_("w", (16, 8), DType.BF16)
    graph = b.kernel_graph("wide", [x, w], [b.cast(b.matmul(x, w), DType.F32)])
    values = [t.bfloat16() for t in tensors(graph)]
    region = whole_region(graph)
    for schedule in derive(region):
        block = block_graph(schedule, tiles(schedule, 8), "kernel")
        results = place(schedule, block, region.inputs)
        candidate = substitute(graph, dict(zip(region.outputs, results, strict=True)))
        (found,) = run_reference(candidate, values)
        assert torch.equal(found, found.bfloat16().float())


def test_nothing_has_no_schedule() -> None:
    x = b.input_("x", (0, 4), DType.F32)
    for y in (b.add(b.mul(x, 2.0), 1.0), b.reduce_sum(b.mul(x, 2.0), -2)):
        assert derive(whole_region(b.kernel_graph("empty", [x], [y]))) == []
