"""The floating-point test: accurate candidates pass, unstable ones do not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from superopt.frontend import lift
from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.interpret import interpret
from superopt.ir.node import Node, make
from superopt.ir.ops import contraction, library
from superopt.ir.ops.library import OpaqueAttrs
from superopt.ir.types import DType, TensorType
from superopt.verify import floating, threads
from superopt.verify.equivalence import verify_field
from superopt.verify.floating import verify_float
from superopt.verify.inputs import DISTRIBUTIONS, HARDEST, PERIOD, draw_inputs
from superopt.verify.reference import run_reference
from superopt.verify.rounding import Rounding
from superopt.verify.slices import alike, slices
from tests.verify.workloads import WORKLOADS

X = b.input_("x", (16, 64))


def graph(result: Node) -> Graph:
    return b.kernel_graph("g", b.graph_inputs([result]), [result])


def softmax(x: Node, shift: bool) -> Graph:
    e = b.exp(b.sub(x, b.reduce_max(x, -1)) if shift else x)
    return graph(b.div(e, b.reduce_sum(e, -1)))


def run(candidate: Graph, original: Graph, seed: int = 1) -> str:
    return verify_float(original, lambda t: run_reference(candidate, t), seed=seed).reason


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_kernels_of_the_workloads(name: str) -> None:
    original, kernel = WORKLOADS[name]()
    verdict = verify_float(original, lambda t: run_reference(kernel, t), seed=4)
    if name == "layer_norm":
        # the mean square less the squared mean: right in a field, useless in floating point
        assert verdict.reason.startswith("constant-rows inputs")
        return
    assert verdict.accurate, verdict.reason
    assert [e.distribution for e in verdict.errors] == list(DISTRIBUTIONS)


def test_an_unstable_softmax_is_equal_and_rejected() -> None:
    stable, unstable = softmax(X, True), softmax(X, False)
    assert verify_field(stable, unstable, seed=1)
    assert "inf or NaN" in run(unstable, stable)


def test_a_row_of_minus_infinity_alone_is_no_number() -> None:
    top = b.reduce_max(X, -1)
    bare, guarded = (
        graph(b.reduce_sum(b.exp(b.sub(X, t)), -1)) for t in (top, b.finite_or_zero(top))
    )
    assert run(bare, bare) == run(guarded, guarded) == ""
    assert run(guarded, bare).startswith("infinite inputs: output 0 is a number")
    assert run(bare, guarded).endswith("is inf or NaN where the original is not")


def test_infinities_lie_where_they_do_not_hide_all_results() -> None:
    q, k, v, mask = (b.input_(n, (2, 32, 32)) for n in ("q", "k", "v", "mask"))
    scores = b.add(b.matmul(q, b.transpose(b.mul(k, 2.0))), mask)
    e = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    attention = b.kernel_graph(
        "g", [q, k, v, mask], [b.matmul(b.div(e, b.reduce_sum(e, -1)), b.neg(v))]
    )
    drawn = draw_inputs(attention, "infinite", 1)
    assert [bool(x.isfinite().all()) for x in drawn] == [False, True, True, False]
    rows = [x.isfinite().all(-1).sum(-1).tolist() for x in drawn]
    assert rows == [[22, 22], [32, 32], [32, 32], [22, 22]]
    assert bool((drawn[3] == -torch.inf).all(-1).any())
    (result,) = run_reference(attention, drawn)
    assert int(result.isfinite().all(-1).sum()) > 16


def test_what_a_mask_of_positions_hides_counts_as_finite() -> None:
    x = b.input_("x", (16, 16))
    weights = b.where(b.le(b.iota((1, 16), -1), b.iota((16, 1), -2)), 1.0, 0.0)
    original = b.kernel_graph("g", [x], [b.matmul(weights, x)])

    def skips(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        (x,) = tensors
        return [torch.stack([x[: i + 1].sum(0) for i in range(16)])]

    assert verify_float(original, skips, seed=1), "eager PyTorch multiplies what is hidden by 0"


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_rightly_infinite_stays_so(wrong: float) -> None:
    mask = b.input_("mask", (32, 8), DType.BOOL)
    x = b.input_("x", (32, 8))
    low = b.where(mask, b.constant(float("-inf")), x)
    original = b.kernel_graph("masked", [mask, x], [b.mul(low, 2.0)])

    def other(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [r.masked_fill(r.isneginf(), wrong) for r in run_reference(original, tensors)]

    assert verify_float(original, lambda t: run_reference(original, t), seed=3).accurate
    assert "the other sign" in verify_float(original, other, seed=3).reason
    own = torch.tensor([[1.0, -torch.inf]])
    assert floating._apart(own, own.masked_fill(own.isinf(), wrong), False) is None
    assert floating._apart(own, own, True) is not None


def test_a_number_whose_errors_cancelled_is_no_measure() -> None:
    """The original meets a difference of means by luck, and so did the errors drawn for it."""

    def difference(scale: Callable[[Node], Node]) -> Graph:
        means = [scale(b.reduce_sum(b.exp(b.neg(b.mul(i, i))), (-1, -2))) for i in inputs]
        return b.kernel_graph("g", inputs, [b.sub(*means)])

    inputs = [b.input_(name, (10, 100)) for name in "xy"]
    original = difference(lambda total: b.div(total, 1000.0))
    wide = difference(lambda total: b.add(b.mul(total, 1e-3), 1.0))
    test = floating.FloatTest(original, seed=2)
    found = test._reference("normal", test._drawn("normal"))
    assert not isinstance(found, str)
    lucky = replace(found, moved=found.exact, own=[t.float() for t in found.exact])
    test._references["normal"] = lucky
    verdict = test.check(lambda t: run_reference(wide, t), ["normal"])
    assert verdict.accurate, verdict.reason
    far = difference(lambda total: b.add(b.mul(total, 1e-3), 100.0))
    assert not test.check(lambda t: run_reference(far, t), ["normal"])


def test_the_order_of_a_sum_may_decide_whether_it_overflows() -> None:
    """A gated layer at the edge: the products fit float32, and so do some of their sums, by luck."""
    gate, up, down = (b.input_(n, s) for n, s in zip("gud", [(64, 64)] * 3, strict=True))
    h = b.mul(b.maximum(b.matmul(X, gate), 0.0), b.matmul(X, up))
    original = b.kernel_graph("g", [X, gate, up, down], [b.matmul(h, down)])

    def apart(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        x, gate, up, down = tensors
        terms = (torch.relu(x @ gate) * (x @ up))[..., None] * down
        return [terms.clamp(min=0).sum(1) + terms.clamp(max=0).sum(1)]

    edge = draw_inputs(original, "overflow-edge", 3)
    own, found = run_reference(original, edge)[0], apart(edge)[0]
    assert bool((own.isfinite() & ~found.isfinite()).any())
    assert verify_float(original, apart, seed=3).accurate
    overflows = verify_float(original, lambda t: [apart(t)[0] * 1e10 * 1e-10], seed=3)
    assert "inf or NaN" in overflows.reason


def test_rounding_may_decide_whether_a_product_overflows() -> None:
    """A gated layer in bfloat16: a kernel does not round what it multiplies."""
    x, gate, up = (b.input_(n, (200, 200), DType.BF16) for n in "xgu")
    original = b.kernel_graph("g", [x, gate, up], [b.mul(b.matmul(x, gate), b.matmul(x, up))])

    def unrounded(tensors: list[torch.Tensor], factor: float = 1.0) -> list[torch.Tensor]:
        x, gate, up = (t.float() for t in tensors)
        return [((x @ gate) * (x @ up) * factor / factor).bfloat16()]

    edge = draw_inputs(original, "overflow-edge", 3)
    own, found = run_reference(original, edge)[0], unrounded(edge)[0]
    assert bool((own.isfinite() & ~found.isfinite()).any())
    assert verify_float(original, unrounded, seed=3).accurate
    assert "inf or NaN" in verify_float(original, lambda t: unrounded(t, 2.0), seed=3).reason


@pytest.mark.parametrize("added", [True, False])
def test_masks_of_the_lowest_number_void_no_test(added: bool) -> None:
    lowest = torch.finfo(torch.float32).min
    visible = torch.ones(32, 32, dtype=torch.bool).tril()

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = q @ k.mT
        mask = torch.where(visible, 0.0, lowest)
        scores = scores + mask if added else scores.masked_fill(~visible, lowest)
        return torch.softmax(scores, -1) @ k

    graph = lift(attend, [torch.randn(32, 16)] * 2).graph

    def all_but_a_row(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        (result,) = run_reference(graph, tensors)
        result[1:] = torch.nan
        return [result]

    assert "inf or NaN" in verify_float(graph, all_but_a_row, seed=3).reason


def test_equal_roundings_may_keep_an_exponential_finite() -> None:
    """Of x ten times its tenth is taken off, as in Sinkhorn's steps: nothing is left, or a unit of x."""
    most = b.mul(b.reduce_max(b.mul(X, 0.1), -1), 10.0)
    original = graph(b.exp(b.sub(X, most)))

    def divided(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        (x,) = tensors
        return [torch.exp(x - (x / 10.0).amax(-1, keepdim=True) * 10.0)]

    (edge,) = draw_inputs(original, "overflow-edge", 3)
    own, found = run_reference(original, [edge])[0], divided([edge])[0]
    assert bool((own.isfinite() & ~found.isfinite()).any())
    assert verify_float(original, divided, seed=3).accurate
    stable = graph(b.exp(b.sub(X, b.reduce_max(X, -1))))
    refused = floating.FloatTest(stable, seed=3).check(divided, ["overflow-edge"])
    assert "inf or NaN" in refused.reason


def test_what_is_too_large_for_its_type_may_be_infinite() -> None:
    x = b.input_("x", (16, 64), DType.F16)
    square = b.mul(b.mul(x, 1000.0), b.mul(x, 1000.0))
    original = b.kernel_graph("g", [x], [b.sub(square, b.mul(square, 0.5))])

    def wide(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [((tensors[0].float() * 1000.0).square() * 0.5).half()]

    def infinite(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [r.masked_fill(r.isnan(), torch.inf) for r in run_reference(original, tensors)]

    (normal,) = draw_inputs(original, "normal", 3)
    assert bool((run_reference(original, [normal])[0].isnan() & wide([normal])[0].isinf()).any())
    assert verify_float(original, wide, seed=3).accurate
    assert "should be a number" in verify_float(original, infinite, seed=3).reason


def test_rounding_may_decide_whether_a_quotient_is_of_zeros() -> None:
    """Weights that no float holds, and the original has by a rounding: a cluster without points."""
    x = b.input_("x", (64, 200), DType.BF16)
    square = b.mul(b.mul(x, 10.0), b.mul(x, 10.0))
    larger = b.cast(b.mul(b.cast(square, DType.F32), 1.002), DType.BF16)
    weight = b.exp(b.sub(square, larger))
    original = b.kernel_graph("g", [x], [b.div(weight, weight)])

    def unrounded(tensors: list[torch.Tensor], factor: float = 0.002) -> list[torch.Tensor]:
        weight = torch.exp((tensors[0].float() * 10.0).square() * -factor)
        return [(weight / weight).bfloat16()]

    mixed = draw_inputs(original, "mixed", 3)
    own, found = run_reference(original, mixed)[0], unrounded(mixed)[0]
    assert bool((own.isfinite() & ~found.isfinite()).any())
    assert verify_float(original, unrounded, seed=3).accurate
    assert "inf or NaN" in verify_float(original, lambda t: unrounded(t, 0.01), seed=3).reason


def test_cancellation_in_a_variance_is_rejected() -> None:
    mean = b.mean(X, -1)
    centered = b.sub(X, mean)
    stable = graph(b.sqrt(b.mean(b.mul(centered, centered), -1)))
    unstable = graph(b.sqrt(b.sub(b.mean(b.mul(X, X), -1), b.mul(mean, mean))))
    assert verify_field(stable, unstable, seed=1)
    assert run(unstable, stable).startswith("constant-rows inputs")


def test_lower_precision_inside_is_rejected() -> None:
    original = graph(b.mean(X, -1))
    rounded = graph(b.cast(b.mean(b.cast(X, DType.BF16), -1), DType.F32))
    assert "errs by" in run(rounded, original)


@pytest.mark.parametrize("narrow", [DType.BF16, DType.F16])
def test_a_rounding_error_that_is_the_result_is_not_dropped(narrow: DType) -> None:
    """In float64 a compensated sum loses nothing: a candidate that does not round looks exact."""
    total, x = (b.cast(b.input_(n, (16, 64), narrow), DType.F32) for n in "tx")

    def lost(rounded: Callable[[Node], Node]) -> Graph:
        after = rounded(b.add(total, x))
        return graph(b.cast(b.sub(b.sub(after, total), x), narrow))

    original = lost(lambda n: b.cast(b.cast(n, narrow), DType.F32))
    kept, dropped = (
        lost(lambda n: b.cast(b.cast(n, narrow, rounds=True), DType.F32)),
        lost(lambda n: n),
    )
    other = DType.F16 if narrow is DType.BF16 else DType.BF16
    assert not run(kept, original)
    assert "made of rounding errors" in run(dropped, original)
    assert "made of rounding errors" in run(
        lost(lambda n: b.cast(b.cast(n, other), DType.F32)), original
    )


def test_a_few_quotients_of_what_cancels_are_no_output_of_noise() -> None:
    """An update of factors in bfloat16, divided by sums that come near 0 here and there."""

    def update(v: torch.Tensor, h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return h * ((v.mT @ w) / (h @ (w.mT @ w) + 1e-3))

    shapes = ((128, 64), (64, 16), (128, 16))
    graph = lift(update, [torch.randn(s).bfloat16() for s in shapes]).graph
    test = floating.FloatTest(graph, seed=3)
    in_float = test.check(lambda t: [update(*(x.float() for x in t)).bfloat16()], ["normal"])
    assert in_float.accurate, in_float.reason


def test_wrong_shapes_types_and_counts_are_reported() -> None:
    original = graph(b.mul(X, 2.0))
    assert "0 outputs" in verify_float(original, lambda t: [], seed=1).reason
    assert "torch.float64" in verify_float(original, lambda t: [t[0].double()], seed=1).reason
    flat = verify_float(original, lambda t: [t[0].reshape(-1)], seed=1)
    assert not flat
    assert flat.reason.startswith("normal inputs: output 0 is")


def test_a_candidate_that_writes_its_input_does_not_hide_it() -> None:
    original = graph(b.mul(X, 2.0))
    assert verify_float(original, lambda t: [t[0].mul_(2.0)], seed=1).accurate
    assert not verify_float(original, lambda t: [t[0].mul_(2.001)], seed=1).accurate


def test_inputs_have_the_layout_and_range_of_the_graph() -> None:
    table = b.input_("table", (9, 4), DType.BF16, strides=(1, 9))
    index = b.input_("index", (5,), DType.I32)
    mask = b.input_("mask", (5, 4), DType.BOOL)
    rows = b.where(mask, b.take(table, index, 0), b.constant(0.0, DType.BF16))
    g = b.kernel_graph("g", [table, index, mask], [rows])
    for distribution in DISTRIBUTIONS:
        t, i, m = draw_inputs(g, distribution, 3)
        assert (t.dtype, t.stride()) == (torch.bfloat16, (1, 9))
        assert i.dtype is torch.int32
        assert int(i.min()) >= 0
        assert int(i.max()) < 9
        assert m.dtype is torch.bool
        assert torch.equal(draw_inputs(g, distribution, 3)[0].nan_to_num(), t.nan_to_num())


def test_a_candidate_is_not_held_against_the_luck_of_the_original() -> None:
    """Scores of nearly equal rows: normalized before the product their errors nearly cancel."""
    q, k, v = (b.input_(n, (256, 64)) for n in "qkv")

    def attend(scores: Node) -> Graph:
        weights = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
        result = b.div(b.matmul(weights, v), b.reduce_sum(weights, -1))
        return b.kernel_graph("g", [q, k, v], [result])

    def scale(x: Node) -> Node:
        return b.div(10.0, b.sqrt(b.mean(b.mul(x, x), -1)))

    early = b.matmul(b.mul(q, scale(q)), b.transpose(b.mul(k, scale(k))))
    product = b.mul(b.mul(b.matmul(q, b.transpose(k)), scale(q)), b.transpose(scale(k)))
    assert run(attend(product), attend(early)) == ""
    narrow = b.cast(b.cast(product, DType.BF16), DType.F32)
    assert "errs by" in run(attend(narrow), attend(early))


@pytest.mark.parametrize("error", [0.0, 1e-2])
def test_complex_results_may_round(error: float) -> None:
    attrs = OpaqueAttrs(
        "aten.fft_rfft.default", '{"args": [{"t": 0}], "kwargs": {}}', TensorType((4, 5), DType.C64)
    )
    x = b.input_("x", (4, 8), DType.F32)
    graph = b.kernel_graph("spectrum", [x], [make(library.OPAQUE, (b.mul(x, 3.0),), attrs)])

    def other(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        (x,) = tensors
        return [torch.fft.rfft(x * 1.5 + x * 1.5 * (1 + error))]

    assert bool(verify_float(graph, other, seed=0)) is (error == 0.0)


def test_bags_of_an_embedding_begin_where_they_may() -> None:
    module = torch.nn.EmbeddingBag(30, 4)
    places = torch.arange(8), torch.tensor([0, 3, 5])
    graph = lift(lambda i, starts: module(i, starts).exp(), places).graph
    verdict = verify_float(graph, lambda t: run_reference(graph, t), seed=0)
    assert verdict.accurate, verdict.reason
    assert len(verdict.errors) == len(DISTRIBUTIONS)


def largest(scores: Node) -> Node:
    return b.arg_reduce(contraction.ARGMAX, scores, -1)


def test_rounding_may_decide_which_of_equal_scores_is_the_largest() -> None:
    x, y = b.input_("x", (9, 300)), b.input_("y", (300, 40))
    graph = b.kernel_graph("nearest", [x, y], [largest(b.exp(b.mul(b.matmul(x, y), 0.01)))])

    def scores(tensors: list[torch.Tensor]) -> torch.Tensor:
        left, right = tensors
        # summed in another order
        return (left[:, :150] @ right[:150] + left[:, 150:] @ right[150:]) * 0.01

    def other_order(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [scores(tensors).exp().argmax(-1, keepdim=True)]

    def second_best(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [scores(tensors).topk(2).indices[:, 1:]]

    def outside(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        return [torch.full((9, 1), 40)]

    assert verify_float(graph, other_order, seed=0)
    for wrong in (second_best, outside):
        verdict = verify_float(graph, wrong, seed=0)
        assert not verdict
        assert "output 0" in verdict.reason


@pytest.mark.parametrize("pick", [lambda s: s.topk(3, -1), lambda s: s.sort(-1)])
def test_rounding_may_decide_which_scores_an_operator_picks(pick: Callable[..., Any]) -> None:
    """Those of an operator that returns the scores and their places."""

    def nearest(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return pick((x @ y).float()).indices

    def unrounded(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return pick(x.float() @ y.float()).indices

    source = torch.Generator().manual_seed(0)
    operands = [torch.randn(s, generator=source).bfloat16() for s in ((200, 30), (30, 40))]
    original = lift(nearest, operands).graph
    assert not torch.equal(nearest(*operands), unrounded(*operands))
    verdict = verify_float(original, lambda t: [unrounded(*t)], seed=0)
    assert verdict.accurate, verdict.reason
    wrongs = (
        lambda found: found.roll(1, -1),
        lambda found: found[:, :1].expand(found.shape),
        lambda found: found + 1,
    )
    for wrong in wrongs:
        verdict = verify_float(original, lambda t, w=wrong: [w(unrounded(*t))], seed=0)
        assert not verdict
        assert "output 0" in verdict.reason


@pytest.mark.parametrize("special", [float("inf"), float("nan")])
def test_infinity_and_nan_are_the_largest_scores(special: float) -> None:
    x = b.input_("x", (6, 20))
    last = b.eq(b.iota((6, 20), -1), 19)
    score = b.where(last, special, b.mul(x, 1.0))
    graph = b.kernel_graph("special", [x], [b.reshape(largest(score), (6,))])
    assert verify_float(graph, lambda tensors: [torch.full((6,), 19)], seed=0)
    # next to nothing is missing from a score that is not a number
    assert not verify_float(graph, lambda tensors: [tensors[0].argmax(-1)], seed=0)


def test_rounding_moves_no_number_that_is_read_again() -> None:
    x = b.input_("x", (64, 32), DType.F32)
    same = b.reshape(b.cast(x, DType.F32), (32, 64))
    doubled = b.mul(same, b.constant(2.0, DType.F32))
    graph = b.kernel_graph("g", [x], [b.add(doubled, same), b.neg(doubled), doubled])
    given = torch.randn(64, 32)
    kept, unit = given.clone(), torch.finfo(torch.float32).eps
    rounding = Rounding("cpu", 0)
    moved_sum, negative, moved = interpret(graph, rounding.all_moved(graph, [given]), rounding)
    assert torch.equal(given, kept)
    # the operand was moved once, its double once more; nobody moves it for the other readers
    assert torch.equal(negative, -moved)
    exact = kept.double().reshape(32, 64)
    errors = ((moved / (2 * exact) - 1) / unit).round().unique()
    assert errors.tolist() == [-2.0, 0.0, 2.0]
    assert bool(((moved_sum / (3 * exact) - 1).abs() <= 3 * unit).all())


def test_what_a_check_will_take_leaves_out_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0

    def slow(
        seconds: float, function: Callable[..., list[torch.Tensor]] = run_reference
    ) -> Callable[..., list[torch.Tensor]]:
        def run_slowly(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
            nonlocal now_s
            now_s += seconds
            return function(*args, **kwargs)

        return run_slowly

    # others keep the processor for two thirds of the time
    for module in (floating, threads):
        monkeypatch.setattr(module, "now", lambda: (3.0 * now_s, now_s))
    monkeypatch.setattr(floating, "run_reference", slow(1.0))
    monkeypatch.setattr(floating, "evaluate", slow(0.5, floating.evaluate))
    original = graph(b.exp(X))
    test = floating.FloatTest(original, seed=1)
    assert test.predicted_s() < 1e-3  # what is left to compute takes that at least
    candidate = slow(0.25)
    for _ in range(2):  # the second time nothing of the original is computed any more
        assert test.check(lambda tensors: candidate(original, tensors), HARDEST)
        rest = len(DISTRIBUTIONS) - len(HARDEST)
        # twice in float64 and once at its own precision, where that is not known yet
        assert test.predicted_s() == 2.0 * rest + 0.25 * len(DISTRIBUTIONS)
    before_s, predicted_s = now_s, test.predicted_s()
    assert test.check(lambda tensors: candidate(original, tensors))
    assert now_s - before_s == predicted_s


def _broken(result: torch.Tensor) -> None:
    result[5, 3] += 1e-3


def _missing(result: torch.Tensor) -> None:
    result[5, 3] = float("nan")


def _turned(result: torch.Tensor) -> None:
    result[5:7] = result[5:7].flip(0)


def _other_rows(result: torch.Tensor) -> None:
    """Rows that are the same where inputs repeat after as many as are tested in float64."""
    result.copy_(result.roll(16, 0))


@pytest.mark.parametrize("harm", [None, _broken, _missing, _turned, _other_rows])
def test_every_element_is_tested_where_few_run_in_float64(
    harm: Callable[[torch.Tensor], None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floating, "alike", partial(alike, large=1 << 10))
    x, w = b.input_("x", (512, 64)), b.input_("w", (64, 32))
    original = graph(b.matmul(softmax(x, shift=True).outputs[0], w))
    test = floating.FloatTest(original, seed=1)
    assert test._part.kept == ((16, 512),)

    def candidate(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        (result,) = run_reference(original, tensors)
        if harm is not None:
            harm(result)
        return [result]

    assert bool(test.check(candidate)) is (harm is None)


@pytest.mark.parametrize("rows", [512, 511, 480, 256])
def test_a_mean_over_all_rows_is_tested_at_a_few(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are missing show where all differ, were they as many as come again and again."""
    monkeypatch.setattr(floating, "alike", partial(alike, large=1 << 10))
    x = b.input_("x", (512, 64))
    total = b.log(b.reduce_sum(b.exp(b.sub(x, b.reduce_max(x, -1))), -1))
    original = graph(b.div(b.reduce_sum(total, (-2, -1)), 512.0))
    test = floating.FloatTest(original, seed=1)
    assert test._part.kept == ((16, 512),)

    def candidate(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        apart = tensors[0][:rows] - tensors[0][:rows].amax(-1, keepdim=True)
        return [apart.exp().sum(-1).log().sum().reshape(1, 1) / rows]

    assert bool(test.check(candidate)) is (rows == 512)


def test_results_that_read_all_rows_are_tested_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 a few queries are left of a self-attention; what is wrong at another is seen."""
    monkeypatch.setattr(floating, "alike", partial(alike, large=1 << 10))
    x = b.input_("x", (128, 8))
    scores = b.matmul(x, b.transpose(x))
    weights = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    original = graph(b.matmul(b.div(weights, b.reduce_sum(weights, -1)), x))
    test = floating.FloatTest(original, seed=1)
    assert test._part.picked
    assert test._part.kept == ((16, 128),)
    for wrong in (0.0, 1e-2):

        def candidate(tensors: list[torch.Tensor], wrong: float = wrong) -> list[torch.Tensor]:
            (result,) = run_reference(original, tensors)
            result[126, 5] += wrong * result[126, 5].abs()
            return [result]

        assert bool(test.check(candidate)) is (wrong == 0.0)


@pytest.mark.parametrize("wrong", [0.0, 0.1])
def test_rows_that_stray_are_looked_at_alone(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows foretell little of those whose sum cancels: these are run in float64, and no others."""
    monkeypatch.setattr(floating, "alike", partial(alike, large=1 << 9))
    monkeypatch.setattr(floating, "slices", partial(slices, large=1 << 9))
    x = b.input_("x", (192, 8))
    scores = b.mul(b.matmul(x, b.transpose(x)), 0.1)
    weights = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    attended = b.matmul(b.div(weights, b.reduce_sum(weights, -1)), x)
    original = graph(b.div(attended, b.reduce_sum(attended, -1)))
    test = floating.FloatTest(original, seed=1)
    assert test._part.picked
    reference = test._reference("normal", test._drawn("normal"))
    assert isinstance(reference, floating._Reference)

    def candidate(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        (rows,) = (t.double() for t in tensors)
        result = torch.softmax(rows @ rows.mT * 0.1, -1) @ rows
        result = result / result.sum(-1, keepdim=True)
        result[17] *= 1 + wrong
        return [result.float()]

    wholes = []
    whole = test._whole
    monkeypatch.setattr(test, "_whole", lambda *args: wholes.append(args) or whole(*args))
    strays = floating._strays(reference, reference.all, candidate(test._drawn("normal").inputs()))
    assert strays is not None
    assert len(strays[0]) > 0
    assert bool(test.check(candidate, ["normal"])) is (wrong == 0.0)
    assert bool(wholes) is (wrong != 0.0)


@pytest.mark.parametrize("reads_all", [False, True])
def test_variants_and_kernels_are_held_against_the_same_reference(
    reads_all: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floating, "alike", partial(alike, large=1 << 10))
    x = b.input_("x", (256, 8))
    scores = b.matmul(x, b.transpose(x)) if reads_all else b.exp(x)

    def half(factor: float) -> Node:
        weights = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
        return b.div(weights, b.mul(b.reduce_sum(weights, -1), factor))

    original = graph(half(2.0))
    test = floating.FloatTest(original, seed=1)
    for factor, near in ((2.0, True), (2.001, False)):
        both = original.with_outputs([*original.outputs, b.mul(half(1.0), 1.0 / factor)])
        left = floating.sampled(both, repeated=True)
        assert left.picked is reads_all
        variant = left.graph.with_outputs(left.graph.outputs[1:])
        run_few = partial(run_reference, variant)
        assert test.near_few(left.first(1), run_few, floating.DISTRIBUTIONS[:2]) is near
    monkeypatch.setattr(test, "_twice", None)  # nothing of it is computed again
    assert test.check(lambda tensors: run_reference(original, tensors), ["normal", "uniform"])
    whole = floating.Alike(original, (), {})
    assert not test.near_few(whole, partial(run_reference, original), ["normal"])


def test_few_rows_tell_of_instability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floating, "alike", partial(alike, large=1 << 10))
    x = b.input_("x", (512, 64))
    assert run(softmax(x, shift=False), softmax(x, shift=True))
    mean = b.div(b.reduce_sum(x, -1), 64.0)
    square = b.sub(x, mean)
    stable = b.div(b.reduce_sum(b.mul(square, square), -1), 64.0)
    other = b.sub(b.div(b.reduce_sum(b.mul(x, x), -1), 64.0), b.mul(mean, mean))
    assert run(graph(other), graph(stable)).startswith("constant-rows")


# -- errors that all numbers have in common --------------------------------------------------------


def normalized(freedom: int, narrow: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a layer norm that divides the squares by so many fewer than there are."""

    def run(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        apart = wide - wide.mean(-1, keepdim=True)
        variance = apart.square().sum(-1, keepdim=True) / (wide.shape[-1] - freedom)
        return (apart * torch.rsqrt(variance + 1e-5)).to(narrow)

    return run


def attended(phantoms: int, narrow: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return an attention whose denominator counts so many keys of zeros that are not there."""

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
        shift = scores.amax(-1, keepdim=True)
        weights = (scores - shift).exp()
        total = weights.sum(-1, keepdim=True) + phantoms * (-shift).exp()
        return (weights @ v.float() / total).to(narrow)

    return run


def layer_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:])


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


@pytest.mark.parametrize(
    ("program", "mistake", "shapes", "narrow"),
    [
        (layer_norm, normalized, [(64, 300)], torch.bfloat16),
        (layer_norm, normalized, [(64, 1024)], torch.float16),
        (attention, attended, [(2, 40, 32), (2, 64, 32), (2, 64, 32)], torch.float16),
    ],
)
def test_errors_that_have_one_sign_are_no_rounding(
    program: Callable[..., torch.Tensor],
    mistake: Callable[[int, torch.dtype], Callable[..., torch.Tensor]],
    shapes: list[tuple[int, ...]],
    narrow: torch.dtype,
) -> None:
    original = lift(program, [torch.ones(s, dtype=narrow) for s in shapes]).graph
    for count, accurate in ((0, True), (1, False)):
        candidate = mistake(count, narrow)
        verdict = verify_float(original, lambda t, c=candidate: [c(*t)], seed=1)
        assert verdict.accurate is accurate, verdict.reason
    assert "on the whole" in verdict.reason


@pytest.mark.parametrize("steps", [0.3, 3.0])
def test_errors_of_all_numbers_are_those_of_roundings(steps: float) -> None:
    """One number may err by more than all of them together."""
    x = b.input_("x", (64, 64), DType.BF16)
    doubled = graph(b.add(x, x))

    def run(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        exact = tensors[0].double() * 2.0
        signs = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).sign()
        return [(exact * (1.0 + steps * 2.0**-7 * signs)).to(torch.bfloat16)]

    assert verify_float(doubled, run, seed=1).accurate is (steps < 1.0)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_large_inputs_repeat_after_a_prime_number_of_elements(distribution: str) -> None:
    x, y = b.input_("x", (1100, 1024)), b.input_("y", (1100, 1024))
    graph = b.kernel_graph("g", [x, y], [b.add(x, y)])
    first, second = draw_inputs(graph, distribution, 3)
    # one row of -inf and half a row of it, of sixteen each
    assert len(torch.unique(first[:, 5])) > (900 if distribution == "infinite" else 1000)
    assert not torch.equal(first, second)
    if distribution not in ("constant-rows", "infinite"):  # which have something of rows
        assert torch.equal(first.reshape(-1)[PERIOD:], first.reshape(-1)[: first.numel() - PERIOD])


def _squares(x: torch.Tensor) -> torch.Tensor:
    return (x.double() ** 2).mean().reshape(1, 1).float()


def _powers(x: torch.Tensor) -> torch.Tensor:
    return x.float().exp().mean(0, keepdim=True).to(x.dtype)


@pytest.mark.parametrize(
    ("dtype", "candidate"), [(DType.F32, _squares), (DType.BF16, _powers)], ids=["scalar", "half"]
)
def test_a_mean_over_one_half_of_the_rows_is_seen_though_inputs_repeat(dtype, candidate) -> None:
    """Large inputs are drawn in part, and one half of 2^21 numbers is nearly the other."""
    x = b.input_("x", (2048, 1024), dtype)
    wide = b.cast(x, DType.F32)
    value = b.mul(wide, wide) if dtype is DType.F32 else b.exp(wide)
    axes, count = ((-2, -1), 2048.0 * 1024) if dtype is DType.F32 else (-2, 2048.0)
    mean = b.cast(b.div(b.reduce_sum(value, axes), count), dtype)
    test = floating.FloatTest(b.kernel_graph("g", [x], [mean]), seed=1)
    assert test.check(lambda tensors: [candidate(tensors[0])])
    for rows in (slice(1024), slice(1024, None), slice(1536)):
        assert not test.check(lambda tensors, rows=rows: [candidate(tensors[0][rows])])
