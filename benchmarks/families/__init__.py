"""Programs beside the suite: six families, written as users write them, at sizes that divide nothing.

The suite holds what everybody knows; these hold what a user brings. Nothing may be tuned to one of them.
"""

from typing import Final

from benchmarks.families import attention, blocks, gates, kernel_methods, losses, norms

PROGRAMS: Final = (
    *attention.WORKLOADS,
    *losses.WORKLOADS,
    *gates.WORKLOADS,
    *norms.WORKLOADS,
    *kernel_methods.WORKLOADS,
    *blocks.WORKLOADS,
)
