"""Bounds of values: what they must be, that they hold, and what looks like a maximum but is none."""

from random import Random

import numpy as np
import pytest
import torch

from superopt.codegen.cpu.divide import shared_divisions
from superopt.codegen.cpu.ranges import maximum_of, range_of
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder
from superopt.ir.node import Node, topological
from superopt.ir.ops import elementwise, tile
from superopt.ir.types import DType


def ranges(outputs: list[Node]) -> dict[Node, tuple[float, float]]:
    found: dict[Node, tuple[float, float]] = {}
    for node in topological(outputs):
        found[node] = range_of(node, found)
    return found


def tile_(rows: int = 4, columns: int = 4) -> tuple[BlockBuilder, Node]:
    build = BlockBuilder("g", grid={"m": 1})
    return build, build.load(b.input_("x", (rows, columns)), rows, columns)


def test_divisors_of_norms_and_softmax() -> None:
    _, x = tile_(4, 8)
    shifted = b.exp(b.sub(x, b.reduce_max(x, -1)))
    total = b.reduce_sum(shifted, -1)
    root = b.sqrt(b.add(b.mul(b.reduce_sum(b.mul(x, x), -1), 0.125), 1e-6))
    length = b.maximum(b.sqrt(b.reduce_sum(b.mul(x, x), -1)), 1e-12)
    rounded = b.cast(
        b.cast(b.sqrt(b.add(b.div(b.reduce_sum(b.mul(x, x), -1), 8.0), 1e-6)), DType.BF16),
        DType.F32,
    )
    scaled = b.mul(b.sub(x, b.reduce_max(x, -1)), 0.5)
    found = ranges([total, root, length, rounded, b.reduce_sum(b.exp(scaled), -1), b.div(x, x)])
    assert found[rounded] == tuple(float(torch.tensor(v).bfloat16()) for v in found[root])
    assert found[b.reduce_sum(b.exp(scaled), -1)] == (1.0, 8.0)
    assert found[b.div(x, x)] == found[x]
    assert found[total] == (1.0, 8.0)
    assert found[root] == pytest.approx((1e-3, 6.522e18), rel=1e-3)
    assert found[length] == pytest.approx((1e-12, 1.845e19), rel=1e-3)


def test_bounds_are_rounded_as_values_are() -> None:
    _, x = tile_(4, 8)
    near = b.maximum(b.minimum(x, 1003.0), 1002.0)
    half = b.cast(b.cast(near, DType.BF16), DType.F32)
    found = ranges([b.sub(near, 1002.0), b.sub(half, 1002.0), b.mul(near, 1e-3)])
    assert found[b.sub(near, 1002.0)] == (0.0, 1.0)
    assert found[b.sub(half, 1002.0)] == (-2.0, 2.0)
    assert found[b.mul(near, 1e-3)][1] == np.float32(1003) * np.float32(1e-3)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_known_divisors_need_no_scale(norm: bool, known: bool) -> None:
    build, x = tile_(4, 16)
    if norm:
        squares = b.reduce_sum(b.mul(x, x) if known else x, -1)
        total = b.sqrt(b.add(b.div(squares, 16.0), 1e-6))
    else:
        total = b.reduce_sum(b.exp(b.sub(x, b.reduce_max(x, -1))) if known else x, -1)
    build.store(b.div(x, total), (4, 16), 4, 16)
    nodes = topological(shared_divisions(build.graph().outputs))
    wide = [n for n in nodes if n.op is elementwise.MUL and n.tensor.elements == 64]
    assert len(wide) == (1 if known else 2) + (norm and known)


def test_what_is_no_maximum_of_the_element() -> None:
    _, x = tile_()
    top = b.reduce_max(x, -1)
    assert maximum_of(b.sub(x, top))
    running = b.accumulate(tile.PREFIX_MAX, top, "n")
    assert maximum_of(b.sub(x, b.finite_or_zero(running)))
    # a row's maximum beside another row's elements, another tensor's, half of it
    assert not maximum_of(b.sub(x, b.reshape(top, (1, 4))))
    assert not maximum_of(b.sub(x, b.transpose(top)))
    assert not maximum_of(b.sub(b.mul(x, 2.0), top))
    assert not maximum_of(b.sub(x, b.mul(top, 0.5)))
    assert not maximum_of(b.sub(x, b.where(b.gt(top, 0.0), top, 0.0)))
    assert not maximum_of(b.sub(top, x))
    # a running maximum may be far above this tile's, so that no exponential is 1
    total = b.reduce_sum(b.exp(b.sub(x, b.finite_or_zero(running))), -1)
    other = b.reduce_sum(b.exp(b.sub(x, top)), -2)
    found = ranges([total, other])
    assert found[total][0] == found[other][0] == 0.0


def test_a_small_product_may_be_zero() -> None:
    _, x = tile_()
    small = b.mul(b.maximum(x, 1e-30), b.maximum(x, 1e-20))
    assert ranges([b.mul(small, 1e30)])[small][0] == 0.0
    assert ranges([b.mul(small, 1e30)])[b.mul(small, 1e30)][0] == 0.0


def test_computed_values_lie_within_their_bounds() -> None:
    binary = {b.add: np.add, b.sub: np.subtract, b.mul: np.multiply, b.maximum: np.maximum}
    unary = {b.abs_: np.abs, b.exp: np.exp, b.sqrt: np.sqrt}
    folds = {b.reduce_sum: np.sum, b.reduce_max: np.max}
    sizes = np.float32([[0.0, 1e-30, -1e-3, 0.5], [-2.0, 3.0, 80.0, -1e30]])
    bounded = 0
    for seed in range(60):
        random = Random(seed)
        _, x = tile_(2, 4)
        values = {x: sizes, b.constant(0.25, x.tensor.dtype): np.float32(0.25)}
        with np.errstate(all="ignore"):
            for _ in range(12):
                of = [random.choice(list(values)), random.choice(list(values))]
                kind = random.choice([binary, unary, folds])
                make, numpy_ = random.choice(list(kind.items()))
                if kind is folds and of[0].shape:
                    made = numpy_(values[of[0]], axis=-1, keepdims=True)
                    values[make(of[0], -1)] = made
                elif kind is not folds:
                    taken = of if kind is binary else of[:1]
                    made = numpy_(*(values[o] for o in taken))
                    values[make(*taken)] = made.astype(np.float32)
        found = ranges(list(values))
        for node in values:
            low, high = found[node]
            finite = values[node][np.isfinite(values[node])].astype(np.float64)
            bounded += low > -1e38 or high < 1e38
            slack = 1e-5 * np.abs(finite)
            assert (finite >= low - slack).all(), f"seed {seed}: {node}"
            assert (finite <= high + slack).all(), f"seed {seed}: {node}"
    assert bounded > 100
