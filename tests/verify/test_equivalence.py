"""What the field test must tell apart, and what it must accept."""

import random
from functools import partial
from math import inf
from typing import Any

import numpy as np
import pytest
import torch

from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.ops import tile
from superopt.ir.ops.library import OpaqueAttrs
from superopt.ir.types import DType, TensorType
from superopt.verify import equivalence
from superopt.verify.arithmetic import Exponential, Modulus, Permutation, draw_primes
from superopt.verify.degree import degrees, error_per_test
from superopt.verify.equivalence import Verdict, provable, verify_field
from superopt.verify.field import FIELD, as_rational
from superopt.verify.floating import verify_float
from superopt.verify.ranges import Integers, integer_ranges
from superopt.verify.reference import run_reference
from superopt.verify.slices import alike
from tests.verify.workloads import attention

MINUS = b.constant(float("-inf"))


def tensor(name: str = "x", shape: tuple[int, ...] = (4, 6), dtype: DType = DType.F32) -> Node:
    return b.input_(name, shape, dtype)


def same(left: Node, right: Node, *inputs: Node, seed: int = 5) -> Verdict:
    nodes = inputs or tuple(b.graph_inputs([left, right]))
    return verify_field(
        b.kernel_graph("left", nodes, [left]), b.kernel_graph("right", nodes, [right]), seed=seed
    )


X, Y = tensor("x"), tensor("y")


def test_every_op_has_a_rule_or_a_reason() -> None:
    assert FIELD.missing() == []


# -- arithmetic ------------------------------------------------------------------------------------


