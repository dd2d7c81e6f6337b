"""Lower block graphs to C++17 with OpenMP and vector types, compile them and load them.

In: a block graph and a `CpuConfig`. Out: a `Source`, and from it a `Kernel`: a shared object to call
with the addresses of inputs and outputs. The generated source includes the headers in `runtime/`,
which are shipped with the package.
"""

from superopt.codegen.cpu.compile import find_compiler
from superopt.codegen.cpu.config import CpuConfig, configs
from superopt.codegen.cpu.expressions import LOWER
from superopt.codegen.cpu.kernel import Kernel, compile_many
from superopt.codegen.cpu.lower import Source, lower

__all__ = [
    "LOWER",
    "CpuConfig",
    "Kernel",
    "Source",
    "compile_many",
    "configs",
    "find_compiler",
    "lower",
]
