"""Random legal block graphs in C++ against the naive oracle; nothing outside their tensors is touched."""

import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import numpy as np
import pytest

from superopt.codegen.cpu.compile import compile_source, find_compiler, load_kernel
from superopt.codegen.cpu.config import CpuConfig
from superopt.codegen.cpu.lower import Source, lower
from superopt.codegen.errors import CodegenError
from superopt.ir.graph import Graph
from superopt.ir.text import parse_graph, print_graph
from tests.ir.naive import poison, run_naive
from tests.strategies import NUMPY, arrays_for, random_block_graph

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")

UNITS, UNIT, STEPS, WIDEST = 4, 10, 8, 40
OLDER = (("-mno-avx512f",), ("-march=x86-64",)) if platform.machine() == "x86_64" else ()
FLAGS = ((), *OLDER, ("-DSO_VECTOR_BYTES=16",))
"""This processor, one with vectors of half the width, one without fused multiply-add; one that has more."""
GUARD = 64


def lowered() -> list[tuple[int, Graph, Source]]:
    """Draw graphs in float32 until there are enough that have a C++ form."""
    found = []
    seed = 0
    while len(found) < UNITS * UNIT:
        seed += 1
        graph = random_block_graph(Random(seed), STEPS, widest=WIDEST)
        if graph is not None:
            graph = parse_graph(print_graph(graph).replace("f64", "f32"))
            try:
                found.append((seed, graph, lower(graph, CpuConfig(), graph.name)))
            except CodegenError:
                continue
    return found


def together(sources: list[Source]) -> str:
    """Return one translation unit with all kernels, numbered: the headers are compiled once."""
    texts = []
    for i, source in enumerate(sources):
        inside = source.text.replace('#include "tile.h"', f'#include "tile.h"\nnamespace k{i} {{')
        texts.append(inside.replace(f"{source.symbol}(", f"{source.symbol}_{i}(") + "}\n")
    return "".join(texts)


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of `array` inside memory that holds what nothing right contains, and all of it."""
    held = poison((array.size + 2 * GUARD,), array.dtype)
    held[GUARD : GUARD + array.size] = array.ravel()
    return held[GUARD : GUARD + array.size].reshape(array.shape), held


def test_random_block_graphs(tmp_path: Path) -> None:
    graphs = lowered()
    units = [graphs[i : i + UNIT] for i in range(0, len(graphs), UNIT)]
    texts = [together([source for *_, source in unit]) for unit in units]
    with ThreadPoolExecutor() as pool:
        flags = [FLAGS[i % len(FLAGS)] for i in range(len(texts))]
        paths = list(
            pool.map(lambda t, f: compile_source(t, tmp_path, extra_flags=f), texts, flags)
        )
    for path, unit in zip(paths, units, strict=True):
        for number, (seed, graph, source) in enumerate(unit):
            kernel = load_kernel(path, source.pointers, f"{source.symbol}_{number}")
            arrays = arrays_for(graph, seed, infinite=seed % 3 == 0)
            with np.errstate(all="ignore"):
                wanted = run_naive(graph, arrays)
            inputs = [guarded(a) for a in arrays]
            outputs = [guarded(poison(o.shape, NUMPY[o.tensor.dtype])) for o in graph.outputs]
            kernel(*(a.ctypes.data for a, _ in (*inputs, *outputs)))
            for (got, held), want in zip(outputs, wanted, strict=True):
                text = f"graph of seed {seed}\n{graph}"
                np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3, err_msg=text)
                clean = poison((GUARD,), held.dtype)
                np.testing.assert_array_equal(held[:GUARD], clean, err_msg=text)
                np.testing.assert_array_equal(held[-GUARD:], clean, err_msg=text)
