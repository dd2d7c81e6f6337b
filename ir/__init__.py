"""μGraphs: what a tensor program is, at kernel, block and thread level.

In: nothing (the lowest layer; it needs no framework). Out: immutable, interned graphs with one
text form, one checker, one meaning (`superopt.ir.semantics`) and one interpreter over domains.
The levels follow Mirage (Wu et al., OSDI 2025, section 2); the maps are generalised to several
loops, nested splits and ragged (masked) edges.
"""

from superopt.ir import composite

__all__ = ["composite"]
