"""A product has one value, whoever reads it: no FMA may merge it into one reader and not the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from superopt.codegen import cpu
from superopt.codegen.cpu.ranges import maximum_of, unscaled
from superopt.codegen.cpu.scales import scales_behind_maxima
from superopt.codegen.errors import CodegenError
from superopt.ir import build as b
from superopt.ir.node import topological
from superopt.ir.ops import elementwise
from superopt.ir.types import DType

SCALE = 0.08838834764831845
NOTHING = 0.633544921875


@pytest.mark.parametrize("rows", [1, 5])
def test_a_scaled_maximum_cancels_exactly_where_scores_are_huge(tmp_path, rows):
    if cpu.find_compiler() is None:
        pytest.skip("needs a C++ compiler")
    builder = b.BlockBuilder("shifted", grid={"m": rows})
    scores = b.mul(builder.load(b.input_("x", (rows, 77)), ("m", 1), 77), SCALE)
    shifted = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    builder.store(shifted, (rows, 77), ("m", 1), 77)
    source = cpu.lower(builder.graph(), cpu.CpuConfig(), "shifted")
    (kernel,) = cpu.compile_many([source], tmp_path)
    assert not isinstance(kernel, CodegenError), kernel
    x = (np.random.default_rng(0).standard_normal((rows, 77)) * 1e18).astype(np.float32)
    result = np.full((rows, 77), np.nan, np.float32)
    kernel(x.ctypes.data, result.ctypes.data)
    expected = (x == x.max(axis=-1, keepdims=True)).astype(np.float32)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("dtype", "use", "rough"),
    [
        (DType.BF16, lambda e: b.div(e, b.reduce_sum(e, -1)), True),
        (DType.F16, lambda e: b.div(e, b.reduce_sum(e, -1)), True),
        (DType.F32, lambda e: b.div(e, b.reduce_sum(e, -1)), False),
        (DType.BF16, lambda e: b.where(b.lt(e, 0.5), e, 2.0), False),  # compared, too
        (DType.BF16, lambda e: b.where(b.lt(b.iota((4, 64), -1), 9), b.mul(e, 3.0), -1.0), True),
        (DType.BF16, lambda e: b.sub(1.0, e), False),  # where e is near 1, all of its bits count
        (DType.BF16, lambda e: b.sub(1.0, b.mul(e, e)), False),
        (DType.BF16, lambda e: b.log(b.reduce_sum(e, -1)), False),  # near 0 where the sum is near 1
        (DType.BF16, lambda e: b.reduce_sum(b.mul(e, b.neg(e)), -1), False),  # terms of any sign
    ],
)
def test_exponentials_of_which_sixteen_bits_count_are_rough(dtype, use, rough):
    builder = b.BlockBuilder("f", grid={"m": 1})
    x = b.cast(builder.load(b.input_("x", (4, 64), dtype), 4, 64), DType.F32)
    result = use(b.exp(b.sub(x, b.reduce_max(x, -1))))
    builder.store(b.cast(b.broadcast(result, (4, 64)), dtype), (4, 64), 4, 64)
    text = cpu.lower(builder.graph(), cpu.CpuConfig(), "f").text
    assert (("exp_rough8(" if dtype is DType.BF16 else "exp_rough(") in text) == rough


@pytest.mark.parametrize(
    ("use", "call"),
    [
        (lambda x: b.mul(x, b.sigmoid(x)), "sigmoid_rough"),
        (lambda x: b.mul(x, b.sigmoid(b.mul(x, 1.702))), "sigmoid2_rough"),
        (lambda x: b.sub(x, b.sigmoid(x)), None),
    ],
)
@pytest.mark.parametrize(("dtype", "bits"), [(DType.BF16, "8("), (DType.F16, "(")])
def test_sigmoids_of_which_sixteen_bits_count_are_rough(use, call, dtype, bits):
    builder = b.BlockBuilder("f", grid={"m": 1})
    x = b.cast(builder.load(b.input_("x", (4, 64), dtype), 4, 64), DType.F32)
    builder.store(b.cast(use(x), dtype), (4, 64), 4, 64)
    call = f"{call}{bits}" if call else "sigmoid("
    assert f"so::{call}" in cpu.lower(builder.graph(), cpu.CpuConfig(), "f").text


def test_functions_over_a_known_range_are_cheaper() -> None:
    builder = b.BlockBuilder("f", grid={"m": 1})
    x = builder.load(b.input_("x", (4, 64)), 4, 64)
    power = b.exp(b.neg(b.abs_(x)))
    builder.store(b.sub(b.log1p(power), b.log1p(b.exp(x))), (4, 64), 4, 64)
    text = cpu.lower(builder.graph(), cpu.CpuConfig(), "f").text
    assert all(f"so::{n}(" in text for n in ("exp_nonpositive", "log1p_unit", "exp", "log1p"))


def test_exponentials_before_a_comparison_are_not_rough():
    builder = b.BlockBuilder("f", grid={"m": 1})
    x = builder.load(b.input_("x", (4, 64)), 4, 64)
    builder.store(b.lt(b.reduce_sum(b.exp(x), -1), 30.0), (4, 1), 4, 1)
    assert "exp_rough" not in cpu.lower(builder.graph(), cpu.CpuConfig(), "f").text


@pytest.mark.parametrize("masked", [False, True])
def test_a_factor_goes_behind_the_maximum(masked: bool) -> None:
    builder = b.BlockBuilder("f", grid={"m": 1})
    scores = b.mul(builder.load(b.input_("x", (4, 64)), 4, 64), SCALE)
    if masked:
        scores = b.where(
            b.lt(builder.load(b.input_("y", (4, 64)), 4, 64), 0.0), float("-inf"), scores
        )
    shifted = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    nodes = list(topological(scales_behind_maxima((shifted,))))
    (product,) = (n for n in nodes if n.op is elementwise.MUL)
    assert unscaled(product)[1] == SCALE
    (difference,) = (n for n in nodes if n.op is elementwise.SUB)
    assert maximum_of(difference)
    assert maximum_of(product)


def test_factors_that_stay_where_they_are() -> None:
    x, y = b.input_("x", (4, 64)), b.input_("y", (4, 64))
    for scores, top in (
        (b.mul(x, -0.5), b.mul(x, -0.5)),  # its maximum is the minimum
        (b.mul(x, 2.0), b.mul(x, 2.0)),  # overflows where x does not
        (b.mul(x, 0.5), b.mul(x, 0.25)),
        (b.mul(x, 0.5), b.mul(y, 0.5)),
        (b.mul(x, 0.5), x),
        (b.where(b.lt(x, 0.0), -3e38, b.mul(x, 0.125)),) * 2,  # -3e38 / 0.125 is no float
    ):
        (root,) = scales_behind_maxima((b.exp(b.sub(scores, b.reduce_max(top, -1))),))
        assert root.inputs[0].op is elementwise.SUB
    halved = b.mul(x, 0.5)
    for seen in (
        b.sub(halved, b.reduce_max(halved, -1)),  # may overflow
        b.gt(halved, 0.0),  # halves of the smallest number are 0
        b.gt(b.reduce_max(halved, -1), 0.0),
        b.where(b.lt(x, 0.0), 41.0, b.mul(x, NOTHING)),  # no number times it is 41
    ):
        (root,) = scales_behind_maxima((seen,))
        assert root.op is seen.op


@settings(deadline=None)
@given(
    st.floats(-(2.0**100), 2.0**100, width=32), st.floats(2.0**-60, 1.0, exclude_max=True, width=32)
)
def test_numbers_beside_scaled_values_keep_their_bits(number: float, factor: float) -> None:
    x = b.input_("x", (4, 64))
    choice = b.where(b.lt(x, 0.0), number, b.mul(x, factor))
    (root,) = scales_behind_maxima((choice,))
    if root is not choice:
        inner, by = root.inputs
        kept = np.float32(inner.inputs[1].attrs.value) * np.float32(by.attrs.value)
        assert kept == np.float32(number)


def test_exponentials_of_divided_scores_are_rough() -> None:
    builder = b.BlockBuilder("f", grid={"m": 1})
    x = builder.load(b.input_("x", (4, 64)), 4, 64)
    scores = b.mul(b.div(x, b.sqrt(b.reduce_sum(b.mul(x, x), -1))), SCALE)
    shifted = b.exp(b.sub(scores, b.reduce_max(scores, -1)))
    builder.store(b.cast(shifted, DType.BF16), (4, 64), 4, 64)
    text = cpu.lower(builder.graph(), cpu.CpuConfig(), "f").text
    assert "exp2_rough" in text
