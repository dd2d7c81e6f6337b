"""The verifier rejects every wrong kernel that 30 kinds of mistake make of right ones."""

from collections import Counter

import pytest
import torch

from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.verify.equivalence import verify_field
from superopt.verify.reference import run_reference
from tests.verify.mutators import MUTATORS
from tests.verify.workloads import WORKLOADS


def differs(original: Graph, mutant: Graph) -> bool | None:
    """Say whether the mutant computes something else in float64; None where it has no meaning."""
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(i.shape, generator=generator) for i in original.inputs]
    try:
        found = run_reference(mutant, inputs, dtype_override=torch.float64)
    except GraphError:
        return None
    exact = run_reference(original, inputs, dtype_override=torch.float64)
    return not all(
        torch.allclose(e, f, rtol=1e-9, atol=1e-9) for e, f in zip(exact, found, strict=True)
    )


@pytest.mark.parametrize("workload", WORKLOADS)
def test_right_kernels_are_accepted(workload: str) -> None:
    original, kernel = WORKLOADS[workload]()
    assert differs(original, kernel) is False
    verdict = verify_field(original, kernel, seed=11)
    assert verdict.equivalent, verdict
    assert verdict.bound <= 2.0**-60


@pytest.mark.parametrize("workload", WORKLOADS)
def test_wrong_kernels_are_rejected(workload: str) -> None:
    original, kernel = WORKLOADS[workload]()
    kinds: Counter[str] = Counter()
    for kind, mutate in MUTATORS.items():
        for index, mutant in enumerate(mutate(kernel)):
            if not differs(original, mutant):
                continue
            kinds[kind] += 1
            verdict = verify_field(original, mutant, seed=index)
            assert not verdict.equivalent, f"{kind} was accepted:\n{mutant}"
            assert verdict.counterexample is not None, verdict
    assert len(kinds) >= 5, kinds


def test_every_kind_of_mistake_occurs() -> None:
    seen = set()
    for make_workload in WORKLOADS.values():
        original, kernel = make_workload()
        seen |= {
            kind
            for kind, mutate in MUTATORS.items()
            if kind not in seen and any(differs(original, m) for m in mutate(kernel))
        }
    assert len(MUTATORS) >= 15
    assert seen == MUTATORS.keys()
