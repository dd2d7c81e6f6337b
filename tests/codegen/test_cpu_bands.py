"""Products that look only where a mask leaves something: the band they take, and what they compute."""

from collections.abc import Callable
from math import inf
from pathlib import Path

import numpy as np
import pytest
import torch

from superopt.codegen.cpu.bands import Band, hidden, unseen_outside, zero_outside
from superopt.codegen.cpu.compile import compile_source, find_compiler, load_kernel
from superopt.codegen.cpu.config import CpuConfig
from superopt.codegen.cpu.context import Context
from superopt.codegen.cpu.inline import Plan
from superopt.codegen.cpu.kernel import Kernel, compile_many
from superopt.codegen.cpu.lower import lower
from superopt.codegen.tile_program import tile_program
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder
from superopt.ir.graph import Graph
from superopt.ir.node import Node, topological
from superopt.ir.ops import contraction, tile
from superopt.ir.types import DType
from superopt.verify.reference import run_reference
from tests.codegen.meaning import check, launched, tensor

ROWS, COLUMNS = 24, 20
Mask = Callable[[Node, Node], Node]
"""From the positions of a tile's rows and columns to a truth value."""
_FAR = 1 << 40

ONE_EDGE: dict[str, Mask] = {
    "causal": lambda r, c: b.le(c, r),
    "strictly": lambda r, c: b.lt(c, r),
    "later": lambda r, c: b.ge(b.sub(c, r), 3),
    "shifted": lambda r, c: b.gt(b.add(r, 7), c),
    "not-above": lambda r, c: b.not_(b.gt(c, r)),
    "not-below": lambda r, c: b.not_(b.ge(b.sub(r, c), 5)),
    "window": lambda r, c: b.and_(b.ge(r, c), b.lt(b.sub(r, c), 6)),
}
NO_EDGE: dict[str, Mask] = {
    "prefix": lambda r, c: b.or_(b.ge(r, c), b.lt(c, 4)),
    "slanted": lambda r, c: b.ge(b.add(r, r), c),
    "steep": lambda r, c: b.ge(b.sub(b.mul(r, 3), 4), c),
    "rows": lambda r, c: b.or_(b.lt(r, 9), b.ne(c, c)),
    "equal": lambda r, c: b.eq(r, c),
}
TWO_AT_ONCE: dict[str, Mask] = {
    "prefix": NO_EDGE["prefix"],
    "sinks": lambda r, c: b.and_(b.ge(r, c), b.or_(b.lt(b.sub(r, c), 8), b.lt(c, 4))),
}
MASKS = {**ONE_EDGE, **NO_EDGE, **TWO_AT_ONCE}


def attention(mask: Mask, masked: Callable[[Node, Node], Node], *, summed: bool = False) -> Graph:
    """Two products with a mask between; `masked` puts it on the scores. `summed`: scores are read unmasked too."""
    g = BlockBuilder("masked", grid={"i": 3}, loops={"l": 4})
    q = g.load(b.input_("q", (3 * ROWS, 16)), ("i", ROWS), 16)
    k = g.load(b.input_("k", (4 * COLUMNS, 16)), ("l", COLUMNS), 16)
    v = g.load(b.input_("v", (4 * COLUMNS, 16)), ("l", COLUMNS), 16)
    rows = b.reshape(g.index(3 * ROWS, ("i", ROWS)), (ROWS, 1))
    columns = b.reshape(g.index(4 * COLUMNS, ("l", COLUMNS)), (1, COLUMNS))
    scores = b.matmul(q, b.transpose(k))
    kept = masked(mask(rows, columns), scores)
    mixed = b.accum_sum(b.matmul(kept, v), "l")
    if summed:
        mixed = b.add(mixed, b.accum_sum(b.reduce_sum(scores, -1), "l"))
    g.store(mixed, (3 * ROWS, 16), ("i", ROWS), 16)
    return g.graph()


FORMS: dict[str, Callable[[Node, Node], Node]] = {
    "selected": lambda mask, x: b.where(mask, x, 0.0),
    "behind-exp": lambda mask, x: b.exp(b.sub(b.where(b.not_(mask), -inf, b.mul(x, 0.1)), 1.0)),
    "added": lambda mask, x: b.mul(b.exp(b.add(b.where(mask, 0.0, -inf), b.mul(x, 0.1))), 2.0),
    "scaled": lambda mask, x: b.exp(b.div(b.mul(b.where(mask, x, -inf), 0.5), 3.0)),
    "multiplied": lambda mask, x: b.mul(x, b.cast(mask, DType.F32)),
}
UNSEEN = ("selected", "behind-exp", "scaled")


