"""The field test as it runs on a GPU: tensors as a whole, on PyTorch's default device."""

from functools import partial

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.semantics import expand
from superopt.ir.types import DType
from superopt.verify import arithmetic, floating
from superopt.verify.equivalence import verify_field
from superopt.verify.floating import verify_float
from superopt.verify.reference import run_reference
from tests.search.programs import PROGRAMS


@pytest.mark.parametrize("name", ["causal_gqa", "norm_mlp", "loss", "rotated"])
def test_tensors_as_a_whole_give_the_same_verdict(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PROGRAMS[name]
    wrong = original.with_outputs([b.mul(o, 2.0) for o in original.outputs])
    plain = [verify_field(original, c, seed=3) for c in (expand(original), wrong)]
    monkeypatch.setattr(arithmetic, "_whole", lambda: True)
    whole = [verify_field(original, c, seed=3) for c in (expand(original), wrong)]
    assert [v.equivalent for v in whole] == [True, False]
    assert str(whole[1].counterexample) == str(plain[1].counterexample)


@pytest.mark.parametrize("distribution", floating.DISTRIBUTIONS)
def test_inputs_drawn_on_a_device_are_as_those_drawn_here(
    distribution: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, at = b.input_("x", (64, 64), DType.F16, strides=(1, 64)), b.input_("at", (64,), DType.I32)
    graph = b.kernel_graph("g", [x, at], [b.take(x, at, 0)])
    here = floating.draw_inputs(graph, distribution, 5)
    monkeypatch.setattr(floating, "_HOST", "elsewhere")
    there = floating.draw_inputs(graph, distribution, 5)
    assert not torch.equal(here[0], there[0])
    assert torch.equal(there[0], floating.draw_inputs(graph, distribution, 5)[0])
    assert there[0].stride() == here[0].stride()
    for measure in (torch.std, torch.max):
        ratio = measure(there[0].float()) / measure(here[0].float())
        assert 0.5 < float(ratio) < 2.0
    assert (there[1].dtype, int(there[1].max())) == (torch.int32, 63)


@pytest.mark.gpu
def test_programs_are_compared_in_floating_point_on_a_gpu() -> None:
    graph = PROGRAMS["causal_gqa"]
    right = verify_float(graph, partial(run_reference, expand(graph)), seed=1, device="cuda")
    assert right.accurate, right.reason
    wrong = expand(graph).with_outputs([b.mul(o, 1.001) for o in expand(graph).outputs])
    assert not verify_float(graph, partial(run_reference, wrong), seed=1, device="cuda").accurate


@pytest.mark.gpu
def test_the_verdict_is_the_same_on_a_gpu() -> None:
    original = PROGRAMS["causal_gqa"]
    wrong = original.with_outputs([b.mul(o, 2.0) for o in original.outputs])
    for candidate in (expand(original), wrong):
        here, there = (
            verify_field(original, candidate, seed=3, device=torch.device(d))
            for d in ("cpu", "cuda")
        )
        assert here.equivalent == there.equivalent
        assert str(here.counterexample) == str(there.counterexample)
