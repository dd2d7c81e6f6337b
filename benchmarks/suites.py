"""The suites by name: the device that each runs on, and its workloads."""

from typing import Final

from benchmarks.families import PROGRAMS
from benchmarks.workloads import CPU, CUDA, Workload

SUITES: Final[dict[str, tuple[str, tuple[Workload, ...]]]] = {
    "cpu": ("cpu", CPU),
    "programs": ("cpu", PROGRAMS),
    "cuda": ("cuda", CUDA),
}
