"""Rounds interleave, short calls repeat, ratios are taken within a round."""

from benchmarks.timing import Call, CpuClock, Effort, Spread, interleave, paired_ratio


class ScriptedClock:
    """Says how long each call takes, and notes the order of calls."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self.timed: list[tuple[str, int]] = []

    def time(self, call: Call, repeat: int) -> float:
        name = call()
        self.timed.append((name, repeat))
        return self.seconds[name]


def test_every_round_runs_everyone_and_starts_with_another() -> None:
    clock = ScriptedClock({"a": 0.001, "b": 0.004, "c": 1.0})
    calls = {name: (lambda name=name: name) for name in clock.seconds}
    effort = Effort(budget_s=1e-6, min_rounds=3, max_rounds=9, sample_s=0.004)
    samples = interleave(calls, clock, effort)
    assert samples == {"a": [0.001] * 3, "b": [0.004] * 3, "c": [1.0] * 3}
    rounds = clock.timed[9:]  # three single calls each come first, to size the samples
    assert "".join(name for name, _ in rounds) == "abcbcacab"
    assert dict(rounds) == {"a": 4, "b": 1, "c": 1}


def test_rounds_fill_the_budget_up_to_the_limit() -> None:
    for budget_s, expected in ((0.1, 10), (10.0, 20), (0.0, 5)):
        clock = ScriptedClock({"a": 0.01})
        effort = Effort(budget_s, min_rounds=5, max_rounds=20)
        assert len(interleave({"a": lambda: "a"}, clock, effort)["a"]) == expected


def test_ratio_is_paired_by_round() -> None:
    # The machine slows down threefold half way; the ratio does not notice.
    assert paired_ratio([2.0, 2.0, 6.0, 6.0], [1.0, 1.0, 3.0, 3.0]) == Spread(2.0, 2.0, 2.0)


def test_spread_is_median_and_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_cpu_clock_divides_by_the_repeats() -> None:
    calls: list[None] = []
    seconds = CpuClock().time(lambda: calls.append(None), 50)
    assert len(calls) == 50
    assert 0.0 < seconds < 1e-3
