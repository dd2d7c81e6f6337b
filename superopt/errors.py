"""Errors of the product layer: what went wrong, where, and what to do next.

In: data about the failure. Out: exceptions that a user can act on. `LiftError` and `CodegenError` stand
with the packages that raise them; all derive from `SuperoptError`.
"""

import difflib
from collections.abc import Iterable
from typing import final

from superopt.ir.errors import SuperoptError


@final
class PlanError(SuperoptError):
    """A stored plan is damaged, foreign or from another version."""


@final
class ArtifactError(SuperoptError):
    """An artifact folder is damaged, incomplete, foreign or from another version."""


@final
class UsageError(SuperoptError):
    """A command line or an input specification that means nothing."""


@final
class Unsupported(SuperoptError):
    """A request that cannot be served here: no such backend, no such device."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that `name` is no `kind`, what is near it, and what there is."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=2)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    return f"no {kind} is called {name!r}{hint} There are: {', '.join(names)}."
