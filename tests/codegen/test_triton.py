"""Generated Triton against the meaning of block graphs, and compiled for GPUs that are not here.

Triton chooses its interpreter when it is imported, so kernels run in a second process.
"""

import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import max_shared_mem
from triton.runtime import driver

from superopt.codegen.errors import CodegenError
from superopt.codegen.triton.compile import load_entries
from superopt.codegen.triton.expressions import LOWER
from superopt.codegen.triton.lower import TritonConfig, configs, lower
from superopt.ir import build as b
from superopt.ir.build import BlockBuilder
from superopt.ir.check import verify_graph
from superopt.ir.graph import Graph
from superopt.ir.text import parse_graph
from superopt.ir.types import DType
from tests.block_graphs import BLOCK_GRAPHS
from tests.codegen import compile_triton
from tests.codegen.meaning import check, launched, tensor

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
KINDS = ("loads", "filling", "stores", "reductions", "products", "accumulators")
ARCHITECTURES = (80, 90)

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
def binaries(request, tmp_path_factory) -> Iterator[dict[tuple[str, int], "Future[str]"]]:
    """Compile, in two processes, for every test that was selected; it goes on while others run."""
    found = {}
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        folder = tmp_path_factory.mktemp("triton")
        for item in request.session.items:
            if getattr(item, "originalname", "") == test_compiles_without_a_gpu.__name__:
                name, arch = item.callspec.params["name"], item.callspec.params["arch"]
                found[name, arch] = pool.submit(compile_triton.error, name, arch, folder)
        yield found
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def differences(binaries) -> dict[str, dict[str, str]]:
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_mask_shows(differences, kind):
    found = differences[kind]
    assert len(found) >= 3
    assert [name for name, error in found.items() if not error] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", BLOCK_GRAPHS)
def test_compiles_without_a_gpu(binaries, name, arch):
    error = binaries[name, arch].result()
    skip_on_defects_of_old_versions(error)
    assert error == ""


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # raised inside Triton
@pytest.mark.parametrize("name", BLOCK_GRAPHS)
def test_kernels_on_a_gpu_compute_the_meaning(tmp_path, name):
    """In every configuration; nothing is written beside the results."""
    graph = BLOCK_GRAPHS[name]()
    generator = torch.Generator().manual_seed(3)
    inputs = [tensor(i, generator, "cuda") for i in graph.inputs]
    sources = [lower(graph, c, name) for c in configs(graph)]
    for entry in load_entries(sources, tmp_path):
        if isinstance(entry, CodegenError):
            skip_on_defects_of_old_versions(str(entry))
            raise entry
        found = launched(entry, graph, inputs)
        check(graph, [i.cpu() for i in inputs], [f.cpu() for f in found])


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


def block_of(rows: int, *, count: int, dtype: DType) -> Graph:
    x, w = b.input_("x", (count, 64), dtype), b.input_("w", (64, 64), dtype)
    build = BlockBuilder("rows", grid={"m": -(-count // rows)})
    product = b.matmul(
        *(b.cast(t, DType.F32) for t in (build.load(x, ("m", rows), 64), build.load(w, 64, 64)))
    )
    build.store(b.cast(product, dtype), (count, 64), ("m", rows), 64)
    return build.graph()


def test_addresses_are_as_wide_as_the_tensor_needs():
    near, far = (
        lower(block_of(64, count=c, dtype=DType.F16), TritonConfig(), "rows").text
        for c in ((1 << 25) - 1, (1 << 25) + 1)
    )
    assert "tl.int64" not in near
    assert "x_ptr + tl.cast(m[:, None], tl.int64) * 64" in far
    assert "out0_ptr + tl.cast(m[:, None], tl.int64) * 64" in far


def test_a_launch_has_at_most_two_to_the_31_blocks():
    with pytest.raises(CodegenError, match="2147483648 blocks"):
        lower(block_of(1, count=1 << 31, dtype=DType.F16), TritonConfig(), "rows")


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_tensor_cores_get_what_memory_holds(dtype):
    text = lower(block_of(64, count=64, dtype=dtype), TritonConfig(), "rows").text
    assert "tl.dot(x, w, " in text


def test_products_of_float32_are_of_float32():
    graph = block_of(64, count=64, dtype=DType.F32)
    text = lower(graph, configs(graph)[0], "rows").text
    assert 'tl.dot(x, w, input_precision="ieee")' in text
    assert {c.precision for c in configs(graph)} == {"ieee", "tf32x3"}  # never tf32


@pytest.mark.parametrize("name", ["norm-linear", "gated-mlp-bf16", "reductions"])
def test_every_configuration_is_another_kernel(name):
    graph = BLOCK_GRAPHS[name]()
    sources = [lower(graph, c, name) for c in configs(graph)]
    assert len({(s.text, s.config.warps, s.config.stages) for s in sources}) == len(sources) >= 3


def test_four_warps_share_a_product_of_sixty_four_rows():
    few, many = (configs(block_of(r, count=r, dtype=DType.BF16))[0] for r in (32, 64))
    assert (few.warps, many.warps) == (2, 4)


class Driver:
    """Stands in for CUDA's: loads anything that fits, and records what is launched."""

    def __init__(self, shared_bytes):
        self.launches = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": shared_bytes},
            load_binary=lambda name, *rest: (object(), name, 32, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 1234

    def launcher_cls(self, source, metadata):
        def launch(x, y, z, stream, function, *rest):
            self.launches.append(((x, y, z), stream, bool(source.attrs), rest[-3:]))

        return launch


@pytest.fixture
def gpu(monkeypatch):
    """Make a driver the current one."""

    def use(shared_bytes):
        max_shared_mem.cache_clear()
        found = Driver(shared_bytes)
        monkeypatch.setattr(driver, "_active", found)
        return found

    yield use
    gc.collect()  # kernels are unloaded by the driver that loaded them
    max_shared_mem.cache_clear()


@pytest.mark.filterwarnings("ignore")  # raised inside Triton
def test_entries_launch_by_addresses_on_the_current_stream(gpu, tmp_path):
    found = gpu(200 << 10)
    graph = block_of(16, count=100, dtype=DType.BF16)
    (entry,) = load_entries([lower(graph, configs(graph)[0], "rows")], tmp_path)
    entry(4096, 8192, 12288)
    entry(4096 + 2, 8192, 12288)  # compiled again, for addresses that are not aligned
    entry(4096 + 2, 8192, 12288)
    assert found.launches == [
        ((7, 1, 1), 1234, True, (4096, 8192, 12288)),
        ((7, 1, 1), 1234, False, (4098, 8192, 12288)),
        ((7, 1, 1), 1234, False, (4098, 8192, 12288)),
    ]


@pytest.mark.filterwarnings("ignore")  # raised inside Triton
def test_a_kernel_that_does_not_fit_is_a_failed_candidate(gpu, tmp_path):
    gpu(1 << 10)
    graph = block_of(16, count=100, dtype=DType.BF16)
    small = lower(BLOCK_GRAPHS["scalars"](), TritonConfig(), "scalars")
    found = load_entries([lower(graph, configs(graph)[0], "rows"), small], tmp_path)
    assert "shared memory" in str(found[0])
    assert isinstance(found[0], CodegenError)
    assert callable(found[1])
