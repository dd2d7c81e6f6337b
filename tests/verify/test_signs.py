"""What signs call finite is finite in the field, at every position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.interpret import interpret
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, elementwise, structural
from superopt.ir.ops.registry import Op
from superopt.ir.semantics import expand
from superopt.ir.types import DType
from superopt.verify import equivalence, signs
from superopt.verify.equivalence import verify_field
from superopt.verify.field import FieldDomain
from superopt.verify.needs import needed_residues, real_valued
from superopt.verify.ranges import integer_ranges
from superopt.verify.signs import finite_everywhere
from tests.strategies import kernel_graphs

INF = float("inf")
ROWS, KEYS = b.iota((24, 1), -2), b.iota((1, 24), -1)
CAUSAL = b.ge(ROWS, KEYS)
STRICT = b.gt(ROWS, KEYS)
HOLLOW = b.elementwise_op(
    elementwise.AND, CAUSAL, b.elementwise_op(elementwise.NE, ROWS, b.constant(5, DType.I64))
)
"""Hides all keys from one row in the middle."""
X = b.input_("x", (24, 4))
GIVEN = b.input_("mask", (24, 24), DType.BOOL)
SEEN = b.reduce_sum(b.cast(CAUSAL, DType.F32), -1)
NONE_SEEN = b.reduce_sum(b.cast(STRICT, DType.F32), -1)


def softmax(mask: Node, hidden: float = -INF) -> Node:
    scores = b.where(mask, b.matmul(X, b.transpose(X)), b.constant(hidden))
    e = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    return b.div(e, b.reduce_sum(e, -1))


def program(result: Node) -> Graph:
    return b.kernel_graph("g", b.graph_inputs([result]), [result])


CASES = [
    (softmax(CAUSAL), True),
    (softmax(STRICT), False),
    (softmax(HOLLOW), False),
    (softmax(STRICT, -1e9), True),
    (softmax(GIVEN), False),
    (b.matmul(softmax(CAUSAL), X), True),
    (b.matmul(softmax(HOLLOW), X), False),
    (b.where(CAUSAL, b.matmul(X, b.transpose(X)), -INF), False),
    (b.div(b.reduce_sum(b.matmul(X, b.transpose(X)), -1), SEEN), True),
    (b.div(b.reduce_sum(b.matmul(X, b.transpose(X)), -1), NONE_SEEN), False),
    (b.div(X, b.add(b.reduce_sum(b.mul(X, X), -1), 1.0)), True),
    (b.div(X, b.reduce_sum(b.mul(X, X), -1)), False),
    (b.div(X, b.add(b.reduce_sum(X, -1), 1.0)), False),
    (b.div(X, b.maximum(b.reduce_sum(X, -1), b.constant(0.5))), True),
    (b.div(X, b.minimum(b.reduce_sum(X, -1), b.constant(0.5))), False),
    (b.reduce_max(b.where(HOLLOW, 1.0, -INF), -1), False),
    (b.reduce_max(b.where(CAUSAL, 1.0, -INF), -1), True),
    (b.reduce(contraction.REDUCE_MIN, b.where(CAUSAL, 1.0, -INF), -1), False),
    (b.div(b.constant(1.0), b.where(CAUSAL, -INF, 1.0)), True),
    (b.mul(b.where(CAUSAL, 1.0, INF), b.constant(0.0)), False),
    (b.exp(b.where(CAUSAL, 1.0, INF)), False),
    (b.sub(b.where(CAUSAL, 1.0, INF), b.where(CAUSAL, 1.0, INF)), False),
    (b.exp(b.sub(b.constant(1.0), b.where(CAUSAL, 1.0, INF))), True),
    (b.elementwise_op(elementwise.POW, b.add(b.mul(X, X), 1.0), -0.5), True),
    (b.elementwise_op(elementwise.POW, b.mul(X, X), -0.5), False),
    (b.flip(b.reshape(softmax(CAUSAL), (4, 6, 24)), (-1,)), True),
    (b.pad(softmax(CAUSAL), -1, 1, 0, INF), False),
    (b.concat([softmax(CAUSAL), softmax(HOLLOW)], -1), False),
    (b.take(softmax(HOLLOW), b.iota((5,), -1), -2), True),
    (b.take(softmax(HOLLOW), b.iota((6,), -1), -2), False),
]


@pytest.mark.parametrize(("result", "finite"), CASES)
def test_signs_of_masks_and_divisors(result: Node, finite: bool) -> None:
    graph = expand(program(result))
    assert (graph.outputs[0] in finite_everywhere(graph)) is finite


def finite_in_the_field(graph: Graph, seed: int) -> set[Node]:
    needs = needed_residues(graph)
    seen = equivalence._Observed(())
    domain = FieldDomain(seed, needs, False, True)
    ranges = integer_ranges(graph)
    needed = [needs.get(i, frozenset()) or frozenset({"p"}) for i in graph.inputs]
    pairs = zip(graph.inputs, needed, strict=True)
    args = [domain.draw(i.tensor, n, ranges[i.attrs.name]) for i, n in pairs]
    interpret(graph, args, seen.over(domain))
    return seen.finite


@given(graph=kernel_graphs(), seed=st.integers(0, 9))
def test_signs_of_random_programs(graph: Graph, seed: int) -> None:
    graph = expand(graph)
    computed = [n for n in topological(graph.outputs) if n.inputs and real_valued(n)]
    found = finite_everywhere(graph)
    assert found.intersection(computed) <= finite_in_the_field(graph, seed)


def test_masks_that_are_too_large_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs, "_MOST", 24 * 24 - 1)
    assert finite_everywhere(expand(program(softmax(CAUSAL)))) == frozenset()


# -- proofs at a few rows --------------------------------------------------------------------------


def few_rows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let small programs be proven as large ones are; return where tests picked rows."""
    picked: list[bool] = []
    alike = equivalence.alike

    def spied(graph: Graph, **options: object) -> object:
        found = alike(graph, 64, **options)
        picked.append(found.picked)
        return found

    monkeypatch.setattr(equivalence, "alike", spied)
    monkeypatch.setattr(equivalence, "DIRECT_ERROR", 1e-9)
    return picked


