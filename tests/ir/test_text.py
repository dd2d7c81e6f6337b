"""The text form: every graph comes back from its text, and errors point at the place."""

import pickle
from collections.abc import Callable

import pytest

from superopt.ir import build as b
from superopt.ir.errors import GraphError, ParseError
from superopt.ir.graph import Graph
from superopt.ir.node import make
from superopt.ir.ops import library, tile
from superopt.ir.semantics import expand
from superopt.ir.text import parse_graph, print_graph
from superopt.ir.threads import form_threads
from superopt.ir.types import DType, TensorType, TupleType
from tests.ir.test_check import attention
from tests.search.programs import PROGRAMS

SQUARE = """// superopt ir 1
kernel @square(%x: f32[16,64]) {
  %0 = mul %x, %x : f32[16,64]
  return %0
}
"""


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_comes_back(name: str) -> None:
    for graph in (PROGRAMS[name], expand(PROGRAMS[name])):
        assert parse_graph(print_graph(graph)) == graph


def test_the_text_is_stable() -> None:
    assert print_graph(parse_graph(SQUARE)) == SQUARE
    assert str(parse_graph(SQUARE)) == SQUARE


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-5, 3.0])
def test_constants_come_back(value: float) -> None:
    x = b.input_("x", (2,))
    graph = b.kernel_graph("c", [x], [b.add(x, value)])
    assert parse_graph(print_graph(graph)) == graph


def test_zero_and_minus_zero_are_two_constants() -> None:
    assert b.constant(0.0) is not b.constant(-0.0)
    assert b.constant(1.0) is b.constant(1.0)
    assert b.constant(1, DType.I64) is not b.constant(1.0)


@pytest.mark.parametrize(
    ("broken", "says", "line"),
    [
        (SQUARE.replace("mul", "mull"), "did you mean mul", 3),
        (SQUARE.replace("%x, %x", "%x, %y"), "%y is not defined", 3),
        (SQUARE.replace(": f32[16,64]\n  ret", ": f32[16,65]\n  ret"), "the type is", 3),
        (SQUARE.replace("kernel", "kernle"), "expected kernel, block or thread", 2),
        (SQUARE.replace("ir 1", "ir 9"), "ir version 9", 1),
        (SQUARE[:-2], "expected '}'", 5),
        (SQUARE.replace("return", "?"), "unexpected character", 4),
    ],
)
def test_errors_point_at_the_place(broken: str, says: str, line: int) -> None:
    with pytest.raises(ParseError, match="line") as caught:
        parse_graph(broken)
    assert says in str(caught.value)
    assert caught.value.line == line


def test_digests_ignore_names_and_see_everything_else() -> None:
    def graph(name: str, factor: float) -> Graph:
        x = b.input_(name, (4,))
        return b.kernel_graph(name, [x], [b.mul(x, factor)])

    assert graph("a", 2.0).digest() == graph("z", 2.0).digest()
    assert graph("a", 2.0).digest() != graph("a", 3.0).digest()


def test_nodes_survive_pickling_as_themselves() -> None:
    x = b.input_("x", (4, 4))
    node = b.matmul(b.exp(x), x)
    assert pickle.loads(pickle.dumps(node)) is node


def test_deep_graphs_do_not_overflow() -> None:
    x = b.input_("x", (2,))
    node = x
    for _ in range(5000):
        node = b.add(b.neg(node), x)
    graph = b.kernel_graph("deep", [x], [node])
    assert parse_graph(print_graph(graph)) == graph
    assert len(repr(node)) < 100


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda x, y: b.add(x, b.cast(y, DType.BF16)), "cast first"),
        (lambda x, y: b.matmul(x, y), "contracted dims differ"),
        (lambda x, y: b.add(x, b.permute(y, (1, 0))), "do not broadcast"),
        (lambda x, y: b.reshape(x, (5, 5)), "do not fill"),
        (lambda x, y: b.reduce_sum(x, (-3,)), "outside"),
        (lambda x, y: b.exp(b.cast(x, DType.I64)), "floating-point"),
        (lambda x, y: b.slice_(x, -1, 2, 9), "slice"),
    ],
)
def test_type_rules_say_what_is_wrong(build: object, says: str) -> None:
    x, y = b.input_("x", (3, 4)), b.input_("y", (3, 4))
    assert callable(build)
    with pytest.raises(GraphError, match=says):
        build(x, y)


def test_an_input_may_have_the_name_of_a_number() -> None:
    x = b.input_("0", (2,))
    graph = b.kernel_graph("g", [x], [b.exp(x)])
    assert "%1 = exp %0" in print_graph(graph)
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize(
    "name", ["q-proj", "a b", 'say "x"', "", "back\\slash", "two\nlines\r", "é%@"]
)
def test_any_name_comes_back(name: str) -> None:
    x, y = b.input_(name, (2,)), b.input_("y", (2,))
    inner = b.BlockBuilder(name)
    inner.store(b.exp(inner.load(x, 2)), (2,), 2)
    (z,) = b.apply_graph(inner.graph(), [x])
    graph = b.kernel_graph(name, [x, y], [b.add(z, y)])
    assert parse_graph(print_graph(graph)) == graph


def every_form() -> Graph:
    """A kernel graph with every form of the text: levels, attributes, names, layouts, results."""
    x = b.input_("x", (40, 8), strides=(1, 40))
    g = b.BlockBuilder("scaled rows", grid={"m": 3}, loops={"n": 2})
    g.bound("n", {"m": 16, "n": -4}, 15)
    t = g.load(x, ("m", 16), ("n", 4))
    columns = b.reshape(g.index(8, ("n", 4)), (1, 4))
    kept = b.where(b.lt(columns, 7), b.mul(b.exp(t), 0.5), float("-inf"))
    g.store(b.accum_sum(kept, "n"), (40, 4), ("m", 16), 4)
    g.store(b.accumulate(tile.ACCUM_MAX, kept, "n"), (40, 4), ("m", 16), 4)
    total, top = b.apply_graph(form_threads(g.graph()), [x])
    pair = TupleType((top.tensor, TensorType((40, 4), DType.I64)))
    sorted_ = make(
        library.OPAQUE, (top,), library.OpaqueAttrs("aten.sort", '[{"t": 0}, "a"]', pair)
    )
    y = b.add(total, b.item(sorted_, 0))
    return b.kernel_graph("every.form", [x, b.input_("q-proj", (2,))], [y, b.item(sorted_, 1)])


@pytest.mark.parametrize("graph", [attention, every_form], ids=lambda g: g.__name__)
def test_the_printed_text_is_as_it_was(
    graph: Callable[[], Graph], golden: Callable[[str, str], None]
) -> None:
    golden(f"{graph.__name__}.txt", print_graph(graph()))
    assert parse_graph(print_graph(graph())) == graph()
