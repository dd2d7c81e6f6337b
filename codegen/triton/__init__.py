"""Lower block graphs to readable Triton source.

In: a tile program and a GPU target. Out: Triton source that runs on a GPU, runs in Triton's
interpreter, and compiles ahead of time for a named architecture.
"""

from superopt.codegen.triton.compile import compile_ahead, load, load_entries
from superopt.codegen.triton.expressions import LOWER
from superopt.codegen.triton.lower import Source, TritonConfig, configs, lower

__all__ = [
    "LOWER",
    "Source",
    "TritonConfig",
    "compile_ahead",
    "configs",
    "load",
    "load_entries",
    "lower",
]
