"""The field test as it runs on a GPU: tensors as a whole, on PyTorch's default device."""

from functools import partial

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.semantics import expand
from superopt.ir.types import DType
from superopt.verify import arithmetic
from superopt.verify.equivalence import verify_field
from superopt.verify.floating import verify_float
from superopt.verify.inputs import DISTRIBUTIONS, draw_inputs
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


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_inputs_are_drawn_as_the_distribution_says(distribution: str) -> None:
    large = DISTRIBUTIONS.index(distribution) % 2  # into memory that is kept, or not
    x = b.input_("x", (64, 8192 if large else 64), strides=None if large else (1, 64))
    at = b.input_("at", (64,), DType.I32)
    graph = b.kernel_graph("g", [x, at], [b.take(x, at, 0)])
    drawn, again = (draw_inputs(graph, distribution, 5) for _ in range(2))
    torch.testing.assert_close(drawn[0], again[0], rtol=0.0, atol=0.0, equal_nan=True)
    assert drawn[0].data_ptr() != again[0].data_ptr()
    assert drawn[0].stride() == ((8192, 1) if large else (1, 64))
    sizes = drawn[0].abs().nan_to_num(0.0, 0.0)
    medians = {"large": 20.0, "tiny": 7e-5, "constant-rows": 7.0, "overflow-edge": 7e17}
    assert 0.4 < float(sizes.median()) / medians.get(distribution, 0.6) < 2.5
    spread = {"uniform": 1.5, "mixed": 200.0}.get(distribution, 5.0)
    assert 0.3 < float(sizes.max() / sizes.median()) / spread < 3.0
    assert (drawn[1].dtype, int(drawn[1].max())) == (torch.int32, 63)


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
