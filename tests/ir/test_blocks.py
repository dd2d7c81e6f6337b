"""Random legal block graphs mean what the naive oracle computes, and keep it through text and threads."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superopt.ir.check import check_graph
from superopt.ir.graph import Graph
from superopt.ir.ops.registry import OpKind, all_ops
from superopt.ir.semantics import to_primitives
from superopt.ir.text import parse_graph, print_graph
from superopt.ir.threads import form_threads
from superopt.verify.reference import run_reference
from tests.ir.naive import run_naive
from tests.strategies import arrays_for, block_graphs


def test_random_block_graphs_mean_what_loops_over_tiles_compute() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=250)
    @given(block_graphs(), st.integers(0, 9), st.booleans())
    def run(graph: Graph, seed: int, infinite: bool) -> None:
        seen.update({n.op.name for n in graph.nodes()})
        arrays = arrays_for(graph, seed, infinite=infinite)
        with np.errstate(all="ignore"):
            wanted = run_naive(graph, arrays)
        got = run_reference(graph, [torch.from_numpy(a) for a in arrays])
        for mine, oracle in zip(got, wanted, strict=True):
            np.testing.assert_allclose(mine.numpy(), oracle, rtol=1e-9, atol=1e-9)

    run()
    tiles = [op.name for op in all_ops() if op.kind is OpKind.TILE]
    assert not [name for name in tiles if not seen[name]]


@settings(max_examples=100)
@given(block_graphs())
def test_threads_and_text_keep_random_block_graphs(graph: Graph) -> None:
    assert parse_graph(print_graph(graph)) == graph
    threaded = form_threads(graph)
    assert check_graph(threaded) == []
    assert to_primitives(threaded, graph.inputs) == to_primitives(graph, graph.inputs)
    assert form_threads(threaded) == threaded
    assert parse_graph(print_graph(threaded)) == threaded
