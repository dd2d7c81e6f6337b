"""The tuner against a sweep: both find a kernel, and the sweep leaves no tile sizes out."""

import json
from math import prod
from pathlib import Path

import pytest

from benchmarks import tuning
from superopt.codegen.cpu.compile import find_compiler
from superopt.ir.target import Target
from superopt.search.schedule import derive
from superopt.search.tiling import choices

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


def test_tuner_and_sweep_are_compared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tuning.KERNELS, "softmax", (tuning._softmax, ((3, 40),)))
    monkeypatch.setattr(tuning, "_BEST", 1)
    out = tmp_path / "out.json"
    assert tuning.main(["softmax", "--budget-s", "1", "--out", str(out)]) == 0
    (kernel,) = json.loads(out.read_text())["kernels"]
    inputs = [tuning.torch.zeros(3, 40)]
    _, region = tuning.region_of(tuning._softmax, inputs)
    space = sum(prod(map(len, choices(s, Target()).values())) for s in derive(region))
    assert kernel["sweep_kernels"] >= space > 0
    assert kernel["ratio"] == pytest.approx(kernel["tuner_s"] / kernel["sweep_s"])
    assert "tuner / sweep" in capsys.readouterr().out


def test_unknown_kernels_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tuning.main(["softmax", "nothing"])
    assert "no kernel nothing; there are softmax" in capsys.readouterr().err
