"""Measured rates of a device: what the cost model needs, by microbenchmark, cached on disk.

In: a cache folder and a device. Out: a `Target`. The measurement takes about half a second, per processor and
number of threads, or GPU; a damaged or foreign file is measured anew. Whatever else the machine does makes rates
too small, never too large: the best are kept, and every process measures once more until some have found the
machine idle.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch

from superopt.backends import Timer, bf16_products, timer, vector_bytes, wall
from superopt.cache import write_atomically
from superopt.ir.errors import SuperoptError
from superopt.ir.target import Target
from superopt.plan import seal, unseal

logger = logging.getLogger("superopt")

CPU: Final = torch.device("cpu")
_SETTLED: Final = 3
"""After so many measurements of an idle machine, each by another process, there are no more."""
_IDLE: Final = 0.5
"""The load per processor, a minute's average, up to which a machine counts as idle."""
_RATES: Final = ("peak_flops", "half_flops", "vector_ops", "memory_bandwidth", "cache_bandwidth")
_measured: Final[set[Path]] = set()
_CACHES: Final = Path("/sys/devices/system/cpu/cpu0/cache")


@cache
def processor() -> str:
    """Name the processor and its instruction sets, products of bfloat16 among them."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        lines = [x for x in text.splitlines() if x.startswith(("model name", "CPU part"))]
        name = lines[0].partition(":")[2].strip() if lines else platform.processor()
    except OSError:
        name = platform.processor()
    products = f", {bf16_products()}" if bf16_products() else ""
    return f"{platform.machine()} {name} {torch.backends.cpu.get_cpu_capability()}{products}"


def target_name(device: torch.device = CPU) -> str:
    """Name what plans are made for: processor and threads, or GPU and the interface to its driver."""
    if device.type == "cpu":
        return f"cpu: {processor()}, {torch.get_num_threads()} threads"
    found = torch.cuda.get_device_properties(device)
    runtime = torch.version.cuda or torch.version.hip
    return f"{device.type}: {found.name} ({found.major}.{found.minor}), {runtime}"


def machine(folder: Path | None, device: torch.device = CPU) -> Target:
    """Return a device's rates, from `folder` where they are settled, else the best measured so far."""
    name = target_name(device)
    key = hashlib.sha256(name.encode()).hexdigest()[:16]
    path = None if folder is None else folder / f"machine-{device.type}-{key}.json"
    known, idle = (None, 0) if path is None else _stored(path, name)
    if known is not None and (idle >= _SETTLED or path in _measured):
        return known
    idle += _is_idle()
    found = _measure() if device.type == "cpu" else _measure_gpu(device)
    if known is not None:
        found = replace(found, **{r: max(getattr(found, r), getattr(known, r)) for r in _RATES})
    if path is not None:
        try:
            write_atomically(path, seal(json.dumps({"idle": idle, "target": found.to_json()})))
        except OSError as error:  # a full or read-only disk costs the file, not the program
            logger.warning("the machine's rates are not kept: %s", error)
        _measured.add(path)
    return found


def _stored(path: Path, name: str) -> tuple[Target | None, int]:
    """Return the rates in a file and how often they were measured on an idle machine."""
    try:
        content = json.loads(unseal(path.read_text(encoding="utf-8")))
        found, idle = Target.from_json(content["target"]), int(content["idle"])
    except (OSError, ValueError, TypeError, KeyError, SuperoptError):
        return None, 0
    return (found, idle) if found.name == name else (None, 0)


def _is_idle() -> bool:
    """Say whether the machine had little to do in the last minute; True where no system tells."""
    if not hasattr(os, "getloadavg"):
        return True
    return os.getloadavg()[0] <= _IDLE * (os.cpu_count() or 1)


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
    memory = torch.ones(48 << 20)
    matrix = torch.randn(1024, 1024)
    read_s = _best(lambda: memory.sum(), 8)
    matmul_s = _best(lambda: torch.mm(matrix, matrix), 16)
    peak_flops = 2 * 1024**3 / matmul_s
    # a multiply-add is two operations on up to two units; elementwise work has a load and a store each
    vector_ops = peak_flops / cores / 5
    known, plain = caches(), Target()
    return Target(
        name=target_name(),
        cores=cores,
        vector_lanes=vector_bytes() // 4,
        peak_flops=peak_flops,
        half_flops=_half_flops(matrix) if bf16_products() == "tiles" else peak_flops,
        vector_ops=vector_ops,
        memory_bandwidth=memory.numel() * 4 / read_s,
        cache_bandwidth=4 * vector_ops,
        inner_cache_bytes=known.get(2, plain.inner_cache_bytes),
        outer_cache_bytes=known.get(3, plain.outer_cache_bytes),
    )


def _half_flops(matrix: torch.Tensor) -> float:
    half = matrix.bfloat16()
    return 2 * 1024**3 / _best(lambda: torch.mm(half, half), 16)


def _best(call: Callable[[], object], count: int, timed: Timer = wall) -> float:
    call()
    return min(timed(call, 1) for _ in range(count))


def _measure_gpu(device: torch.device) -> Target:
    """Measure the rates of a GPU: large products in both precisions, and reading memory."""
    timed = timer(device)
    rates = []
    for dtype, size in ((torch.float32, 4096), (torch.bfloat16, 8192)):
        matrix = torch.randn(size, size, device=device).to(dtype)
        rates.append(2 * size**3 / _best(partial(torch.mm, matrix, matrix), 8, timed))
    free, _ = torch.cuda.mem_get_info(device)
    memory = torch.ones(min(1 << 28, free // 16), device=device)
    bandwidth = memory.numel() * 4 / _best(memory.sum, 8, timed)
    properties = torch.cuda.get_device_properties(device)
    return gpu_target(target_name(device), properties, rates[0], rates[1], bandwidth)


def gpu_target(
    name: str, properties: Any, peak_flops: float, half_flops: float, bandwidth: float
) -> Target:
    """Return a GPU from its properties (as PyTorch has them) and measured rates."""
    cores = properties.multi_processor_count
    return Target(
        name=name,
        kind="cuda",
        cores=cores,
        vector_lanes=32,
        peak_flops=peak_flops,
        half_flops=half_flops,
        # a multiply-add is two operations
        vector_ops=peak_flops / cores / 2,
        memory_bandwidth=bandwidth,
        # the second-level cache reads about twice as fast as memory
        cache_bandwidth=2 * bandwidth / cores,
        inner_cache_bytes=getattr(properties, "shared_memory_per_block_optin", 0) or 48 << 10,
        outer_cache_bytes=getattr(properties, "L2_cache_size", 0) or 4 << 20,
        block_s=5.0e-7,
    )
