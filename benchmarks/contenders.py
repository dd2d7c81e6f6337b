"""What runs against what: eager, torch.compile (default, max-autotune), the library, superopt.

In: a workload and its inputs. Out: one built callable per contender, or the reason why there is none.
A contender that fails to build is reported as failed and left out; it never stops the run.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import select_algorithm

from benchmarks.workloads import Program, Workload

SUPEROPT: Final = "superopt"
NAMES: Final = ("eager", "compile", "max-autotune", "sdpa", SUPEROPT)


@dataclass(frozen=True)
class Search:
    """What superopt's search did; None where its report does not say."""

    seconds: float
    proposed: int | None
    rejected: int | None
    proven: int | None
    report: str = ""


@dataclass(frozen=True)
class Contender:
    """One built callable that takes the workload's inputs."""

    name: str
    call: Program
    build_s: float
    search: Search | None = None


@dataclass(frozen=True)
class Failure:
    """Why a contender does not take part."""

    name: str
    reason: str


@dataclass(frozen=True)
class SearchOptions:
    """What superopt is told; a fresh cache folder makes every search a cold one."""

    cache: Path
    budget_s: float
    seed: int = 0


def quiet_compilers() -> None:
    """Keep the autotuning tables of torch.compile, and its own deprecation warnings, off stderr."""
    inductor_config.max_autotune_report_choices_stats = False
    select_algorithm.PRINT_AUTOTUNE = False
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")


def build(
    name: str, workload: Workload, inputs: tuple[Tensor, ...], options: SearchOptions
) -> Contender | Failure | None:
    """Build one contender by calling it once; None when it does not apply to this workload."""
    start = time.perf_counter()
    try:
        if name == SUPEROPT:
            return _superopt(workload, inputs, options)
        call = _baseline(name, workload, inputs)
        if call is None:
            return None
        call(*inputs)
        return Contender(name, call, time.perf_counter() - start)
    except Exception as error:  # a compiler may raise anything, and the run goes on without it
        first_line = str(error).strip().split("\n", 1)[0]
        return Failure(name, f"{type(error).__name__}: {first_line}")


def optimized(workload: Workload, options: SearchOptions) -> Any:
    """Return the workload's program through `superopt.optimize`, not yet warmed up."""
    import superopt

    return superopt.optimize(
        workload.program,
        budget_s=options.budget_s * workload.kernels,
        cache=options.cache,
        seed=options.seed,
    )


def _baseline(name: str, workload: Workload, inputs: tuple[Tensor, ...]) -> Program | None:
    if name == "eager":
        return workload.program
    if name == "sdpa":
        return workload.library
    if name == "compile":
        return torch.compile(workload.program, dynamic=False)
    if name == "max-autotune":
        compiled = torch.compile(workload.program, dynamic=False, mode="max-autotune")
        return _stepping(compiled, inputs) if inputs[0].is_cuda else compiled
    raise ValueError(f"no contender named {name!r}; there are {', '.join(NAMES)}")


def _stepping(compiled: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Program:
    """Give CUDA graphs their best case: inputs that are not copied, outputs that may be overwritten."""
    for tensor in inputs:
        torch._dynamo.mark_static_address(tensor)

    def call(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return compiled(*inputs)

    return call


def _superopt(workload: Workload, inputs: tuple[Tensor, ...], options: SearchOptions) -> Contender:
    start = time.perf_counter()
    call = optimized(workload, options)
    call.warmup(*inputs)
    seconds = time.perf_counter() - start
    report = call.report()
    search = Search(
        seconds,
        _count(report, "proposed"),
        _count(report, "rejected"),
        _count(report, "proven"),
        str(report),
    )
    return Contender(SUPEROPT, call, seconds, search)


def _count(report: Any, name: str) -> int | None:
    value = getattr(report, name, None)
    return int(value) if isinstance(value, int) else None
