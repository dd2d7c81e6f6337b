"""What every test shares: the Hypothesis profile, skipping of GPU tests, golden files."""

import os
from collections.abc import Callable

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


def pytest_addoption(parser: pytest.Parser) -> None:
    what = "write the golden files anew; read the diff before you commit it"
    parser.addoption("--update-golden", action="store_true", help=what)


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name in `golden/` beside the test."""
    folder = request.path.parent / "golden"

    def compare(name: str, text: str) -> None:
        path = folder / name
        if request.config.getoption("--update-golden"):
            folder.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        assert path.is_file(), f"no {path}: pytest --update-golden writes it"
        assert text == path.read_text(encoding="utf-8")

    return compare


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