def bands(graph: Graph) -> tuple[Band | None, Band | None]:
    """Return where the left operand of the second product counts, and the result of the first."""
    program = tile_program(graph)
    first, second = (n for n in topological(graph.outputs) if n.op is contraction.MATMUL)
    context, plan = Context(program, CpuConfig()), Plan(program)
    return zero_outside(context, second.inputs[0]), unseen_outside(context, plan, first)


def inside(band: Band, i: int, step: int) -> np.ndarray:
    """Return which elements of the tile in block `i`, iteration `step` a band holds."""
    names = {"i_i": i, "i_l": step, "max_of": max, "min_of": min}
    first, last = (
        default if text is None else eval(text.replace("L", ""), names)
        for text, default in ((band.first, -_FAR), (band.last, _FAR))
    )
    distance = np.arange(ROWS)[:, None] - np.arange(COLUMNS)[None, :]
    return (first <= distance) & (distance <= last)


def visible(mask: Mask, i: int, step: int) -> np.ndarray:
    """Return the mask's values in a tile."""
    rows = b.reshape(b.add(b.iota((ROWS,), -1), i * ROWS), (ROWS, 1))
    columns = b.reshape(b.add(b.iota((COLUMNS,), -1), step * COLUMNS), (1, COLUMNS))
    (value,) = run_reference(b.kernel_graph("mask", [], [mask(rows, columns)]), [])
    return np.broadcast_to(value.numpy(), (ROWS, COLUMNS))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MASKS)
def test_bands_hold_all_that_counts(name: str, form: str) -> None:
    zero, unseen = bands(attention(MASKS[name], FORMS[form]))
    assert (zero is None) == (name in NO_EDGE)
    assert (unseen is None) == (name in NO_EDGE or form not in UNSEEN)
    for band in (zero, unseen):
        for i, step in [(0, 0), (1, 1), (2, 0), (0, 2)] if band else []:
            held, counts = inside(band, i, step), visible(MASKS[name], i, step)
            assert not (counts & ~held).any()
            if name in ONE_EDGE:
                assert (counts == held).all()


def test_scores_that_are_read_beside_the_mask_are_computed() -> None:
    zero, unseen = bands(attention(MASKS["causal"], FORMS["selected"], summed=True))
    assert zero is not None
    assert unseen is None


def test_an_operand_that_is_not_zero_behind_the_mask_is_read() -> None:
    zero, unseen = bands(attention(MASKS["causal"], lambda m, x: b.where(m, x, 1.0)))
    assert zero is None
    assert unseen is not None


@pytest.mark.parametrize("scale", [b.mul, b.div])
def test_a_negative_factor_turns_what_is_hidden(scale: Callable[[Node, float], Node]) -> None:
    graph = attention(
        MASKS["sinks"], lambda m, x: b.exp(scale(b.where(m, b.mul(x, 0.0), -inf), -1.0))
    )
    zero, _ = bands(graph)
    assert zero is None
    assert skips(graph) is None


def test_what_is_made_once_serves_every_iteration() -> None:
    g = BlockBuilder("once", loops={"l": 4})
    q = g.load(b.input_("q", (ROWS, 16)), ROWS, 16)
    k = g.load(b.input_("k", (COLUMNS, 16)), COLUMNS, 16)
    columns = b.reshape(g.index(4 * COLUMNS, ("l", COLUMNS)), (1, COLUMNS))
    rows = b.reshape(g.index(ROWS, ROWS), (ROWS, 1))
    scores = b.matmul(q, b.transpose(k))
    kept = b.where(b.le(columns, rows), scores, 0.0)
    g.store(b.accum_sum(b.matmul(kept, k), "l"), (ROWS, 16), ROWS, 16)
    zero, unseen = bands(g.graph())
    assert zero is not None
    assert unseen is None


def skips(graph: Graph) -> str | None:
    """Return the test for iterations that give the loop's states nothing."""
    program = tile_program(graph)
    states = [n for n in topological(graph.outputs) if n.op in (tile.ACCUM_SUM, tile.PREFIX_MAX)]
    return hidden(Context(program, CpuConfig()), states)


@pytest.mark.parametrize("name", MASKS)
def test_iterations_that_two_conditions_hide_are_skipped(name: str) -> None:
    text = skips(attention(MASKS[name], FORMS["behind-exp"]))
    assert (text is None) == (name not in TWO_AT_ONCE)
    if text is None:
        return
    code = text.replace("L", "").replace("&&", "and").replace("||", "or")
    skipped = 0
    for i in range(3):
        for step in range(4):
            if eval(code, {"i_i": i, "i_l": step}):
                skipped += 1
                assert not visible(MASKS[name], i, step).any()
    assert skipped


