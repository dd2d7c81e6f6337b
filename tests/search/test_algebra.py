"""Each rule of algebra: where it fires, where it must not, and that both sides agree."""

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, elementwise
from superopt.ir.types import DType
from superopt.search.algebra import (
    BROADCAST_INTO_ELEMENTWISE,
    COMPUTED_GATHER_TO_SELECT,
    DOTS_TO_SUMS,
    FUSION_RULES,
    GATHER_BELOW_ELEMENTWISE,
    GATHER_TO_SELECT,
    MAXIMUM_OUT_OF_SHIFT,
    ONE_ABOVE_EXPM1,
    PRODUCT_OF_CONCAT,
    REDUCE_IN_PARTS,
    REDUCE_IN_STAGES,
    REDUCE_OF_CONCAT,
    SCALE_OUT_OF_CONTRACTION,
    SCALE_OUT_OF_SUM,
    SLICE_OF_CONCAT,
    TAKE_TO_GATHER,
    Rule,
    apply_rules,
)
from superopt.verify.reference import run_reference

x, y = b.input_("x", (5, 6)), b.input_("y", (6, 7))
label = b.input_("label", (5, 1), DType.I64)
row = b.reduce_sum(x, -1)
column = b.reduce_sum(y, -2)
bias = b.input_("bias", (1, 6))
place = b.input_("place", (), DType.I64)
places, rows = b.input_("places", (3, 4), DType.I64), b.input_("rows", (6, 7, 17))
sink = b.input_("sink", (5, 1))
joined = b.concat([sink, x], -1)
top = b.maximum(b.reduce_max(x, -1), sink)
deep = b.input_("deep", (3, 9, 11))
long = b.input_("long", (5, 7))
wide = b.input_("wide", (70, 3, 4))
tall = b.input_("tall", (3, 64, 9))
cache, new = b.input_("cache", (2, 8, 5)), b.input_("new", (2, 1, 5))
keys = b.concat([cache, b.exp(new)], -2)
many = b.input_("many", (2, 65, 5))
query, weights = b.input_("query", (4, 3, 5)), b.input_("weights", (2, 3, 9))
grouped = b.reshape(b.broadcast(b.reshape(keys, (2, 1, 9, 5)), (2, 2, 9, 5)), (4, 9, 5))
vast, prime = b.input_("vast", (1, 40000)), b.input_("prime", (2, 32771, 1))


def case(inputs: list[object], output: object) -> Graph:
    return b.kernel_graph("case", inputs, [output])  # type: ignore[list-item,arg-type]


