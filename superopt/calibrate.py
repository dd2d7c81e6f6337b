"""Measured rates of this machine: what the cost model needs, by microbenchmark, cached on disk.

In: a cache folder. Out: a `Target`. The measurement takes about half a second and is done once per
machine and number of threads; a damaged or foreign file is measured anew.
"""

import platform
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Final

import torch

from superopt.cache import write_atomically
from superopt.ir.errors import SuperoptError
from superopt.ir.target import Target
from superopt.plan import seal, unseal

_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


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


def machine(folder: Path | None) -> Target:
    """Return this machine's rates, measured or from `folder`."""
    path = None if folder is None else folder / f"rates-{torch.get_num_threads()}.json"
    if path is not None:
        try:
            found = Target.from_json(unseal(path.read_text(encoding="utf-8")))
            if found.name == target_name():
                return found
        except (OSError, UnicodeError, SuperoptError):
            pass
    measured = _measure()
    if path is not None:
        write_atomically(path, seal(measured.to_json()))
    return measured


def caches(folder: Path = _CACHES) -> dict[int, int]:
    """Return the bytes of a core's data caches by level, as Linux tells; nothing elsewhere."""
    found = {}
    for path in sorted(folder.glob("index*")):
        try:
            kind, level, size = ((path / n).read_text().strip() for n in ("type", "level", "size"))
            if kind != "Instruction" and size.endswith("K"):
                found[int(level)] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    return found


def _measure() -> Target:
    cores = torch.get_num_threads()
    lanes = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability(), 4)
    memory = torch.ones(48 << 20)
    matrix = torch.randn(1024, 1024)
    read_s = _best(lambda: memory.sum(), 4)
    matmul_s = _best(lambda: torch.mm(matrix, matrix), 4)
    peak_flops = 2 * 1024**3 / matmul_s
    # a multiply-add is two operations on up to two units; elementwise work has a load and a store each
    vector_ops = peak_flops / cores / 5
    known, plain = caches(), Target()
    return Target(
        name=target_name(),
        cores=cores,
        vector_lanes=lanes,
        peak_flops=peak_flops,
        half_flops=peak_flops,  # kernels compute in float32
        vector_ops=vector_ops,
        memory_bandwidth=memory.numel() * 4 / read_s,
        cache_bandwidth=4 * vector_ops,
        inner_cache_bytes=known.get(2, plain.inner_cache_bytes),
        outer_cache_bytes=known.get(3, plain.outer_cache_bytes),
    )


def _best(call: Callable[[], object], count: int) -> float:
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
