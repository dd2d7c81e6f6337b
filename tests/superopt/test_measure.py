"""The search's clock: what it refuses before a compiler sees it."""

from math import inf
from typing import Any

import torch

from superopt.backends import wall
from superopt.ir import build as b
from superopt.measure import Clock


class NoCompiler:
    """A backend that nothing may reach."""

    device = torch.device("cpu")
    timed = staticmethod(wall)

    def variants(self, graph: object, count: int) -> list[Any]:
        raise AssertionError("a malformed graph was lowered")

    def load(self, sources: list[Any]) -> list[Any]:
        assert not sources
        return []


def test_malformed_candidates_are_rejected_with_their_violations() -> None:
    x = b.input_("x", (8,))
    g = b.BlockBuilder("g", grid={"m": 2})
    g.store(g.load(x, ("m", 4)), (4,), 4)
    kernel = g.graph()
    program = b.kernel_graph("p", [x], b.apply_graph(kernel, [x]))
    clock = Clock(NoCompiler(), {})  # type: ignore[arg-type]
    assert clock.kernels([kernel]) == [inf]
    assert clock.programs([program]) == [inf]
    assert ["varies over m" in failure for failure in clock.failures] == [True, True]
