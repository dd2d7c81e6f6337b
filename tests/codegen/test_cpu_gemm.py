"""Tile products of the C++ runtime against float64, ragged extents included, nothing else touched."""

from pathlib import Path

import numpy as np
import pytest

from superopt.codegen.cpu.compile import compile_source, find_compiler, load_kernel

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

TYPES = {"float": np.float32, "so::f16": np.float16}
EXTENTS = [(1, 1, 1), (3, 5, 7), (6, 64, 16), (7, 65, 33), (16, 48, 8), (13, 100, 1), (20, 130, 47)]
CANARY = np.float32(12345.0)


def build(body: str, folder: Path, width: int):
    source = (
        f'#define SO_VECTOR_BYTES {width}\n#include "gemm.h"\nusing namespace so;\n'
        'extern "C" __attribute__((visibility("default"))) void superopt_kernel('
        "const void* va, const void* vb, float* c, const long* e) {\n"
        f"const long m = e[0], n = e[1], k = e[2];\n{body}\n}}\n"
    )
    return load_kernel(compile_source(source, folder), 4)


def call(kernel, a: np.ndarray, b: np.ndarray, c: np.ndarray, extents: list[int]) -> None:
    numbers = np.array(extents, dtype=np.int64)
    kernel(a.ctypes.data, b.ctypes.data, c.ctypes.data, numbers.ctypes.data)


