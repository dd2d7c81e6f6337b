"""Time several callables against each other, so that drift and noise hit all of them alike.

In: callables without arguments. Out: seconds per call, one sample per round and callable. A sample
is many calls back to back when one call is short; each round runs every callable once, and the next
round starts with another one.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from superopt.backends import timer, wall

Call = Callable[[], Any]


class Clock(Protocol):
    """Times calls on one kind of device."""

    def time(self, call: Call, repeat: int) -> float:
        """Return the mean seconds of one of `repeat` calls made back to back."""


class CpuClock:
    """Wall time."""

    def time(self, call: Call, repeat: int) -> float:
        """Return the mean seconds of one of `repeat` calls made back to back."""
        return wall(call, repeat)


class CudaClock:
    """Time on the device, between two events on the current stream."""

    def time(self, call: Call, repeat: int) -> float:
        """Return the mean seconds of one of `repeat` calls made back to back."""
        return timer(torch.device("cuda", torch.cuda.current_device()))(call, repeat)


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds until `budget_s` is spent, within the two limits."""

    budget_s: float
    min_rounds: int
    max_rounds: int
    sample_s: float = 0.004
    """Repeat short calls until one sample lasts this long; well above the 2 ms where noise rules."""
    warm_up: int = 3


def interleave(calls: Mapping[str, Call], clock: Clock, effort: Effort) -> dict[str, list[float]]:
    """Return each callable's samples; sample i of all of them comes from the same round."""
    repeats: dict[str, int] = {}
    round_s = 0.0
    for name, call in calls.items():
        for _ in range(effort.warm_up):
            call()
        once = statistics.median(clock.time(call, 1) for _ in range(3))
        repeats[name] = max(1, round(effort.sample_s / max(once, 1e-7)))
        round_s += repeats[name] * once
    rounds = int(effort.budget_s / max(round_s, 1e-9))
    rounds = min(max(rounds, effort.min_rounds), effort.max_rounds)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clock.time(calls[name], repeats[name]))
    return samples


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: list[float]) -> "Spread":
        """Summarize at least one sample."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0])
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, low, high)


def paired_ratio(slow: list[float], fast: list[float]) -> Spread:
    """Return how many times faster `fast` is, from samples of the same rounds."""
    return Spread.of([a / b for a, b in zip(slow, fast, strict=True)])
