"""Generated Triton against the meaning of block graphs, and compiled for GPUs that are not here.

Triton chooses its interpreter when it is imported, so kernels run in a second process.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton

from superopt.codegen.errors import CodegenError
from superopt.codegen.triton.compile import compile_ahead
from superopt.codegen.triton.expressions import LOWER
from superopt.codegen.triton.lower import TritonConfig, configs, lower
from superopt.ir.check import verify_graph
from superopt.ir.text import parse_graph
from tests.block_graphs import BLOCK_GRAPHS

ROOT = Path(__file__).parents[2]
MUTATED = (
    "searched-residual",
    "attention-f16",
    "gated-mlp",
    "norm-linear",
    "norm-linear-f16",
    "two-loops",
    "three-passes",
    "nested-loops",
    "reductions",
    "reductions-i64",
    "accumulators",
    "accumulators-f16",
    "accumulators-i32",
    "rescaled-twice",
    "split-k",
    "two-axes-on-one-dim",
    "masks-and-labels",
    "half-arithmetic-f16",
    "positions",
)
CAUGHT = {
    "loads": 1.0,
    "stores": 1.0,
    "reductions": 0.8,
    "products": 0.9,
    "accumulators": 1.0,
    "filling": 0.3,
}
"""The least share of graphs that must fail without a kind of mask. Zeros past the edge of a load matter
only where both operands of a product have something there."""
COMPILED = (
    "searched-causal_gqa",
    "attention-bf16",
    "accumulators-f16",
    "gated-mlp",
    "norm-linear-f16",
    "positions",
    "accumulators-bool",
    "batched-products-bf16",
    "other-products",
    "moves",
    "lookups",
    "float-ops-bf16",
    "integer-ops-i8",
)

DEFECTS = {
    "get_bf16": "the interpreter of Triton 3.6 and 3.7 has no bfloat16 constants",
    "only 0-dimensional arrays": "the interpreter of Triton 3.6 loops to no computed bound",
    "PassManager::run failed": "Triton 3.6 and 3.7 do not place this gather's threads",
}


def skip_on_defects_of_old_versions(error: str) -> None:
    """Skip what Triton itself cannot do before 3.8; such a kernel is refused, and others are used."""
    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 8):
        for words, reason in DEFECTS.items():
            if words in error:
                pytest.skip(reason)


@pytest.fixture(scope="module")
def differences() -> dict[str, dict[str, str]]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.codegen.run_triton"]
    done = subprocess.run(
        [*command, ",".join(BLOCK_GRAPHS), ",".join(MUTATED)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", BLOCK_GRAPHS)
def test_interpreted_kernels_compute_the_meaning(differences, name):
    skip_on_defects_of_old_versions(differences[""][name])
    assert differences[""][name] == ""


@pytest.mark.parametrize("kind", CAUGHT)
def test_a_missing_mask_shows(differences, kind):
    found = differences[kind]
    assert len(found) >= 3
    missed = [name for name, error in found.items() if not error]
    assert len(missed) <= (1 - CAUGHT[kind]) * len(found), missed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_gpu(tmp_path, name, arch):
    graph = BLOCK_GRAPHS[name]()
    try:
        binary = compile_ahead(lower(graph, configs(graph)[0], name), arch, tmp_path)
    except CodegenError as error:
        skip_on_defects_of_old_versions(str(error))
        raise
    assert binary[:4] == b"\x7fELF"


@pytest.mark.parametrize("name", BLOCK_GRAPHS)
def test_the_graphs_are_legal(name):
    verify_graph(BLOCK_GRAPHS[name]())


def test_every_op_has_a_rule_or_a_reason():
    assert LOWER.missing() == []


def test_the_source_says_what_it_computes():
    graph = BLOCK_GRAPHS["gated-mlp"]()
    text = lower(graph, TritonConfig(), "gated mlp").text
    listing = re.search(r"(    // superopt.*?\n    })\n", text, re.DOTALL)
    assert listing is not None
    assert parse_graph("\n".join(line[4:] for line in listing[1].splitlines())) == graph
    assert "def gated_mlp(x_ptr, g_ptr, u_ptr, out0_ptr)" in text
