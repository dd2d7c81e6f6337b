"""What a program prints while it is traced, and the user's line for what PyTorch meets.

In: the standard streams, or frames of a stack. Out: the lines of the user's code that wrote something. A plan
would print nothing, so whoever lifts a program has to know; what it prints of tensors without values is
kept back.
"""

import linecache
import sys
import threading
import traceback
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, final

import torch

_NOT_THE_USERS: Final = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    "<eval_with_key",
    "<string>",
)


@final
class _Silenced:
    """Stands for a stream while a program is traced: keeps the line of what this thread writes to it."""

    def __init__(self, stream: Any, written: list[str]) -> None:
        self._stream = stream
        self._written = written
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        """Take in what the program writes; other threads, warnings and logs write as ever."""
        caller = sys._getframe(1)
        module = caller.f_globals.get("__name__", "").partition(".")[0]
        if threading.get_ident() != self._thread or module in ("warnings", "logging"):
            written: int = self._stream.write(text)
            return written
        frames = reversed(list(traceback.walk_stack(caller)))
        self._written.append(last_line(frames))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Take in each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def silenced() -> Iterator[list[str]]:
    """Keep back what a program prints; yield the lines of its code that do."""
    written: list[str] = []
    kept = sys.stdout, sys.stderr
    ours = [_Silenced(stream, written) for stream in kept]
    sys.stdout, sys.stderr = ours
    try:
        yield written
    finally:
        # the program may have put others in their place
        if sys.stdout is ours[0]:
            sys.stdout = kept[0]
        if sys.stderr is ours[1]:
            sys.stderr = kept[1]


def last_line(frames: Iterable[tuple[types.FrameType, int]]) -> str:
    """Return the innermost line, outermost frame first, that is neither PyTorch's nor ours."""
    found = ""
    for frame, number in frames:
        code = frame.f_code
        if not code.co_filename.startswith(_NOT_THE_USERS):
            text = linecache.getline(code.co_filename, number).strip()
            found = f'File "{code.co_filename}", line {number}, in {code.co_qualname}: {text}'
    return found
