"""Verdicts on the graphs of another system: 87 are right, 12 are wrong."""

from pathlib import Path

import pytest

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.mirage import read_mirage
from superopt.ir.node import Node
from superopt.ir.types import DType
from superopt.verify.equivalence import verify_field

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


@pytest.mark.parametrize("name", COUNTS)
def test_every_graph_gets_the_right_verdict(name: str) -> None:
    graphs = read(name)
    assert len(graphs) == COUNTS[name]
    for index, graph in enumerate(graphs):
        original = program(name, [i.shape for i in graph.inputs])
        # the whole file at a loose bound, one graph at the default one
        bound = 2.0**-60 if index == 0 else 2.0**-15
        verdict = verify_field(original, graph, seed=index, error_bound=bound)
        assert verdict.equivalent is ("wrong" not in name), (index, verdict)
        assert verdict.counterexample is None or verdict.counterexample.output == 0
