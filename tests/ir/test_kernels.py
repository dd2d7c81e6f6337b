"""Random kernel graphs: legal, the same after printing and parsing, and after expansion."""

from collections import Counter

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from superopt.ir.check import check_graph
from superopt.ir.graph import Graph
from superopt.ir.ops.registry import OpKind, all_ops
from superopt.ir.semantics import expand
from superopt.ir.text import parse_graph, print_graph
from superopt.verify.reference import run_reference
from tests.strategies import arrays_for, kernel_graphs


def test_random_kernel_graphs_come_back_and_expand() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=250)
    @given(kernel_graphs(), st.integers(0, 9))
    def run(graph: Graph, seed: int) -> None:
        seen.update({n.op.name for n in graph.nodes()})
        assert check_graph(graph) == []
        again = parse_graph(print_graph(graph))
        assert again == graph
        assert again.digest() == graph.digest()
        tensors = [torch.from_numpy(a) for a in arrays_for(graph, seed)]
        wanted = run_reference(graph, tensors)
        for value, same in zip(run_reference(expand(graph), tensors), wanted, strict=True):
            np.testing.assert_allclose(value.numpy(), same.numpy(), rtol=1e-7, atol=1e-9)

    run()
    # elementwise ops are drawn from the registry itself, tile ops stand inside block graphs only
    named = [o for o in all_ops() if o.kind not in (OpKind.TILE, OpKind.ELEMENTWISE)]
    assert [op.name for op in named if not seen[op.name]] == []
