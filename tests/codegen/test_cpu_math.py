"""The vector runtime of generated C++ kernels against NumPy and PyTorch, for every vector width.

Each width is one shared object built from `KERNELS` below. Functions are compared in units in the
last place of the float32 result with a float64 reference, over all exponents and special values.
"""

import ctypes
import functools
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import superopt.codegen.cpu

RUNTIME = Path(superopt.codegen.cpu.__file__).parent / "runtime"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
WIDTHS = {64: "x86-64-v4", 32: "x86-64-v3", 16: "x86-64"}
BATCH = 32  # lengths are multiples of it, so that every width takes whole pairs of vectors

# What is applied to whole vectors, and the greatest error allowed. The bound is what the header
# promises (2 ulp) or, where exact results are expected, less.
UNARY = {
    "exp": 1.1, "exp_nonpositive": 1.1, "expm1": 2.0, "log": 1.0, "log1p": 1.5, "log1p_unit": 1.5,
    "log2": 1.7, "log10": 2.0, "tanh": 1.6, "sigmoid": 2.0, "erf": 1.5, "sin": 1.6, "cos": 1.6, "sqrt": 0.5001, "rsqrt": 1.6,
    "asin": 2.0, "acos": 2.0, "atan": 2.0, "asinh": 2.0, "acosh": 2.0, "atanh": 2.0,
    "floor": 0.0, "ceil": 0.0, "round": 0.0, "trunc": 0.0, "abs": 0.0, "sign": 0.0,
}  # fmt: skip
ROUGH = {"exp_rough": -18.0, "sigmoid_rough": -18.0, "exp_rough8": -13.5, "sigmoid_rough8": -12.7}
"""The logarithm to base 2 of the relative error that each may have."""
LANEWISE = ("tan", "sinh", "cosh", "erfinv")
ELEMENTS = {
    "f32": ("float", torch.float32), "f64": ("double", torch.float64), "bf16": ("bf16", torch.bfloat16),
    "f16": ("f16", torch.float16), "i8": ("int8_t", torch.int8), "u8": ("uint8_t", torch.uint8),
    "bool": ("bool", torch.bool), "i16": ("int16_t", torch.int16), "i32": ("int32_t", torch.int32),
    "i64": ("int64_t", torch.int64),
}  # fmt: skip

KERNELS = """
#include "math.h"
#include <cfenv>
using namespace so;
#define UNARY(name) \\
  extern "C" void k_##name(const float* x, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += VL) store(y + i, so::name(load<vf>(x + i))); } \\
  extern "C" void s_##name(const float* x, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; ++i) store(y + i, so::name(load<float>(x + i))); }
#define BINARY(name) \\
  extern "C" void k_##name(const float* a, const float* b, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += VL) store(y + i, so::name(load<vf>(a + i), load<vf>(b + i))); } \\
  extern "C" void s_##name(const float* a, const float* b, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; ++i) store(y + i, so::name(a[i], b[i])); }
#define ELEMENT(name, type) \\
  extern "C" void load_##name(const type* x, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += VL) store(y + i, load<vf>(x + i)); } \\
  extern "C" void store_##name(const float* x, type* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += VL) store(y + i, load<vf>(x + i)); } \\
  extern "C" void loadpair_##name(const type* x, float* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += 2 * VL) store_pair(y + i, load_half<false>(x + i), load_half<true>(x + i)); } \\
  extern "C" void pair_##name(const float* x, type* y, int64_t n) { \\
    for (int64_t i = 0; i < n; i += 2 * VL) store_pair(y + i, load_half<false>(x + i), load_half<true>(x + i)); } \\
  extern "C" void scalar_##name(const float* x, type* y, int64_t n) { \\
    for (int64_t i = 0; i < n; ++i) store(y + i, load<float>(x + i)); } \\
  extern "C" void part_##name(const type* x, type* y, int64_t n) { \\
    store_n(y, load_n<vf>(x, n, 1.0f), n); } \\
  extern "C" void fill_##name(const type* x, float* y, int64_t n) { \\
    store(y, load_n<vf>(x, n, 7.0f)); }
extern "C" int64_t lanes() { return VL; }
extern "C" int64_t underflows(const float* x, float* y, int64_t n) {
  std::feclearexcept(FE_ALL_EXCEPT);
  for (int64_t i = 0; i < n; i += VL) {
    const vf v = load<vf>(x + i);
    store(y + i, so::exp(v) + so::exp_nonpositive(v) + so::sigmoid(v));
  }
  return std::fetestexcept(FE_UNDERFLOW);
}
extern "C" void reduce(const float* x, float* y) {
  vf v = load<vf>(x);
  y[0] = hsum(v); y[1] = hprod(v); y[2] = hmax(v); y[3] = hmin(v);
}
extern "C" void choose(const float* x, int64_t n, float* y) {
  vf v = load<vf>(x);
  store(y, select(first_lanes(n), v, -v));
  y[VL] = any(v > 0.0f); y[VL + 1] = all(v > 0.0f);
}
"""