small = b.elementwise_op(elementwise.EXPM1, x)
firsts, seconds = b.input_("firsts", (9, 1, 7)), b.input_("seconds", (9, 7, 1))
FIRES = [
    (DOTS_TO_SUMS, case([firsts, seconds], b.matmul(firsts, seconds))),
    (DOTS_TO_SUMS, case([firsts], b.matmul(firsts, b.transpose(firsts)))),
    (ONE_ABOVE_EXPM1, case([x], b.add(small, 1.0))),
    (ONE_ABOVE_EXPM1, case([x], b.add(b.cast(small, DType.BF16), 1.0))),
    (ONE_ABOVE_EXPM1, case([x], b.add(1.0, b.where(b.gt(x, 0.0), x, small)))),
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.mul(x, row), y))),
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.div(x, row), y))),
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(x, b.div(y, column)))),
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.mul(b.exp(x), row), b.mul(y, column)))),
    (SCALE_OUT_OF_SUM, case([x], b.reduce_sum(b.div(b.exp(x), row), -1))),
    (GATHER_TO_SELECT, case([x, label], b.gather(x, label, -1))),
    (COMPUTED_GATHER_TO_SELECT, case([x, label], b.gather(b.scan(x, -1, "sum"), label, -1))),
    (GATHER_BELOW_ELEMENTWISE, case([x, label], b.gather(b.sub(x, row), label, -1))),
    (GATHER_BELOW_ELEMENTWISE, case([x, bias, label], b.gather(b.sub(x, bias), label, -1))),
    (TAKE_TO_GATHER, case([rows, places], b.take(rows, places, -2))),
    (TAKE_TO_GATHER, case([rows, places], b.take(rows, places, 0))),
    (TAKE_TO_GATHER, case([rows, place], b.take(rows, place, 0))),
    (TAKE_TO_GATHER, case([rows, label], b.take(rows, b.reshape(label, (5,)), 1))),
    (TAKE_TO_GATHER, case([rows, places], b.take(b.transpose(rows), places, 0))),
    (TAKE_TO_GATHER, case([x, places], b.take(x, places, -1))),
    (REDUCE_IN_STAGES, case([deep], b.reduce_sum(deep, (-3, -2, -1)))),
    (REDUCE_IN_STAGES, case([deep], b.reduce_max(deep, (-2, -1)))),
    (REDUCE_IN_STAGES, case([tall], b.reduce_sum(b.exp(b.mul(tall, 2.0)), (-3, -2, -1)))),
    (REDUCE_IN_PARTS, case([vast], b.reduce_sum(b.mul(vast, vast), (-2, -1)))),
    (
        REDUCE_IN_PARTS,
        case([prime, vast], b.reduce_max(b.sub(b.exp(prime), b.reduce_max(vast, -1)), -2)),
    ),
    (REDUCE_OF_CONCAT, case([sink, x], b.reduce_sum(b.exp(b.sub(joined, row)), -1))),
    (REDUCE_OF_CONCAT, case([sink, x], b.reduce_max(b.mul(joined, joined), (-2, -1)))),
    (
        REDUCE_OF_CONCAT,
        case([sink, x, long], b.reduce_sum(b.mul(joined, b.add(long, joined)), -1)),
    ),
    # scores of a cache and a new key, values of both, heads that share them, and weights that are cut
    (PRODUCT_OF_CONCAT, case([query, cache, new], b.matmul(query, b.transpose(grouped)))),
    (PRODUCT_OF_CONCAT, case([weights, cache, new], b.matmul(weights, keys))),
    (
        PRODUCT_OF_CONCAT,
        case([weights, cache, new], b.matmul(b.transpose(keys), b.transpose(weights))),
    ),
    (
        PRODUCT_OF_CONCAT,
        case(
            [weights, cache, new],
            b.matmul(
                b.exp(b.concat([b.slice_(weights, -1, k, k + s) for k, s in ((0, 8), (8, 1))], -1)),
                keys,
            ),
        ),
    ),
    (SLICE_OF_CONCAT, case([sink, x], b.slice_(b.transpose(joined), -2, 2, 6, 2))),
    (SLICE_OF_CONCAT, case([cache, new], b.slice_(grouped, -2, 2, 6, 2))),
    (SLICE_OF_CONCAT, case([sink, x], b.slice_(joined, -1, 2, 6, 2))),
    (SLICE_OF_CONCAT, case([sink, x], b.slice_(b.div(joined, row), -1, 0, 1))),
    (BROADCAST_INTO_ELEMENTWISE, case([x, sink], b.div(x, b.broadcast(sink, (5, 6))))),
    (MAXIMUM_OUT_OF_SHIFT, case([x, sink], b.exp(b.sub(x, b.finite_or_zero(top))))),
    (MAXIMUM_OUT_OF_SHIFT, case([x, sink], b.exp(b.sub(x, top)))),
]
STAYS = [
    # a factor along the contracted dim cannot leave
    (
        SCALE_OUT_OF_CONTRACTION,
        case([x, y], b.matmul(b.mul(x, b.transpose(b.reduce_sum(y, -1))), y)),
    ),
    # a tensor in memory is read at the place
    (COMPUTED_GATHER_TO_SELECT, case([x, label], b.gather(b.transpose(b.transpose(x)), label, -1))),
    # what is computed has to be in memory whole, and a library moves single elements
    (TAKE_TO_GATHER, case([rows, places], b.take(b.exp(rows), places, 0))),
    # a plain input costs nothing inside the loop
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.mul(x, b.input_("r", (5, 1))), y))),
    (SCALE_OUT_OF_SUM, case([x], b.reduce_sum(b.div(b.exp(x), row), -2))),
    # one axis has no stages, and many results need none
    (REDUCE_IN_STAGES, case([x], b.reduce_sum(x, -1))),
    (REDUCE_IN_PARTS, case([deep], b.reduce_sum(deep, -1))),
    (REDUCE_IN_STAGES, case([wide], b.reduce_sum(wide, (-2, -1)))),
    # joined along another axis, or read as a whole
    (REDUCE_OF_CONCAT, case([sink, x], b.reduce_sum(joined, -2))),
    # most of it is computed, weights are, too, many rows pay the copy, or rows are joined
    (
        PRODUCT_OF_CONCAT,
        case([weights, cache, new], b.matmul(weights, b.concat([b.exp(cache), new], -2))),
    ),
    (PRODUCT_OF_CONCAT, case([weights, cache, new], b.matmul(b.exp(weights), keys))),
    (PRODUCT_OF_CONCAT, case([many, cache, new], b.matmul(many, b.transpose(keys)))),
    (PRODUCT_OF_CONCAT, case([cache, new, y], b.matmul(keys, b.slice_(y, -2, 0, 5)))),
    # nothing else gives the result its shape
    (BROADCAST_INTO_ELEMENTWISE, case([sink], b.exp(b.broadcast(sink, (5, 6))))),
    (DOTS_TO_SUMS, case([x, y], b.matmul(b.slice_(x, -2, 0, 1), b.slice_(y, -1, 0, 1)))),
    (DOTS_TO_SUMS, case([firsts, seconds], b.matmul(seconds, firsts))),
    (ONE_ABOVE_EXPM1, case([x], b.add(small, 2.0))),
    (ONE_ABOVE_EXPM1, case([x], b.add(b.cast(small, DType.BF16, rounds=True), 1.0))),
    (ONE_ABOVE_EXPM1, case([x], b.add(1.0, b.where(b.gt(x, 0.0), x, b.exp(x))))),
    # the slice meets both parts
    (SLICE_OF_CONCAT, case([sink, x], b.slice_(joined, -1, 0, 4))),
    # the maximum of something else, or alone
    (MAXIMUM_OUT_OF_SHIFT, case([x, sink], b.exp(b.sub(b.mul(x, 2.0), top)))),
    (MAXIMUM_OUT_OF_SHIFT, case([x], b.exp(b.sub(x, b.reduce_max(x, -1))))),
]


