"""Import generated Triton modules, and compile them for a named architecture without a GPU.

In: a `Source`. Out: its launcher `run`, or the bytes of a cubin. Triton decides at its import
whether kernels run in its interpreter (environment variable TRITON_INTERPRET=1).
"""

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from superopt.codegen.errors import CodegenError
from superopt.codegen.triton.lower import Source

_POINTERS: Final = {
    "f64": "*fp64",
    "f32": "*fp32",
    "f16": "*fp16",
    "bf16": "*bf16",
    "bool": "*i1",
}


def load(source: Source, folder: Path) -> Callable[..., Any]:
    """Write the module under `folder` (Triton reads kernels from files); return its `run`."""
    run: Callable[..., Any] = _module(source, folder).run
    return run


def _module(source: Source, folder: Path) -> ModuleType:
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    path = folder / f"{source.symbol}_{digest}.py"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(source.text)
    spec = importlib.util.spec_from_file_location(f"superopt_triton_{digest}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def compile_ahead(source: Source, arch: int, folder: Path) -> bytes:
    """Compile for an NVIDIA architecture (80, 90, …) and return the cubin; needs no GPU.

    Raises:
        CodegenError: Triton refuses the source.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(_module(source, folder), source.symbol)
    signature = {
        name: _POINTERS.get(dtype, f"*{dtype}")
        for name, dtype in zip(kernel.arg_names, source.pointers, strict=True)
    }
    options = {"num_warps": source.config.warps, "num_stages": source.config.stages}
    try:
        built = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs={}),
            target=GPUTarget("cuda", arch, 32),
            options=options,
        )
    except Exception as error:
        raise CodegenError(f"Triton refuses {source.symbol} for sm_{arch}: {error}") from error
    cubin: bytes = built.asm["cubin"]
    return cubin
