"""The programs beside the suite: six families, ragged sizes in each, finite results, fresh inputs."""

from types import ModuleType

import pytest
import torch
from torch import nn

from benchmarks.families import PROGRAMS, attention, blocks, gates, kernel_methods, losses, norms
from benchmarks.runner import _tensors, _widen, _widened
from benchmarks.suites import SUITES
from benchmarks.workloads import Module, Workload

FAMILIES = (attention, losses, gates, norms, kernel_methods, blocks)


def test_names_are_unique_over_all_suites() -> None:
    names = [w.name for suite in ("cpu", "programs") for w in SUITES[suite][1]]
    assert len(set(names)) == len(names)
    assert len(PROGRAMS) >= 30


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.__name__.rpartition(".")[2])
def test_a_family_has_sizes_that_nothing_divides(family: ModuleType) -> None:
    assert len(family.WORKLOADS) >= 6
    sizes = [
        d for w in family.WORKLOADS for t in w.inputs("cpu", torch.float32, 0) for d in t.shape
    ]
    assert len([d for d in sizes if d % 2 and d > 16]) >= 3


@torch.no_grad()
@pytest.mark.parametrize("workload", PROGRAMS, ids=lambda w: w.name)
def test_results_are_finite_and_near_float64(workload: Workload) -> None:
    workload = workload.ready("cpu", torch.float32)
    inputs = workload.inputs("cpu", torch.float32, seed=0)
    exact = _tensors(_widened(workload.program)(*map(_widen, inputs)))
    for found, wide in zip(_tensors(workload.program(*inputs)), exact, strict=True):
        assert bool(found.isfinite().all())
        size = float(wide.abs().max())
        assert float((found.double() - wide).abs().max()) <= 1e-4 * size


def test_a_module_has_the_same_parameters_every_time_and_leaves_the_generator() -> None:
    module = Module(lambda: nn.Linear(3, 2))
    state = torch.random.get_rng_state()
    first, again = module.on("cpu", torch.float32), module.on("cpu", torch.bfloat16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(first, nn.Linear)
    assert isinstance(again, nn.Linear)
    assert torch.equal(first.weight.to(torch.bfloat16), again.weight)
    assert not again.training


def test_operations_are_counted_where_they_are_not_given() -> None:
    workload = Workload("tiny", lambda a, b: a @ b, lambda d: (d.normal(3, 5), d.normal(5, 7)))
    assert workload.arithmetic(workload.inputs("cpu", torch.float32, 0))[0] == 2 * 3 * 5 * 7
