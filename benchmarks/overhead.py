"""What a call of an optimized function costs beside its kernel.

Out: seconds per call of a planned function of three tensors of 64 numbers. Its kernel takes next to
nothing, so all of a call counts: guards, looking the plan up, making the output, starting the kernel.
"""

import statistics
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

import superopt
from superopt.backends import wall

_SIZE: Final = 64
_CALLS: Final = 1000
_SAMPLES: Final = 15
_BUDGET_S: Final = 20.0


def _program(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Eager launches a dozen operators here, so that the plan is certain to be faster."""
    for _ in range(4):
        x = torch.tanh(x * y + z)
    return x


def call_s(cache: Path) -> float | None:
    """Return the median seconds of a call, or None where no plan runs."""
    call = superopt.optimize(_program, budget_s=_BUDGET_S, cache=cache)
    inputs = [torch.linspace(0.1, k, _SIZE) for k in (1.0, 2.0, 3.0)]
    call.warmup(*inputs)
    if not any(plan.improved for plan in call.report().plans):
        return None
    return statistics.median(wall(lambda: call(*inputs), _CALLS) for _ in range(_SAMPLES))
