"""Partitions are legal and cover the program; the cost model orders what is plainly ordered."""

from dataclasses import replace
from math import inf
from random import Random
from unittest import mock

import networkx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction, elementwise, library, structural
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.ir.types import DType
from superopt.search.algebra import FUSION_RULES, apply_rules, with_gathers
from superopt.search.cost import KernelModel, library_cost
from superopt.search.partition import _Partition, is_compute, partition
from superopt.search.region import extract, is_leaf, is_view, make_region, substitute, view_type
from superopt.search.schedule import derive
from superopt.search.tiling import best_tiles, choices
from superopt.search.transposes import laid_out
from tests.search.programs import PROGRAMS

MACHINE = Target()


def prepared(graph: Graph) -> Graph:
    return apply_rules(expand(graph), FUSION_RULES)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("most", [None, 1, 0])
def test_groups_cover_every_op_once(name: str, most: int | None) -> None:
    graph = prepared(PROGRAMS[name])
    groups = partition(graph, MACHINE, products=most)
    nodes = [n for group in groups for n in group]
    assert len(nodes) == len(set(nodes))
    assert set(nodes) == {n for n in topological(graph.outputs) if is_compute(n)}
    for group in groups:
        products = [n for n in group if n.op is contraction.MATMUL]
        assert most is None or len(products) <= 1
        assert most != 0 or not products or len(group) == 1
        if len(group) > 1:
            assert derive(make_region(graph, group))


def test_attention_becomes_one_kernel() -> None:
    assert len(partition(prepared(PROGRAMS["causal_gqa"]), MACHINE)) == 1


def test_the_last_division_of_attention_stays_inside_at_any_size() -> None:
    # also where the choices of tiles are so many that they are thinned
    q, k, v = (b.input_(name, (4, 2048, 64)) for name in "qkv")
    scores = b.mul(b.matmul(q, b.transpose(k)), 0.125)
    shifted = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    out = b.div(b.matmul(shifted, v), b.reduce_sum(shifted, -1))
    (group,) = partition(b.kernel_graph("attention", [q, k, v], [out]), MACHINE)
    # one division for all that share it: it costs little more than a product
    (schedule,) = (
        s
        for s in derive(make_region(b.kernel_graph("a", [q, k, v], [out]), group))
        if s.passes.shifts
    )
    seconds, tiles = best_tiles(schedule, MACHINE, 1)[0]
    with mock.patch.dict("superopt.search.cost._SLOW", {elementwise.DIV: 600.0}):
        assert KernelModel(schedule, MACHINE).seconds(tiles) == seconds


def test_a_loss_reads_its_label_in_its_own_kernel() -> None:
    graph = apply_rules(expand(PROGRAMS["loss"]), with_gathers(FUSION_RULES))
    (group,) = partition(graph, MACHINE)
    assert structural.GATHER in {n.op for n in group}
    (loop,) = [s for s in derive(make_region(graph, group)) if s.loop is not None]
    assert len(loop.reads) == len(loop.region.inputs) == 3  # the logits at the label, apart


def test_an_embedding_is_read_in_the_kernel_of_its_norm() -> None:
    table, index = b.input_("w", (1000, 64)), b.input_("i", (7, 30), DType.I64)
    rows = b.take(table, index, 0)
    norm = b.div(rows, b.sqrt(b.reduce_sum(b.mul(rows, rows), -1)))
    graph = b.kernel_graph("norm", [table, index], [norm])
    (group,) = partition(apply_rules(graph, with_gathers(FUSION_RULES)), MACHINE)
    assert structural.GATHER in {n.op for n in group}
    # elsewhere it stays the library's
    assert len(partition(apply_rules(graph, FUSION_RULES), MACHINE)) == 2


