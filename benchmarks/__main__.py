"""`python -m benchmarks cpu|programs|cuda`: run a suite, print the table, write the JSON, check the targets."""

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, overhead, report
from benchmarks.contenders import NAMES, SUPEROPT
from benchmarks.isolation import Isolated
from benchmarks.measurement import Measurement
from benchmarks.roofline import svg
from benchmarks.runner import WorkloadResult, failed
from benchmarks.suites import SUITES
from benchmarks.workloads import Workload

_Call = Callable[[str], WorkloadResult]

_RESULTS = Path(__file__).resolve().parent / "results"
_DTYPES = {
    "cpu": ("float32", "bfloat16"),
    "programs": ("float32",),
    "cuda": ("bfloat16", "float16"),
}
# The first product that is autotuned takes a minute, most workloads take 30 s.
_WORKLOAD_LIMIT_S = 180.0
_LIMIT_S = {"cpu": math.inf, "cuda": 1200.0}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.suite == "cuda":
        machine.require_cuda()
    names = [workload.name for workload in _select(options)]
    dtypes = _dtypes(options)
    limit_s = options.limit_s
    end = time.monotonic() + (_LIMIT_S[SUITES[options.suite][0]] if limit_s is None else limit_s)
    missed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="superopt-bench-") as cache:
        call_s = _call_s(options, Path(cache) / "call")
        missed += report.missed_calls(options.suite, call_s)
        for number, dtype in enumerate(dtypes):
            share_s = (end - time.monotonic()) / (len(dtypes) - number)
            measure = Measurement(options, dtype, Path(cache) / dtype)
            results = _run(names, measure, time.monotonic() + share_s, call_s)
            missed += [f"{dtype}: {line}" for line in report.missed_targets(options.suite, results)]
            left = names[len(results) :]
            missed += [f"{dtype}: no time was left for {name}" for name in left]
    if not options.check:
        return 0
    print("\n".join(f"missed: {line}" for line in missed) or "every target is met")
    return 1 if missed else 0


def _call_s(options: argparse.Namespace, cache: Path) -> float | None:
    """Return the seconds that a call costs beside its kernel, measured where the program runs."""
    if SUITES[options.suite][0] != "cpu" or SUPEROPT in options.skip:
        return None
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        return overhead.call_s(cache)


def _run(
    names: Sequence[str], measure: Measurement, end: float, call_s: float | None
) -> list[WorkloadResult]:
    """Measure one workload after the other until `end`; what has been measured is written at once."""
    options, dtype = measure.options, measure.dtype
    out = _out_path(options, dtype)
    facts = machine.facts(SUITES[options.suite][0], options.threads)
    results: list[WorkloadResult] = []
    with _caller(measure) as call:
        for name in names:
            start = time.monotonic()
            if start > end:
                print(f"no time is left for {name}", file=sys.stderr)
                break
            print(f"{name} ...", end="", file=sys.stderr, flush=True)
            result = call(name)
            results.append(result)
            taken = f"{time.monotonic() - start:.1f} s"
            print(f" {taken}; {_summary(result)}", file=sys.stderr, flush=True)
            _write(out, options.suite, facts, results, call_s)
    content = _write(out, options.suite, facts, results, call_s)
    if any(result.timings for result in results):
        out.with_suffix(".svg").write_text(svg(content))
    print(_heading(content, dtype))
    print(report.table(results))
    print(f"written to {os.path.relpath(out)}")
    return results


@contextmanager
def _caller(measure: Measurement) -> Iterator[_Call]:
    """Give what measures a workload: in a process of its own on a GPU, which a bad kernel spoils."""
    if SUITES[measure.options.suite][0] == "cpu":
        yield measure
        return
    isolated = Isolated(measure, machine.usable)

    def call(name: str) -> WorkloadResult:
        answer, reason = isolated.call(name, _WORKLOAD_LIMIT_S)
        return answer or failed(name, measure.dtype, reason)

    try:
        yield call
    finally:
        isolated.close()


def _summary(result: WorkloadResult) -> str:
    times = [f"{name} {t.spread.median * 1e3:.3f} ms" for name, t in result.timings.items()]
    if result.ratio is not None:
        times.append(f"{result.ratio.median:.2f}x")
    return "; ".join([*times, *(f"{name}: {why}" for name, why in result.failures.items())])


def _write(
    out: Path,
    suite: str,
    facts: dict[str, object],
    results: Sequence[WorkloadResult],
    call_s: float | None,
) -> dict[str, Any]:
    """Write what there is so far, so that an interrupted run leaves its results."""
    content = report.document(suite, facts, results, call_s)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content, indent=1) + "\n")
    return content


def _heading(content: dict[str, Any], dtype: str) -> str:
    facts, (memory, peak) = content["machine"], report.roofs(content)
    device = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    return (
        f"\n{content['suite']} {dtype}: {device}; torch {facts['torch']}, "
        f"triton {facts['triton']}, commit {facts['commit']}, {facts['date']}\n"
        f"measured: read {memory / 1e9:.1f} GB/s from memory, "
        f"matrix product {peak / 1e9:.0f} GFLOP/s{report.call_text(content)}\n"
    )


def _select(options: argparse.Namespace) -> list[Workload]:
    _, workloads = SUITES[options.suite]
    if options.only:
        unknown = set(options.only) - {workload.name for workload in workloads}
        if unknown:
            names = ", ".join(workload.name for workload in workloads)
            sys.exit(f"benchmarks: no workload {', '.join(sorted(unknown))}; there are: {names}")
        return [workload for workload in workloads if workload.name in options.only]
    return [workload for workload in workloads if workload.quick or not options.quick]


def _dtypes(options: argparse.Namespace) -> tuple[str, ...]:
    if options.dtype:
        return (options.dtype,)
    return _DTYPES[options.suite][: 1 if options.quick else None]


def _out_path(options: argparse.Namespace, dtype: str) -> Path:
    if options.out is not None:
        out: Path = options.out
        return out if len(_dtypes(options)) == 1 else _suffixed(out, dtype)
    kind = "-quick" if options.quick else "-part" if options.only else ""
    return _RESULTS / f"{options.suite}-{dtype}{kind}-{datetime.now(UTC):%Y%m%d-%H%M}.json"


def _suffixed(out: Path, dtype: str) -> Path:
    return out.with_name(f"{out.stem}-{dtype}{out.suffix}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suite", choices=tuple(SUITES))
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few workloads, one dtype, shorter searches, fewer rounds",
    )
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
        help="superopt's search, per kernel (default 20 on a CPU, 8 on a GPU and with --quick)",
    )
    parser.add_argument(
        "--limit-s",
        type=float,
        help="begin no workload after this long, shared by the dtypes (default 1200 on a GPU)",
    )
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