def test_matmul_is_exact_for_long_sums_and_broadcast_batches() -> None:
    p, _ = draw_primes(random.Random(2))
    modulus, source = Modulus(p), np.random.default_rng(2)
    a = modulus.draw((3, 1, 2, 70), source)
    c = modulus.draw((1, 4, 70, 5), source)
    found = modulus.canonical(modulus.matmul(a, c))
    exact = torch.zeros(3, 4, 2, 5, dtype=torch.int64)
    for k in range(70):
        term = a[..., k : k + 1].to(torch.int64) * c[..., k : k + 1, :].to(torch.int64)
        exact = (exact + term) % p
    assert torch.equal(found.to(torch.int64), exact)
    worst = torch.full((1, 2, 100_000), float(p // 2), dtype=torch.float64)
    product = modulus.canonical(modulus.matmul(worst, worst.mT.contiguous()))
    assert set(product.reshape(-1).tolist()) == {float((p // 2) ** 2 * 100_000 % p)}


def test_inverse_exponential_and_permutation() -> None:
    source = random.Random(3)
    p, q = (Modulus(n) for n in draw_primes(source, three=True))
    r = Modulus(q.prime // 2)
    assert (p.prime, q.prime) == (2 * q.prime + 1, 2 * r.prime + 1)
    x = p.draw((5000,), np.random.default_rng(1))
    x = torch.where(x == 0, 1.0, x)
    assert bool((p.mul(x, p.invert(x)) == 1).all())
    for modulus in (p, q, r):
        secret = Permutation(modulus, source)
        y = modulus.draw((300,), np.random.default_rng(4))
        back = secret.backward(secret.forward(y))
        assert torch.equal(modulus.canonical(back), modulus.canonical(y))
    for field, exponents in ((p, q), (q, r)):
        power = Exponential(field, exponents, source)
        u, v = (exponents.draw((300,), np.random.default_rng(s)) for s in (5, 6))
        both = field.canonical(power(exponents.add(u, v)))
        assert torch.equal(both, field.canonical(field.mul(power(u), power(v))))
        assert pow(power.root, exponents.prime, field.prime) == 1 != power.root


def test_constants_are_rationals_where_they_look_like_one() -> None:
    third = float(np.float32(1 / 3))
    assert as_rational(1 / 3, DType.F32) == as_rational(third, DType.F32)
    assert as_rational(0.1, DType.F32) == as_rational(0.1, DType.F64)
    assert as_rational(0.0009765625, DType.F32) is not None
    assert as_rational(3.14159265, DType.F32) is None


# -- different programs ------------------------------------------------------------------------------


def test_structured_inputs_would_not_tell_these_apart() -> None:
    """Consecutive integers make rows of K differ by constants, which a softmax cancels."""
    q, k, v = tensor("q", (4, 8)), tensor("k", (8, 16)), tensor("v", (16, 8))

    def attend(scores: Node) -> Node:
        e = b.exp(scores)
        return b.div(b.matmul(e, v), b.reduce_sum(e, -1))

    right = attend(b.matmul(q, k))
    row = b.slice_(k, 0, 3, 4)
    wrong = attend(b.mul(b.broadcast(b.reduce_sum(q, -1), (4, 16)), row))
    assert not same(right, wrong, q, k, v)


def test_sums_of_different_inputs_are_different() -> None:
    x0, x1, x2 = (tensor(f"x{i}") for i in range(3))
    assert not same(b.add(x0, x2), b.add(x1, x1), x0, x1, x2)


DIFFERENT = {
    "exp of a sum": (b.exp(b.add(X, Y)), b.add(b.exp(X), b.exp(Y))),
    "unknown functions": (b.sqrt(X), b.log(X)),
    "sqrt is not linear": (b.sqrt(b.add(X, Y)), b.add(b.sqrt(X), b.sqrt(Y))),
    "max is not a sum": (b.maximum(X, Y), b.add(X, Y)),
    "max is not min": (b.maximum(X, Y), b.minimum(X, Y)),
    "max of another element": (
        b.reduce_max(X, -1),
        b.reduce_max(b.slice_(X, -1, 0, 5), -1),
    ),
    "where on the other side": (b.where(b.gt(X, Y), X, Y), b.where(b.lt(X, Y), X, Y)),
    "sums of maxima, exchanged": (
        b.add(b.maximum(X, Y), b.maximum(b.mul(X, 2.0), b.mul(Y, 3.0))),
        b.add(b.maximum(X, b.mul(Y, 3.0)), b.maximum(b.mul(X, 2.0), Y)),
    ),
    "constants": (b.mul(X, 0.1), b.mul(X, 0.1001)),
    "epsilon": (b.add(X, 1e-5), b.add(X, 1e-6)),
    "missing max in log-sum-exp": (
        b.log(b.reduce_sum(b.exp(X), -1)),
        b.add(b.log(b.reduce_sum(b.exp(X), -1)), b.reduce_max(X, -1)),
    ),
    "transposed": (b.matmul(X, b.transpose(Y)), b.matmul(Y, b.transpose(X))),
    "power": (b.pow_(X, 3.0), b.pow_(X, 2.0)),
    "fully masked rows": (
        b.where(b.gt(X, MINUS), X, Y),
        b.where(b.gt(X, MINUS), Y, X),
    ),
    "sums of exponentials as exponents": (
        b.exp(b.add(b.exp(X), b.exp(Y))),
        b.exp(b.mul(b.exp(X), b.exp(Y))),
    ),
    "exponentials of another exponent": (b.exp(b.exp(X)), b.exp(b.exp(b.mul(X, 2.0)))),
    "another gate": (b.exp(b.sigmoid(X)), b.exp(b.sigmoid(b.neg(X)))),
    "exponents of exponents of others": (b.exp(b.exp(b.exp(X))), b.exp(b.exp(b.exp(Y)))),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_programs_are_rejected(name: str) -> None:
    left, right = DIFFERENT[name]
    verdict = same(left, right, X, Y)
    assert not verdict.equivalent
    assert verdict.counterexample is not None
    assert str(verdict).startswith("not equivalent: output 0 at [")


# -- equal programs ----------------------------------------------------------------------------------


def _softmax(x: Node) -> Node:
    e = b.exp(b.sub(x, b.reduce_max(x, -1)))
    return b.div(e, b.reduce_sum(e, -1))


def _unstable(x: Node) -> Node:
    e = b.exp(x)
    return b.div(e, b.reduce_sum(e, -1))


def _capped(x: Node) -> Node:
    return b.mul(b.tanh(b.div(x, 30.0)), 30.0)


EQUAL = {
    "exp of a sum": (b.exp(b.add(X, Y)), b.mul(b.exp(X), b.exp(Y))),
    "softmax shift": (_softmax(X), _unstable(X)),
    "softmax shift by anything": (_softmax(X), _unstable(b.sub(X, b.slice_(Y, -1, 0, 1)))),
    "shift of a capped softmax": (_softmax(_capped(X)), _unstable(_capped(X))),
    "division after the sum": (
        b.matmul(_softmax(X), b.transpose(Y)),
        b.div(b.matmul(b.exp(X), b.transpose(Y)), b.reduce_sum(b.exp(X), -1)),
    ),
    "max of parts": (
        b.reduce_max(X, -1),
        b.maximum(b.reduce_max(b.slice_(X, -1, 0, 2), -1), b.reduce_max(b.slice_(X, -1, 2, 6), -1)),
    ),
    "max is idempotent": (b.maximum(X, Y), b.maximum(b.maximum(X, Y), Y)),
    "relu as a choice": (b.maximum(X, 0.0), b.where(b.gt(X, 0.0), X, 0.0)),
    "max with -inf": (b.reduce_max(b.where(b.gt(X, Y), X, MINUS), -1),) * 2,
    "sigmoid": (b.sigmoid(X), b.div(1.0, b.add(b.exp(b.neg(X)), 1.0))),
    "tanh by sigmoid": (b.tanh(X), b.sub(b.mul(b.sigmoid(b.mul(X, 2.0)), 2.0), 1.0)),
    "powers": (b.pow_(X, -2.0), b.div(1.0, b.mul(X, X))),
    "variance": (
        b.sub(b.mean(b.mul(X, X), -1), b.mul(b.mean(X, -1), b.mean(X, -1))),
        b.mean(b.mul(b.sub(X, b.mean(X, -1)), b.sub(X, b.mean(X, -1))), -1),
    ),
    "mean": (b.mean(X, -1), b.mul(b.reduce_sum(X, -1), 1 / 6)),
    "masked by -inf": (
        b.exp(b.where(b.gt(X, Y), X, MINUS)),
        b.where(b.gt(X, Y), b.exp(X), b.constant(0.0)),
    ),
    "product of exponentials as an exponent": (
        b.exp(b.exp(b.add(X, Y))),
        b.exp(b.mul(b.exp(X), b.exp(Y))),
    ),
    "softmax of a softmax, both without a shift": (_softmax(_softmax(X)), _unstable(_unstable(X))),
    "a gate of what is divided after the sum": (
        b.sigmoid(b.matmul(_softmax(X), b.transpose(Y))),
        b.sigmoid(b.div(b.matmul(b.exp(X), b.transpose(Y)), b.reduce_sum(b.exp(X), -1))),
    ),
    "a gate of its own scores": (
        b.exp(b.mul(X, b.sigmoid(X))),
        b.exp(b.div(X, b.add(b.exp(b.neg(X)), 1.0))),
    ),
    "maxima of exponents": (b.exp(b.tanh(_softmax(X))), b.exp(b.tanh(_unstable(X)))),
    "comparison seen from the other side": (b.where(b.gt(X, Y), X, Y), b.where(b.lt(Y, X), X, Y)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_programs_are_accepted(name: str) -> None:
    left, right = EQUAL[name]
    verdict = same(left, right, X, Y)
    assert verdict.equivalent, verdict
    assert verdict.bound <= 2.0**-60
    assert len(set(verdict.primes)) == verdict.tests


def test_split_k_matmul() -> None:
    x, w = tensor("x", (5, 21)), tensor("w", (21, 7))
    original = b.kernel_graph("mm", [x, w], [b.matmul(x, w)])
    block = b.BlockBuilder("split", grid={"s": 2}, loops={"k": 3})
    part = b.accum_sum(
        b.matmul(block.load(x, 5, ("s", "k", 4)), block.load(w, ("s", "k", 4), 7)), "k"
    )
    block.store(b.reshape(part, (1, 5, 7)), (2, 5, 7), ("s", 1), 5, 7)
    parts = b.apply_graph(block.graph(), [x, w])[0]
    candidate = b.kernel_graph("sum", [x, w], [b.reshape(b.reduce_sum(parts, 0), (5, 7))])
    assert verify_field(original, candidate, seed=1).equivalent


@pytest.mark.parametrize("causal", [False, True])
def test_online_softmax(causal: bool) -> None:
    original, kernel = attention(heads=5, causal=causal)
    assert verify_field(original, kernel, seed=2).equivalent


def test_guarded_rows_that_are_masked_whole_are_not_nan() -> None:
    x = tensor("x", (4, 6))
    block = b.BlockBuilder("guard", loops={"n": 2})
    tx = block.load(x, 4, ("n", 3))
    columns = b.reshape(block.index(6, ("n", 3)), (1, 3))
    s = b.where(b.ge(columns, 3), tx, MINUS)
    m = b.accumulate(tile.PREFIX_MAX, b.reduce_max(s, -1), "n")
    p = b.exp(b.sub(s, b.finite_or_zero(m)))
    block.store(b.accum_rescaled(b.reduce_sum(p, -1), m, "n"), (4, 1), 4, 1)
    tail = b.slice_(x, -1, 3, 6)
    expected = b.reduce_sum(b.exp(b.sub(tail, b.reduce_max(tail, -1))), -1)
    original = b.kernel_graph("tail", [x], [expected])
    assert verify_field(original, block.graph(), seed=3).equivalent


# -- integers, unknown operators, signatures -------------------------------------------------------


def test_indices_are_concrete_and_valid() -> None:
    table, index = tensor("table", (9, 4)), tensor("index", (5,), DType.I64)
    rows = b.take(table, index, 0)
    assert same(b.mul(rows, 2.0), b.take(b.mul(table, 2.0), index, 0), table, index)
    clipped = b.take(table, b.minimum(index, b.constant(7, DType.I64)), 0)
    assert not same(rows, clipped, table, index)


def test_boolean_masks_are_drawn() -> None:
    mask = tensor("mask", (4, 6), DType.BOOL)
    assert not same(b.where(mask, X, Y), b.where(mask, Y, X), mask, X, Y)
    assert same(b.where(mask, X, Y), b.where(b.not_(mask), Y, X), mask, X, Y)


def _opaque(x: Node, target: str = "aten.erfinv.default") -> Node:
    from superopt.ir.node import make
    from superopt.ir.ops import library

    arguments = '{"args": [{"t": 0}], "kwargs": {}}'
    attrs = OpaqueAttrs(target, arguments, TensorType(x.shape, DType.F32))
    return make(library.OPAQUE, (x,), attrs)


def test_opaque_operators_are_unknown_functions() -> None:
    assert same(_opaque(b.add(X, Y)), _opaque(b.add(Y, X)), X, Y)
    assert not same(_opaque(X), _opaque(Y), X, Y)
    assert not same(_opaque(X), _opaque(X, "aten.erfc.default"), X, Y)


def test_signatures_must_agree() -> None:
    one = b.kernel_graph("one", [X], [X])
    with pytest.raises(GraphError, match="takes 1 inputs"):
        verify_field(one, b.kernel_graph("two", [X, Y], [X]), seed=0)
    other = tensor("x", (4, 7))
    with pytest.raises(GraphError, match="input x is"):
        verify_field(one, b.kernel_graph("other", [other], [other]), seed=0)
    verdict = verify_field(one, b.kernel_graph("sum", [X], [b.reduce_sum(X, -1)]), seed=0)
    assert not verdict
    assert "output 0 is" in verdict.reason


def test_the_same_seed_gives_the_same_tests() -> None:
    graph: Graph = b.kernel_graph("g", [X, Y], [b.add(X, Y)])
    first, second = (verify_field(graph, graph, seed=9) for _ in range(2))
    assert (first.primes, first.seeds) == (second.primes, second.seeds)
    assert verify_field(graph, graph, seed=10).primes != first.primes


def test_the_bound_grows_with_the_degree() -> None:
    cube = b.pow_(X, 3.0)
    low, high = same(X, b.mul(X, 1.0), X), same(b.pow_(cube, 20.0), b.pow_(b.mul(X, 1.0), 60.0), X)
    assert low.equivalent
    assert high.equivalent
    assert high.error_per_test > 10 * low.error_per_test
    assert high.bound <= 2.0**-60


def test_a_common_divisor_is_counted_once() -> None:
    wide, values = tensor("wide", (2, 512)), tensor("values", (512, 4))
    e = b.exp(wide)
    attended = b.matmul(b.div(e, b.reduce_sum(e, -1)), values)
    after = b.div(b.matmul(e, values), b.reduce_sum(e, -1))
    verdict = same(attended, after, wide, values)
    assert verdict.equivalent
    assert verdict.error_per_test < 2.0**-20


def test_only_integers_that_differing_results_read_need_many_values() -> None:
    count = tensor("count", (), DType.I64)
    doubled, scaled = b.add(X, X), b.cast(count, DType.F32)

    def tests(*pairs: tuple[Node, Node]) -> int:
        left, right = (
            b.kernel_graph("both", (X, count), side) for side in zip(*pairs, strict=True)
        )
        verdict = verify_field(left, right, seed=3)
        assert verdict.equivalent
        return verdict.tests

    apart = tests((b.mul(X, 2.0), doubled), (b.add(count, 1), b.add(count, 1)))
    assert apart < 10
    assert tests((b.mul(X, 2.0), doubled), (b.add(count, 1), b.sub(count, -1))) == 64
    assert tests((b.mul(b.mul(X, 2.0), scaled), b.mul(doubled, scaled))) == 64


def test_a_first_look_sees_fewer_outcomes_of_few_comparisons() -> None:
    scale = tensor("scale", (6,))
    capped = b.where(b.gt(scale, 1.0), scale, b.exp(scale))
    doubled, added = b.mul(X, 2.0), b.add(X, X)

    def tests(error_bound: float, left: list[Node], right: list[Node]) -> int:
        graphs = (b.kernel_graph("capped", (X, scale), side) for side in (left, right))
        verdict = verify_field(*graphs, seed=3, error_bound=error_bound)
        assert verdict.equivalent
        return verdict.tests

    read = [b.mul(doubled, capped)], [b.mul(added, capped)]
    assert tests(2.0**-60, *read) == 43
    assert tests(2.0**-20, *read) == 15
    assert tests(2.0**-60, [doubled, capped], [added, capped]) < 10, "nothing that differs reads it"


def test_integers_are_negative_too() -> None:
    i = tensor("i", (40,), DType.I64)
    plain, wrong = b.cast(i, DType.F32), b.cast(b.abs_(i), DType.F32)
    assert not same(plain, wrong, i)
    original, candidate = (b.kernel_graph("g", [i], [n]) for n in (plain, wrong))
    assert not verify_float(original, lambda tensors: run_reference(candidate, tensors), seed=1)


def test_indices_that_the_program_mends_are_drawn_too() -> None:
    x, i = tensor("x", (50, 9)), tensor("i", (50, 1), DType.I64)

    def range_of(index: Node) -> Integers:
        return integer_ranges(b.kernel_graph("g", [x, i], [b.gather(x, index, -1)]))["i"]

    ignored = b.where(b.ne(i, b.constant(-100, DType.I64)), i, b.constant(0, DType.I64))
    negative = b.lt(i, b.constant(0, DType.I64))
    from_the_end = b.where(negative, b.add(i, b.constant(9, DType.I64)), i)
    assert range_of(i) == Integers(0, 9)
    assert range_of(ignored) == Integers(0, 9, (-100,))
    assert range_of(from_the_end) == Integers(0, 9, (1, -1))
    zero, one = b.constant(0, DType.I64), b.constant(1, DType.I64)
    same_ignored = b.where(b.eq(i, b.constant(-100, DType.I64)), zero, i)
    same_from_the_end = b.add(i, b.where(negative, b.constant(9, DType.I64), zero))
    wrong = b.where(negative, one, i)
    for mended, other in ((ignored, same_ignored), (from_the_end, same_from_the_end)):
        assert same(b.gather(x, mended, -1), b.gather(x, other, -1), x, i)
        assert not same(b.gather(x, mended, -1), b.gather(x, wrong, -1), x, i)


def test_what_degree_allows_no_proof_is_told_before() -> None:
    power = X
    for _ in range(23):
        power = b.mul(power, power)
    assert provable(b.kernel_graph("g", [X], [power]))
    for _ in range(2):
        power = b.mul(power, power)
    assert not provable(b.kernel_graph("g", [X], [power]))


@pytest.mark.parametrize(
    ("rows", "squared", "proven"), [(8, 20, 1), (1 << 26, 20, 0), (1 << 26, 8, 1)]
)
def test_what_is_large_is_proven_where_few_tests_are_enough(
    rows: int, squared: int, proven: bool
) -> None:
    """More would look for views, among all its elements."""
    power = x = b.input_("x", (rows, 8))
    for _ in range(squared):
        power = b.mul(power, power)
    assert provable(b.kernel_graph("g", [x], [power])) is bool(proven)


def test_nested_exponentials_are_bounded_by_the_smallest_prime() -> None:
    def error(x: Node) -> float:
        graph = b.kernel_graph("g", [X], [x, x])
        return error_per_test(graph, 1, 2 * 1009 + 1, 1009)

    # of degree one each: variables modulo q = 1009, and modulo r = 504 as well
    assert error(b.exp(X)) == pytest.approx(1 / 1009)
    assert error(b.exp(b.exp(X))) == pytest.approx(1 / 1009 + 2 / 1009)


def test_degrees_of_many_layers_take_no_more_divisors_than_those_of_few() -> None:
    def divisors(layers: int) -> int:
        y = b.input_("x", (64, 64), DType.F32)
        for _ in range(layers):
            y = b.matmul(b.div(y, b.reduce_sum(b.mul(y, y), (-1,))), y)
        found = degrees(b.kernel_graph("g", b.graph_inputs([y]), [y]))
        return max(len(d.factors) for d in found.values())

    # every layer has twice as many as the one before, until the degree says nothing any more
    assert divisors(12) == divisors(8)


def test_large_programs_are_tested_at_a_few_steps_that_are_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(equivalence, "alike", partial(alike, large=64))
    x, w = tensor("x", (64, 8)), tensor("w", (8, 16))
    product = b.exp(b.matmul(x, w))
    found = same(product, b.exp(b.transpose(b.matmul(b.transpose(w), b.transpose(x)))))
    assert found.equivalent
    assert found.alike == ((4, 64),)
    # one row of all that is wrong is seen: where rows count, all are tested
    row = b.eq(b.iota((64, 1), -2), b.constant(37, DType.I64))
    wrong = same(product, b.where(row, b.mul(product, 2.0), product))
    assert not wrong.equivalent
    assert wrong.counterexample is not None
    assert wrong.counterexample.position[0] == 37
    # while columns are alike
    assert wrong.alike == ((1, 16),)
    assert not same(product, b.exp(b.matmul(b.mul(x, 2.0), w))).equivalent


def gram(x: Node, columns: int) -> Node:
    """Return the determinant of xᵀ x: 0 where fewer rows than columns differ."""
    if columns == 1:
        return b.reduce_sum(b.mul(x, x), (-2, -1))
    parts = [b.slice_(x, -1, i, i + 1) for i in range(columns)]
    sums = [[b.reduce_sum(b.mul(p, q), (-2, -1)) for q in parts] for p in parts]

    def determinant(rows: list[list[Node]]) -> Node:
        if len(rows) == 1:
            return rows[0][0]
        terms = [
            b.mul(rows[0][j], determinant([[*r[:j], *r[j + 1 :]] for r in rows[1:]]))
            for j in range(len(rows))
        ]
        total = terms[0]
        for j, term in enumerate(terms[1:], 1):
            total = b.sub(total, term) if j % 2 else b.add(total, term)
        return total

    return determinant(sums)


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_so_many_steps_are_left_of_sums_that_no_polynomial_hides(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "alike", partial(alike, large=2))
    x = tensor("x", (128, columns))
    zero = b.sub(x, x)
    nothing = gram(zero, columns)
    found = same(nothing, gram(x, columns))
    assert not found.equivalent
    assert found.alike == ((2 * columns + 4, 128),)
    # with the two that a first guess needs, a determinant of three columns is none
    monkeypatch.setattr(equivalence, "SUMMED", inf)
    assert same(nothing, gram(x, columns)).equivalent == (columns > 2)


def mean_loss(
    logits: Node, classes: Node, *, by: float | None = None, blocks: int | None = None
) -> Node:
    """Return the mean over rows of what a class costs; rows of class -100 do not count."""
    kept = b.ne(classes, b.constant(-100, DType.I64))
    total = b.log(b.reduce_sum(b.exp(logits), -1))
    picked = b.gather(logits, b.where(kept, classes, b.constant(0, DType.I64)), -1)
    rows = b.where(kept, b.sub(total, picked), b.constant(0.0))
    count = b.cast(b.reduce_sum(b.cast(kept, DType.I64), (-2, -1)), DType.F32)
    summed = b.reduce_sum(rows, (-2, -1))
    if blocks is not None:
        partly = b.reduce_sum(b.reshape(rows, (blocks, rows.shape[0] // blocks, 1)), -2)
        summed = b.reshape(b.reduce_sum(partly, -3), (1, 1))
    return b.div(summed, count if by is None else by)


def test_sums_over_rows_are_tested_at_a_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "alike", partial(alike, large=64))
    logits, classes = tensor("logits", (64, 16)), b.input_("classes", (64, 1), DType.I64)
    loss = mean_loss(logits, classes)
    found = same(loss, mean_loss(logits, classes, blocks=32))
    assert found.equivalent
    assert found.alike == ((8, 32),)
    assert not same(loss, mean_loss(logits, classes, by=64.0)).equivalent
    assert not same(loss, b.mul(loss, 2.0)).equivalent
    # rows that are told apart are all tested
    row = b.eq(b.iota((64, 1), -2), b.constant(37, DType.I64))
    other = mean_loss(b.where(row, b.mul(logits, 2.0), logits), classes)
    assert not same(loss, other).equivalent
    assert same(loss, other).alike == ()


def label_loss(
    logits: Node,
    classes: Node,
    table: bool,
    ignored: int,
    *,
    by: float | None = None,
    odd: int | None = None,
    shift: int = 0,
    last: int | None = None,
) -> Node:
    """Return the mean loss over rows, looked up in a table or compared with all classes; or a wrong one."""

    def whole(value: int) -> Node:
        return b.constant(value, DType.I64)

    kept = b.ne(classes, whole(ignored))
    index = b.add(classes, whole(shift))
    columns = logits.shape[-1]
    if not table:
        hot = b.eq(index, b.iota((1, columns if last is None else last), -1))
        read = logits if last is None else b.slice_(logits, -1, 0, last)
        picked = b.reduce_sum(b.where(hot, read, b.constant(0.0)), -1)
    else:
        inside = b.where(b.lt(index, whole(columns if last is None else last)), index, whole(0))
        picked = b.gather(logits, b.where(kept, inside, whole(0)), -1)
    if odd is not None:
        picked = b.where(b.eq(classes, whole(odd)), b.mul(picked, 2.0), picked)
    rows = b.where(kept, picked, b.constant(0.0))
    count = b.cast(b.reduce_sum(b.cast(kept, DType.I64), (-2, -1)), DType.F32)
    return b.div(b.reduce_sum(rows, (-2, -1)), count if by is None else by)


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("ignored", [-100, 40, 63])
@pytest.mark.parametrize(
    "wrong", [{"by": 512.0}, {"odd": 77}, {"shift": 1}, {"last": 199}], ids=str
)
def test_a_class_that_few_rows_have_is_tried(
    table: bool, ignored: int, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equivalence, "alike", partial(alike, large=64))
    logits, classes = tensor("logits", (512, 200)), b.input_("classes", (512, 1), DType.I64)
    loss = partial(label_loss, logits, classes, table, ignored)
    for seed in range(3):
        found = same(loss(), loss(**wrong), logits, classes, seed=seed)
        assert not found.equivalent
        assert found.alike


def test_a_product_is_tested_at_a_few_terms_where_its_result_is_no_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(equivalence, "alike", partial(alike, large=64))
    x, w = tensor("x", (4, 512)), tensor("w", (512, 6))
    product = b.matmul(b.exp(x), w)
    staged = b.reduce_sum(
        b.matmul(b.permute(b.reshape(b.exp(x), (4, 32, 16)), (1, 0, 2)), b.reshape(w, (32, 16, 6))),
        -3,
    )
    found = same(product, b.reshape(staged, (4, 6)))
    assert found.equivalent
    assert found.alike
    assert not same(product, b.matmul(b.exp(b.mul(x, 2.0)), w)).equivalent
    assert {of for _, of in same(b.exp(product), b.exp(product)).alike} == {4}


@pytest.mark.parametrize("causal", [False, True])
def test_kernels_are_proven_at_a_few_steps(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence, "alike", partial(alike, large=64))
    original, kernel = attention(heads=5, causal=causal)
    found = verify_field(original, kernel, seed=2)
    assert found.equivalent
    assert found.alike
    other = original.with_outputs([b.mul(original.outputs[0], 2.0)])
    assert not verify_field(other, kernel, seed=2).equivalent


def test_results_whose_few_steps_lie_along_different_axes_are_refused_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What sums over the first axis in one program, and over the last in the other, is cut along others."""
    monkeypatch.setattr(equivalence, "alike", lambda graph, **options: alike(graph, 120, **options))
    monkeypatch.setattr(equivalence, "DIRECT_ERROR", 0.0)
    x, z = b.input_("x", (6, 18, 4)), b.input_("z", (6, 18, 4))
    quotients = b.flip(b.div(z, b.reduce_sum(b.mul(x, x), 1)), (2,))
    one, other = (
        b.kernel_graph("g", [x, z], [b.broadcast(b.reduce_sum(quotients, axis), (6, 18, 4))])
        for axis in (2, 0)
    )
    assert not verify_field(one, other, seed=1).equivalent
    assert verify_field(one, one, seed=1).equivalent


@pytest.mark.parametrize("times", [1.0, 2.0])
def test_a_few_rows_choose_the_claims(times: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all rows read all others, and no position is known; the claims are about all."""
    picked = []

    def spied(graph: Graph, **options: Any) -> Any:
        found = alike(graph, 64, **options)
        picked.append(bool(found.few and options["picked"]))
        return found

    monkeypatch.setattr(equivalence, "alike", spied)
    monkeypatch.setattr(equivalence, "DIRECT_ERROR", 1e-9)
    x, w, out = tensor("x", (24, 4)), tensor("w", (4, 4)), tensor("out", (4, 3))

    def attended(late: bool) -> Node:
        keys = b.matmul(x, w)
        weights = b.exp(b.matmul(x, b.transpose(keys)))
        total = b.reduce_sum(weights, -1)
        if late:
            return b.matmul(b.div(b.matmul(weights, keys), b.mul(total, times)), out)
        return b.matmul(b.matmul(b.div(weights, total), keys), out)

    found = same(attended(late=False), attended(late=True), x, w, out)
    assert found.equivalent is (times == 1.0)
    assert any(picked)
    assert (found.pieces != ()) is found.equivalent


def test_what_is_compared_with_infinity_tells_no_position() -> None:
    x = tensor("x", (24, 4))
    lowest = b.broadcast(b.constant(float("-inf")), (24, 1))
    shift = b.reduce_max(x, -1)
    guarded = b.sub(x, b.where(b.gt(shift, lowest), shift, b.constant(0.0)))
    hidden = b.where(b.gt(x, b.constant(0.0)), x, lowest)
    counted = b.mul(x, b.cast(b.iota((24, 1), -2), DType.F32))
    for result, few in ((guarded, True), (hidden, False), (counted, False), (lowest, False)):
        assert equivalence._pickable(b.kernel_graph("g", [x], [result])) is few


@pytest.mark.parametrize("glance", [False, True])
def test_a_proof_asks_what_is_finite_at_other_rows(
    glance: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a mask of positions a few rows do not tell; a glance takes them for all."""
    left, asked = [], []
    everywhere = equivalence.finite_everywhere
    monkeypatch.setattr(
        equivalence, "finite_everywhere", lambda g: asked.append(g) or everywhere(g)
    )

    def spied(graph: Graph, **options: Any) -> Any:
        found = alike(graph, 64, **options)
        left.append(found.picked)
        return found

    monkeypatch.setattr(equivalence, "alike", spied)
    monkeypatch.setattr(equivalence, "DIRECT_ERROR", 1e-9)
    x, w = tensor("x", (24, 4)), tensor("w", (4, 3))
    earlier = b.ge(b.iota((24, 24), -2), b.iota((24, 24), -1))
    weights = b.exp(b.where(earlier, b.matmul(x, b.transpose(x)), b.constant(float("-inf"))))
    results = [
        b.matmul(b.matmul(weights, b.mul(x, factor)), b.mul(w, other))
        for factor, other in ((2.0, 1.0), (1.0, 2.0), (1.0, 3.0))
    ]
    one, same_, wrong = (b.kernel_graph("g", [x, w], [result]) for result in results)
    assert verify_field(one, same_, seed=1, glance=glance).equivalent
    assert any(left)
    assert bool(asked) is not glance
    assert not verify_field(one, wrong, seed=1, glance=glance).equivalent


def test_a_first_look_makes_a_third_of_the_tests_of_a_proof() -> None:
    x, lengths = b.input_("x", (2, 30)), b.input_("lengths", (2, 1), DType.I64)
    seen = b.where(b.lt(b.iota((1, 30), -1, DType.I64), lengths), x, 0.0)
    sums = b.reduce_sum(b.mul(seen, 2.0), -1), b.mul(b.reduce_sum(seen, -1), 2.0)
    graphs = [b.kernel_graph("g", [x, lengths], [result]) for result in sums]
    look = verify_field(*graphs, seed=1, error_bound=2.0**-20)
    proof = verify_field(*graphs, seed=1)
    assert (look.tests, proof.tests) == (22, 64)
