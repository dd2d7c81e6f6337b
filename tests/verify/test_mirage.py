"""Verdicts on the graphs of another system: 87 are right, 12 are wrong."""

from pathlib import Path

import pytest

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.interpret import interpret
from superopt.ir.mirage import read_mirage
from superopt.ir.node import Node
from superopt.ir.semantics import to_primitives
from superopt.ir.types import DType
from superopt.verify.equivalence import compare, verify_field
from superopt.verify.field import FieldDomain
from superopt.verify.needs import needed_residues
from superopt.verify.ranges import Integers

ORACLES = Path(__file__).parents[1] / "oracles" / "mirage"


def read(name: str) -> list[Graph]:
    return read_mirage((ORACLES / name).read_text())


def rms(x: Node) -> Node:
    return b.div(x, b.sqrt(b.mean(b.mul(x, x), -1)))


def attention(q: Node, k: Node, v: Node) -> Node:
    e = b.exp(b.matmul(q, k))
    return b.matmul(b.div(e, b.reduce_sum(e, -1)), v)


def program(name: str, shapes: list[tuple[int, ...]]) -> Graph:
    inputs = [b.input_(f"input{i}", s, DType.F16) for i, s in enumerate(shapes)]
    match name.split("_")[0], inputs:
        case "gated", [x, w1, w2]:
            gate = b.matmul(x, w1)
            result = b.mul(b.mul(gate, b.sigmoid(gate)), b.matmul(x, w2))
        case "gqa" | "mqa", [q, k, v]:
            result = attention(q, k, v)
        case "qknorm", [q, k, v]:
            result = attention(rms(q), k, rms(v))
        case "lora", [x, w, down, up]:
            result = b.add(b.matmul(x, w), b.matmul(b.matmul(x, down), up))
        case "ntrans", [h, x, alpha]:
            result = rms(b.add(x, b.mul(alpha, b.add(rms(h), x))))
        case "rmsnorm", [x, w]:
            result = b.matmul(rms(x), w)
        case _:
            raise AssertionError(name)
    return b.kernel_graph(name, inputs, [result])


COUNTS = {
    "gated_mlp_bs8.json": 32,
    "gqa_bs8.json": 10,
    "mqa_bs1.json": 12,
    "lora_bs8.json": 4,
    "ntrans_bs8.json": 9,
    "rmsnorm_bs8.json": 20,
    "qknorm_gqa_bs8_wrong.json": 12,
}


def counterexamples(original: Graph, graphs: list[Graph], seed: int) -> list[str | None]:
    """Test many candidates on one draw: what they share with the original is computed once."""
    outputs = [*to_primitives(original, original.inputs)]
    for graph in graphs:
        outputs += to_primitives(graph, original.inputs)
    joint = b.kernel_graph("joint", original.inputs, outputs)
    needs = needed_residues(joint)
    domain = FieldDomain(seed, needs)
    args = [domain.draw(i.tensor, needs.get(i, frozenset("p")), Integers()) for i in joint.inputs]
    expected, *found = interpret(joint, args, domain)
    differences = [compare([expected], [value], domain) for value in found]
    return [None if d is None else str(d) for d in differences]


@pytest.mark.parametrize("name", COUNTS)
def test_every_graph_gets_the_right_verdict(name: str) -> None:
    graphs = read(name)
    assert len(graphs) == COUNTS[name]
    original = program(name, [i.shape for i in graphs[0].inputs])
    verdicts = counterexamples(original, graphs, seed=8)
    if "wrong" in name:
        assert None not in verdicts
    else:
        assert set(verdicts) == {None}


@pytest.mark.parametrize("name", ["lora_bs8.json", "ntrans_bs8.json", "rmsnorm_bs8.json"])
def test_a_graph_at_the_default_bound(name: str) -> None:
    graph = read(name)[-1]
    verdict = verify_field(program(name, [i.shape for i in graph.inputs]), graph, seed=1)
    assert verdict.equivalent, verdict
    assert verdict.bound <= 2.0**-60


def test_a_wrong_graph_by_the_public_way() -> None:
    name = "qknorm_gqa_bs8_wrong.json"
    graph = read(name)[0]
    verdict = verify_field(program(name, [i.shape for i in graph.inputs]), graph, seed=1)
    assert not verdict
    assert verdict.counterexample is not None
    assert verdict.tests == 1
