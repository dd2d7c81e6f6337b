"""Run one workload: build every contender, check each against float64, time them interleaved.

In: a workload and what to do with it. Out: a `WorkloadResult`, from which the table, the JSON and
the check are made. A contender with a wrong result is reported and never timed.
"""

import copy
import gc
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from benchmarks.contenders import SUPEROPT, Contender, Failure, Search, SearchOptions, build
from benchmarks.machine import OtherLoad, Probe, Probes
from benchmarks.timing import Clock, Effort, Spread, interleave, paired_ratio
from benchmarks.workloads import Program, Workload

# A contender may be this many times less exact than eager, plus this many roundings.
_ERROR_FACTOR = 4.0
_ERROR_ROUNDINGS = 8.0
_INPUT_SEEDS = (0, 1)
# With more than this many cores' worth of other processes a timing is noisy, and is tried again.
NOISY_CORES: Final = 0.2
_TRIES = 3
WARM_START: Final = "warm start"
_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """How to run the workloads of one suite."""

    suite: str
    device: str
    dtype: torch.dtype
    contenders: Sequence[str]
    clock: Clock
    effort: Effort
    probes: Probes
    search: SearchOptions


@dataclass(frozen=True)
class Errors:
    """Distance to float64, relative to the size of the result: in the mean square, and at worst."""

    mean_square: float
    worst: float

    def within(self, eager: "Errors", dtype: torch.dtype) -> bool:
        """Tell whether this is as exact as eager, up to the tolerance."""
        floor = _ERROR_ROUNDINGS * torch.finfo(dtype).eps
        return (
            self.mean_square <= _ERROR_FACTOR * eager.mean_square + floor
            and self.worst <= _ERROR_FACTOR * eager.worst + floor
        )


@dataclass(frozen=True)
class Timing:
    """One contender's times per call, in seconds."""

    spread: Spread
    build_s: float
    errors: Errors


@dataclass
class WorkloadResult:
    """Everything measured about one workload."""

    name: str
    dtype: str
    moved_bytes: int
    flops: int
    functions: int = 0
    """Exponentials, logarithms and the like that an eager run evaluates."""
    bound_s: float = math.nan
    """The longer of its traffic and the arithmetic of its products, at the rates below."""
    bound_kind: str = ""
    with_functions_s: float = math.nan
    """The longer of its traffic and of products and functions one after the other."""
    read_bytes_per_s: float = math.nan
    product_flops_per_s: float | None = None
    functions_per_s: float | None = None
    """Rates of a read of as many bytes, a large product and exponentials, timed in turn with the program."""
    timings: dict[str, Timing] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    rounds: int = 0
    best_other: str | None = None
    ratio: Spread | None = None
    """Best of the others over superopt, round by round: above 1 superopt is faster."""
    search: Search | None = None
    warm_start_s: float | None = None
    """In a second process: from `import superopt` to the first result, with the plan cached."""
    other_cores: float | None = None


def run_workload(workload: Workload, job: Job) -> WorkloadResult:
    """Build, check and time all contenders of one workload."""
    torch._dynamo.reset()
    workload = workload.ready(job.device, job.dtype)
    inputs = workload.inputs(job.device, job.dtype, _INPUT_SEEDS[0])
    outputs = _tensors(workload.program(*inputs))
    flops, functions = workload.arithmetic(inputs)
    result = WorkloadResult(
        workload.name,
        str(job.dtype).removeprefix("torch."),
        moved_bytes=_size((*inputs, *_parameters(workload.program), *outputs)),
        flops=flops,
        functions=functions if job.device == "cpu" else 0,
    )
    built: list[Contender] = []
    for name in job.contenders:
        contender = build(name, workload, inputs, job.search)
        if isinstance(contender, Failure):
            result.failures[name] = contender.reason
        elif contender is not None:
            built.append(contender)
            result.search = contender.search or result.search
    errors = _check(workload, job, built, inputs, result)
    exact = [contender for contender in built if contender.name in errors]
    _time(exact, inputs, errors, job, result)
    # a new process costs seconds: a few workloads, whole blocks among them, say what a warm start takes
    if SUPEROPT in errors and (workload.quick or workload.kernels > 1):
        _warm_start(workload, job, result)
    del built, exact, inputs
    gc.collect()
    return result


def failed(name: str, dtype: str, reason: str) -> WorkloadResult:
    """Return the result of a workload of which nothing could be measured."""
    return WorkloadResult(name, dtype, 0, 0, failures={SUPEROPT: reason})


def _time(
    exact: list[Contender],
    inputs: tuple[Tensor, ...],
    errors: dict[str, Errors],
    job: Job,
    result: WorkloadResult,
) -> None:
    calls = {contender.name: _bind(contender, inputs) for contender in exact}
    probes = job.probes.of(result.moved_bytes, result.flops, result.functions)
    samples, result.other_cores = _quietest(
        calls | {name: probe.call for name, probe in probes.items()}, job
    )
    _set_bound(result, {name: _rate(probe, samples[name]) for name, probe in probes.items()})
    for contender in exact:
        spread = Spread.of(samples[contender.name])
        result.timings[contender.name] = Timing(spread, contender.build_s, errors[contender.name])
        result.rounds = len(samples[contender.name])
    others = {name: timing for name, timing in result.timings.items() if name != SUPEROPT}
    result.best_other = min(others, key=lambda name: others[name].spread.median, default=None)
    if SUPEROPT in samples and result.best_other is not None:
        result.ratio = paired_ratio(samples[result.best_other], samples[SUPEROPT])


