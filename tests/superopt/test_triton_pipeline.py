"""Plans of the Triton backend: made, cached, restored, certified and stored, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import superopt
from superopt import pipeline
from superopt.backends import backend_named, triton_source, triton_variants
from superopt.calibrate import gpu_target
from superopt.errors import Unsupported
from superopt.plan import KernelSource
from superopt.runtime import build_program
from superopt.search.schedule import derive
from superopt.search.tiling import best_tiles
from tests.block_graphs import BLOCK_GRAPHS
from tests.search.programs import PROGRAMS
from tests.search.test_schedule import prepared, whole_region
from tests.superopt.test_runtime import chain

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    command = [sys.executable, "-W", "ignore", "-m", "tests.superopt.run_triton"]
    done = subprocess.run(
        [*command, str(tmp_path_factory.mktemp("triton"))],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["norm", "attend"])
@pytest.mark.parametrize("run", ["searched", "restored"])
def test_a_plan_of_triton_kernels_is_found_and_found_again(facts, name, run):
    found = facts[name][run]
    assert found["improved"], found["report"]
    assert set(found["kernels"]) == {"triton"}
    assert found["launches"] == len(found["kernels"])
    assert found["error"] < (2e-2 if found["dtype"] == "torch.bfloat16" else 2e-6)
    assert found["report"] == facts[name]["searched"]["report"]


def test_an_artifact_of_triton_kernels_verifies_and_runs(facts):
    assert facts["artifact"]["codes"] == [0, 0, 0, 0]
    assert len(facts["artifact"]["files"]) == 1


def test_backends_go_by_the_device(tmp_path):
    assert backend_named("auto", tmp_path, torch.device("cpu")).name == "cpu"
    for name in ("auto", "triton"):
        chosen = backend_named(name, tmp_path, CUDA)
        assert (chosen.name, chosen.device) == ("triton", CUDA)
    for name, device in (("cpu", CUDA), ("triton", torch.device("cpu")), ("auto", "meta")):
        with pytest.raises(Unsupported, match=str(device)):
            backend_named(name, tmp_path, torch.device(device))
    with pytest.raises(Unsupported, match="auto"):
        backend_named("tritn", tmp_path, CUDA)


def test_tensors_on_several_devices_run_as_they_were(tmp_path):
    fast = superopt.optimize(lambda x, y: x + y, cache=tmp_path)
    fast.warmup(torch.ones(2), torch.ones(2, device="meta"))
    assert "several devices" in str(fast.report().unplanned)


def test_stored_kernels_are_read_as_they_were_generated():
    graph = BLOCK_GRAPHS["gated-mlp-bf16"]()
    variants = [v for v in triton_variants(graph, 6) if isinstance(v, KernelSource)]
    assert len({str(v.config) for v in variants}) == 6
    source = triton_source(variants[1])
    assert source.types == ("bf16",) * 4
    assert source.blocks == 6
    assert source.config.stages == variants[1].config["stages"]


def test_programs_for_a_gpu_allocate_there_and_set_the_device():
    graph, kernels = chain(3)
    text = build_program(graph, kernels, device=CUDA).source
    assert "with on_device():" in text
    assert "work = make_work()" in text
    assert "pool" not in text


def test_tiles_of_a_gpu_fit_its_memory():
    def machine(staging):
        properties = SimpleNamespace(
            multi_processor_count=100, shared_memory_per_block_optin=staging
        )
        return gpu_target("a GPU", properties, 5e13, 8e14, 3e12)

    (schedule, *_) = derive(whole_region(prepared(PROGRAMS["norm_linear"])))
    counts = [len(best_tiles(schedule, machine(s), 512)) for s in (1 << 8, 8 << 10, 1 << 20)]
    assert 0 == counts[0] < counts[1] < counts[2]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # raised inside Triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_attention_on_a_gpu(tmp_path, monkeypatch, dtype):
    """The plan is used even where the original is as fast: its kernels have to be right."""
    monkeypatch.setattr(pipeline, "_GAIN", 1e3)

    def attend(q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * 0.125, dim=-1) @ v

    q, k, v = (torch.randn(8, n, 64, device="cuda").to(dtype) for n in (256, 1024, 1024))
    fast = superopt.optimize(attend, budget_s=30, cache=tmp_path)
    fast.warmup(q, k, v)
    torch.testing.assert_close(fast(q, k, v), attend(q, k, v), rtol=2e-2, atol=2e-3)
    assert fast.plans[0].target.startswith("cuda: ")
    assert fast.plans[0].program is not None, fast.report()
    assert fast.plans[0].kernels
    shifted = [
        torch.randn(t.numel() + 1, device="cuda").to(dtype)[1:].view(t.shape) for t in (q, k, v)
    ]
    torch.testing.assert_close(fast(*shifted), attend(*shifted), rtol=2e-2, atol=2e-3)