@pytest.mark.parametrize("heads_last", [False, True])
def test_a_bias_chosen_from_a_table_is_made_once_for_all_that_read_it(heads_last: bool) -> None:
    table = b.input_("t", (732, 8) if heads_last else (8, 732))
    index = b.input_("i", (197, 197), DType.I64)
    q, k, v = (b.input_(name, (16, 8, 197, 64)) for name in "qkv")
    bias = b.take(table, b.where(b.lt(index, 0), 0, index), 0 if heads_last else -1)
    bias = b.permute(bias, (2, 0, 1)) if heads_last else bias
    scores = b.add(b.matmul(q, b.transpose(k)), bias)
    shifted = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    out = b.div(b.matmul(shifted, v), b.reduce_sum(shifted, -1))
    graph = b.kernel_graph("g", [table, index, q, k, v], [out])
    graph = laid_out(apply_rules(graph, with_gathers(FUSION_RULES)))
    first, second = partition(graph, MACHINE)
    copied = {elementwise.CAST} if heads_last else set()
    assert {n.op for n in first} == {elementwise.LT, elementwise.WHERE, structural.GATHER} | copied
    assert contraction.MATMUL in {n.op for n in second}


def test_a_library_node_stays_alone() -> None:
    x, w = b.input_("x", (1, 3, 8, 8)), b.input_("w", (4, 3, 3, 3))
    attrs = library.ConvAttrs((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    conv = make(library.CONV, (b.exp(x), w), attrs)
    graph = b.kernel_graph("g", [x, w], [b.mul(b.sigmoid(conv), conv)])
    groups = partition(graph, MACHINE)
    assert frozenset([conv]) in groups
    assert len(groups) == 3


def test_a_group_is_convex() -> None:
    # merging the first and the last op around the convolution would make a cycle
    x, w = b.input_("x", (1, 3, 8, 8)), b.input_("w", (3, 3, 1, 1))
    attrs = library.ConvAttrs((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    y = b.exp(x)
    z = b.add(make(library.CONV, (y, w), attrs), y)
    groups = partition(b.kernel_graph("g", [x, w], [z]), MACHINE)
    assert {frozenset([y]), frozenset([z])} <= set(groups)


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=12), st.integers(0, 9))
@example([(0, 1), (0, 1)], 0)  # exp(x) and exp(y), both read twice: two pairs that need each other
@settings(max_examples=60)
def test_no_two_groups_need_each_other(reads: list[tuple[int, int]], seed: int) -> None:
    inputs = [b.input_(name, (4,)) for name in "xy"]
    nodes = [b.exp(i) for i in inputs]
    for first, second in reads:
        op = b.add if len(nodes) % 2 else b.mul
        nodes.append(op(nodes[first % len(nodes)], nodes[second % len(nodes)]))
    graph = b.kernel_graph("g", inputs, nodes)
    # any costs will do: whatever is gained by merging, the result must be runnable
    draw = Random(seed)
    with mock.patch.object(_Partition, "_estimate", side_effect=lambda group: draw.random()):
        groups = partition(graph, MACHINE)
    owner = {n: g for g in groups for n in g}
    needs = networkx.DiGraph(
        (owner[i], owner[n]) for n in owner for i in n.inputs if i in owner and owner[i] != owner[n]
    )
    assert networkx.is_directed_acyclic_graph(needs)


def test_a_replacement_that_needs_itself_is_refused() -> None:
    x = b.input_("x", (4,))
    first, second = b.exp(x), b.neg(x)
    graph = b.kernel_graph("g", [x], [first, second])
    with pytest.raises(GraphError, match="needs its own result"):
        substitute(graph, {first: b.neg(second), second: b.exp(first)})


def test_views_are_free_and_masks_are_leaves() -> None:
    x = b.input_("x", (4, 6))
    assert is_view(b.transpose(x))
    assert not is_view(b.reshape(b.transpose(x), (24,)))
    kind = view_type(b.slice_(b.transpose(x), -2, 1, 5, 2))
    assert kind is not None
    assert kind.element_strides == (2, 6)
    mask = b.ge(b.iota((4, 1), -2), b.iota((1, 6), -1))
    assert is_leaf(mask)
    assert not is_leaf(b.where(mask, x, 0.0))


def test_a_broadcast_view_has_stride_zero() -> None:
    x = b.input_("x", (4, 1))
    kind = view_type(b.broadcast(x, (4, 5)))
    assert kind is not None
    assert kind.strides == (1, 0)


def test_extract_makes_a_program_of_a_region() -> None:
    graph = prepared(PROGRAMS["norm_linear"])
    group = max(partition(graph, MACHINE), key=len)
    part = extract(make_region(graph, group), "part")
    assert all(n.op.name != "matmul" or n.shape == (9, 30) for n in part.nodes())
    assert len(part.outputs) == len(make_region(graph, group).outputs)


def schedules(shape: tuple[int, int, int]) -> list[float]:
    m, k, n = shape
    x, w = b.input_("x", (m, k)), b.input_("w", (k, n))
    graph = b.kernel_graph("g", [x, w], [b.matmul(x, w)])
    region = make_region(graph, [graph.outputs[0]])
    return [best_tiles(s, MACHINE, 1)[0][0] for s in derive(region)]


def test_cost_grows_with_work() -> None:
    small, large = schedules((64, 256, 256)), schedules((64, 512, 512))
    assert all(a < c for a, c in zip(small, large, strict=True))
    assert all(c < inf for c in large)


def test_one_block_costs_more_than_two_on_two_cores() -> None:
    x = b.input_("x", (512, 4096))
    graph = b.kernel_graph("g", [x], [b.exp(x)])
    schedule = derive(make_region(graph, [graph.outputs[0]]))[0]
    rows, columns = schedule.grid
    one = KernelModel(schedule, MACHINE).seconds({rows: 512, columns: 4096})
    two = KernelModel(schedule, MACHINE).seconds({rows: 256, columns: 4096})
    assert two < one


def test_weights_that_both_cores_read_come_from_memory_twice() -> None:
    x, w = b.input_("x", (16, 4096)), b.input_("w", (4096, 4096))
    graph = b.kernel_graph("g", [x, w], [b.matmul(x, w)])
    schedule = derive(make_region(graph, [graph.outputs[0]]))[0]
    rows, columns = schedule.grid
    slow = replace(MACHINE, memory_bandwidth=1e9)
    by_rows = KernelModel(schedule, slow).seconds({rows: 8, columns: 4096})
    by_columns = KernelModel(schedule, slow).seconds({rows: 16, columns: 2048})
    assert by_rows > 1.9 * by_columns
    # four blocks of columns, each core takes two of one half of the rows
    in_turn = KernelModel(schedule, slow).seconds({rows: 8, columns: 1024})
    assert in_turn > 1.9 * by_columns


def test_a_result_that_outgrows_the_cache_is_read_again_for_every_stretch_of_a_product() -> None:
    x, w = b.input_("x", (2048, 2048), DType.BF16), b.input_("w", (2048, 2048), DType.BF16)
    g = b.kernel_graph("gram", [x, w], [b.abs_(b.matmul(x, w))])
    region = make_region(g, [n for n in g.nodes() if is_compute(n)])
    (schedule,) = [s for s in derive(region) if s.loop is None]

    def seconds(cache_bytes: int) -> float:
        machine = replace(MACHINE, inner_cache_bytes=cache_bytes)
        return KernelModel(schedule, machine).seconds(dict.fromkeys(schedule.grid, 1024))

    once = 4.0 * 2048 * 2048 / MACHINE.cache_bandwidth / MACHINE.cores
    assert seconds(2 << 20) - seconds(1 << 30) > 3 * once


def test_tiles_that_cut_vectors_and_lines_cost_more() -> None:
    x = b.input_("x", (8209, 129))
    graph = b.kernel_graph("g", [x], [b.reduce_sum(x, -2)])
    region = make_region(graph, [graph.outputs[0]])
    (schedule,) = (s for s in derive(region) if s.loop is None)
    (columns,) = schedule.grid
    narrow, wide = (KernelModel(schedule, MACHINE).seconds({columns: n}) for n in (4, 16))
    assert narrow > 1.5 * wide
    # rows of four are read whole
    thin = b.kernel_graph("g", [y := b.input_("y", (8209, 4))], [b.reduce_sum(y, -2)])
    (schedule,) = (s for s in derive(make_region(thin, [thin.outputs[0]])) if s.loop is None)
    assert KernelModel(schedule, MACHINE).seconds(dict.fromkeys(schedule.grid, 4)) < wide


def test_choices_stay_inside_the_extents() -> None:
    for graph in PROGRAMS.values():
        ready = prepared(graph)
        for group in partition(ready, MACHINE):
            for schedule in derive(make_region(ready, group)):
                for atom, options in choices(schedule, MACHINE).items():
                    assert all(1 <= o <= schedule.space.extent(atom) for o in options)


def test_a_copy_is_charged_by_its_bytes() -> None:
    x = b.input_("x", (1 << 12, 1 << 12))
    turned = b.reshape(b.transpose(x), (1 << 24,))
    node: Node = turned
    assert node.op is structural.RESHAPE
    assert library_cost(node, MACHINE) > x.tensor.size_bytes / MACHINE.memory_bandwidth


def test_halves_that_are_joined_again_become_one_kernel() -> None:
    """A rotary embedding: a joined dim has its own extent, not the product with those of its parts."""
    x, c, s = b.input_("x", (8, 64, 32)), b.input_("c", (64, 32)), b.input_("s", (64, 32))
    turned = b.concat([b.neg(b.slice_(x, -1, 16, 32)), b.slice_(x, -1, 0, 16)], -1)
    graph = b.kernel_graph("g", [x, c, s], [b.add(b.mul(x, c), b.mul(turned, s))])
    ready = prepared(graph)
    assert len(partition(ready, MACHINE)) == 1


def test_views_of_one_tensor_are_read_from_memory_once() -> None:
    x = b.input_("x", (2048, 4096))
    whole = b.kernel_graph("g", [x], [b.mul(x, x)])
    halves = [b.slice_(x, -1, 0, 4096), b.slice_(x, -1, 0, 2048), b.slice_(x, -1, 2048, 4096)]
    parts = b.kernel_graph("g", [x], [b.add(halves[0], b.concat(halves[1:], -1))])
    costs = [
        best_tiles(derive(make_region(g, [n for n in g.nodes() if is_compute(n)]))[0], MACHINE, 1)
        for g in (whole, parts)
    ]
    assert costs[1][0][0] < 1.5 * costs[0][0][0]


def test_rows_that_two_groups_read_are_read_by_one() -> None:
    anchor, near, far = (b.input_(name, (4099, 509)) for name in ("anchor", "near", "far"))
    apart = [b.sub(anchor, other) for other in (near, far)]
    lengths = [b.sqrt(b.reduce_sum(b.mul(d, d), -1)) for d in apart]
    graph = b.kernel_graph("triplet", [anchor, near, far], lengths)
    assert len(partition(graph, Target())) == 1


def test_no_group_contains_a_refused_one() -> None:
    x, w = b.input_("x", (64, 256)), b.input_("w", (256, 32))
    value = b.exp(b.matmul(b.div(b.exp(x), b.reduce_sum(b.exp(x), -1)), w))
    ready = prepared(b.kernel_graph("g", [x, w], [value]))
    (whole,) = partition(ready, MACHINE)
    refused = frozenset(sorted(whole, key=lambda n: n.op.name)[:2])
    found = partition(ready, MACHINE, refused=[refused])
    assert frozenset().union(*found) == whole
    assert len(found) > 1
    assert not any(refused <= group for group in found)


def test_what_lies_between_two_groups_is_merged_with_them() -> None:
    """Linear attention: a constant is added to the divisor after one product, before the quotient after the other."""
    q, k, v = (b.input_(n, (16, 2053, 64)) for n in "qkv")
    q_, k_ = (b.add(b.exp(x), 1.0) for x in (q, k))
    turned = b.permute(k_, (0, 2, 1))
    norm = b.matmul(q_, b.permute(b.reduce_sum(k_, -2), (0, 2, 1)))
    result = b.div(b.matmul(q_, b.matmul(turned, v)), b.add(norm, 1e-6))
    found = partition(prepared(b.kernel_graph("g", [q, k, v], [result])), MACHINE, products=2)
    first, second = ([n.shape for n in g if n.op is contraction.MATMUL] for g in found)
    assert first == [(16, 64, 64)]
    assert sorted(second) == [(16, 2053, 1), (16, 2053, 64)]


def test_a_boundary_lies_where_a_kernel_ends_best() -> None:
    """Pairs merged GELU into the second product; the first one does with it what others would read again."""
    x, w, v, c, d = (
        b.input_(n, s)
        for n, s in zip(
            "xwvcd", [(128, 768), (768, 3072), (3072, 768), (1, 3072), (1, 768)], strict=True
        )
    )
    y = b.add(b.matmul(x, w), c)
    gelu = b.mul(b.mul(y, 0.5), b.add(b.erf(b.mul(y, 0.7)), 1.0))
    last = b.add(x, b.add(b.matmul(gelu, v), d))
    first, second = partition(b.kernel_graph("g", [x, w, v, c, d], [last]), MACHINE, products=1)
    assert gelu in first
    assert len(second) == 3


def test_what_is_fetched_ahead_has_to_stay() -> None:
    """Rows at a multiple of a page compete for few places of a cache; a bias so wide takes few at once."""

    def more(columns: int, machine: Target = MACHINE) -> float:
        x, y, z = (
            b.input_(n, s)
            for n, s in [("x", (512, 16)), ("y", (16, columns)), ("z", (columns, 64))]
        )
        bias = b.input_("bias", (512, columns))
        graph = b.kernel_graph(
            "g", [x, y, z, bias], [b.matmul(b.exp(b.add(b.matmul(x, y), bias)), z)]
        )
        schedules = derive(make_region(graph, [n for n in graph.nodes() if is_compute(n)]))
        (schedule,) = (s for s in schedules if s.loop and s.space.extent(s.loop) == columns)
        model = KernelModel(schedule, machine)
        sizes = {512: 512, columns: 64, 64: 64, 16: 16}
        tiles = {a: sizes[schedule.space.extent(a)] for a in schedule.roles}
        (rows,) = (a for a in schedule.grid if schedule.space.extent(a) == 512)
        return model.seconds(tiles) / model.seconds({**tiles, rows: 128})

    assert more(4096) > 1.02 * more(4096 + 64)
    # a GPU fetches into registers and shared memory, which have no such places
    gpu = replace(MACHINE, kind="cuda", inner_cache_bytes=1 << 19)
    assert more(4096, gpu) == pytest.approx(more(4096 + 64, gpu), rel=0.02)


def test_cores_leave_each_other_nothing() -> None:
    """What both of two blocks of columns compute of rows costs twice what it does where rows are split."""
    x, w = b.input_("x", (256, 512)), b.input_("w", (512, 128))

    def seconds(left: Node, rows: int, columns: int) -> float:
        graph = b.kernel_graph("g", [x, w], [b.matmul(left, w)])
        region = make_region(graph, [n for n in graph.nodes() if is_compute(n)])
        schedule = next(s for s in derive(region) if s.loop)
        sizes = {512: 64, 256: rows, 128: columns}
        tiles = {a: sizes[schedule.space.extent(a)] for a in schedule.roles}
        return KernelModel(schedule, MACHINE).seconds(tiles)

    computed = b.sigmoid(x)
    by_rows, by_columns = (seconds(computed, *t) - seconds(x, *t) for t in ((128, 128), (256, 64)))
    assert by_columns > 1.9 * by_rows


def test_what_accumulates_under_a_running_maximum_is_rescaled_every_time() -> None:
    """Few keys per iteration cost more; a tile of a quarter of the second cache does not leave it yet."""
    q, k, v = (b.input_(n, (4, 2048, 64)) for n in "qkv")
    scores = b.matmul(q, b.transpose(k))
    p = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    graph = b.kernel_graph("g", [q, k, v], [b.div(b.matmul(p, v), b.reduce_sum(p, -1))])
    region = make_region(graph, [n for n in graph.nodes() if is_compute(n)])
    schedule = next(s for s in derive(region) if s.passes.shifts)
    model = KernelModel(schedule, MACHINE)
    (rows,) = (a for a in schedule.grid if schedule.space.extent(a) == 2048)
    assert schedule.loop is not None

    def seconds(queries: int, keys: int) -> float:
        sizes = {a: {4: 1}.get(schedule.space.extent(a), 64) for a in schedule.roles}
        return model.seconds({**sizes, rows: queries, schedule.loop: keys})

    assert seconds(256, 32) > 1.01 * seconds(256, 64)
    assert MACHINE.inner_cache_bytes // 4 == 4 * 256 * 256
    assert seconds(256, 256) < 1.02 * seconds(256, 128)


@pytest.mark.parametrize(("computed", "share"), [(False, 0.92), (True, 0.6)])
def test_blocks_leave_operands_to_each_other(computed: bool, share: float) -> None:
    """With matrix tiles, operands in pairs are made once for all blocks: few rows cost little more."""

    def more(machine: Target) -> float:
        x, y = (b.input_(n, (4, 2048, 64), DType.BF16) for n in "xy")
        right = b.mul(y, b.sigmoid(y)) if computed else y
        graph = b.kernel_graph("g", [x, y], [b.matmul(x, b.transpose(right))])
        region = make_region(graph, [n for n in graph.nodes() if is_compute(n)])
        (schedule,) = (s for s in derive(region) if s.loop is None)
        model, extents = KernelModel(schedule, machine), schedule.space.extent
        batch, rows, columns = schedule.grid
        assert [extents(a) for a in schedule.grid] == [4, 2048, 2048]
        tiles = {batch: 1, rows: 1024, columns: 2048}
        return model.seconds({**tiles, rows: 64}) / model.seconds(tiles)

    rate = MACHINE.peak_flops
    with_tiles, without = (replace(MACHINE, half_flops=f * rate) for f in (1.001, 1.0))
    assert more(with_tiles) < share * more(without)


def test_blocks_leave_sizes_of_rows_to_each_other() -> None:
    """A size per key, in a loop over keys, is computed by the first block of a head; others find it."""
    q, k = b.input_("q", (4, 512, 64)), b.input_("k", (4, 2048, 64))
    size = b.reduce_sum(b.sigmoid(k), -1)

    def seconds(scores: Node) -> float:
        graph = b.kernel_graph("g", b.graph_inputs([scores]), [b.reduce_sum(b.exp(scores), -1)])
        region = make_region(graph, [n for n in graph.nodes() if is_compute(n)])
        schedule = next(s for s in derive(region) if s.loop and s.space.extent(s.loop) == 2048)
        model, extents = KernelModel(schedule, MACHINE), schedule.space.extent
        tiles = {a: {4: 1, 2048: 128, 512: 128}.get(extents(a), 64) for a in schedule.roles}
        return model.seconds(tiles)

    scores, given = b.matmul(q, b.transpose(k)), b.input_("size", (4, 1, 2048))
    assert seconds(b.mul(scores, b.transpose(size))) < 1.1 * seconds(b.mul(scores, given))


def test_dear_operators_are_dear_in_the_library_too() -> None:
    """A sigmoid looked cheaper alone than in the kernel that reads it, which counts what it takes."""
    x = b.input_("x", (1 << 20,))
    assert library_cost(b.sigmoid(x), MACHINE) > 1.3 * library_cost(b.neg(x), MACHINE)
    logits, target = (
        b.input_("logits", (64, 4099), DType.BF16),
        b.input_("t", (64, 4099), DType.BF16),
    )
    p = b.sigmoid(logits)
    loss = b.reduce_sum(b.add(b.mul(p, target), b.mul(b.sub(1.0, p), b.sub(1.0, target))), -1)
    assert len(partition(b.kernel_graph("loss", [logits, target], [loss]), MACHINE)) == 1


def test_a_mask_given_by_blocks_is_made_whole_where_no_tile_of_it_is_one_of_its_blocks() -> None:
    q, k, v = (b.input_(name, (2, 61, 16)) for name in "qkv")
    blocks = b.input_("m", (1, 4, 4), DType.BOOL)
    repeated = b.broadcast(b.reshape(blocks, (1, 4, 1, 4, 1)), (1, 4, 16, 4, 16))
    mask = b.slice_(b.slice_(b.reshape(repeated, (1, 64, 64)), 1, 0, 61), 2, 0, 61)
    scores = b.where(mask, b.matmul(q, b.permute(k, (0, 2, 1))), b.constant(-1e30))
    shifted = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    out = b.div(b.matmul(shifted, v), b.reduce_sum(shifted, -1))
    graph = b.kernel_graph("attention", [q, k, v, blocks], [out])
    *_, attention = partition(graph, MACHINE)
    assert {n.op for n in attention} >= {
        elementwise.WHERE,
        contraction.REDUCE_MAX,
        contraction.MATMUL,
    }
    assert structural.SLICE not in {n.op for n in attention}  # of what lies in memory it is free
    assert any(s.passes.shifts for s in derive(make_region(graph, attention)))
