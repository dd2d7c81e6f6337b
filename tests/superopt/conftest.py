"""What the tests of the product share: running a lifted program in the reference executor."""

from typing import Any

import pytest
import torch

from superopt import pipeline
from superopt.frontend import Lifted
from superopt.ir.text import parse_graph, print_graph
from superopt.search import driver
from superopt.verify.reference import run_reference


class Runner:
    """Run a lifted program as the product would, in the reference executor."""

    def __call__(self, lifted: Lifted, *args: Any, **kwargs: Any) -> Any:
        tensors = lifted.flatten(args, kwargs)
        outputs = run_reference(lifted.graph, [*tensors, *lifted.parameters.values()])
        for output, node in zip(outputs, lifted.graph.outputs, strict=True):
            assert tuple(output.shape) == node.shape
        lifted.write_back(tensors, outputs)
        return lifted.unflatten(outputs)

    def check(self, lifted: Lifted, expected: Any, *args: Any, **tolerance: Any) -> None:
        """Compare with eager results; the text form must round-trip."""
        torch.testing.assert_close(self(lifted, *args), expected, equal_nan=True, **tolerance)
        assert parse_graph(print_graph(lifted.graph)) == lifted.graph


@pytest.fixture
def runner() -> Runner:
    return Runner()


@pytest.fixture
def first_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans be made whatever the clock says, and no time go into making them better."""
    ranked = driver.best_tiles
    monkeypatch.setattr(pipeline, "_GAIN", float("inf"))
    monkeypatch.setattr(pipeline, "_CONFIGURATIONS", 1)
    monkeypatch.setattr(driver, "_neighbours", lambda best, machine: [])
    monkeypatch.setattr(driver, "best_tiles", lambda *a: ranked(*a)[:1])
