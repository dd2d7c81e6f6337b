"""Compiles block graphs for GPUs that are not here; imported by the processes that do it in parallel."""

from pathlib import Path

from superopt.codegen.errors import CodegenError
from superopt.codegen.triton.compile import compile_ahead
from superopt.codegen.triton.lower import configs, lower
from tests.block_graphs import BLOCK_GRAPHS


def error(name: str, arch: int, folder: Path) -> str:
    """Say why a graph's kernel does not become a binary; nothing where it does."""
    graph = BLOCK_GRAPHS[name]()
    try:
        binary = compile_ahead(lower(graph, configs(graph)[0], name), arch, folder)
    except CodegenError as refused:
        return str(refused)
    return "" if binary[:4] == b"\x7fELF" else "no ELF file"
