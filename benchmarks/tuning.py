"""`python -m benchmarks.tuning`: how near the tuner comes to an exhaustive sweep, and with how many kernels.

For each of five kernels, tile sizes and register tiles are chosen twice: by the search (cost model, first
batch, climbing), and by measuring every combination of tile sizes of every schedule, then every
configuration of the best of these. Both winners are then timed in turn. Out: a table, and JSON in
`benchmarks/results/`.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import product
from math import inf
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine
from superopt.backends import CpuBackend
from superopt.calibrate import machine as calibrated
from superopt.frontend import lift
from superopt.ir.errors import GraphError
from superopt.ir.graph import Graph
from superopt.ir.semantics import expand
from superopt.ir.target import Target
from superopt.measure import Clock, interleaved
from superopt.search.algebra import FUSION_RULES, apply_rules
from superopt.search.driver import Driver
from superopt.search.emit import block_graph
from superopt.search.errors import NotFusible
from superopt.search.partition import partition
from superopt.search.region import Region, make_region
from superopt.search.schedule import derive
from superopt.search.tiling import choices
from superopt.verify.floating import FloatTest

_RESULTS = Path(__file__).resolve().parent / "results"
_CONFIGURATIONS: Final = 6
_BEST: Final = 16
"""Tile sizes of the sweep that are tried with every configuration."""
_BATCH: Final = 24
_BUDGET_S: Final = 20.0


def _softmax(x: Tensor) -> Tensor:
    return torch.softmax(x * 0.5, -1)


def _norm_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.rms_norm(x, x.shape[-1:]), weight)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.125, -1) @ v


def _gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


KERNELS: Final[dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]]] = {
    "softmax": (_softmax, ((384, 3000),)),
    "norm-linear": (_norm_linear, ((16, 512), (768, 512))),
    "linear-gelu": (_linear_gelu, ((200, 384), (500, 384), (500,))),
    "attention": (_attention, ((4, 256, 64), (4, 512, 64), (4, 512, 64))),
    "gated": (_gated, ((8, 512), (640, 512), (640, 512))),
}


@dataclass(frozen=True)
class Comparison:
    """What tuner and sweep found for one kernel; `ratio` is the tuner's time over the sweep's."""

    kernel: str
    tuner_kernels: int
    tuner_s: float
    tuner_search_s: float
    sweep_kernels: int
    sweep_s: float
    sweep_search_s: float

    @property
    def ratio(self) -> float:
        """How much slower the tuner's kernel is: 1.05 is 5 %."""
        return self.tuner_s / self.sweep_s


def region_of(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Graph, Region]:
    """Return a program, and the one kernel that it makes."""
    target = Target()
    graph = lift(function, tuple(inputs)).graph
    variant = apply_rules(expand(graph), FUSION_RULES)
    largest = max(partition(variant, target), key=len)
    return graph, make_region(variant, largest)


def compare(
    name: str, graph: Graph, region: Region, target: Target, folder: Path, budget_s: float
) -> Comparison:
    """Tune one kernel both ways, with caches of their own, and time the winners in turn."""
    started = time.monotonic()
    tuner = Clock(CpuBackend(folder / f"{name}-tuner"), {}, target=target)
    driver = Driver(graph, target, tuner, budget_s, 0, FloatTest(graph, seed=0))
    choice = driver.tune(region, started + budget_s, minor=False)
    if choice is None:
        raise SystemExit(f"{name}: the search found no kernel")
    tuner.tune(choice.graph, _CONFIGURATIONS)
    tuned = time.monotonic()
    sweeper = Clock(CpuBackend(folder / f"{name}-sweep"), {}, target=target)
    found, count = sweep(region, target, sweeper)
    swept = time.monotonic()
    entries = [tuner.compiled[choice.graph.digest()].entry, sweeper.compiled[found.digest()].entry]
    calls = [sweeper._call(g, e) for g, e in zip((choice.graph, found), entries, strict=True)]
    mine, best = interleaved(calls, limit_s=4.0, rounds=41)
    return Comparison(
        name,
        driver.statistics.measured + len(tuner.backend.variants(choice.graph, _CONFIGURATIONS)) - 1,
        mine,
        tuned - started,
        count,
        best,
        swept - tuned,
    )


def sweep(region: Region, target: Target, clock: Clock) -> tuple[Graph, int]:
    """Measure every combination of tile sizes, then every configuration of the best; return the winner."""
    graphs: dict[str, Graph] = {}
    for schedule in derive(region):
        table = choices(schedule, target)
        for sizes in product(*table.values()):
            try:
                graph = block_graph(schedule, dict(zip(table, sizes, strict=True)), "swept")
            except (NotFusible, GraphError):
                continue
            graphs[graph.digest()] = graph
    wanted = list(graphs.values())
    seconds: list[float] = []
    for first in range(0, len(wanted), _BATCH):
        seconds += clock.kernels(wanted[first : first + _BATCH])
        print(f"\r  {len(seconds)} of {len(wanted)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    count = len(wanted)
    best: tuple[float, Graph] = (inf, wanted[0])
    order = sorted(range(len(wanted)), key=lambda i: seconds[i])
    for i in order[:_BEST]:
        if seconds[i] < inf:
            compiled = clock.tune(wanted[i], _CONFIGURATIONS)
            count += len(clock.backend.variants(wanted[i], _CONFIGURATIONS)) - 1
            if compiled is not None and compiled.seconds < best[0]:
                best = compiled.seconds, wanted[i]
    return best[1], count


def table(comparisons: Sequence[Comparison]) -> str:
    """Return one line per kernel."""
    lines = ["kernel        tuner: kernels      ms   sweep: kernels      ms   tuner / sweep"]
    lines += [
        f"{c.kernel:12s} {c.tuner_kernels:15d} {c.tuner_s * 1e3:8.3f} {c.sweep_kernels:16d} "
        f"{c.sweep_s * 1e3:7.3f} {c.ratio:12.2f}x"
        for c in comparisons
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; with --check, exit code 1 if a kernel is over 5 % slower than the sweep's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)}")
    parser.add_argument(
        "--budget-s", type=float, default=_BUDGET_S, help="for the tuner, per kernel"
    )
    parser.add_argument("--check", action="store_true", help="fail where the tuner is 5 %% slower")
    parser.add_argument("--out", type=Path, help="the result file")
    options = parser.parse_args(arguments)
    unknown = set(options.kernels) - set(KERNELS)
    if unknown:
        parser.error(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    comparisons = []
    with tempfile.TemporaryDirectory(prefix="superopt-tuning-") as folder, torch.no_grad():
        target = calibrated(Path(folder))
        for name in options.kernels or KERNELS:
            function, shapes = KERNELS[name]
            torch.manual_seed(0)
            graph, region = region_of(function, [torch.randn(s) for s in shapes])
            print(f"{name} ...", file=sys.stderr)
            comparisons.append(compare(name, graph, region, target, Path(folder), options.budget_s))
    print(table(comparisons))
    out = options.out or _RESULTS / f"tuning-{datetime.now(UTC):%Y%m%d-%H%M}.json"
    facts: dict[str, Any] = machine.facts("cpu", torch.get_num_threads())
    content = {"machine": facts, "kernels": [asdict(c) | {"ratio": c.ratio} for c in comparisons]}
    out.write_text(json.dumps(content, indent=1) + "\n")
    slow = [c.kernel for c in comparisons if c.ratio > 1.05]
    if options.check and slow:
        print(f"missed: over 5 % slower than the best of the sweep: {', '.join(slow)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
