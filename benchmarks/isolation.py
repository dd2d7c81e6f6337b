"""Run tasks in a process of their own: one that crashes, hangs or spoils its device ends nothing else.

In: a function that can be pickled, and arguments for it, one call at a time. Out: its answer, or the
reason why there is none. The process lives on between calls, so that what takes long (imports, the
device's context) is done once, and is replaced when a call failed or ran too long.
"""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, final


@final
class Isolated:
    """One process that answers calls of `task`; after each it says whether it is still `usable`."""

    def __init__(self, task: Callable[[str], Any], usable: Callable[[], bool]) -> None:
        self._task = task
        self._usable = usable
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def call(self, argument: str, limit_s: float) -> tuple[Any, str]:
        """Return (the answer, "") or (None, why there is none after at most `limit_s`)."""
        process, pipe = self._running()
        try:
            pipe.send(argument)
            if not pipe.poll(limit_s):
                self.close()
                return None, f"it took more than {limit_s:g} s"
            answer, reason, usable = pipe.recv()
        except (EOFError, OSError):
            process.join(10)
            code = process.exitcode
            self.close()
            return None, f"its process ended with exit code {code}"
        if not usable:
            self.close()
        return answer, reason

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process is not None and self._pipe is not None:
            self._pipe.close()
            self._process.kill()
            self._process.join()
        self._process = self._pipe = None

    def _running(self) -> tuple[BaseProcess, Connection]:
        if self._process is None or self._pipe is None:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            # not a daemon: compilers start processes of their own
            self._process = context.Process(
                target=_serve, args=(self._task, self._usable, theirs), daemon=False
            )
            self._process.start()
            theirs.close()  # so that its end is noticed
        return self._process, self._pipe


def _serve(task: Callable[[str], Any], usable: Callable[[], bool], pipe: Connection) -> None:
    while True:
        try:
            argument = pipe.recv()
        except EOFError:
            return
        try:
            found: tuple[Any, str] = (task(argument), "")
        except Exception as error:
            traceback.print_exc()
            found = (None, f"{type(error).__name__}: {error}")
        pipe.send((*found, usable()))
