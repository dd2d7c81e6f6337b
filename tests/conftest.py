"""What every test shares: the derandomized Hypothesis profile, and skipping of GPU tests."""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    print_blob=True,
)
# Local runs explore new examples; HYPOTHESIS_PROFILE=default asks for that. Anything else repeats.
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def _missing_gpu() -> str | None:
    """Why GPU tests cannot run here, or None where they can."""
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device: torch.cuda.is_available() is False"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    reason = _missing_gpu() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))
