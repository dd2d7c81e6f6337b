"""Measured rates of this machine: what the cost model needs, by microbenchmark, cached on disk.

In: a cache folder. Out: a `Machine`. The measurement takes about half a second and is done once per
machine and number of threads; a damaged or foreign file is measured anew.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Final

import torch

from superopt.cache import write_atomically
from superopt.errors import PlanError
from superopt.plan import seal, unseal
from superopt.search.cost import Machine

_FORMAT: Final = "superopt machine 1"


@cache
def processor() -> str:
    """Name the processor, its instruction sets and the number of threads in use."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lines = [x for x in text.splitlines() if x.startswith(("model name", "CPU part"))]
        name = lines[0].partition(":")[2].strip() if lines else platform.processor()
    except OSError:
        name = platform.processor()
    return f"{platform.machine()} {name} {torch.backends.cpu.get_cpu_capability()}"


def target_name() -> str:
    """Name what plans are made for: processor and threads."""
    return f"cpu: {processor()}, {torch.get_num_threads()} threads"


def machine(folder: Path | None) -> Machine:
    """Return this machine's rates, measured or from `folder`."""
    path = None if folder is None else folder / f"rates-{torch.get_num_threads()}.json"
    if path is not None:
        try:
            body = json.loads(unseal(path.read_text(encoding="utf-8")))
            if body["format"] == _FORMAT and body["target"] == target_name():
                return Machine(**body["machine"])
        except (OSError, ValueError, KeyError, TypeError, PlanError):
            pass
    measured = _measure()
    if path is not None:
        body = {"format": _FORMAT, "target": target_name(), "machine": asdict(measured)}
        write_atomically(path, seal(json.dumps(body, indent=1)))
    return measured


def _measure() -> Machine:
    cores = torch.get_num_threads()
    lanes = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    memory = torch.ones(48 << 20)
    matrix = torch.randn(1024, 1024)
    read_s = _best(lambda: memory.sum(), 4)
    matmul_s = _best(lambda: torch.mm(matrix, matrix), 4)
    peak_flops = 2 * 1024**3 / matmul_s
    # a multiply-add is two operations on up to two units; elementwise work has a load and a store each
    vector_ops = peak_flops / cores / 5
    return Machine(
        cores=cores,
        vector_lanes=lanes,
        peak_flops=peak_flops,
        vector_ops=vector_ops,
        memory_bandwidth=memory.numel() * 4 / read_s,
        cache_bandwidth=4 * vector_ops,
    )


def _best(call: Callable[[], object], count: int) -> float:
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
