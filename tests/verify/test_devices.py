"""The field test as it runs on a GPU: tensors as a whole, on PyTorch's default device."""

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.semantics import expand
from superopt.verify import arithmetic
from superopt.verify.equivalence import verify_field
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