def test_a_plain_factor_follows_one_that_is_moved_out() -> None:
    length = b.input_("r", (5, 1))
    scaled = b.matmul(b.div(b.mul(length, x), b.sqrt(b.reduce_sum(b.mul(x, x), -1))), y)
    (moved,) = apply_rules(case([x, y, length], scaled), (SCALE_OUT_OF_CONTRACTION,)).outputs
    (product,) = [n for n in topological([moved]) if n.op is contraction.MATMUL]
    assert product.inputs == (x, y)


@pytest.mark.parametrize(
    ("columns", "width", "moves"),
    [(30, 64, True), (300, 64, False), (80 * 64, 64, False), (2000, 300, True)],
)
def test_short_rows_are_scaled_before_wide_products(columns: int, width: int, moves: bool) -> None:
    rows, keys = b.input_("rows", (16, width)), b.input_("keys", (width, columns))
    scaled = b.div(rows, b.sqrt(b.reduce_sum(b.mul(rows, rows), -1)))
    graph = case([rows, keys], b.matmul(scaled, keys))
    (moved,) = apply_rules(graph, (SCALE_OUT_OF_CONTRACTION,)).outputs
    assert (moved.op is elementwise.DIV) == moves


def test_short_axes_are_reduced_as_one() -> None:
    x = b.input_("x", (9, 3, 64))
    across = b.permute(x, (1, 2, 0))
    column = b.input_("column", (1, 64, 1))
    scale = b.input_("scale", (1, 1, 1))

    def width(*inputs: Node, of: Node) -> int:
        total = b.reduce_sum(of, (-3, -2, -1))
        found = apply_rules(b.kernel_graph("g", inputs, [total]), (REDUCE_IN_STAGES,)).nodes()
        return next(n.inputs[0].shape[-1] for n in found if n.op is contraction.REDUCE_SUM)

    assert width(tall, scale, of=b.exp(b.mul(tall, scale))) == 27
    assert width(tall, x, of=b.mul(tall, across)) == 9
    assert width(tall, column, of=b.mul(tall, column)) == 9


