"""Lift PyTorch programs to kernel graphs.

In: a function or module with example arguments, a `torch.export` program, or an FX graph. Out: a
`Lifted` program: a kernel graph of primitives and whole composites (softmax, norms, attention), the
parameters that are further inputs of it, and how arguments and results are laid out. Operators without
a rule stay as opaque nodes, so that every program that PyTorch exports runs.
"""

from superopt.frontend.errors import LiftError
from superopt.frontend.lift import Lifted, Mutation, lift, lift_exported, lift_fx

__all__ = ["LiftError", "Lifted", "Mutation", "lift", "lift_exported", "lift_fx"]
