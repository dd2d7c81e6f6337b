"""Import generated Triton modules, compile them, and make them callable with addresses.

In: a `Source`. Out: its launcher `run`, a compiled kernel for an architecture (which needs no GPU), or
an entry that takes the addresses of inputs, then of outputs, and launches on the current stream.
Triton decides at its import whether kernels run in its interpreter (TRITON_INTERPRET=1).
"""

import hashlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from superopt.codegen.errors import CodegenError
from superopt.codegen.triton.lower import Source, launch_options

Entry = Callable[..., None]

_POINTERS: Final = {
    "f64": "*fp64",
    "f32": "*fp32",
    "f16": "*fp16",
    "bf16": "*bf16",
    "bool": "*i1",
}
_ALIGNMENT: Final = 16
"""Bytes; what Triton's widest memory access wants."""


def load(source: Source, folder: Path) -> Callable[..., Any]:
    """Write the module under `folder` (Triton reads kernels from files); return its `run`."""
    run: Callable[..., Any] = _module(source, folder).run
    return run


def compile_ahead(source: Source, arch: int, folder: Path) -> bytes:
    """Compile for an NVIDIA architecture (80, 90, …) and return the cubin; needs no GPU.

    Raises:
        CodegenError: Triton refuses the source.
    """
    from triton.backends.compiler import GPUTarget

    built = _compiled(source, folder, GPUTarget("cuda", arch, 32), aligned=True)
    cubin: bytes = built.asm["cubin"]
    return cubin


def load_entries(sources: Sequence[Source], folder: Path) -> list[Entry | CodegenError]:
    """Compile for the current device, several at a time; failures are returned in their place."""
    from triton.runtime import driver

    target = driver.active.get_current_target()

    def attempt(source: Source) -> Any:
        try:
            return _compiled(source, folder, target, aligned=True)
        except CodegenError as error:
            return error

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        built = list(pool.map(attempt, sources))
    return [
        b if isinstance(b, CodegenError) else _entry(s, folder, target, b)
        for s, b in zip(sources, built, strict=True)
    ]


def _entry(source: Source, folder: Path, target: Any, built: Any) -> Entry | CodegenError:
    """Return what launches a compiled kernel, and one for pointers that are not aligned."""
    grid = (source.blocks, 1, 1)
    try:
        aligned = built[grid]
    except Exception as error:  # Triton's driver raises its own types: too much shared memory, …
        return CodegenError(f"{source.symbol} does not load: {error}")
    plain: list[Entry] = []

    def launch(*addresses: int) -> None:
        bits = 0
        for address in addresses:
            bits |= address
        if not bits % _ALIGNMENT:
            aligned(*addresses)
            return
        if not plain:
            plain.append(_compiled(source, folder, target, aligned=False)[grid])
        plain[0](*addresses)

    return launch


def _compiled(source: Source, folder: Path, target: Any, *, aligned: bool) -> Any:
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(_module(source, folder), source.symbol)
    signature = {
        name: _POINTERS.get(dtype, f"*{dtype}")
        for name, dtype in zip(kernel.arg_names, source.types, strict=True)
    }
    divisible = [["tt.divisibility", _ALIGNMENT]]
    attributes = {(i,): divisible for i in range(len(signature))} if aligned else {}
    try:
        return triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs={}, attrs=attributes),
            target=target,
            options=launch_options(source.config),
        )
    except Exception as error:  # Triton raises whatever its passes meet
        raise CodegenError(f"Triton refuses {source.symbol}: {error}") from error


def _module(source: Source, folder: Path) -> ModuleType:
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:32]
    name = f"superopt_triton_{digest}"
    found = sys.modules.get(name)
    if found is not None:
        return found
    path = folder / f"{source.symbol[:80]}_{digest}.py"
    _write(path, source.text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module


def _write(path: Path, text: str) -> None:
    """Write the file where it is not there as a whole already, by one rename."""
    try:
        if path.read_text(encoding="utf-8") == text:
            return
    except (OSError, UnicodeDecodeError):
        pass
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".writing-", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)
