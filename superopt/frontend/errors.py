"""Errors of the frontend."""

from typing import Final

from superopt.ir.errors import SuperoptError

BREAKING: Final = (
    'torch.compile(backend="superopt") breaks the graph there, and optimizes both sides'
)


class LiftError(SuperoptError):
    """A program cannot be made a kernel graph; whoever asked runs it as it was.

    Args:
        message: what stands in the way.
        location: the user's line, where it is known.
    """

    def __init__(self, message: str, location: str = "") -> None:
        self.location = location
        super().__init__(f"{message}\n  at {location}" if location else message)
