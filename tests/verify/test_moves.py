"""Candidates written over values of the original keep their meaning, whatever their operands' moves are."""

import math

import hypothesis.strategies as st
import torch
from hypothesis import assume, given

from superopt.ir import build as b
from superopt.ir.graph import Graph
from superopt.ir.node import Node, make, topological
from superopt.ir.ops import contraction, elementwise
from superopt.verify.equivalence import verify_field
from superopt.verify.moves import like
from superopt.verify.reference import run_reference

X, Y, S = b.input_("x", (4, 6)), b.input_("y", (4, 6)), b.input_("s", (4, 1))
INPUTS = (X, Y, S)
Step = tuple[str, tuple[int, ...]]


def padded(x: Node) -> Node:
    """Repeat the last column twice."""
    last = b.slice_(x, -1, x.shape[-1] - 1, x.shape[-1])
    return b.concat([x, b.broadcast(last, (*x.shape[:-1], 2))], -1)


def moved(x: Node, steps: list[Step]) -> Node:
    for kind, numbers in steps:
        if kind == "pad":
            x = padded(x)
        elif kind == "permute":
            x = b.permute(x, numbers)
        else:
            x = b.reshape(x, numbers)
    return x


@st.composite
def chains(draw: st.DrawFn, shape: tuple[int, ...], *, rows: bool = False) -> list[Step]:
    """Draw moves of a value; with `rows` such that leave the last axis where it is."""
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 3))):
        kind = draw(
            st.sampled_from(("reshape", "permute") if rows else ("reshape", "permute", "pad"))
        )
        if kind == "pad":
            shape = (*shape[:-1], shape[-1] + 2)
            steps.append((kind, ()))
            continue
        if kind == "permute":
            kept = draw(st.permutations(range(len(shape) - rows)))
            perm = (*kept, *((len(shape) - 1,) if rows else ()))
            shape = tuple(shape[p] for p in perm)
            steps.append((kind, perm))
            continue
        tail = shape[-1:] if rows else ()
        left = math.prod(shape) // math.prod(tail)
        first = draw(st.sampled_from([d for d in range(1, left + 1) if left % d == 0]))
        shape = draw(st.sampled_from([(left, *tail), (first, left // first, *tail)]))
        steps.append((kind, shape))
    return steps


def check(original: Node, candidate: Node) -> tuple[Node, ...]:
    """Compare the candidate with what it is written as, on numbers."""
    own = (original,)
    written = like(own, (candidate,))
    tensors = [
        torch.randn(i.shape, generator=torch.Generator().manual_seed(n))
        for n, i in enumerate(INPUTS)
    ]
    results = [
        run_reference(b.kernel_graph("test", list(INPUTS), [node]), tensors)[0]
        for node in (candidate, *written)
    ]
    assert torch.equal(*results)
    return written


@given(st.data())
def test_elements_of_moved_operands(data: st.DataObject) -> None:
    steps = data.draw(chains((4, 6)))
    program = b.mul(b.exp(X), b.add(X, Y))
    kernel = b.mul(b.exp(moved(X, steps)), b.add(moved(X, steps), moved(Y, steps)))
    (written,) = check(program, kernel)
    assert program in set(topological([written]))


@given(st.data())
def test_rows_of_moved_operands(data: st.DataObject) -> None:
    steps = data.draw(chains((4, 6), rows=True))
    of_numbers = [(k, (*n[:-1], 1) if k == "reshape" else n) for k, n in steps]
    op = data.draw(st.sampled_from([contraction.REDUCE_SUM, contraction.REDUCE_MAX]))
    program = b.reduce(op, make(elementwise.MUL, (X, S)), -1)
    kernel = b.reduce(op, make(elementwise.MUL, (moved(X, steps), moved(S, of_numbers))), -1)
    (written,) = check(program, kernel)
    assert program in set(topological([written]))


@given(st.data())
def test_operands_that_are_moved_otherwise(data: st.DataObject) -> None:
    steps = data.draw(chains((4, 6)))
    other = data.draw(chains((4, 6)))
    x = moved(X, steps)
    y = moved(Y, other)
    assume(math.prod(x.shape) == math.prod(y.shape))
    y = b.reshape(y, x.shape)
    check(b.add(X, Y), b.add(x, y))
    check(b.reduce_sum(b.add(X, Y), -1), b.reduce_sum(b.add(x, y), -1))


def test_moves_that_differ_in_nothing_but_where_they_put_what() -> None:
    first = b.slice_(Y, -1, 0, 1)
    pairs = [
        (b.permute(b.reshape(v, (2, 2, 6)), perm) for v, perm in ((X, (1, 0, 2)), (Y, (0, 1, 2)))),
        (b.permute(b.reshape(v, (2, 2, 6)), perm) for v, perm in ((X, (1, 2, 0)), (Y, (0, 2, 1)))),
        (padded(X), b.concat([Y, b.broadcast(first, (4, 2))], -1)),
        (b.reshape(b.concat([X, X], -1), (2, 24)), b.reshape(b.concat([Y, X], -1), (2, 24))),
    ]
    for x, y in pairs:
        check(b.add(X, Y), b.add(x, y))
        check(b.reduce_max(b.add(X, Y), -1), b.reduce_max(b.add(x, y), -1))


def test_rows_and_their_scales_are_padded_to_different_shapes() -> None:
    def rows_padded(x: Node) -> Node:
        return b.concat([x, b.broadcast(b.slice_(x, -2, 3, 4), (2, x.shape[-1]))], -2)

    check(b.mul(X, S), b.mul(rows_padded(X), rows_padded(S)))


def test_a_loss_of_another_shape_is_one_claim_about_its_sum() -> None:
    """What is summed is the same computation; nothing of it is tested again."""

    def loss(x: Node, y: Node) -> Node:
        return b.mul(b.exp(b.sub(x, y)), b.sub(x, y))

    def program(name: str, summed: Node, axes: tuple[int, ...]) -> Graph:
        return b.kernel_graph(name, [X, Y], [b.reshape(b.reduce_sum(summed, axes), ())])

    original = program("loss", loss(X, Y), (-2, -1))
    tiles = [
        b.permute(b.reshape(padded(b.reshape(v, (2, 12))), (2, 7, 2)), (1, 0, 2)) for v in (X, Y)
    ]
    for end, equal in ((12, True), (11, False)):
        inside = b.broadcast(b.reshape(b.lt(b.iota((14,), -1), end), (7, 1, 2)), (7, 2, 2))
        masked = b.where(inside, loss(*tiles), b.constant(0.0))
        verdict = verify_field(original, program("kernel", masked, (-3, -2, -1)), seed=3)
        assert verdict.equivalent is equal, verdict
    written = like(original.outputs, (loss(*tiles),))
    assert loss(X, Y) in set(topological(written))
