"""The function that is timed really runs as a plan."""

from pathlib import Path

import pytest

from benchmarks import overhead
from superopt.codegen.cpu import find_compiler


@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
def test_a_call_is_timed_where_a_plan_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_CALLS", 3)
    found = overhead.call_s(tmp_path)
    assert found is not None
    assert found > 0


def test_without_a_plan_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "_program", lambda x, y, z: x)
    assert overhead.call_s(tmp_path) is None
