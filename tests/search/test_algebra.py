"""Each rule of algebra: where it fires, where it must not, and that both sides agree."""

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.ops import contraction, structural
from superopt.ir.types import DType
from superopt.search.algebra import (
    FUSION_RULES,
    GATHER_BELOW_ELEMENTWISE,
    GATHER_TO_SELECT,
    SCALE_OUT_OF_CONTRACTION,
    SCALE_OUT_OF_SUM,
    Rule,
    apply_rules,
)
from superopt.verify.reference import run_reference

x, y = b.input_("x", (5, 6)), b.input_("y", (6, 7))
label = b.input_("label", (5, 1), DType.I64)
row = b.reduce_sum(x, -1)
column = b.reduce_sum(y, -2)


def case(inputs: list[object], output: object) -> Graph:
    return b.kernel_graph("case", inputs, [output])  # type: ignore[list-item,arg-type]


FIRES = [
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.mul(x, row), y))),
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.div(x, row), y))),
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(x, b.div(y, column)))),
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.mul(b.exp(x), row), b.mul(y, column)))),
    (SCALE_OUT_OF_SUM, case([x], b.reduce_sum(b.div(b.exp(x), row), -1))),
    (GATHER_TO_SELECT, case([x, label], b.gather(x, label, -1))),
    (GATHER_BELOW_ELEMENTWISE, case([x, label], b.gather(b.sub(x, row), label, -1))),
]
STAYS = [
    # a factor along the contracted dim cannot leave
    (
        SCALE_OUT_OF_CONTRACTION,
        case([x, y], b.matmul(b.mul(x, b.transpose(b.reduce_sum(y, -1))), y)),
    ),
    # a plain input costs nothing inside the loop
    (SCALE_OUT_OF_CONTRACTION, case([x, y], b.matmul(b.mul(x, b.input_("r", (5, 1))), y))),
    (SCALE_OUT_OF_SUM, case([x], b.reduce_sum(b.div(b.exp(x), row), -2))),
]


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


@pytest.mark.parametrize("number", range(len(STAYS)))
def test_rule_stays_away(number: int) -> None:
    rule, graph = STAYS[number]
    assert apply_rules(graph, (rule,)) == graph


def test_names_are_unique() -> None:
    names = [rule.name for rule in FUSION_RULES]
    assert len(set(names)) == len(names)


def test_rules_work_through_views() -> None:
    v = b.input_("v", (6, 7))
    weights = b.div(b.exp(x), b.reduce_sum(b.exp(x), -1))
    graph = case([x, v], b.matmul(b.reshape(weights, (1, 5, 6)), b.reshape(v, (1, 6, 7))))
    moved = apply_rules(graph, (SCALE_OUT_OF_CONTRACTION,))
    products = [n for n in moved.nodes() if n.op is contraction.MATMUL]
    assert all(i.op is structural.RESHAPE for n in products for i in n.inputs)
    assert moved != graph


def test_a_rule_is_data() -> None:
    assert isinstance(FUSION_RULES[0], Rule)
