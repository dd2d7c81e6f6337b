import logging
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from superopt.cache import Cache, key_of, write_atomically
from superopt.ir import build as b
from superopt.plan import Plan


def plan(scale: float = 2.0) -> Plan:
    x = b.input_("x", (8, 16))
    graph = b.kernel_graph("f", [x], [b.mul(x, scale)])
    return Plan(graph, None, {}, ("arg:0",), (), {}, (), "{}", "t")


def test_a_stored_plan_is_found(tmp_path):
    cache = Cache(tmp_path)
    assert cache.load_plan("ab12") is None
    cache.save_plan("ab12", plan())
    assert cache.load_plan("ab12") == plan()


@pytest.mark.parametrize("damage", [lambda t: t[: len(t) // 2], lambda t: "", lambda t: "{}" + t])
def test_a_damaged_entry_is_dropped_with_a_warning(tmp_path, caplog, damage):
    cache = Cache(tmp_path)
    cache.save_plan("ab12", plan())
    (path,) = tmp_path.rglob("*.json")
    path.write_text(damage(path.read_text()))
    with caplog.at_level(logging.WARNING, "superopt"):
        assert cache.load_plan("ab12") is None
    assert "made again" in caplog.text
    assert not path.exists()
    cache.save_plan("ab12", plan())
    assert cache.load_plan("ab12") == plan()


def test_binary_rubbish_is_a_damaged_entry(tmp_path):
    cache = Cache(tmp_path)
    cache.save_plan("ab12", plan())
    (path,) = tmp_path.rglob("*.json")
    path.write_bytes(bytes(range(256)))
    assert cache.load_plan("ab12") is None


def test_an_entry_under_the_name_of_another_is_damaged(tmp_path):
    cache = Cache(tmp_path)
    cache.save_plan("ab12", plan())
    cache.save_plan("cd34", plan(3.0))
    cache.save_alias("ab12", "cd34", "bound")
    cache.save_alias("ef56", "ab12", "bound")
    for kind, first, second in (("plans", "ab12", "cd34"), ("aliases", "ab12", "ef56")):
        cache._path(kind, first).write_text(cache._path(kind, second).read_text())
    assert cache.load_plan("ab12") is None
    assert cache.load_plan("cd34") == plan(3.0)
    assert cache.load_alias("ab12") is None
    assert cache.load_alias("ef56") == ("ab12", "bound")


def test_a_folder_that_cannot_be_written_costs_the_entry_only(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    Cache(blocked).save_plan("ab12", plan())
    assert "not cached" in caplog.text


def _write_for_ever(path: Path) -> None:
    number = 0
    while True:
        number += 1
        write_atomically(path, str(number % 10) * 200_000)


def test_readers_see_whole_files_while_writers_are_killed(tmp_path):
    path = tmp_path / "entry"
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        writers = [context.Process(target=_write_for_ever, args=(path,)) for _ in range(2)]
        for writer in writers:
            writer.start()
        end = time.monotonic() + 0.3
        seen = 0
        while time.monotonic() < end or not seen:
            if path.exists():
                text = path.read_text()
                assert len(text) == 200_000
                assert len(set(text)) == 1
                seen += 1
        for writer in writers:
            assert writer.pid is not None
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()


def test_what_killed_writers_left_is_removed_after_a_day(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    old, fresh = folder / ".writing-old", folder / ".writing-fresh"
    for path, age_s in ((old, 90_000), (fresh, 60)):
        path.write_text("half")
        os.utime(path, (time.time() - age_s,) * 2)
    Cache(tmp_path).save_plan("ab12", plan())
    assert not old.exists()
    assert fresh.exists()


def test_listing_and_clearing(tmp_path):
    cache = Cache(tmp_path)
    cache.save_plan("ab12", plan())
    cache.save_plan("cd34", plan(3.0))
    (tmp_path / "keep.txt").write_text("somebody else's")
    assert sum(e.kind == "plan" for e in cache.entries()) >= 2
    cache.clear()
    assert cache.load_plan("ab12") is None
    assert (tmp_path / "keep.txt").exists()


def test_keys_depend_on_every_part():
    keys = {key_of("a", {"b": 1}), key_of("a", {"b": 2}), key_of("c", {"b": 1}), key_of("a")}
    assert len(keys) == 4
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
