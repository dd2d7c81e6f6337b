"""Runs block graphs in Triton's interpreter; a process of its own, with TRITON_INTERPRET=1.

Prints as JSON what was wrong with each graph, and with each of its mutants: lowerings from which one
kind of mask is missing.
"""

import json
import re
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from superopt.codegen.triton.compile import load
from superopt.codegen.triton.lower import Source, TritonConfig, _Kernel, lower
from superopt.ir.graph import Graph
from tests.block_graphs import BLOCK_GRAPHS
from tests.codegen import triton_interpreter
from tests.codegen.meaning import check, tensor

_TEXT_MUTANTS = {
    "loads": (r"(tl\.load\([^=]*), mask=.*\)", r"\1)"),
    "filling": (r", other=0\)", ")"),
    "stores": (r"(tl\.store\(.*), mask=.*\)", r"\1)"),
}
_METHOD_MUTANTS = {"reductions": "reduced", "products": "zeroed", "accumulators": "accumulate"}
MUTANTS = (*_TEXT_MUTANTS, *_METHOD_MUTANTS)


def run(source: Source, inputs, folder):
    """Run a kernel; every element of its results has to be written, and nothing else."""
    results, empty = [], torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        made.fill_(float("nan") if made.is_floating_point() else 99)
        results.append(made)
        triton_interpreter.allow(inputs, results)
        return made

    torch.empty = poisoned
    triton_interpreter.allow(inputs, results)
    try:
        return load(source, folder)(*inputs)
    finally:
        torch.empty = empty
        triton_interpreter.allow([], [])


def difference(graph: Graph, source: Source, folder: Path) -> str:
    """Say how a kernel differs from its meaning; nothing where it does not."""
    generator = torch.Generator().manual_seed(3)
    inputs = [tensor(i, generator) for i in graph.inputs]
    try:
        check(graph, inputs, run(source, inputs, folder))
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:400]
    return ""


@contextmanager
def without_masks(method: str):
    """Lower as if one method of the lowering masked nothing."""
    original, masked = getattr(_Kernel, method), _Kernel.masked

    def mutated(self, *args):
        _Kernel.masked = lambda self, node, value, *rest: value
        try:
            return original(self, *args)
        finally:
            _Kernel.masked = masked

    setattr(_Kernel, method, mutated)
    try:
        yield
    finally:
        setattr(_Kernel, method, original)


def mutant(graph: Graph, kind: str) -> Source:
    """Return the kernel without one kind of mask."""
    if kind in _METHOD_MUTANTS:
        with without_masks(_METHOD_MUTANTS[kind]):
            return lower(graph, TritonConfig(), graph.name)
    source = lower(graph, TritonConfig(), graph.name)
    return replace(source, text=re.sub(*_TEXT_MUTANTS[kind], source.text))


def main(names: list[str], mutated: list[str]) -> None:
    triton_interpreter.install()
    results: dict[str, dict[str, str]] = {"": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            graph = BLOCK_GRAPHS[name]()
            source = lower(graph, TritonConfig(), graph.name)
            results[""][name] = difference(graph, source, Path(folder))
            for kind in MUTANTS if name in mutated else ():
                changed = mutant(graph, kind)
                if changed.text != source.text:
                    found = difference(graph, changed, Path(folder))
                    results.setdefault(kind, {})[name] = found
    print(json.dumps(results))


if __name__ == "__main__":
    main(*(argument.split(",") for argument in sys.argv[1:3]))
