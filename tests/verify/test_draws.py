import json
import re

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make
from superopt.ir.ops import library
from superopt.ir.ops.library import OpaqueAttrs
from superopt.ir.types import DType, TensorType
from superopt.verify.draws import draws, draws_random_numbers, generators
from superopt.verify.equivalence import verify_field
from superopt.verify.floating import verify_float
from superopt.verify.reference import run_reference

X = b.input_("x", (3, 4), DType.F32)
SHELL = {"empty": [3, 4], "strides": [4, 1], "dtype": "float32", "device": "cpu"}


def draw(before: Node | None = None, target: str = "aten.rand_like.default") -> Node:
    arguments = json.dumps({"args": [SHELL], "kwargs": {}})
    attrs = OpaqueAttrs(target, arguments, TensorType((3, 4), DType.F32))
    return make(library.OPAQUE, () if before is None else (before,), attrs)


def chosen(of: Node, before: Node) -> Node:
    arguments = json.dumps({"args": [{"t": 0, "strides": [4, 1]}], "kwargs": {}})
    attrs = OpaqueAttrs("aten.bernoulli.default", arguments, TensorType((3, 4), DType.F32))
    return make(library.OPAQUE, (of, before), attrs)


def program(result: Node, last: Node) -> Graph:
    return b.kernel_graph("program", [X], [result, last])


FIRST = draw()
SECOND = draw(FIRST)
THIRD = chosen(b.sigmoid(b.add(X, X)), SECOND)
ORIGINAL = program(b.add(b.mul(FIRST, X), b.mul(SECOND, THIRD)), THIRD)


def test_other_arithmetic_on_the_same_draws_is_equal() -> None:
    last = chosen(b.sigmoid(b.mul(X, 2.0)), SECOND)
    equal = program(b.add(b.mul(last, SECOND), b.mul(X, FIRST)), last)
    assert len(draws(ORIGINAL)) == 3
    assert verify_field(ORIGINAL, equal, seed=0)


SWAPPED = program(b.add(b.mul(SECOND, X), b.mul(FIRST, THIRD)), THIRD)
MERGED = program(b.add(b.mul(FIRST, X), b.mul(FIRST, THIRD)), THIRD)
_OTHER = chosen(b.sigmoid(X), SECOND)
_TWICE = chosen(b.sigmoid(b.mul(X, 2.0)), SECOND)
_AFTER_FIRST = chosen(b.sigmoid(b.add(X, X)), FIRST)
_NORMAL = draw(target="aten.randn_like.default")


@pytest.mark.parametrize(
    ("mutant", "reason"),
    [
        (SWAPPED, "output 0"),
        (MERGED, "output 0"),
        (program(ORIGINAL.outputs[0], SECOND), "output 1"),
        (program(b.add(b.mul(FIRST, X), b.mul(SECOND, _OTHER)), _OTHER), "output"),
        (program(b.add(b.mul(FIRST, X), b.mul(SECOND, _TWICE)), THIRD), "4 draws"),
        (program(b.add(b.mul(FIRST, X), b.mul(FIRST, _AFTER_FIRST)), _AFTER_FIRST), "2 draws"),
        (program(b.mul(_NORMAL, X), chosen(X, draw(_NORMAL))), "draw 0 .* is aten.randn_like"),
    ],
    ids=["swapped", "merged", "dropped", "other-rate", "twice", "skipped", "other-operator"],
)
def test_mutants_are_rejected(mutant: Graph, reason: str) -> None:
    verdict = verify_field(ORIGINAL, mutant, seed=0)
    assert not verdict
    assert re.search(reason, verdict.reason), verdict.reason


def test_the_floating_point_test_lets_both_draw_the_same() -> None:
    before = torch.get_rng_state()
    assert verify_float(ORIGINAL, lambda tensors: run_reference(ORIGINAL, tensors), seed=0)
    verdict = verify_float(ORIGINAL, lambda tensors: run_reference(SWAPPED, tensors), seed=0)
    assert "output 0" in verdict.reason
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_original_refuses_is_not_tested() -> None:
    x = b.input_("x", (4, 4), DType.F32)
    arguments = '{"args": [{"t": 0}], "kwargs": {}}'
    attrs = OpaqueAttrs("aten.cholesky.default", arguments, TensorType((4, 4), DType.F32))
    square = b.add(b.matmul(x, b.transpose(x)), 1e-3)
    for operand, accurate in ((square, True), (x, False)):
        graph = b.kernel_graph("factor", [x], [make(library.OPAQUE, (operand,), attrs)])
        verdict = verify_float(graph, lambda t, g=graph: run_reference(g, t), seed=0)
        assert bool(verdict) is accurate
    assert "the original fails on all test inputs" in verdict.reason


def test_generators_get_their_state_back() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), generators("cpu", seed=3):
        torch.multinomial(-torch.rand(5), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_damaged_arguments_are_named() -> None:
    attrs = OpaqueAttrs("aten.rand.default", "[1]", TensorType((1,), DType.F32))
    with pytest.raises(GraphError, match=r"arguments of aten\.rand\.default are damaged"):
        draws_random_numbers(attrs)