@pytest.mark.parametrize("number", range(len(FIRES)))
def test_rule_fires_and_both_sides_agree(number: int) -> None:
    rule, graph = FIRES[number]
    moved = apply_rules(graph, (rule,))
    assert moved != graph
    generator = torch.Generator().manual_seed(number)
    values = [
        torch.randint(0, 6, n.shape, generator=generator)
        if n.tensor.dtype is DType.I64
        else torch.randn(n.shape, generator=generator, dtype=torch.float64)
        for n in graph.inputs
    ]
    left = run_reference(graph, values, dtype_override=torch.float64)
    right = run_reference(moved, values, dtype_override=torch.float64)
    torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-10)


def test_a_maximum_leaves_its_shift_where_a_row_has_none() -> None:
    infinity = float("inf")
    graph = case([x, sink], b.exp(b.sub(x, top)))
    moved = apply_rules(graph, (MAXIMUM_OUT_OF_SHIFT,))
    assert moved != graph
    values = [
        torch.full((5, 6), -infinity).index_fill(0, torch.tensor(0), 1.0),
        torch.tensor([infinity, infinity, 3.0, -1000.0, -infinity])[:, None],
    ]
    (given,), (left,) = run_reference(graph, values), run_reference(moved, values)
    assert given[4].isnan().all()
    assert not given[:4].any()
    torch.testing.assert_close(left, given, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("number", range(len(STAYS)))
def test_rule_stays_away(number: int) -> None:
    rule, graph = STAYS[number]
    assert apply_rules(graph, (rule,)) == graph


def test_products_of_parts_are_added_up_in_wide_floats() -> None:
    whole, part = b.input_("cache", (1, 8, 1), DType.F16), b.input_("new", (1, 1, 1), DType.F16)
    weights = b.input_("weights", (1, 3, 9), DType.F16)
    graph = case([weights, whole, part], b.matmul(weights, b.concat([whole, part], -2)))
    moved = apply_rules(graph, (PRODUCT_OF_CONCAT,))
    values = [torch.full(n.shape, value) for n, value in ((weights, 1.0), (whole, 8752.0))]
    tensors = [t.half() for t in (*values, torch.full(part.shape, -30000.0))]
    (result,) = run_reference(moved, tensors)
    assert moved != graph
    assert torch.equal(result, torch.full((1, 3, 1), 8 * 8752.0 - 30000.0).half())


def test_a_long_chain_without_parts_is_looked_at_once() -> None:
    value = x
    for _ in range(2000):
        value = b.mul(value, value)
    graph = case([x, y], b.reduce_sum(b.matmul(value, y), -1))
    assert apply_rules(graph, (REDUCE_OF_CONCAT, PRODUCT_OF_CONCAT, SLICE_OF_CONCAT)) == graph


def test_names_are_unique() -> None:
    names = [rule.name for rule in FUSION_RULES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("shape", "perm"),
    [
        ((1, 5, 3, 6), (0, 1, 2, 3)),
        ((15, 6), (0, 1)),
        ((5, 1, 3, 6), (2, 1, 0, 3)),
        ((5, 3, 6, 1), (1, 0, 3, 2)),
    ],
)
def test_rules_work_through_views(shape: tuple[int, ...], perm: tuple[int, ...]) -> None:
    e = b.exp(b.input_("z", (5, 3, 6)))
    weights = b.permute(b.reshape(b.div(e, b.reduce_sum(e, -1)), shape), perm)
    graph = case([e.inputs[0], y], b.matmul(weights, y))
    moved = apply_rules(graph, (SCALE_OUT_OF_CONTRACTION,))
    (product,) = [n for n in moved.nodes() if n.op is contraction.MATMUL]
    assert all(n.op is not elementwise.DIV for n in topological([product]))
    values = [torch.randn(n.shape, dtype=torch.float64) for n in graph.inputs]
    left = run_reference(graph, values, dtype_override=torch.float64)
    right = run_reference(moved, values, dtype_override=torch.float64)
    torch.testing.assert_close(left, right)


def test_a_rule_is_data() -> None:
    assert isinstance(FUSION_RULES[0], Rule)