def _rate(probe: Probe, samples: list[float]) -> float:
    return probe.amount / Spread.of(samples).median


def _set_bound(result: WorkloadResult, rates: dict[str, float]) -> None:
    result.read_bytes_per_s = rates["read"]
    result.product_flops_per_s = rates.get("product")
    result.functions_per_s = rates.get("functions")
    traffic_s = result.moved_bytes / rates["read"]
    arithmetic_s = result.flops / rates["product"] if result.flops else 0.0
    functions_s = result.functions / rates["functions"] if result.functions else 0.0
    result.bound_s = max(traffic_s, arithmetic_s)
    result.with_functions_s = max(traffic_s, arithmetic_s + functions_s)
    result.bound_kind = "memory" if traffic_s >= arithmetic_s else "compute"


def _quietest(calls: dict[str, Any], job: Job) -> tuple[dict[str, list[float]], float | None]:
    """Time all calls, again if others used the machine meanwhile; keep the quietest time."""
    tries: list[tuple[float, dict[str, list[float]]]] = []
    for _ in range(_TRIES):
        load = OtherLoad()
        samples = interleave(calls, job.clock, job.effort)
        # a GPU is not shared
        cores = load.cores() if job.device == "cpu" else None
        if cores is None:
            return samples, None
        tries.append((cores, samples))
        if cores <= NOISY_CORES:
            break
    cores, samples = min(tries, key=lambda each: each[0])
    return samples, cores


def _bind(contender: Contender, inputs: tuple[Tensor, ...]) -> Any:
    call = contender.call
    return lambda: call(*inputs)


def _check(
    workload: Workload,
    job: Job,
    built: list[Contender],
    first_inputs: tuple[Tensor, ...],
    result: WorkloadResult,
) -> dict[str, Errors]:
    """Return the errors of the contenders that are right, on inputs they saw and on fresh ones.

    Fresh inputs catch a contender that answers from what it remembers.
    """
    errors: dict[str, Errors] = {}
    wide = _widened(workload.program)
    for seed in reversed(_INPUT_SEEDS):
        inputs = _redraw(workload, job, first_inputs, seed)
        exact = _tensors(wide(*(_widen(tensor) for tensor in inputs)))
        eager = _errors(_tensors(workload.program(*inputs)), exact)
        for contender in built:
            try:
                found = _errors(_tensors(contender.call(*inputs)), exact)
            except Exception as error:  # a contender that fails here leaves the run
                result.failures[contender.name] = f"{type(error).__name__}: {error}"
                continue
            if not found.within(eager, job.dtype):
                result.failures[contender.name] = (
                    f"wrong on inputs of seed {seed}: relative error {found.mean_square:.2g} in the "
                    f"mean square, {found.worst:.2g} at worst; eager has {eager.mean_square:.2g} "
                    f"and {eager.worst:.2g}"
                )
            previous = errors.get(contender.name, Errors(0.0, 0.0))
            errors[contender.name] = Errors(
                max(previous.mean_square, found.mean_square), max(previous.worst, found.worst)
            )
    return {name: found for name, found in errors.items() if name not in result.failures}


def _redraw(
    workload: Workload, job: Job, first: tuple[Tensor, ...], seed: int
) -> tuple[Tensor, ...]:
    """Draw inputs anew: in place on a GPU, where CUDA graphs are bound to the addresses."""
    drawn = workload.inputs(job.device, job.dtype, seed)
    if job.device != "cuda":
        return drawn
    for old, new in zip(first, drawn, strict=True):
        old.copy_(new)
    return first


def _errors(outputs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> Errors:
    if [tuple(out.shape) for out in outputs] != [tuple(ref.shape) for ref in exact]:
        return Errors(math.inf, math.inf)
    mean_square = worst = 0.0
    for out, ref in zip(outputs, exact, strict=True):
        if not bool((torch.isfinite(out) == torch.isfinite(ref)).all()):
            return Errors(math.inf, math.inf)
        difference = (out.double() - ref).nan_to_num()
        size = ref.nan_to_num()
        mean_square = max(mean_square, _over(difference.norm(), size.norm()))
        worst = max(worst, _over(difference.abs().max(), size.abs().max()))
    return Errors(mean_square, worst)


def _over(difference: Tensor, size: Tensor) -> float:
    return float(difference) / max(float(size), 1e-300)


def _widen(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _widened(program: Program) -> Program:
    return copy.deepcopy(program).double() if isinstance(program, nn.Module) else program


def _parameters(program: Program) -> tuple[Tensor, ...]:
    if not isinstance(program, nn.Module):
        return ()
    return (*program.parameters(), *program.buffers())


def _tensors(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _warm_start(workload: Workload, job: Job, result: WorkloadResult) -> None:
    """Ask a second process how soon it runs the plan that is now in the cache."""
    dtype = str(job.dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "benchmarks.warmstart", job.suite, workload.name, dtype]
    command += [str(job.search.cache), str(job.search.budget_s), str(torch.get_num_threads())]
    ran = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    if ran.returncode == 0:
        result.warm_start_s = float(json.loads(ran.stdout.strip().split("\n")[-1])["seconds"])
    else:
        result.failures[WARM_START] = ran.stderr.strip().split("\n")[-1]
