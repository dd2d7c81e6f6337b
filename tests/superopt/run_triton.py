"""The whole pipeline with Triton's kernels interpreted, on CPU tensors; prints facts as JSON.

A process of its own, with TRITON_INTERPRET=1. A call that launches kernels counts as fast: the interpreter
says nothing about time.
"""

import ctypes
import json
import sys
from dataclasses import dataclass
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

import superopt
from superopt import cli, pipeline
from superopt.backends import triton_source, triton_variants
from superopt.calibrate import gpu_target
from superopt.codegen.triton import load
from superopt.ir.text import parse_graph
from superopt.verify.reference import DTYPES
from tests.codegen import triton_interpreter

GPU = SimpleNamespace(
    multi_processor_count=4, shared_memory_per_block_optin=96 << 10, L2_cache_size=1 << 20
)


def view(address: int, type_: Any) -> torch.Tensor:
    """Return a tensor over memory at an address."""
    dtype, strides = DTYPES[type_.dtype], type_.element_strides
    span = 1 + sum((n - 1) * s for n, s in zip(type_.shape, strides, strict=True))
    memory = (ctypes.c_char * (span * dtype.itemsize)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(type_.shape, strides)


@dataclass(frozen=True)
class Interpreted:
    """The Triton backend, its kernels run by the interpreter."""

    folder: Path
    device: ClassVar[torch.device] = torch.device("cpu")
    name: str = "triton"
    launches: ClassVar[list[str]] = []

    def usable(self):
        return True

    def variants(self, graph, count):
        return triton_variants(graph, count)

    def load(self, sources, limit_s=inf):
        return [self.entry(s) for s in sources]

    def entry(self, kernel):
        source, graph = triton_source(kernel), parse_graph(kernel.block)
        run = load(source, self.folder)
        types = [n.tensor for n in (*graph.inputs, *graph.outputs)]

        def launch(*addresses):
            self.launches.append(kernel.name)
            tensors = [view(a, t) for a, t in zip(addresses, types, strict=True)]
            inputs, outputs = tensors[: len(graph.inputs)], tensors[len(graph.inputs) :]
            triton_interpreter.allow(inputs, outputs)
            # the launcher makes its own results: let it take these
            made, empty = iter(outputs), torch.empty
            torch.empty = lambda *a, **k: next(made)
            try:
                run(*inputs)
            finally:
                torch.empty = empty

        return launch

    def timed(self, call, repeats):
        before = len(self.launches)
        call()
        return 1e-3 if len(self.launches) > before else 1e-2


def norm_gate(x: torch.Tensor, gain: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return F.silu(F.rms_norm(x, (x.shape[-1],), gain, 1e-6)) * x + shift


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.3, dim=-1) @ v


def facts(function: Any, inputs: tuple[torch.Tensor, ...], folder: Path) -> dict[str, Any]:
    """Optimize a function twice, searching and from the cache; say what came of it."""
    found = {}
    for run in ("searched", "restored"):
        fast = superopt.optimize(function, budget_s=1, backend="triton", cache=folder)
        fast.warmup(*inputs)
        (plan,) = fast.plans
        launched = len(Interpreted.launches)
        result, wanted = fast(*inputs), function(*(i.double() for i in inputs))
        found[run] = {
            "report": str(fast.report()),
            "improved": plan.program is not None,
            "kernels": [k.backend for k in plan.kernels.values()],
            "launches": len(Interpreted.launches) - launched,
            "error": float((result.double() - wanted).abs().max()),
            "dtype": str(result.dtype),
        }
    return found


def main(folder: Path) -> None:
    triton_interpreter.install()
    pipeline.backend_named = lambda name, place, device: Interpreted(place)
    pipeline.machine = lambda place, device: gpu_target("a GPU", GPU, 2e13, 2e14, 1e12)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    keys = tuple(draw(*s, dtype=torch.bfloat16) for s in ((3, 16), (9, 16), (9, 8)))
    results = {
        "norm": facts(norm_gate, (draw(3, 20), draw(20), draw(20)), folder),
        "attend": facts(attend, keys, folder),
    }
    artifact = folder / "artifact"
    command = ["optimize", "tests.superopt.run_triton:norm_gate", "-o", str(artifact), "--budget"]
    command += ["1", "--cache", str(folder), "-i", "f32[3,20]", "-i", "f32[20]", "-i", "f32[20]"]
    sys.stdout = sys.stderr
    codes = [cli.main([*command, "--backend", "triton"])]
    codes += [cli.main([verb, str(artifact)]) for verb in ("verify", "run", "bench")]
    sys.stdout = sys.__stdout__
    results["artifact"] = {"codes": codes, "files": [p.name for p in artifact.rglob("*.py")]}
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