def close(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    expected = a.astype(np.float64) @ b.astype(np.float64)
    scale = np.abs(a.astype(np.float64)) @ np.abs(b.astype(np.float64)) + 1e-30
    assert np.max(np.abs(c - expected) / scale) < 3e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("tile", [(6, 4), (4, 1), (1, 2)])
@pytest.mark.parametrize("element", TYPES)
def test_nn_any_extent_and_strides(folder, width, tile, element):
    rows, vectors = tile
    kernel = build(
        f"auto a = (const {element}*)va; auto b = (const {element}*)vb;\n"
        f"if (e[6]) gemm_nn<{rows}, {vectors}, true>(m, n, k, a, e[3], e[4], b, e[5], c, e[7]);\n"
        f"else gemm_nn<{rows}, {vectors}, false>(m, n, k, a, e[3], e[4], b, e[5], c, e[7]);",
        folder,
        width,
    )
    rng = np.random.default_rng(7)
    for m, n, k in EXTENTS:
        a = rng.standard_normal((m, k)).astype(TYPES[element])
        b = rng.standard_normal((k, n)).astype(TYPES[element])
        for layout in ("C", "F"):
            stored = np.array(a, order=layout)
            strides = [s // stored.itemsize for s in stored.strides]
            c = np.full((m + 1, n + 3), CANARY)
            call(kernel, stored, b, c, [m, n, k, *strides, n, 0, n + 3])
            close(c[:m, :n], a, b)
            assert (c[m:] == CANARY).all()
            assert (c[:, n:] == CANARY).all()
            before = c[:m, :n].copy()
            call(kernel, stored, b, c, [m, n, k, *strides, n, 1, n + 3])
            np.testing.assert_allclose(c[:m, :n], 2 * before, rtol=1e-5, atol=1e-5)
            assert (c[:, n:] == CANARY).all()


@pytest.mark.parametrize(("m", "n", "k"), EXTENTS)
def test_nn_static_extents_and_prefetch(folder, m, n, k):
    kernel = build(
        f"gemm_nn<6, 4, false, {m}, {n}, true>({m}, {n}, {k}, (const float*)va, {k}, 1, "
        f"(const float*)vb, {n}, c, {n}, 0);",
        folder,
        64,
    )
    rng = np.random.default_rng(8)
    a, b = rng.standard_normal((m, k)), rng.standard_normal((k, n))
    a, b = a.astype(np.float32), b.astype(np.float32)
    c = np.full(m * n + 8, CANARY)
    call(kernel, a, b, c, [m, n, k])
    close(c[: m * n].reshape(m, n), a, b)
    assert (c[m * n :] == CANARY).all()


def check_rows_by_rows(kernel, element, large):
    """Compare a product of rows with rows, stored and accumulated, and what lies around it."""
    rng = np.random.default_rng(9)
    for m, n, k in [*EXTENTS, large]:
        a = rng.standard_normal((m, k)).astype(TYPES[element])
        b = rng.standard_normal((n, k)).astype(TYPES[element])
        c = np.full((m + 1, n + 3), CANARY)
        call(kernel, a, b, c, [m, n, k, 0, n + 3])
        close(c[:m, :n], a, b.T)
        before = c[:m, :n].copy()
        call(kernel, a, b, c, [m, n, k, 1, n + 3])
        np.testing.assert_allclose(c[:m, :n], 2 * before, rtol=1e-5, atol=1e-5)
        assert (c[m:] == CANARY).all()
        assert (c[:, n:] == CANARY).all()


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("element", TYPES)
def test_dot_any_extent(folder, width, element):
    kernel = build(
        f"auto a = (const {element}*)va; auto b = (const {element}*)vb;\n"
        "if (e[3]) gemm_dot<4, 3, true>(m, n, k, a, k, b, k, c, e[4]);\n"
        "else if (n == 5) gemm_dot<4, 3, false, 2, 5>(m, n, k, a, k, b, k, c, e[4]);\n"
        "else gemm_dot<4, 3, false, 1>(m, n, k, a, k, b, k, c, e[4]);",
        folder,
        width,
    )
    check_rows_by_rows(kernel, element, (37, 5, 1030))
    check_rows_by_rows(kernel, element, (37, 7, 530))


@pytest.mark.parametrize("width", [64, 32, 16])
def test_dot_in_pairs_of_vectors(folder, width):
    kernel = build(
        "auto a = (const so::bf16*)va; auto b = (const so::bf16*)vb;\n"
        "static float rows[37 * 2080]; pack_rows<true>(a, k, k, m, rows, 2080);\n"
        "if (e[3]) gemm_dot<4, 3, true, 0, -1, true>(m, n, k, rows, 2080, b, k, c, e[4]);\n"
        "else if (n == 5) gemm_dot<4, 3, false, 2, 5, true>(m, n, k, rows, 2080, b, k, c, e[4]);\n"
        "else gemm_dot<4, 3, false, 1, -1, true>(m, n, k, rows, 2080, b, k, c, e[4]);",
        folder,
        width,
    )
    rng = np.random.default_rng(9)
    for m, n, k in [*EXTENTS, (37, 5, 2070), (37, 7, 530)]:
        a = rng.standard_normal((m, k)).astype(np.float32).view(np.uint32) & 0xFFFF0000
        b = rng.standard_normal((n, k)).astype(np.float32).view(np.uint32) & 0xFFFF0000
        c = np.full((m + 1, n + 3), CANARY)
        for times in (1, 2):
            stored = [(x >> 16).astype(np.uint16) for x in (a, b)]
            call(kernel, *stored, c, [m, n, k, times - 1, n + 3])
            close(c[:m, :n] / times, a.view(np.float32), b.view(np.float32).T)
        assert (c[m:] == CANARY).all()
        assert (c[:, n:] == CANARY).all()


@pytest.mark.parametrize("width", [64, 32, 16])
def test_swapped_any_extent(folder, width):
    kernel = build(
        "auto a = (const float*)va; auto b = (const float*)vb;\n"
        "static float turned[200 * 80], strip[STRIP * 80];\n"
        "if (e[3]) gemm_swapped<6, 2, true, 48>(m, n, k, a, k, 1, b, k, turned, strip, c, e[4]);\n"
        "else gemm_swapped<6, 2, false, 48>(m, n, k, a, k, 1, b, k, turned, strip, c, e[4]);",
        folder,
        width,
    )
    check_rows_by_rows(kernel, "float", (37, 70, 131))
    check_rows_by_rows(kernel, "float", (64, 250, 96))
    check_rows_by_rows(kernel, "float", (64, 250, 0))


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("element", TYPES)
def test_packed_any_extent(folder, width, element):
    kernel = build(
        f"auto a = (const {element}*)va; auto b = (const {element}*)vb;\n"
        "static float panel[48 * 2 * VL];\n"
        "if (e[3]) gemm_packed<4, 2, true, -1, -1, 48>(m, n, k, a, k, 1, b, k, 1, panel, c, e[4]);\n"
        "else if (n == 70)\n"
        "  gemm_packed<4, 2, false, 37, 70, 48, true>(m, n, k, a, k, 1, b, k, 1, panel, c, e[4]);\n"
        "else gemm_packed<4, 2, false, -1, -1, 48>(m, n, k, a, k, 1, b, k, 1, panel, c, e[4]);",
        folder,
        width,
    )
    check_rows_by_rows(kernel, element, (37, 70, 131))
    check_rows_by_rows(kernel, element, (37, 71, 96))


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("element", TYPES)
def test_tall_any_extent(folder, width, element):
    kernel = build(
        f"auto a = (const {element}*)va; auto b = (const {element}*)vb;\n"
        "static float panels[48 * SHARED];\n"
        "if (e[3]) gemm_tall<5, 2, true, 48>(m, n, k, a, k, 1, b, k, 1, panels, c, e[4]);\n"
        "else gemm_tall<5, 2, false, 48>(m, n, k, a, k, 1, b, k, 1, panels, c, e[4]);",
        folder,
        width,
    )
    check_rows_by_rows(kernel, element, (147, 275, 131))
    check_rows_by_rows(kernel, element, (70, 131, 96))


@pytest.mark.parametrize("width", [64, 32, 16])
@pytest.mark.parametrize("element", TYPES)
def test_pack_any_strides(folder, width, element):
    kernel = build(
        f"pack((const {element}*)va, e[3], e[4], n, k, c, e[5]);",
        folder,
        width,
    )
    rng = np.random.default_rng(10)
    for _, n, k in [*EXTENTS, (0, 64, 64)]:
        whole = rng.standard_normal((n, 2 * k)).astype(TYPES[element])
        for operand in (
            np.ascontiguousarray(whole[:, :k]),
            np.asfortranarray(whole),
            whole[:, ::2],
        ):
            strides = [s // operand.itemsize for s in operand.strides]
            c = np.full((k, n + 5), CANARY)
            call(kernel, operand, operand, c, [0, n, k, *strides, n + 5])
            np.testing.assert_array_equal(c[:, :n], operand[:, :k].T.astype(np.float32))
            assert (c[:, n:] == CANARY).all()


def test_nan_and_infinity_stay_in_their_row_and_column(folder):
    kernel = build(
        "gemm_nn<6, 4, false>(m, n, k, (const float*)va, k, 1, (const float*)vb, n, c, n);",
        folder,
        64,
    )
    a = np.ones((5, 3), dtype=np.float32)
    b = np.ones((3, 21), dtype=np.float32)
    a[4, 2], b[1, 20] = np.nan, np.inf
    c = np.empty((5, 21), dtype=np.float32)
    call(kernel, a, b, c, [5, 21, 3])
    assert np.isnan(c[4]).all()
    assert np.isposinf(c[:4, 20]).all()
    assert (c[:4, :20] == 3).all()
