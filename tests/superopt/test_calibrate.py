"""Measured rates: kept in the cache folder, measured anew where the file is not one of this machine."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from superopt import calibrate
from superopt.ir.target import Target
from superopt.plan import seal


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 9.0, 9.0))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Target:
    here = Target(name=calibrate.target_name(), cores=3)
    monkeypatch.setattr(calibrate, "_measure", lambda: here)
    return here


def in_another_process(folder: Path) -> Target:
    calibrate._measured.clear()
    return calibrate.machine(folder)


def test_rates_are_kept(measured: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calibrate.machine(tmp_path) == measured
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "_measure", lambda: pytest.fail("measured twice"))
        assert calibrate.machine(tmp_path) == measured
    assert in_another_process(tmp_path) == in_another_process(tmp_path) == measured
    monkeypatch.setattr(calibrate, "_measure", lambda: pytest.fail("they are settled"))
    assert in_another_process(tmp_path) == measured


def test_a_busy_machine_is_measured_until_it_is_idle(
    measured: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = measured.peak_flops / 2
    slow = replace(measured, peak_flops=half, memory_bandwidth=2 * measured.memory_bandwidth)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getloadavg", lambda: (2.0 * (os.cpu_count() or 1), 0.0, 0.0))
        patch.setattr(calibrate, "_measure", lambda: slow)
        assert [in_another_process(tmp_path) for _ in range(9)] == [slow] * 9
    best = in_another_process(tmp_path)
    assert best.peak_flops == measured.peak_flops, "the rate of the busy machine was kept"
    assert best.memory_bandwidth == slow.memory_bandwidth, "a better rate was lost"


@pytest.mark.parametrize("text", ["", "damaged", seal("{}"), seal(Target().to_json()), seal("[]")])
def test_a_foreign_or_damaged_file_is_replaced(measured: Target, tmp_path: Path, text: str) -> None:
    calibrate.machine(tmp_path)
    (path,) = tmp_path.iterdir()
    kept = path.read_text()
    path.write_text(text)
    assert calibrate.machine(tmp_path) == measured
    assert path.read_text() == kept


def test_a_folder_that_cannot_be_written_costs_the_file(
    measured: Target, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert in_another_process(file / "cache") == measured
    assert "not kept" in caplog.text


def test_caches_are_those_that_linux_tells(tmp_path: Path) -> None:
    told = [
        ("Data", 1, "32K"),
        ("Instruction", 1, "64K"),
        ("Unified", 2, "1024K"),
        ("Unified", 3, "?"),
    ]
    for i, (kind, level, size) in enumerate(told):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, text in (("type", kind), ("level", str(level)), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    assert calibrate.caches(tmp_path) == {1: 32 << 10, 2: 1 << 20}
    assert calibrate.caches(tmp_path / "none") == {}
