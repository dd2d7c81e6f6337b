"""The command line end to end on a tiny workload: JSON, exit code, wrong results kept out."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as cli
from benchmarks import contenders, machine, measurement, overhead, report, runner
from benchmarks.suites import SUITES
from benchmarks.timing import CpuClock, CudaClock, Effort
from benchmarks.workloads import Workload


def slow_scale(x: Tensor) -> Tensor:
    """A program that wastes time, so that the contender below is certain to win."""
    time.sleep(0.002)
    return x * 2.0


def quick_scale(x: Tensor) -> Tensor:
    return x * 2.0


TINY = Workload("tiny", slow_scale, lambda d: (d.normal(3, 5),), flops=15, quick=True)


class Optimized:
    """Stands in for what `superopt.optimize` returns."""

    def __init__(self, program: Any) -> None:
        self.program = program

    def __call__(self, *inputs: Tensor) -> Any:
        return self.program(*inputs)

    def warmup(self, *inputs: Tensor) -> None:
        self.program(*inputs)

    def report(self) -> SimpleNamespace:
        return SimpleNamespace(proposed=7, rejected=4, proven=3)


@pytest.fixture(autouse=True)
def tiny_suite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(machine, "_MATMUL_SIZE", {"cpu": 64, "cuda": 64})
    # the suite for GPUs runs in a process of its own, which knows nothing of this
    tiny = {n: (device, (TINY,)) for n, (device, _) in SUITES.items() if n != "cuda"}
    tiny["cuda"] = SUITES["cuda"]
    monkeypatch.setattr(cli, "SUITES", tiny)
    monkeypatch.setattr(measurement, "SUITES", tiny)
    monkeypatch.setattr(overhead, "call_s", lambda cache: 5e-6)
    monkeypatch.setattr(measurement, "_FULL", Effort(budget_s=0.05, min_rounds=3, max_rounds=5))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run_with(program: Any, monkeypatch: pytest.MonkeyPatch, out: Path, warm_s: float = 0.1) -> int:
    def measured(workload: Workload, job: Any, result: runner.WorkloadResult) -> None:
        result.warm_start_s = warm_s

    monkeypatch.setattr(contenders, "optimized", lambda workload, options: Optimized(program))
    monkeypatch.setattr(runner, "_warm_start", measured)
    return cli.main(
        [
            "cpu",
            "--dtype",
            "float32",
            "--check",
            "--skip",
            "compile,max-autotune",
            "--out",
            str(out),
        ]
    )


def test_faster_and_right_passes_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # next to nothing is moved and computed here: no program reaches a share of that bound
    no_bound = replace(report.TARGETS["cpu"], min_share=0.0)
    monkeypatch.setitem(report.TARGETS, "cpu", no_bound)
    assert run_with(quick_scale, monkeypatch, tmp_path / "out.json") == 0
    printed = capsys.readouterr().out
    assert "every target is met" in printed
    assert "7/4/3" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert written["machine"]["cores"] >= 1
    (workload,) = written["workloads"]
    assert written["roofline"] == {
        "flops_per_s": workload["product_flops_per_s"],
        "read_bytes_per_s_by_footprint": {"120": workload["read_bytes_per_s"]},
    }
    assert workload["name"] == "tiny"
    assert written["call_s"] == 5e-6
    assert "5.0 us per call of three small tensors" in printed
    assert workload["moved_bytes"] == 2 * 3 * 5 * 4
    assert workload["best_other"] == "eager"
    assert workload["ratio"]["median"] > 2.0
    assert written["geomean"] == pytest.approx(workload["ratio"]["median"])
    assert set(workload["timings"]) == {"eager", "superopt"}
    traffic_s = 120 / workload["read_bytes_per_s"]
    assert workload["bound_s"] == max(traffic_s, 15 / workload["product_flops_per_s"])
    assert workload["with_functions_s"] == workload["bound_s"]
    assert 0 < workload["bound_s"] < workload["timings"]["eager"]["spread"]["median"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * 2.001,
        lambda x: (x * 2.0)[:-1],
        lambda x: torch.where(x > 0, x * 2.0, torch.nan),
        lambda x, first=[]: first.append(x * 2.0) or first[0],
    ],
    ids=["inexact", "shape", "nan", "stale"],
)
def test_wrong_results_are_never_timed(
    wrong: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_with(wrong, monkeypatch, tmp_path / "out.json") == 1
    assert "missed: float32: tiny: superopt did not run: wrong on" in capsys.readouterr().out
    (workload,) = json.loads((tmp_path / "out.json").read_text())["workloads"]
    assert "superopt" not in workload["timings"]
    assert workload["ratio"] is None


def test_slower_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def slower(x: Tensor) -> Tensor:
        time.sleep(0.01)
        return x * 2.0

    assert run_with(slower, monkeypatch, tmp_path / "out.json", warm_s=1.5) == 1
    missed = [line for line in capsys.readouterr().out.split("\n") if line.startswith("missed:")]
    assert len(missed) == 4
    assert "best of the others (eager), must be at least 0.97x" in missed[0]
    assert "must be at least 70%" in missed[1]
    assert "warm start 1.50 s, must take at most 1.0 s" in missed[2]
    assert "geometric mean" in missed[3]


def test_a_contender_that_raises_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    assert run_with(broken, monkeypatch, tmp_path / "out.json") == 1
    assert "superopt did not run: RuntimeError: no such kernel" in capsys.readouterr().out


def test_skipping_superopt_misses_the_check_only_when_asked(tmp_path: Path) -> None:
    skip = [
        "cpu",
        "--dtype",
        "float32",
        "--skip",
        "compile,max-autotune,superopt",
        "--out",
        str(tmp_path / "out.json"),
    ]
    assert cli.main(skip) == 0
    assert cli.main([*skip, "--check"]) == 1


def test_a_workload_that_cannot_run_ends_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(d: Any) -> Any:
        raise torch.OutOfMemoryError("too large")

    both = {"cpu": ("cpu", (replace(TINY, name="huge", draw=draw), TINY))}
    monkeypatch.setattr(cli, "SUITES", both)
    monkeypatch.setattr(measurement, "SUITES", both)
    assert run_with(quick_scale, monkeypatch, tmp_path / "out.json") == 1
    huge, tiny = json.loads((tmp_path / "out.json").read_text())["workloads"]
    assert huge["failures"] == {"superopt": "OutOfMemoryError: too large"}
    assert tiny["ratio"]["median"] > 2.0
    assert "missed: float32: huge: superopt did not run" in capsys.readouterr().out


def test_what_no_time_is_left_for_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["cpu", "--dtype", "float32", "--check", "--limit-s", "0"]
    assert cli.main([*command, "--out", str(tmp_path / "out.json")]) == 1
    assert "missed: float32: no time was left for tiny" in capsys.readouterr().out


def test_probes_are_as_large_as_the_program() -> None:
    probes = machine.Probes("cpu", torch.bfloat16, CpuClock())
    assert set(probes.of(6 << 20, 0, 0)) == {"read"}
    assert set(probes.of(6 << 20, 0, 1)) == {"read", "functions"}
    found = probes.of(6 << 20, 1, 0)
    assert {name: probe.amount for name, probe in found.items()} == {
        "read": 6 << 20,
        "product": 2 * 64**3,
    }
    assert float(found["read"].call()) == 6 * (1 << 18)
    assert found["product"].call().shape == (64, 64)


def test_quick_takes_one_type_and_short_searches(tmp_path: Path) -> None:
    options = cli._parser().parse_args(["cpu", "--quick"])
    assert cli._dtypes(options) == ("float32",)
    quick = measurement.job_of(options, torch.float32, tmp_path)
    full = measurement.job_of(cli._parser().parse_args(["cpu"]), torch.float32, tmp_path)
    assert quick.search.budget_s < full.search.budget_s


def test_unknown_workload_is_named() -> None:
    with pytest.raises(SystemExit, match=r"no workload nonesuch; there are: tiny"):
        cli.main(["cpu", "--only", "nonesuch"])


def test_cuda_refuses_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        cli.main(["cuda"])


def test_the_cuda_suite_compares_what_a_gpu_user_would_run(tmp_path: Path) -> None:
    options = cli._parser().parse_args(["cuda", "--skip", "sdpa"])
    job = measurement.job_of(options, torch.float16, tmp_path)
    assert job.contenders == ["eager", "max-autotune", "superopt"]
    assert (job.device, job.effort.warm_up) == ("cuda", 10)
    assert isinstance(job.clock, CudaClock)
    assert cli._DTYPES["cuda"] == ("bfloat16", "float16")


@pytest.mark.gpu
def test_cuda_suite_on_a_gpu(tmp_path: Path) -> None:
    """In a process of its own, so at the suite's sizes."""
    out = tmp_path / "out.json"
    command = ["cuda", "--only", "n-trans-16", "--budget-s", "4", "--out", str(out)]
    assert cli.main(command) == 0
    for dtype in ("bfloat16", "float16"):
        written = json.loads(out.with_name(f"out-{dtype}.json").read_text())
        (workload,) = written["workloads"]
        assert workload["failures"] == {}
        assert set(workload["timings"]) == {"eager", "max-autotune", "superopt"}
