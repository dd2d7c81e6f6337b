"""One suite at one dtype: measures its workloads, one at a time, by name.

In: the command line's options. Out: per workload its result. It can be sent to another process: what measuring needs is made at the first workload, where that is measured.
"""

import argparse
import traceback
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.contenders import NAMES, SearchOptions, quiet_compilers
from benchmarks.machine import Probes
from benchmarks.runner import Job, WorkloadResult, failed, run_workload
from benchmarks.suites import SUITES
from benchmarks.timing import Clock, CpuClock, CudaClock, Effort

_BUDGET_S = {"cpu": 20.0, "cuda": 8.0}
_QUICK_BUDGET_S = 8.0
# eager, max-autotune and the library's kernels on a GPU: the whole suite is to take 20 minutes there
_CONTENDERS = {"cpu": NAMES, "cuda": tuple(name for name in NAMES if name != "compile")}
_FULL = Effort(budget_s=5.0, min_rounds=7, max_rounds=60)
_QUICK = Effort(budget_s=2.0, min_rounds=5, max_rounds=20)


@dataclass
class Measurement:
    """Measures workloads by name."""

    options: argparse.Namespace
    dtype: str
    cache: Path
    job: Job | None = None

    def __call__(self, name: str) -> WorkloadResult:
        """Return one workload's result."""
        if self.job is None:
            torch.set_num_threads(self.options.threads)
            quiet_compilers()
            self.job = job_of(self.options, getattr(torch, self.dtype), self.cache)
        (workload,) = (w for w in SUITES[self.options.suite][1] if w.name == name)
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                return run_workload(workload, self.job)
        except Exception as error:  # memory runs out, a kernel spoils the device: others go on
            traceback.print_exc()
            return failed(name, self.dtype, f"{type(error).__name__}: {error}")


def job_of(options: argparse.Namespace, dtype: torch.dtype, cache: Path) -> Job:
    """Return how to run the workloads."""
    device = SUITES[options.suite][0]
    clock: Clock = CudaClock() if device == "cuda" else CpuClock()
    effort = _QUICK if options.quick else _FULL
    budget_s = options.budget_s or (_QUICK_BUDGET_S if options.quick else _BUDGET_S[device])
    return Job(
        suite=options.suite,
        device=device,
        dtype=dtype,
        contenders=[name for name in _CONTENDERS[device] if name not in options.skip],
        clock=clock,
        effort=_on_gpu(effort) if device == "cuda" else effort,
        probes=Probes(device, dtype, clock),
        search=SearchOptions(cache, budget_s),
    )


def _on_gpu(effort: Effort) -> Effort:
    """Return the effort for a GPU, whose timings spread less and whose clock needs to rise first."""
    return replace(effort, warm_up=10, budget_s=effort.budget_s / 2)