def _source() -> str:
    lines = [KERNELS]
    lines += [f"UNARY({name})" for name in (*UNARY, *LANEWISE, *ROUGH)]
    lines += [
        f"BINARY({name})"
        for name in ("pow", "max", "min", "fmod", "atan2", "remainder", "copysign")
    ]
    lines += [f"ELEMENT({name}, {ctype})" for name, (ctype, _) in ELEMENTS.items()]
    return "\n".join(lines)


def _machine_flags(width: int) -> list[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    capability = torch.backends.cpu.get_cpu_capability()
    if (width == 64 and capability != "AVX512") or (width == 32 and capability == "DEFAULT"):
        pytest.skip(f"this processor has no {width}-byte vectors")
    return [f"-march={WIDTHS[width]}"]


@pytest.fixture(scope="module", params=list(WIDTHS))
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("cpu_math")
    source, library = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(_source(), encoding="utf-8")
    flags = [
        *FLAGS,
        *_machine_flags(request.param),
        f"-DSO_VECTOR_BYTES={request.param}",
        "-Werror",
        "-Wall",
    ]
    command = [compiler, *flags, "-iquote", str(RUNTIME), "-fPIC", "-shared", str(source)]
    subprocess.run([*command, "-o", str(library), "-lm"], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.lanes.restype = ctypes.c_int64
    loaded.underflows.restype = ctypes.c_int64
    assert loaded.lanes() == request.param // 4
    return loaded


def _call(function: Any, *arguments: Any) -> Any:
    return function(
        *(
            ctypes.c_int64(argument)
            if isinstance(argument, int)
            else ctypes.c_void_p(
                argument.data_ptr() if isinstance(argument, torch.Tensor) else argument.ctypes.data
            )
            for argument in arguments
        )
    )


# fmt: off
SPECIAL = np.array([
    0.0, -0.0, np.inf, -np.inf, np.nan, 1.0, -1.0, 1e-45, -1e-45, 1.1754944e-38, -1.1754944e-38,
    3.4028235e38, -3.4028235e38, 88.72283, 88.72284, 89.0, 104.0, -87.33655, -103.97, -103.97208,
    -103.97209, -104.0, 0.5, 1.5, 2.5, -0.5, -1.5, 8388607.5, 4194304.5, 8388608.0, 65536.0,
    0.99999994, 1.0000001, -0.99999994, 1e-30, -1e-30, 2.0, -2.0, 3.0, -3.0, 16777217.0,
], np.float32)
# fmt: on


@functools.cache
def _inputs() -> np.ndarray[Any, np.dtype[np.float32]]:
    """All exponents and signs with random mantissas, and more where the functions bend."""
    random = np.random.default_rng(7)
    bits = random.integers(0, 1 << 32, 1 << 20, dtype=np.uint32).view(np.float32)
    scales = np.exp(random.uniform(-7, 6, 1 << 18))
    near_zero = (random.standard_normal(1 << 18) * scales).astype(np.float32)
    near_one = (1 + near_zero[: 1 << 16] * 2.0**-9).astype(np.float32)
    quarter_turns = (np.arange(1, 1 << 15) * (np.pi / 2)).astype(np.float32)
    values = np.concatenate([bits, near_zero, near_one, quarter_turns, SPECIAL])
    return np.concatenate([values, np.zeros(-len(values) % BATCH, np.float32)])


def _torch_reference(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda x: function(torch.from_numpy(x)).numpy()


REFERENCES: dict[str, Callable[[Any], Any]] = {
    "exp_nonpositive": np.exp,
    "log1p_unit": np.log1p,
    "sigmoid": lambda x: np.where(x < 0, np.exp(x) / (1 + np.exp(x)), 1 / (1 + np.exp(-x))),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "round": np.rint,
    "erf": _torch_reference(torch.erf),
    "erfinv": _torch_reference(torch.erfinv),
    "sign": _torch_reference(torch.sign),
    **{
        name: getattr(np, "arc" + name[1:])
        for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh")
    },
}


def _domain(name: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    x = _inputs()
    if name == "exp_nonpositive":
        return np.where(x > 0, -x, x)
    if name == "log1p_unit":
        with np.errstate(all="ignore"):
            inside = np.where(np.abs(x) > 1, 1 / x, x)
        return np.where(inside < 0, -inside, inside)
    return x[-(1 << 17) :] if name in LANEWISE else x


@functools.cache
def _reference(name: str) -> Any:
    function = REFERENCES.get(name) or getattr(np, name)
    with np.errstate(all="ignore"):
        return function(_domain(name).astype(np.float64))


def _errors_ulp(got: Any, reference: Any) -> Any:
    """Distance in float32 ulp; infinite where NaN, infinity or the sign of a zero differ."""
    largest = np.finfo(np.float32).max
    with np.errstate(all="ignore"):
        rounded = reference.astype(np.float32)
        spacing = np.spacing(np.minimum(np.abs(rounded), largest)).astype(np.float64)
        error = np.abs(got.astype(np.float64) - reference) / np.maximum(spacing, 2.0**-149)
    special = ~np.isfinite(rounded) | ~np.isfinite(got) | (reference == 0)
    same = (got == rounded) & (np.signbit(got) == np.signbit(rounded))
    same |= np.isnan(got) & np.isnan(rounded)
    # Within an ulp of overflow both infinity and the largest float are near enough.
    edge = (np.abs(np.abs(reference) / (2.0**128) - 1) < 2.0**-23) & (np.abs(got) >= largest)
    return np.where(special, np.where(same | edge, 0.0, np.inf), error)


def _assert_close(got: Any, reference: Any, bound: float, *arguments: Any) -> None:
    error = _errors_ulp(got, reference)
    worst = int(np.argmax(error))
    at = [float(argument[worst]) for argument in arguments]
    assert error[worst] <= bound, f"{error[worst]} ulp at {at}: {got[worst]} for {reference[worst]}"


def test_masked_scores_underflow_nowhere(kernels: Any) -> None:
    """A product that underflows costs a hundred cycles, and masks are full of them."""
    x = np.array([-104.5, -1e4, np.finfo(np.float32).min, -np.inf] * BATCH, np.float32)
    got = np.full_like(x, np.nan)
    assert _call(kernels.underflows, x, got, len(x)) == 0
    assert not got.any()


@pytest.mark.parametrize("name", [*UNARY, *LANEWISE])
def test_function_accuracy(kernels: Any, name: str) -> None:
    x = _domain(name)
    got = np.empty_like(x)
    _call(kernels["k_" + name], x, got, len(x))
    _assert_close(got, _reference(name), UNARY.get(name, 2.0), x)


@pytest.mark.parametrize("name", list(ROUGH))
def test_rough_functions_keep_sixteen_bits(kernels: Any, name: str) -> None:
    x = _inputs()
    got = np.empty_like(x)
    _call(kernels["k_" + name], x, got, len(x))
    exact = name.partition("_")[0]
    reference = _reference(exact)
    with np.errstate(all="ignore"):
        rounded = reference.astype(np.float32)
    usual = (reference >= 2.0**-126) & (reference < 2.0**127)
    error = np.abs(got[usual].astype(np.float64) / reference[usual] - 1)
    assert np.all(error <= 2.0 ** ROUGH[name] + np.minimum(np.abs(x[usual]), 90) * 2.0**-23)
    assert np.all(got[x == 0] == rounded[x == 0])
    assert np.all((got[reference < 2.0**-126] < 1.2e-38) | (x[reference < 2.0**-126] > -87.4))
    assert np.all(got[rounded == np.inf] == np.inf)
    assert np.array_equal(np.isnan(got), np.isnan(x))


@pytest.mark.parametrize("name", list(UNARY))
def test_scalar_version_agrees(kernels: Any, name: str) -> None:
    x = _domain(name)[-(1 << 16) :].copy()
    got = np.empty_like(x)
    _call(kernels["s_" + name], x, got, len(x))
    _assert_close(got, _reference(name)[-(1 << 16) :], 2.5, x)  # the C library's own error


@pytest.mark.parametrize(("base", "exponents"), [(2, range(-149, 128)), (10, range(-37, 39))])
@pytest.mark.parametrize("form", ["k_", "s_"])
def test_logarithms_of_powers_are_whole(
    kernels: Any, form: str, base: int, exponents: range
) -> None:
    count = -len(exponents) % BATCH + len(exponents)
    wanted = np.resize(np.array(exponents, np.float32), count)
    x = np.resize(np.array([float(base) ** e for e in exponents], np.float32), count)
    got = np.empty_like(x)
    _call(kernels[f"{form}log{base}"], x, got, count)
    assert np.array_equal(got, wanted)


@functools.cache
def _pairs() -> tuple[Any, Any]:
    random = np.random.default_rng(3)
    x, count = _inputs(), 1 << 19
    grid = np.meshgrid(SPECIAL, SPECIAL)
    bases = [x[:count], np.exp(random.uniform(-4, 4, count)), -np.exp(random.uniform(-2, 2, count))]
    powers = [
        random.permutation(x[:count]),
        random.normal(0, 9, count),
        random.integers(-50, 50, count),
    ]
    left = np.concatenate([side.astype(np.float32) for side in [*bases, grid[0].ravel()]])
    right = np.concatenate([side.astype(np.float32) for side in [*powers, grid[1].ravel()]])
    length = len(left) // BATCH * BATCH
    return left[:length], right[:length]


@functools.cache
def _pow_reference() -> Any:
    left, right = _pairs()
    with np.errstate(all="ignore"):
        return np.power(left.astype(np.float64), right.astype(np.float64))


def test_pow_accuracy(kernels: Any) -> None:
    left, right = _pairs()
    got = np.empty_like(left)
    _call(kernels.k_pow, left, right, got, len(left))
    _assert_close(got, _pow_reference(), 1.0, left, right)


@pytest.mark.parametrize(
    ("name", "reference", "bound"),
    [
        ("max", np.maximum, 0.0),  # as torch.maximum: NaN wins
        ("min", np.minimum, 0.0),
        ("fmod", np.fmod, 0.0),
        ("remainder", np.remainder, 0.5001),
        ("atan2", np.arctan2, 2.0),
        ("copysign", np.copysign, 0.0),
    ],
)
@pytest.mark.parametrize("form", ["k_", "s_"])
def test_binary_functions(
    kernels: Any, form: str, name: str, reference: Callable[..., Any], bound: float
) -> None:
    left, right = (side[-(1 << 12) :].copy() for side in _pairs())
    got = np.empty_like(left)
    _call(kernels[form + name], left, right, got, len(left))
    with np.errstate(all="ignore"):
        expected = reference(left.astype(np.float64), right.astype(np.float64))
    if name in ("max", "min", "remainder"):  # PyTorch leaves the sign of a zero open in these
        got, expected = got + 0.0, expected + 0.0
    _assert_close(got, expected, bound, left, right)


def test_odd_functions_stay_in_range(kernels: Any) -> None:
    x = _inputs()
    for name in ("tanh", "erf", "sin", "cos"):
        got = np.empty_like(x)
        _call(kernels["k_" + name], x, got, len(x))
        assert np.nanmax(np.abs(got)) <= 1.0, name
        if name in ("tanh", "erf"):
            assert (got[x > 10] == 1).all(), f"what is left of 1 - {name}(x) is multiplied by x"


@pytest.mark.parametrize("name", list(ELEMENTS))
def test_store_converts_as_torch(kernels: Any, name: str) -> None:
    dtype = ELEMENTS[name][1]
    x = torch.from_numpy(_inputs())
    if dtype is not torch.bool and not dtype.is_floating_point:
        limits = torch.iinfo(dtype)  # beyond them the result is undefined, in PyTorch too
        x = torch.nan_to_num(x).remainder(float(min(limits.max, 1 << 24))) + 0.25
        x[::3] *= -1.0 if limits.min < 0 else 1.0
    for form in ("store_", "scalar_", "pair_"):
        got = torch.empty(len(x), dtype=dtype)
        _call(kernels[form + name], x, got, len(x))
        expected = x.to(dtype)
        if dtype.is_floating_point:
            nan = expected.isnan()
            assert torch.equal(got.isnan(), nan)
            got, expected = got.masked_fill(nan, 0), expected.masked_fill(nan, 0)
            assert torch.equal(got.signbit(), expected.signbit())
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", list(ELEMENTS))
def test_load_converts_as_torch(kernels: Any, name: str) -> None:
    dtype = ELEMENTS[name][1]
    raw = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    if dtype in (torch.bfloat16, torch.float16):
        x = raw.view(dtype)  # every value there is
    elif dtype.is_floating_point:
        x = torch.from_numpy(_inputs()[: 1 << 16]).to(dtype)
    else:
        x = (raw.to(torch.int64) * 40503).to(dtype)
    for form in ("load_", "loadpair_"):
        got = torch.empty(len(x), dtype=torch.float32)
        _call(kernels[form + name], x, got, len(x))
        torch.testing.assert_close(got, x.to(torch.float32), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", list(ELEMENTS))
def test_partial_access_touches_only_what_it_counts(kernels: Any, name: str) -> None:
    dtype, lanes = ELEMENTS[name][1], kernels.lanes()
    x = (torch.arange(lanes) % 2 + torch.arange(lanes) // 2).to(dtype)
    for count in range(lanes + 1):
        got, filled = torch.zeros(lanes, dtype=dtype), torch.zeros(lanes)
        _call(kernels["part_" + name], x, got, count)
        assert torch.equal(got[:count], x[:count])
        assert not got[count:].any()
        _call(kernels["fill_" + name], x, filled, count)
        assert torch.equal(filled[:count], x[:count].to(torch.float32))
        assert (filled[count:] == 7.0).all()


def test_partial_access_at_the_end_of_a_page(kernels: Any) -> None:
    mmap = pytest.importorskip("mmap")
    libc = ctypes.CDLL(None)
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0) == 0
    try:
        for name, (_, dtype) in ELEMENTS.items():
            for count in range(kernels.lanes()):
                last = ctypes.c_void_p(start + page - count * dtype.itemsize)
                kernels["part_" + name](
                    last, last, ctypes.c_int64(count)
                )  # faults when it reads past
    finally:
        libc.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 3)


def test_reductions(kernels: Any) -> None:
    lanes = kernels.lanes()
    for position in range(lanes):
        x = np.linspace(1.0, 2.0, lanes, dtype=np.float32)
        x[position] = -3.0
        got = np.empty(4, np.float32)
        _call(kernels.reduce, x, got)
        np.testing.assert_allclose(got, [x.sum(), x.prod(), x.max(), -3.0], rtol=1e-6)
        x[position] = np.nan
        _call(kernels.reduce, x, got)
        assert np.isnan(got).all()


def test_masks(kernels: Any) -> None:
    lanes = kernels.lanes()
    x = np.arange(1, lanes + 1, dtype=np.float32)
    for count in range(lanes + 2):
        got = np.empty(lanes + 2, np.float32)
        _call(kernels.choose, x, count, got)
        np.testing.assert_array_equal(got[:lanes], np.where(np.arange(lanes) < count, x, -x))
        assert got[lanes] == 1.0
        assert got[lanes + 1] == 1.0
    x[lanes // 2] = -1.0
    _call(kernels.choose, x, 0, got)
    assert (got[lanes], got[lanes + 1]) == (1.0, 0.0)
    _call(kernels.choose, -np.abs(x), 0, got)
    assert (got[lanes], got[lanes + 1]) == (0.0, 0.0)
