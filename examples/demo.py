"""Optimize four functions and print what was found, proven and gained.

python examples/demo.py [--budget SECONDS] [--small]
"""

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import programs
import torch

import superopt
from superopt.measure import interleaved


def cases(small: bool) -> list[tuple[Callable[..., Any], tuple[torch.Tensor, ...]]]:
    """Return each function with its inputs."""
    d, n = (256, 128) if small else (4096, 1024)
    torch.manual_seed(0)
    r = torch.randn
    w = [r(d, d) / d**0.5 for _ in range(3)]
    q, k, v = (r(4, n, 64) for _ in range(3))
    return [
        (programs.norm_linear, (r(16, d), r(d), w[0])),
        (programs.gated_mlp, (r(8, d), w[1], w[2])),
        (programs.causal_attention, (q, k, v)),
        (programs.squared_decay_retrieval, (q, k, v, torch.rand(4, 1, n))),
    ]


def show(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], budget_s: float) -> None:
    """Optimize one function, check it, and time it against eager and torch.compile."""
    print(f"\n{function.__name__}: {function.__doc__}")
    started = time.perf_counter()
    fast = superopt.optimize(function, budget_s=budget_s)
    fast.warmup(*inputs)
    print(fast.report())
    print(f"  ready after {time.perf_counter() - started:.1f} s (a second run reads the cache)")
    error = (fast(*inputs) - function(*inputs)).abs().max()
    print(f"  largest difference from eager: {error:.1e}")
    compiled = torch.compile(function, dynamic=False)
    compiled(*inputs)  # its compilation is not what is compared
    calls = [lambda: function(*inputs), lambda: compiled(*inputs), lambda: fast(*inputs)]
    eager, compile_, ours = (f"{s * 1e3:.2f} ms" for s in interleaved(calls))
    print(f"  eager {eager}, torch.compile {compile_}, superopt {ours}")


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=30.0, help="seconds of search per function")
    parser.add_argument("--small", action="store_true", help="small inputs, for a quick look")
    options = parser.parse_args()
    with torch.no_grad():
        for function, inputs in cases(options.small):
            show(function, inputs, options.budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