def vanishing(mask: Node) -> tuple[Graph, Graph]:
    """Return 0 times the largest score that a row sees, and 0 times its exponential: the same where that is finite."""
    w = b.input_("w", (4, 3))
    largest = b.reduce_max(b.where(mask, b.matmul(X, b.transpose(X)), -INF), -1)
    results = [b.matmul(b.mul(X, b.mul(a, 0.0)), w) for a in (largest, b.exp(largest))]
    one, other = (b.kernel_graph("g", [X, w], [result]) for result in results)
    return one, other


@pytest.mark.parametrize(("mask", "equal"), [(CAUSAL, True), (HOLLOW, False), (STRICT, False)])
def test_rows_that_see_nothing_are_not_forgotten(
    mask: Node, equal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = few_rows(monkeypatch)
    assert verify_field(*vanishing(mask), seed=1).equivalent is equal
    assert any(picked)


def test_a_proof_asks_the_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that is finite at a few rows taken for finite the test above would fail."""
    few_rows(monkeypatch)

    def every(graph: Graph) -> frozenset[Node]:
        return frozenset(topological(graph.outputs))

    monkeypatch.setattr(equivalence, "finite_everywhere", every)
    assert verify_field(*vanishing(HOLLOW), seed=1).equivalent


def says(signs_: int) -> Callable[..., torch.Tensor]:
    return lambda node, args: signs._all(node, signs_)


@pytest.mark.parametrize(
    ("op", "rule"),
    [
        (contraction.REDUCE_MAX, says(signs._FINITE)),
        (contraction.REDUCE_MAX, says(signs._ANY)),
        (contraction.REDUCE_MIN, says(signs._FINITE)),
        (contraction.REDUCE_SUM, says(signs._POSITIVE)),
        (contraction.REDUCE_SUM, says(signs._FINITE)),
        (contraction.MATMUL, says(signs._FINITE)),
        (elementwise.DIV, says(signs._FINITE)),
        (elementwise.DIV, signs._by_table(signs._times)),
        (elementwise.MUL, signs._by_table(torch.mul)),
        (elementwise.MUL, signs._by_table(signs._times)),
        (elementwise.EXP, says(signs._POSITIVE)),
        (elementwise.SUB, signs._RULES[elementwise.ADD]),
        (elementwise.MAXIMUM, signs._RULES[elementwise.MINIMUM]),
        (elementwise.MINIMUM, signs._RULES[elementwise.MAXIMUM]),
        (elementwise.POW, says(signs._FINITE)),
        (structural.PAD, says(signs._FINITE)),
        (structural.CONCAT, says(signs._FINITE)),
        (structural.TAKE, signs._unknown),
    ],
)
def test_wrong_rules_are_seen(op: Op, rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(signs._RULES, op, rule)
    graphs = [(expand(program(result)), finite) for result, finite in CASES]
    assert any((g.outputs[0] in finite_everywhere(g)) is not finite for g, finite in graphs)
