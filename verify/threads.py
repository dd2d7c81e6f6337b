"""How many threads tests compute with: one alone where other programs keep the processors.

Threads that compute a tensor together wait for each other after every operation. Where another program
has the processor of one, all of them wait until the scheduler takes it back: milliseconds, in
operations of microseconds. One thread goes on with its share.

Results do not depend on it, but for the rounding of sums in float64. Programs and kernels that are timed,
or tested as they will run, keep the threads that they were given.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from threading import Thread
from typing import Final

import torch

_PACE_S: Final = 0.01
"""For how long each way is tried: longer than the scheduler lets another program run."""
_VALID_S: Final = 2.0
"""How long the answer holds."""
_SLOWER: Final = 2.0
"""How much slower threads together must be. On a busy machine it is hundreds of times, on a quiet one they are faster."""
_ELEMENTS: Final = 1 << 17
_judged: Final[dict[int, tuple[float, bool]]] = {}


@contextmanager
def suitable() -> Iterator[None]:
    """Compute with the threads that PyTorch has, or with one where it is far faster alone now."""
    given = torch.get_num_threads()
    if given == 1 or torch.get_default_device().type != "cpu" or not _crowded(given):
        yield
        return
    torch.set_num_threads(1)
    # threads that use PyTorch for the first time take what was set last: not what is for this one
    other = Thread(target=torch.set_num_threads, args=(given,))
    other.start()
    other.join()
    try:
        yield
    finally:
        torch.set_num_threads(given)


def _crowded(threads: int) -> bool:
    """Say whether one thread computes far faster than so many do."""
    judged_s, crowded = _judged.get(threads, (-_VALID_S, False))
    if time.monotonic() - judged_s >= _VALID_S:
        try:
            crowded = _SLOWER * _pace(1) < _pace(threads)
        finally:
            torch.set_num_threads(threads)
        _judged[threads] = (time.monotonic(), crowded)
    return crowded


def _pace(threads: int) -> float:
    """Return the seconds that an operation takes on so many threads."""
    torch.set_num_threads(threads)
    values = torch.zeros(_ELEMENTS)
    values.add_(1.0)
    started, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < _PACE_S:
        values.add_(1.0)
        count += 1
    return taken / count


def now() -> tuple[float, float]:
    """Return the time on the wall and the processor's, in seconds."""
    return time.monotonic(), time.process_time()


def worked_s(begun: tuple[float, float]) -> float:
    """Return the seconds since `now()` said this, the processor's where others kept it.

    What takes long in a busy moment does not foretell how long it takes in the next.
    """
    return min(then - before for then, before in zip(now(), begun, strict=True))


def waited_s() -> float:
    """Return the seconds that this process's threads have waited for a processor so far; 0 where no one says."""
    total = 0
    for path in glob("/proc/self/task/*/schedstat"):
        with suppress(OSError), open(path, "rb") as file:  # a thread may be gone
            total += int(file.read().split()[1])
    return total * 1e-9
