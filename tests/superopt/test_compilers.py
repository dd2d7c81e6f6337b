"""Machines without a C++ compiler, or with one that does not work."""

import os
import shutil

import numpy as np
import pytest
import torch

import superopt
from superopt import cli, commands, measure, pipeline
from superopt.artifact import save_artifact
from superopt.backends import CpuBackend
from superopt.codegen.cpu import compile as driver

REAL = shutil.which("g++")


def program(x):
    return torch.exp(x) + torch.tanh(x) * 2


@pytest.fixture
def tools(tmp_path, monkeypatch, first_found):
    """An empty folder as the only one on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(driver, "_PROBE_LIMIT_S", 0.3)
    driver.find_compiler.cache_clear()
    pipeline._warn_once.cache_clear()
    yield folder
    driver.find_compiler.cache_clear()


def compiler(folder, script):
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def runs_as_it_was(caplog, folder) -> str:
    """Return the one warning that two programs give together."""
    for _ in range(2):
        fast = superopt.optimize(program, budget_s=2, cache=folder)
        x = torch.randn(4, 8)
        torch.testing.assert_close(fast(x), program(x), rtol=0, atol=0)
        assert [p.program for p in fast.plans] == [None]
    (message,) = [r.getMessage() for r in caplog.records if r.name == "superopt"]
    return message


def test_without_a_compiler_programs_run_as_they_were(tools, tmp_path, caplog, monkeypatch):
    assert "install g++ or clang++" in runs_as_it_was(caplog, tmp_path / "cache")
    if REAL is None:
        pytest.skip("no C++ compiler")
    # nothing of it is kept: once a compiler is there it is used
    os.symlink(REAL, tools / "g++")
    monkeypatch.setenv("PATH", f"{tools}:{os.defpath}")
    monkeypatch.setattr(driver, "_PROBE_LIMIT_S", 60.0)
    driver.find_compiler.cache_clear()
    fast = superopt.optimize(program, budget_s=2, cache=tmp_path / "cache")
    fast(torch.randn(4, 8))
    assert fast.plans[0].program is not None


BROKEN = {
    "fails": "exit 1",
    "crashes": "kill -SEGV $$",
    "hangs": "exec /bin/sleep 1000",
    "silent": "exit 0",
    "rubbish": "echo g++ 12",
}


@pytest.mark.parametrize("script", BROKEN.values(), ids=BROKEN)
def test_a_compiler_that_does_not_work_is_none(tools, tmp_path, caplog, script):
    compiler(tools, script)
    assert "install g++ or clang++" in runs_as_it_was(caplog, tmp_path / "cache")


HALF = {
    "fails": 'echo "no such flag" >&2; exit 1',
    "hangs": "/bin/sleep 1000",
    "empty": "exit 0",
}


@pytest.mark.skipif(REAL is None, reason="no C++ compiler")
@pytest.mark.parametrize("script", HALF.values(), ids=HALF)
def test_a_compiler_that_fails_on_kernels_costs_the_kernels(
    tools, tmp_path, caplog, monkeypatch, script
):
    # it answers probes, which come on stdin, and nothing else
    probes = f'case "$*" in *--version*|*" c++ -"*) PATH={os.defpath} exec {REAL} "$@";; esac'
    compiler(tools, f"{probes}\n{script}")
    monkeypatch.setattr(driver, "_PROBE_LIMIT_S", 60.0)
    monkeypatch.setattr(driver, "_COMPILE_LIMIT_S", 0.3)
    assert "fails on every kernel" in runs_as_it_was(caplog, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("building-*"))


@pytest.mark.skipif(REAL is None, reason="no C++ compiler")
def test_a_compiler_without_time_to_answer_is_not_blamed(tools, tmp_path, caplog, monkeypatch):
    probes = f'case "$*" in *--version*|*" c++ -"*) PATH={os.defpath} exec {REAL} "$@";; esac'
    compiler(tools, f"{probes}\n/bin/sleep 1000")
    monkeypatch.setattr(driver, "_PROBE_LIMIT_S", 60.0)
    monkeypatch.setattr(measure, "_PATIENCE_S", 0.2)
    fast = superopt.optimize(program, budget_s=0.2, cache=tmp_path / "cache")
    fast(torch.randn(4, 8))
    assert "before the budget was over" in str(fast.report())
    assert "fails on every kernel" not in caplog.text
    assert not list((tmp_path / "cache").rglob("plans/*/*"))


@pytest.mark.skipif(REAL is None, reason="no C++ compiler")
def test_an_artifact_runs_without_a_compiler(tmp_path, caplog, monkeypatch, first_found):
    x = torch.randn(4, 8)
    fast = superopt.optimize(program, budget_s=2, cache=tmp_path / "cache").warmup(x)
    save_artifact(fast.plans[0], tmp_path / "artifact", pipeline.versions(), overwrite=False)
    np.savez(tmp_path / "in.npz", x=x.numpy())
    monkeypatch.setattr(commands, "backend_named", lambda *_: CpuBackend(tmp_path))
    monkeypatch.setattr(CpuBackend, "usable", lambda _: False)
    out = tmp_path / "out.npz"
    arguments = ["run", str(tmp_path / "artifact"), "--inputs", str(tmp_path / "in.npz")]
    assert cli.main([*arguments, "--outputs", str(out)]) == 0
    assert caplog.text.count("install g++ or clang++") == 1
    torch.testing.assert_close(
        torch.from_numpy(np.load(out)["output0"]), program(x), rtol=0, atol=0
    )
