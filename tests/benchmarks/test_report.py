"""Each missed target gets its own line, and the table shows what was measured."""

import math

import pytest

from benchmarks.contenders import Search
from benchmarks.report import geomean, missed_calls, missed_targets, table
from benchmarks.runner import WARM_START, Errors, Timing, WorkloadResult
from benchmarks.timing import Spread


def result(
    name: str,
    ratio: float,
    search_s: float = 5.0,
    warm_s: float = 0.3,
    bound_s: float = 0.0028,
    kind: str = "memory",
    functions: int = 0,
) -> WorkloadResult:
    def timing(seconds: float) -> Timing:
        return Timing(Spread(seconds, seconds, seconds), 1.0, Errors(0.0, 0.0))

    return WorkloadResult(
        name,
        "float32",
        moved_bytes=1,
        flops=1,
        functions=functions,
        bound_s=bound_s,
        with_functions_s=1.5 * bound_s,
        bound_kind=kind,
        timings={"eager": timing(0.010), "compile": timing(0.008), "superopt": timing(0.004)},
        best_other="compile",
        ratio=Spread(ratio, ratio, ratio),
        search=Search(search_s, 12, 3, None),
        warm_start_s=warm_s,
    )


def test_geomean_ignores_workloads_without_a_ratio() -> None:
    skipped = result("c", 9.0)
    skipped.ratio = None
    assert geomean([result("a", 0.5), result("b", 8.0), skipped]) == pytest.approx(2.0)
    assert geomean([skipped]) is None


def test_targets_are_met() -> None:
    assert missed_targets("cpu", [result("a", 0.97), result("b", 3.0)]) == []


def test_each_target_is_missed_on_its_own_line() -> None:
    cases = {
        "a: 0.969x the best of the others": result("a", 0.969),
        "a: search 181 s": result("a", 2.0, search_s=181.0),
        "a: warm start 1.01 s": result("a", 2.0, warm_s=1.01),
        "a: 69% of the bandwidth": result("a", 2.0, bound_s=0.00276),
        "a: 50% of the rate of a large product, must": result(
            "a", 2.0, bound_s=0.002, kind="compute"
        ),
        "a: 40% of the bandwidth (60% with functions), must": result(
            "a", 2.0, bound_s=0.0016, functions=1
        ),
    }
    for line, missing in cases.items():
        (missed,) = missed_targets("cpu", [missing, result("b", 4.0)])
        assert missed.startswith(line)
    broken = result("a", 4.0)
    broken.failures[WARM_START] = "no module"
    assert missed_targets("cpu", [broken]) == ["a: warm start: no module"]
    (missed,) = missed_targets("cpu", [result("a", 1.0), result("b", 2.0)])
    assert missed.startswith("geometric mean 1.414x")
    assert missed_targets("cpu", []) == ["no workload was run"]


def test_gpu_targets_ask_for_the_mean_alone() -> None:
    slow_search = result("a", 0.9, search_s=500.0, warm_s=math.inf, bound_s=0.0)
    assert missed_targets("cuda", [slow_search, result("b", 1.2)]) == []


def test_table_shows_the_best_the_share_and_the_counts() -> None:
    failed = result("bad", 1.0)
    failed.failures["max-autotune"] = "RuntimeError: no"
    text = table([result("good", 2.0), failed])
    good = next(line for line in text.split("\n") if line.startswith("good"))
    shown = " ".join(good.split())
    assert shown == "good 10.000 8.000* 4.000 2.800 mem 70% 105% 2.00x 5.0 12/3/? 0.30"
    assert "bad: max-autotune: RuntimeError: no" in text


def test_slow_calls_are_missed() -> None:
    assert missed_calls("cpu", None) == missed_calls("cpu", 9.9e-6) == []
    assert missed_calls("cpu", 10.3e-6) == ["a call takes 10.3 us, must take at most 10 us"]
