import collections
import dataclasses

import pytest
import torch

import superopt
from superopt.subject import builder

Pair = collections.namedtuple("Pair", "left right")


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "superopt-cache"


@pytest.fixture(autouse=True)
def every_plan(first_found):
    """Plans do not depend on the clock of a busy test machine."""


def planned(optimized) -> list[bool]:
    return [p.program is not None for p in optimized.plans]


def same(found, expected):
    left, left_form = torch.utils._pytree.tree_flatten(found)
    right, right_form = torch.utils._pytree.tree_flatten(expected)
    assert left_form == right_form
    for a, b in zip(left, right, strict=True):
        assert type(a) is type(b)
        assert torch.allclose(a, b, rtol=1e-4) if isinstance(a, torch.Tensor) else a == b


def test_results_are_the_named_tuples_that_eager_returns(folder):
    def best(x):
        return {"top": (x.exp() * 2).max(-1), "both": [Pair(x.sigmoid().min(0), 3)]}

    x = torch.randn(40, 70)
    for _ in range(2):  # the second one is found in the cache, by its code
        fast = superopt.optimize(best, budget_s=1, cache=folder)
        found = fast(x)
        assert planned(fast) == [True]
        same(found, best(x))
        assert type(found["top"]) is torch.return_types.max
        assert type(found["both"][0]) is Pair
        assert type(found["both"][0].left) is torch.return_types.min


def test_a_named_tuple_without_a_lasting_name_is_returned_by_plans_of_this_process(folder):
    Local = collections.namedtuple("Local", "y z")

    def local(x):
        return Local(x.exp() * 3, None)

    x = torch.randn(40, 70)
    for _ in range(2):
        fast = superopt.optimize(local, budget_s=1, cache=folder)
        same(fast(x), local(x))
        assert planned(fast) == [True]
    with pytest.raises(superopt.SuperoptError, match="no lasting name"):
        builder(fast.plans[0].structure)


@dataclasses.dataclass
class Registered:
    scores: torch.Tensor
    kind: str


@dataclasses.dataclass
class Unregistered:
    scores: torch.Tensor


torch.export.register_dataclass(Registered)


def test_registered_dataclasses_are_arguments_and_results(folder):
    def scaled(given: Registered, pair: Pair) -> Registered:
        return Registered((given.scores * pair.right).exp() * pair.left, given.kind + "!")

    fast = superopt.optimize(scaled, budget_s=1, cache=folder)
    x = Registered(torch.randn(40, 70), "a"), Pair(torch.randn(70), 2.0)
    same(fast(*x), scaled(*x))
    other = Registered(torch.randn(40, 70), "b"), x[1]
    assert fast(*other).kind == "b!"
    assert planned(fast) == [True, True]


def test_what_pytree_does_not_know_runs_as_it_was_and_the_report_says_so(folder):
    fast = superopt.optimize(lambda x: Unregistered(x * 2), budget_s=1, cache=folder)
    assert type(fast(torch.ones(3))) is Unregistered
    assert "register_dataclass" in str(fast.report())
    fast = superopt.optimize(lambda u: u.scores * 2, budget_s=1, cache=folder)
    fast(Unregistered(torch.ones(3)))
    assert "Unregistered" in str(fast.report())


def test_calls_that_no_plan_may_serve_are_reported(folder):
    fast = superopt.optimize(lambda x: x * 2, budget_s=1, cache=folder)
    fast(torch.ones(3, requires_grad=True))
    with torch.autocast("cpu"):
        fast(torch.ones(3))
    fast(torch.ones(3).to_sparse())
    assert fast.report().unplanned == (
        "argument 0 requires gradients: plans are for inference, under torch.no_grad()",
        "autocast is on",
        "argument 0 is no dense tensor",
    )


def test_programs_of_one_graph_keep_their_own_constants_and_results(folder):
    def written(body):
        space = {"torch": torch}
        exec(f"def program(x):\n    return {body}", space)
        return space["program"]

    bodies = (
        "(x * torch.tensor([1.0, 2.0])).exp()",
        "(x * torch.tensor([3.0, 4.0])).exp()",
        "(x.exp() * 2, x.sum())",
        "[x.exp() * 2, x.sum()]",
    )
    x = torch.randn(40, 2)
    for _ in range(2):  # the second time they are found in the cache, by their code
        for body in bodies:
            fast = superopt.optimize(written(body), budget_s=1, cache=folder)
            same(fast(x), written(body)(x))
            assert planned(fast) == [True]
