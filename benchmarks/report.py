"""Show the results: a table for people, JSON for machines, a list of missed targets for CI.

In: `WorkloadResult`s and the facts of the machine. Out: text. The table has one line per workload;
"of bound" is the fraction of the measured limit that the contender reaches; "+functions" counts as well
what the library takes for as many exponentials, after the products.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.contenders import NAMES, SUPEROPT
from benchmarks.runner import NOISY_CORES, WARM_START, WorkloadResult

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Targets:
    """What a suite must show; `min_share` is of the bound, of memory's or of arithmetic's."""

    min_ratio: float
    min_share: float
    min_geomean: float
    max_search_s: float
    max_warm_start_s: float
    max_call_s: float


TARGETS = {
    "cpu": Targets(0.97, 0.7, 1.5, 180.0, 1.0, 10e-6),
    "programs": Targets(0.97, 0.7, 1.5, 180.0, 1.0, 10e-6),
    "cuda": Targets(0.0, 0.0, 1.0, math.inf, math.inf, math.inf),
}


def geomean(results: Sequence[WorkloadResult]) -> float | None:
    """Return the geometric mean of superopt's ratios; None when there is none."""
    ratios = [result.ratio.median for result in results if result.ratio is not None]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def table(results: Sequence[WorkloadResult]) -> str:
    """Return the table; times in milliseconds, `*` at the best of the others."""
    present = [name for name in NAMES if any(name in r.timings for r in results)]
    head = ["workload", *(f"{name} ms" for name in present), "bound ms", "of bound", "+functions"]
    if any(SUPEROPT in r.timings for r in results):
        head += ["vs best", "search s", "prop/rej/prov", "warm s"]
    rows = [head, *(_row(result, present, len(head)) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(_align(cell, i, widths[i]) for i, cell in enumerate(row)) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    lines += ["", *_footnotes(results)]
    return "\n".join(lines)


def _row(result: WorkloadResult, present: list[str], length: int) -> list[str]:
    cells = [result.name]
    for name in present:
        timing = result.timings.get(name)
        mark = "*" if name == result.best_other else " "
        lost = "failed " if name in result.failures else "- "
        cells.append(f"{timing.spread.median * 1e3:.3f}{mark}" if timing else lost)
    own = SUPEROPT if SUPEROPT in result.timings else result.best_other
    own_s = result.timings[own].spread.median if own else math.nan
    cells += [f"{result.bound_s * 1e3:.3f} {result.bound_kind[:3]}"]
    cells += [f"{each / own_s:.0%}" for each in (result.bound_s, result.with_functions_s)]
    if len(cells) < length:
        search = result.search
        counts = (search.proposed, search.rejected, search.proven) if search else ()
        cells += [
            f"{result.ratio.median:.2f}x" if result.ratio else "-",
            f"{search.seconds:.1f}" if search else "-",
            "/".join("?" if count is None else str(count) for count in counts) or "-",
            f"{result.warm_start_s:.2f}" if result.warm_start_s is not None else "-",
        ]
    if (result.other_cores or 0.0) > NOISY_CORES:
        cells[0] += " ~"
    return cells


def _align(cell: str, column: int, width: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _footnotes(results: Sequence[WorkloadResult]) -> list[str]:
    lines = ["* best of the others; of bound: superopt's share, or the best's without superopt"]
    if any((r.other_cores or 0.0) > NOISY_CORES for r in results):
        lines.append("~ other processes kept the machine busy meanwhile: times are not dependable")
    mean = geomean(results)
    if mean is not None:
        lines.append(f"geometric mean over the best of the others: {mean:.3f}x")
    lines += [f"{r.name}: {name}: {why}" for r in results for name, why in r.failures.items()]
    return lines


def document(
    suite: str,
    facts: dict[str, Any],
    results: Sequence[WorkloadResult],
    call_s: float | None,
) -> dict[str, Any]:
    """Return the result file's content; `call_s` is of a function that computes next to nothing."""
    timed = [result for result in results if result.timings]
    products = [r.product_flops_per_s for r in timed if r.product_flops_per_s is not None]
    return {
        "format": FORMAT_VERSION,
        "suite": suite,
        "machine": facts,
        "roofline": {
            "flops_per_s": statistics.median(products) if products else 0.0,
            "read_bytes_per_s_by_footprint": {r.moved_bytes: r.read_bytes_per_s for r in timed},
        },
        "geomean": geomean(results),
        "call_s": call_s,
        "workloads": [asdict(result) for result in results],
    }


def roofs(document: dict[str, Any]) -> tuple[float, float]:
    """Return a run's bytes/s from memory, at its largest footprint, and its FLOP/s of large products.

    Both are medians; 0 where nothing measured them.
    """
    measured = document["roofline"]
    largest = max(
        measured["read_bytes_per_s_by_footprint"].items(), key=_footprint, default=(0, 0.0)
    )
    return largest[1], measured["flops_per_s"]


def _footprint(entry: tuple[Any, float]) -> int:
    return int(entry[0])


def markdown(document: dict[str, Any]) -> str:
    """Return a result file's content as a Markdown table: what the README shows."""
    facts, (memory, peak) = document["machine"], roofs(document)
    dtype = document["workloads"][0]["dtype"]
    lines = [
        f"**{dtype}**: {facts['cpu']}, {facts['vector']}, {facts['threads']} threads, torch {facts['torch']}; "
        f"medians in milliseconds, all contenders in turn in one run; "
        f"{memory / 1e9:.1f} GB/s and {peak / 1e9:.0f} GFLOP/s measured there{call_text(document)}.",
        "",
        "| program | eager | `torch.compile` | SDPA | superopt | against the best | of the bound | with functions |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for entry in document["workloads"]:
        times = {n: t["spread"]["median"] * 1e3 for n, t in entry["timings"].items()}
        compiled = [times[n] for n in ("compile", "max-autotune") if n in times]
        cells = [
            entry["name"],
            _ms(times.get("eager")),
            _ms(min(compiled, default=None)),
            _ms(times.get("sdpa")),
            _ms(times.get(SUPEROPT)),
            f"{entry['ratio']['median']:.2f}x" if entry["ratio"] else "-",
            *(
                _share(entry.get(key), times.get(SUPEROPT))
                for key in ("bound_s", "with_functions_s")
            ),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Geometric mean: **{document['geomean']:.2f}x**."])


def call_text(document: dict[str, Any]) -> str:
    """Say what a call costs, where the run measured it."""
    call_s = document.get("call_s")
    return "" if call_s is None else f", {call_s * 1e6:.1f} us per call of three small tensors"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _share(bound_s: float | None, ms: float | None) -> str:
    return "-" if bound_s is None or ms is None else f"{bound_s * 1e3 / ms:.0%}"


def missed_targets(suite: str, results: Sequence[WorkloadResult]) -> list[str]:
    """Return one line for each target that these results miss."""
    targets = TARGETS[suite]
    missed: list[str] = []
    for result in results:
        missed += [f"{result.name}: {line}" for line in _missed_by(result, targets)]
    mean = geomean(results)
    if mean is not None and not mean > targets.min_geomean:
        missed.append(f"geometric mean {mean:.3f}x, must be above {targets.min_geomean}x")
    if not results:
        missed.append("no workload was run")
    return missed


def missed_calls(suite: str, call_s: float | None) -> list[str]:
    """Return a line where a call that computes next to nothing takes too long."""
    most = TARGETS[suite].max_call_s
    if call_s is None or call_s <= most:
        return []
    return [f"a call takes {call_s * 1e6:.1f} us, must take at most {most * 1e6:.0f} us"]


def _missed_by(result: WorkloadResult, targets: Targets) -> list[str]:
    if SUPEROPT not in result.timings or result.ratio is None:
        return [f"superopt did not run: {result.failures.get(SUPEROPT, 'it was skipped')}"]
    missed = []
    if result.ratio.median < targets.min_ratio:
        ratio = f"{result.ratio.median:.3f}x the best of the others ({result.best_other})"
        missed.append(f"{ratio}, must be at least {targets.min_ratio}x")
    own_s = result.timings[SUPEROPT].spread.median
    share = result.bound_s / own_s
    if share < targets.min_share:
        rate = "bandwidth" if result.bound_kind == "memory" else "rate of a large product"
        counted = f" ({result.with_functions_s / own_s:.0%} with functions)"
        found = f"{share:.0%} of the {rate}{counted if result.functions else ''}"
        missed.append(f"{found}, must be at least {targets.min_share:.0%}")
    if result.search is None or result.search.seconds > targets.max_search_s:
        found = f"{result.search.seconds:.0f} s" if result.search else "not measured"
        missed.append(f"search {found}, must take at most {targets.max_search_s:.0f} s")
    start = result.warm_start_s
    if start is not None and start > targets.max_warm_start_s:
        found = f"{start:.2f} s, must take at most {targets.max_warm_start_s} s"
        missed.append(f"warm start {found}")
    if WARM_START in result.failures:
        missed.append(f"warm start: {result.failures[WARM_START]}")
    return missed
