"""What can be tuned in a C++ kernel beside its block graph's tile sizes."""

from dataclasses import dataclass
from typing import Literal, final

Contraction = Literal["auto", "pack", "dot"]


@final
@dataclass(frozen=True, slots=True)
class CpuConfig:
    """Register tiles of the products and how their operands are brought into shape.

    `rows` x `vectors` is the register tile of products that broadcast one operand, `dot_rows` x
    `dot_columns` of those that run along the contracted dim. `contraction` decides for operands
    that are contiguous along the contracted dim: transpose them tile by tile ("pack"), run along
    them ("dot"), or go by the shape ("auto").
    """

    rows: int = 6
    vectors: int = 4
    dot_rows: int = 4
    dot_columns: int = 4
    contraction: Contraction = "auto"
    prefetch: bool = True
    unroll: int = 4
