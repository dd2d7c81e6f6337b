"""Measure, in a process of its own, how soon a plan that is already in the cache runs.

In (arguments): suite, workload, dtype, cache folder, search budget in seconds, threads. Out: one
line of JSON. The clock starts before `import superopt` and stops after the first result; making the
inputs, which needs torch but not superopt, comes before. Nothing is subtracted.
"""

import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.contenders import SearchOptions, optimized
from benchmarks.suites import SUITES


def main(arguments: list[str]) -> None:
    """Measure one warm start and print it."""
    suite, name, dtype, cache, budget_s, threads = arguments
    torch.set_num_threads(int(threads))
    device, workloads = SUITES[suite]
    workload = next(w for w in workloads if w.name == name).ready(device, getattr(torch, dtype))
    inputs = workload.inputs(device, getattr(torch, dtype), seed=0)
    if device == "cuda":
        torch.cuda.synchronize()
    assert "superopt" not in sys.modules, "superopt was imported before the clock started"
    with torch.no_grad():
        start = time.perf_counter()
        call = optimized(workload, SearchOptions(Path(cache), float(budget_s)))
        call(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(sys.argv[1:])
