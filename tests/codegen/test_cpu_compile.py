"""The compile cache: hits, damage, refusal, several processes, nothing half-written."""

import ctypes
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from superopt.codegen.cpu import compile as driver
from superopt.codegen.errors import CodegenError, CompileError, NoCompiler

pytestmark = pytest.mark.skipif(driver.find_compiler() is None, reason="no C++ compiler")

HEAD = 'extern "C" __attribute__((visibility("default"))) void superopt_kernel(int* out)'
GOOD = HEAD + " { *out = 41; }"


def answer(path: Path) -> int:
    out = ctypes.c_int(0)
    driver.load_kernel(path, 1)(ctypes.addressof(out))
    return out.value


def _compile_in_process(folder: str) -> int:
    return answer(driver.compile_source(GOOD, Path(folder)))


def test_second_compile_is_a_hit(tmp_path, monkeypatch):
    path = driver.compile_source(GOOD, tmp_path)
    assert answer(path) == 41

    def refuse(*_):
        raise AssertionError("compiled again")

    monkeypatch.setattr(driver, "_build", refuse)
    assert driver.compile_source(GOOD, tmp_path) == path


def test_key_depends_on_source_and_flags(tmp_path):
    first = driver.compile_source(GOOD, tmp_path)
    assert driver.compile_source(GOOD.replace("41", "42"), tmp_path) != first
    assert driver.compile_source(GOOD, tmp_path, extra_flags=["-DX=1"]) != first


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "another's"])
def test_damaged_entry_is_refused_and_rebuilt(tmp_path, damage):
    path = driver.compile_source(GOOD, tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage == "another's":
        content[:] = driver.compile_source(GOOD.replace("41", "42"), tmp_path).read_bytes()
    path.unlink()  # a new inode: the loader may keep the old file mapped
    path.write_bytes({"truncate": content[:-5], "empty": b""}.get(damage, content))
    with pytest.raises(CodegenError, match="damaged"):
        driver.load_kernel(path, 1)
    assert answer(driver.compile_source(GOOD, tmp_path)) == 41


def test_refused_source_reports_the_compiler(tmp_path):
    with pytest.raises(CompileError, match="not_declared") as caught:
        driver.compile_source(HEAD + " { *out = not_declared; }", tmp_path)
    assert "not_declared" in Path(caught.value.source_path).read_text()
    assert not list(tmp_path.glob("*.so"))
    assert not list(tmp_path.glob("building-*"))


def test_compile_many_keeps_order_and_failures(tmp_path):
    sources = [GOOD.replace("41", str(i)) for i in range(3)]
    sources.insert(1, HEAD + " { syntax error }")
    results = driver.compile_many(sources, tmp_path)
    assert isinstance(results[1], CompileError)
    assert [answer(results[i]) for i in (0, 2, 3)] == [0, 1, 2]


def test_several_processes_share_a_folder(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_compile_in_process, [str(tmp_path)] * 3) == [41, 41, 41]
    assert len(list(tmp_path.glob("*.so"))) == 1


def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "find_compiler", lambda: None)
    with pytest.raises(NoCompiler, match="CXX"):
        driver.compile_source(GOOD, tmp_path)


def test_what_killed_builds_left_is_removed_when_it_is_old(tmp_path):
    old, young = tmp_path / "building-old", tmp_path / "building-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "kernel.cpp").write_text("")
    then = time.time() - 2 * driver._STALE_S
    os.utime(old, (then, then))
    driver.compile_source(GOOD, tmp_path)
    assert not old.exists()
    assert young.exists()


def test_a_compiler_that_does_not_answer_is_ended_with_its_children(tmp_path):
    script = tmp_path / "slow"
    script.write_text(f"#!/bin/sh\nsleep 1000 & echo $! > {tmp_path}/child; wait\n")
    script.chmod(0o755)
    assert driver._run([str(script)], limit_s=0.3) is None
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/stat")
    deadline = time.monotonic() + 10
    while status.exists() and status.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CodegenError, match="cannot build"):
        driver.compile_source(GOOD, tmp_path / "file")


def test_many_compilations_share_one_limit(tmp_path, monkeypatch):
    slow = driver.Compiler(("/bin/sh", "-c", "sleep 100"), "slow 1", ())
    monkeypatch.setattr(driver, "find_compiler", lambda: slow)
    started = time.monotonic()
    results = driver.compile_many([f"{GOOD}// {i}" for i in range(5)], tmp_path, limit_s=0.5)
    assert time.monotonic() - started < 5
    assert all(isinstance(r, CompileError) for r in results)
