"""What the machine is, and what it can do at best, measured in the same run as the programs.

Out: facts for the result file (no names of hosts, users or folders), the time that the measured
bandwidth and peak allow a program (its bound), and how busy other processes kept the machine.
"""

import functools
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Clock

_ROOT = Path(__file__).resolve().parent.parent
_SMALLEST_READ_BYTES = 1 << 20
_LARGEST_READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 32}
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Bound:
    """The least time a program can take: the longer of its traffic and its arithmetic."""

    traffic_s: float
    arithmetic_s: float

    @property
    def seconds(self) -> float:
        """The bound itself."""
        return max(self.traffic_s, self.arithmetic_s)

    @property
    def kind(self) -> str:
        """Which of the two it is."""
        return "memory" if self.traffic_s >= self.arithmetic_s else "compute"


@dataclass
class Roofline:
    """Measured read bandwidth, by footprint, and the rate of a large matrix product.

    A footprint that fits a cache is read faster than memory allows, and repeated calls find their
    inputs there. So bandwidth is measured at each power of two, and a program is held against the
    one at its own footprint. A CPU's product is the faster of the dtype's and float32's. Every measurement is a maximum, and `refresh` can only raise it.
    """

    device: str
    dtype: torch.dtype
    clock: Clock
    bytes_per_s: dict[int, float] = field(default_factory=dict)
    flops_per_s: float = 0.0

    def refresh(self) -> None:
        """Measure (again), and keep the best seen."""
        n = _MATMUL_SIZE[self.device]
        wide = torch.randn(n, n, device=self.device)
        # a library may be slower in 16 bits than in 32, where the CPU has no such instructions
        for a in (wide.to(self.dtype), wide) if self.device == "cpu" else (wide.to(self.dtype),):
            seconds = self._best(functools.partial(torch.matmul, a, a))
            self.flops_per_s = max(self.flops_per_s, 2 * n**3 / seconds)
        largest = torch.ones(_LARGEST_READ_BYTES[self.device] // 4, device=self.device)
        size = _SMALLEST_READ_BYTES
        while size <= _LARGEST_READ_BYTES[self.device]:
            rate = size / self._best(largest[: size // 4].sum)
            self.bytes_per_s[size] = max(self.bytes_per_s.get(size, 0.0), rate)
            size *= 2

    def merge(self, other: "Roofline") -> None:
        """Keep the best of both."""
        self.flops_per_s = max(self.flops_per_s, other.flops_per_s)
        for size, rate in other.bytes_per_s.items():
            self.bytes_per_s[size] = max(self.bytes_per_s.get(size, 0.0), rate)

    def bound(self, moved_bytes: int, flops: int) -> Bound:
        """Return the least time for this much traffic and arithmetic."""
        fitting = [size for size in self.bytes_per_s if size >= moved_bytes]
        size = min(fitting, default=max(self.bytes_per_s))
        return Bound(moved_bytes / self.bytes_per_s[size], flops / self.flops_per_s)

    def _best(self, call: Callable[[], Any]) -> float:
        call()
        repeat = max(1, int(0.002 / self.clock.time(call, 1)))
        return min(self.clock.time(call, repeat) for _ in range(7))


class OtherLoad:
    """How many cores other processes used between two moments; None where Linux does not say."""

    def __init__(self) -> None:
        self._start = _busy_seconds()

    def cores(self) -> float | None:
        """Return the mean number of cores that others kept busy since construction."""
        now = _busy_seconds()
        if self._start is None or now is None:
            return None
        wall = max(now[2] - self._start[2], 1e-9)
        return max(0.0, ((now[0] - self._start[0]) - (now[1] - self._start[1])) / wall)


def _busy_seconds() -> tuple[float, float, float] | None:
    """Return (busy time of all cores, of this process, wall time), in seconds."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    ticks = [int(value) for value in fields[1:9]]
    user, nice, system, _idle, _iowait, irq, softirq, steal = ticks
    own = os.times()
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy, own.user + own.system, own.elapsed


def facts(device: str, threads: int) -> dict[str, Any]:
    """Return what a reader needs to judge and repeat the run."""
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "vector": _vector_extension(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "compiler": _compiler(),
    }
    found["torch"] = torch.__version__
    for package in ("triton", "numpy", "superopt"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["capability"] = f"sm_{properties.major}{properties.minor}"
        found["gpu_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


def _commit() -> str | None:
    """Return the commit that ran, marked when the working tree differs from it."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
        ran = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return ran.stdout.strip() or None


def _cpu_info(key: str) -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, re.MULTILINE)
    return found.group(1) if found else ""


def _cpu_model() -> str:
    numbers = "/".join(_cpu_info(key) for key in ("cpu family", "model", "stepping"))
    name = _cpu_info("model name")
    return f"{name} (family/model/stepping {numbers})" if name else platform.processor()


def _vector_extension() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            ran = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
            return ran.stdout.split("\n", 1)[0]
    return None


def require_cuda() -> None:
    """Leave with a clear message on a machine without a usable GPU."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or "no CUDA"
        sys.exit(
            f"benchmarks cuda: no CUDA device (torch {torch.__version__}, built with {built}). "
            "Run `python -m benchmarks cpu` here."
        )


def usable() -> bool:
    """Say whether the GPU still answers: after a fault in a kernel it does not, in that process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
