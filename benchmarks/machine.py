"""What the machine is, and what it can do at best, measured in the same run as the programs.

Out: facts for the result file (no names of hosts, users or folders), what to time beside a program
to know its bound, and how busy other processes kept the machine.
"""

import functools
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Clock
from superopt.codegen.cpu import find_compiler

_ROOT = Path(__file__).resolve().parent.parent
_SMALLEST_READ_BYTES = 1 << 20
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
_EXPONENTIALS = 1 << 18  # input and result fit the second cache


@dataclass(frozen=True)
class Probe:
    """A library call that does nothing but `amount` of one thing: bytes read, operations, exponentials."""

    call: Callable[[], Any]
    amount: int


@dataclass
class Probes:
    """What a program is held against: a read of as many bytes, a large matrix product, exponentials.

    They are timed in turn with the program, since the speed of a machine that others use too changes
    within minutes. What fits a cache is read from there, as repeated calls find their inputs there.
    A CPU's product is the faster of the dtype's and float32's: without 16-bit instructions a library
    is slower in 16 bits. Exponentials are float32's, in the second cache, as no library's are faster in
    16 bits.
    """

    device: str
    dtype: torch.dtype
    clock: Clock
    _product: Probe | None = None

    def of(self, moved_bytes: int, flops: int, functions: int) -> dict[str, Probe]:
        """Return the probes for a program; one without contractions needs no product."""
        size = max(moved_bytes, _SMALLEST_READ_BYTES) // 4
        found = {"read": Probe(torch.ones(size, device=self.device).sum, 4 * size)}
        if flops:
            found["product"] = self._large_product()
        if functions:
            x = torch.zeros(_EXPONENTIALS, device=self.device)
            exponentials = functools.partial(torch.exp, x, out=torch.empty_like(x))
            found["functions"] = Probe(exponentials, _EXPONENTIALS)
        return found

    def _large_product(self) -> Probe:
        if self._product is None:
            n = _MATMUL_SIZE[self.device]
            wide = torch.randn(n, n, device=self.device)
            dtypes = {self.dtype, torch.float32} if self.device == "cpu" else {self.dtype}
            calls = [functools.partial(torch.matmul, a, a) for a in map(wide.to, dtypes)]
            fastest = min(calls, key=self._seconds) if len(calls) > 1 else calls[0]
            self._product = Probe(fastest, 2 * n**3)
        return self._product

    def _seconds(self, call: Callable[[], Any]) -> float:
        call()
        return min(self.clock.time(call, 1) for _ in range(3))


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
    compiler = find_compiler()
    tiles = " and AMX" if compiler and compiler.bf16 == "tiles" else ""
    return f"{torch.backends.cpu.get_cpu_capability()}{tiles}"


def _compiler() -> str | None:
    """Return the command that compiles kernels, flags of $CXX included, and its version."""
    found = find_compiler()
    return f"{' '.join(found.command)}: {found.version}" if found else None


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