def test_nothing_is_skipped_that_another_state_needs() -> None:
    assert skips(attention(MASKS["sinks"], FORMS["selected"], summed=True)) is None
    assert skips(attention(MASKS["sinks"], lambda m, x: b.where(m, x, 1.0))) is None


needs_compiler = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_masked_products(tmp_path: Path) -> None:
    chosen = [("window", "behind-exp"), ("sinks", "selected"), ("prefix", "multiplied")]
    graphs = [attention(MASKS[name], FORMS[form]) for name, form in chosen]
    sources = [lower(g, CpuConfig(rows=4, vectors=1), g.name) for g in graphs]
    for graph, source, kernel in zip(graphs, sources, compile_many(sources, tmp_path), strict=True):
        assert "Band{" in source.text or "&&" in source.text
        assert isinstance(kernel, Kernel), kernel
        inputs = [tensor(i, torch.Generator().manual_seed(2)) for i in graph.inputs]
        check(graph, inputs, launched(kernel, graph, inputs))


BODY = """
const Band in{e[3], e[4]}, out{e[5], e[6]};
float panel[48 * 2 * VL];
const float* a = (const float*)va; const float* b = (const float*)vb;
if (e[7] == 0) gemm_nn<4, 2, false>(m, n, k, a, k, 1, b, n, c, n, 0, in, out);
if (e[7] == 1) gemm_nn<4, 2, true, 37, 70>(m, n, k, a, k, 1, b, n, c, n, 0, in, out);
if (e[7] == 2) gemm_packed<4, 2, false, -1, -1, 48>(m, n, k, a, k, 1, b, k, 1, panel, c, n, in, out);
if (e[7] == 3) gemm_packed<4, 2, true, 37, 70, 48>(m, n, k, a, k, 1, b, k, 1, panel, c, n, in, out);
"""


@needs_compiler
@pytest.mark.parametrize("width", [64, 16])
def test_products_in_bands(tmp_path: Path, width: int) -> None:
    source = (
        f'#define SO_VECTOR_BYTES {width}\n#include "gemm.h"\nusing namespace so;\n'
        'extern "C" __attribute__((visibility("default"))) void superopt_kernel('
        "const void* va, const void* vb, float* c, const long* e) {\n"
        f"const long m = e[0], n = e[1], k = e[2];\n{BODY}}}\n"
    )
    kernel = load_kernel(compile_source(source, tmp_path), 4)
    rng = np.random.default_rng(3)
    m, n, k = 37, 70, 101
    limits = [(0, _FAR), (-_FAR, 0), (-40, -3), (5, 9), (60, 90), (3, 2), (-_FAR, _FAR)]
    distance_in = np.arange(m)[:, None] - np.arange(k)[None, :]
    distance_out = np.arange(m)[:, None] - np.arange(n)[None, :]
    for way in range(4):
        for inner, outer in [(x, limits[-1]) for x in limits] + [(limits[-1], x) for x in limits]:
            a = rng.standard_normal((m, k)).astype(np.float32)
            right = rng.standard_normal((k, n)).astype(np.float32)
            a[(distance_in < inner[0]) | (distance_in > inner[1])] = 0.0
            want = a.astype(np.float64) @ right
            # what lies a register tile beyond the band is not even read
            a[(distance_in < inner[0] - 3) | (distance_in > inner[1] + 3)] = np.nan
            held = np.full((9 * m, n), 2.0, np.float32)
            c = held[4 * m : 5 * m]
            stored = np.ascontiguousarray(right.T if way >= 2 else right)
            numbers = np.array([m, n, k, *inner, *outer, way], np.int64)
            kernel(a.ctypes.data, stored.ctypes.data, c.ctypes.data, numbers.ctypes.data)
            want += 2.0 if way % 2 else 0.0
            counts = (distance_out >= outer[0]) & (distance_out <= outer[1])
            np.testing.assert_allclose(c[counts], want[counts], rtol=2e-4, atol=2e-5)
            reach = 2 * width // 4 + 3
            beyond = (distance_out < outer[0] - reach) | (distance_out > outer[1] + reach)
            assert (c[beyond] == 2.0).all()
            assert (held[: 4 * m] == 2.0).all()
            assert (held[5 * m :] == 2.0).all()
