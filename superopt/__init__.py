"""superopt: a PyTorch function in, a faster one out, proven to compute the same thing.

In: a function or module (`superopt.optimize`), a `torch.export` file (the `superopt` command), or
an FX graph (`torch.compile(backend="superopt")`). Out: a callable that behaves like the original.
Public names are loaded on first use, so that `import superopt.ir` never loads torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it. Everything not listed here is private.
_EXPORTS: dict[str, str] = {
    "SuperoptError": "superopt.ir.errors",
    "optimize": "superopt.api",
    "Optimized": "superopt.api",
    "Plan": "superopt.plan",
    "lift": "superopt.frontend",
}

__all__ = ["Optimized", "Plan", "SuperoptError", "__version__", "lift", "optimize"]


def __getattr__(name: str) -> Any:
    """Load a public name from its module at first use."""
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module 'superopt' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
