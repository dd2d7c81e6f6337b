"""What happens to a task in its process stays there."""

import os
from collections.abc import Iterator

import pytest

from benchmarks.isolation import Isolated

PID = "__import__('os').getpid()"


@pytest.fixture
def isolated() -> Iterator[Isolated]:
    made = Isolated(eval, usable=os.getpid)
    yield made
    made.close()


def test_a_process_answers_several_calls(isolated: Isolated) -> None:
    first, second = isolated.call(PID, 60), isolated.call(PID, 60)
    assert first == second
    assert first[0] not in (None, os.getpid())


@pytest.mark.parametrize(
    ("task", "limit_s", "reason"),
    [
        ("__import__('os')._exit(7)", 60, "exit code 7"),
        ("__import__('time').sleep(100)", 0.5, "more than 0.5 s"),
        ("__import__('os').kill(__import__('os').getpid(), 11)", 60, "exit code -11"),
        ("1 / 0", 60, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failure_says_why_and_the_next_call_works(
    isolated: Isolated, task: str, limit_s: float, reason: str
) -> None:
    answer, why = isolated.call(task, limit_s)
    assert answer is None
    assert reason in why
    assert isolated.call("6 * 7", 60) == (42, "")


def test_a_process_that_is_no_longer_usable_is_replaced() -> None:
    isolated = Isolated(eval, usable=bool)
    assert isolated.call(PID, 60)[0] != isolated.call(PID, 60)[0]
    isolated.close()
