"""`python -m benchmarks cpu|programs|cuda`: run a suite, print the table, write the JSON, check the targets."""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report, roofline
from benchmarks.contenders import NAMES, SearchOptions, quiet_compilers
from benchmarks.runner import Job, WorkloadResult, run_workload, set_bound
from benchmarks.suites import SUITES
from benchmarks.timing import CpuClock, CudaClock, Effort
from benchmarks.workloads import Workload

_RESULTS = Path(__file__).resolve().parent / "results"
_DTYPES = {
    "cpu": ("float32", "bfloat16"),
    "programs": ("float32",),
    "cuda": ("bfloat16", "float16"),
}
_BUDGET_S = {"cpu": 20.0, "cuda": 8.0}
# eager, max-autotune and the library's kernels on a GPU: the whole suite is to take 20 minutes there
_CONTENDERS = {"cpu": NAMES, "cuda": tuple(name for name in NAMES if name != "compile")}
_FULL = Effort(budget_s=6.0, min_rounds=7, max_rounds=60)
_QUICK = Effort(budget_s=2.0, min_rounds=5, max_rounds=20)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.suite == "cuda":
        machine.require_cuda()
    workloads = _select(SUITES[options.suite][1], options)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    quiet_compilers()
    dtypes = [options.dtype] if options.dtype else _DTYPES[options.suite]
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="superopt-bench-") as cache, torch.no_grad():
        for dtype in dtypes:
            job = _job(options, getattr(torch, dtype), Path(cache) / dtype)
            results = _run(workloads, job, options, dtype)
            missed += [f"{dtype}: {line}" for line in report.missed_targets(job.suite, results)]
    if not options.check:
        return 0
    print("\n".join(f"missed: {line}" for line in missed) or "every target is met")
    return 1 if missed else 0


def _run(
    workloads: Sequence[Workload], job: Job, options: argparse.Namespace, dtype: str
) -> list[WorkloadResult]:
    facts = machine.facts(job.device, options.threads)
    out = _out_path(options, dtype)
    results: list[WorkloadResult] = []
    job.roofline.refresh()
    for workload in workloads:
        start = time.perf_counter()
        print(f"{workload.name} ...", end="", file=sys.stderr, flush=True)
        results.append(run_workload(workload, job))
        print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        _write(out, job, facts, results)
    job.roofline.refresh()
    content = _write(out, job, facts, results)
    out.with_suffix(".svg").write_text(roofline.svg(content))
    print(_heading(facts, job, dtype))
    print(report.table(results))
    print(f"written to {os.path.relpath(out)}")
    return results


def _write(
    out: Path, job: Job, facts: dict[str, object], results: Sequence[WorkloadResult]
) -> dict[str, Any]:
    """Write what there is so far, so that an interrupted run leaves its results."""
    for result in results:
        set_bound(result, job.roofline)
    content = report.document(job.suite, facts, job.roofline, results)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    return content


def _heading(facts: dict[str, object], job: Job, dtype: str) -> str:
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    memory = job.roofline.bytes_per_s[max(job.roofline.bytes_per_s)]
    return (
        f"\n{job.suite} {dtype}: {device}; torch {facts['torch']}, triton {facts['triton']}, "
        f"commit {facts['commit']}, {facts['date']}\n"
        f"measured: read {memory / 1e9:.1f} GB/s from memory, "
        f"matrix product {job.roofline.flops_per_s / 1e9:.0f} GFLOP/s\n"
    )


def _job(options: argparse.Namespace, dtype: torch.dtype, cache: Path) -> Job:
    device = SUITES[options.suite][0]
    clock = CudaClock() if device == "cuda" else CpuClock()
    effort = _QUICK if options.quick else _FULL
    return Job(
        suite=options.suite,
        device=device,
        dtype=dtype,
        contenders=[name for name in _CONTENDERS[device] if name not in options.skip],
        clock=clock,
        effort=_on_gpu(effort) if device == "cuda" else effort,
        roofline=machine.Roofline(device, dtype, clock),
        search=SearchOptions(cache, options.budget_s or _BUDGET_S[device]),
    )


def _on_gpu(effort: Effort) -> Effort:
    """Return the effort for a GPU, whose timings spread less and whose clock needs to rise first."""
    return replace(effort, warm_up=10, budget_s=effort.budget_s / 2)


def _select(suite: Sequence[Workload], options: argparse.Namespace) -> list[Workload]:
    if options.only:
        unknown = set(options.only) - {workload.name for workload in suite}
        if unknown:
            names = ", ".join(workload.name for workload in suite)
            sys.exit(f"benchmarks: no workload {', '.join(sorted(unknown))}; there are: {names}")
        return [workload for workload in suite if workload.name in options.only]
    return [workload for workload in suite if workload.quick or not options.quick]


def _out_path(options: argparse.Namespace, dtype: str) -> Path:
    if options.out is not None:
        out: Path = options.out
        return out if options.dtype or len(_DTYPES[options.suite]) == 1 else _suffixed(out, dtype)
    kind = "-quick" if options.quick else "-part" if options.only else ""
    return _RESULTS / f"{options.suite}-{dtype}{kind}-{datetime.now(UTC):%Y%m%d-%H%M}.json"


def _suffixed(out: Path, dtype: str) -> Path:
    return out.with_name(f"{out.stem}-{dtype}{out.suffix}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument("--quick", action="store_true", help="a few workloads, fewer rounds")
    parser.add_argument(
        "--check", action="store_true", help="exit with 1 and a line for each missed target"
    )
    parser.add_argument(
        "--only", type=_names, default=[], metavar="NAME,...", help="these workloads"
    )
    parser.add_argument(
        "--skip", type=_names, default=[], metavar="NAME,...", help=f"leave out of {NAMES}"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: all of the suite's"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default 2)")
    parser.add_argument(
        "--budget-s",
        type=float,
        help="superopt's search, per workload (default 20 on a CPU, 8 on a GPU)",
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
