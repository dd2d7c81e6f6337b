"""Tests on a busy machine compute with one thread; everybody else keeps the threads there were."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from superopt.ir import build as b
from superopt.verify import threads
from superopt.verify.equivalence import verify_field
from superopt.verify.field import FieldDomain
from superopt.verify.floating import verify_float
from superopt.verify.reference import run_reference

X = b.input_("x", (8, 8))
GRAPH = b.kernel_graph("g", [X], [b.exp(b.matmul(X, X))])


@pytest.fixture
def two_threads() -> Iterator[None]:
    given = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(given)


@pytest.fixture(params=["quiet", "crowded"])
def wanted(
    request: pytest.FixtureRequest, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> int:
    """Make one thread the slower or the faster way; return how many there should be."""
    crowded = request.param == "crowded"
    monkeypatch.setattr(threads, "_judged", {})
    monkeypatch.setattr(threads, "_pace", lambda count: 10.0**count if crowded else 1.0)
    return 1 if crowded else 2


def test_fields_are_computed_with_the_faster_number(
    wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    draw = FieldDomain.draw

    def noting(*args: object) -> object:
        seen.add(torch.get_num_threads())
        return draw(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(FieldDomain, "draw", noting)
    assert verify_field(GRAPH, GRAPH, seed=0).equivalent
    assert seen == {wanted}
    assert torch.get_num_threads() == 2


def test_programs_run_with_their_own_threads(wanted: int) -> None:
    seen: set[int] = set()

    def candidate(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.add(torch.get_num_threads())
        return run_reference(GRAPH, tensors)

    assert verify_float(GRAPH, candidate, seed=0).accurate
    assert seen == {2}


def test_other_threads_keep_theirs(wanted: int) -> None:
    with threads.suitable(), ThreadPoolExecutor(1) as pool:
        assert torch.get_num_threads() == wanted
        assert pool.submit(torch.get_num_threads).result() == 2


def test_threads_come_back_after_an_error(wanted: int) -> None:
    def fail() -> None:
        with threads.suitable():
            assert torch.get_num_threads() == wanted
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.get_num_threads() == 2


def test_the_machine_is_asked_now_and_then(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    now_s = 100.0

    def pace(count: int) -> float:
        asked.append(count)
        return 1.0

    monkeypatch.setattr(threads, "_judged", {})
    monkeypatch.setattr(threads, "_pace", pace)
    monkeypatch.setattr(threads.time, "monotonic", lambda: now_s)
    for step_s in (0.0, 0.5, threads._VALID_S):
        now_s += step_s
        with threads.suitable(), threads.suitable():
            assert torch.get_num_threads() == 2
    assert sorted(asked) == [1, 1, 2, 2]
