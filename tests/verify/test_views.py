"""Views that are read from values: what a kernel holds in blocks is found in the program's tensors."""

import pytest
import torch

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node
from superopt.ir.text import parse_graph
from superopt.verify import equivalence, views
from superopt.verify.equivalence import verify_field
from superopt.verify.reference import run_reference

X = torch.randperm(210).reshape(5, 6, 7)


def padded(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    return x.index_select(axis, torch.arange(size).clamp(max=x.shape[axis] - 1))


@pytest.mark.parametrize(
    "wanted",
    [
        X.reshape(30, 1, 7),
        X.permute(2, 0, 1),
        X.reshape(5, 2, 3, 7).permute(1, 3, 0, 2),
        X[:, None].expand(5, 4, 6, 7),
        padded(X, 1, 8).reshape(5, 2, 4, 7).permute(1, 0, 2, 3),
        padded(padded(X, 0, 6), 2, 8).reshape(3, 2, 6, 2, 4),
        padded(X.reshape(30, 7), 0, 32).reshape(4, 8, 1, 7),
    ],
)
def test_a_view_is_found_and_stated(wanted: torch.Tensor) -> None:
    source = b.input_("x", X.shape)
    found = views.view(source, X, b.input_("y", tuple(wanted.shape)), wanted)
    assert found is not None
    (result,) = run_reference(b.kernel_graph("view", [source], [found]), [X.float()])
    assert torch.equal(result, wanted.float())
    assert views.occurring(wanted) == views.occurring(X)


def test_repeated_elements_are_taken_once() -> None:
    source = b.input_("x", (3, 4))
    values = torch.tensor([[5], [3], [8]]).expand(3, 4)
    found = views.view(source, values, b.input_("y", (3,)), values[:, 0])
    assert found is b.reshape(b.slice_(source, -1, 0, 1), (3,))


@pytest.mark.parametrize("wanted", [X.flip(0), X.flatten()[torch.randperm(210)], X + 1])
def test_what_is_no_known_view_is_none(wanted: torch.Tensor) -> None:
    target = b.input_("y", tuple(wanted.shape))
    assert views.view(b.input_("x", X.shape), X, target, wanted) is None


# -- proofs that need them -------------------------------------------------------------------------

ROWS = 20000


def variance_of_rows(rows: int = ROWS) -> Graph:
    """Return the mean and the variance of the sums of normalized rows."""
    x = b.input_("x", (rows, 8))
    sums = b.div(b.reduce_sum(x, -1), b.sqrt(b.reduce_sum(b.mul(x, x), -1)))
    mean = b.div(b.reduce_sum(sums, -2), float(rows))
    apart = b.sub(sums, mean)
    variance = b.div(b.reduce_sum(b.mul(apart, apart), -2), rows - 1.0)
    return b.kernel_graph("variance", [x], [mean, variance])


KERNEL = """// superopt ir 1
block @kernel(%x: f32[20000,8], %m: f32[1,1]) grid(i=16) {
  %0 = load %x {dims=[(i=16):1251, ():8]} : f32[1251,8]
  %1 = load %m {dims=[():1, ():1]} : f32[1,1]
  %2 = mul %0, %0 : f32[1251,8]
  %3 = reduce_sum %2 {axes=[-1]} : f32[1251,1]
  %4 = sqrt %3 : f32[1251,1]
  %5 = div %0, %4 : f32[1251,8]
  %6 = reduce_sum %5 {axes=[-1]} : f32[1251,1]
  %7 = sub %6, %1 : f32[1251,1]
  %8 = mul %7, %7 : f32[1251,1]
  %9 = reduce_sum %8 {axes=[-2]} : f32[1,1]
  %10 = store %9 {dims=[(i=16):1, ():1], shape=[16, 1]} : f32[16,1]
  return %10
}
"""


def in_blocks(original: Graph, freedom: float = ROWS - 1) -> Graph:
    """Return the same, the variance from sums of blocks of rows."""
    x, mean = original.inputs[0], original.outputs[0]
    (sums,) = b.apply_graph(parse_graph(KERNEL), [x, mean])
    variance = b.div(b.reduce_sum(sums, -2), freedom)
    return original.with_outputs([mean, variance])


def test_statistics_of_rows_that_no_kernel_writes_are_proven_in_few_tests() -> None:
    original = variance_of_rows()
    verdict = verify_field(original, in_blocks(original), seed=1)
    assert verdict.equivalent, verdict
    assert verdict.bound <= 2.0**-60
    assert max(len(p.seeds) for p in verdict.pieces) <= 5, "the degree of all rows asks for more"
    assert not verify_field(original, in_blocks(original, ROWS), seed=1)


def test_a_wrong_view_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(
        source: Node, values: torch.Tensor, target: Node, wanted: torch.Tensor
    ) -> Node | None:
        found = views.view(source, values, target, wanted)
        return None if found is None else b.mul(found, 2.0)

    monkeypatch.setattr(equivalence, "view", wrong)
    original = variance_of_rows()
    verdict = verify_field(original, in_blocks(original), seed=1, error_bound=2.0**-20)
    assert not verdict.equivalent or max(len(p.seeds) for p in verdict.pieces) > 2
