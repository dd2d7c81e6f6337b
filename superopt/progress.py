"""Progress of a search, for a terminal or for a machine.

In: events. Out: on a terminal one live line and the milestones, on stderr; with `json` one JSON object per
line on stdout. Nothing else is written to stdout while a search runs.
"""

import json
import sys
import time
from types import TracebackType
from typing import Any, Final, final

from rich.console import Console
from rich.status import Status

_MILESTONES: Final = ("partition", "compared", "proven", "rejected", "cached", "result")


@final
class Progress:
    """Shows events while it is entered as a context."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=True, highlight=False)
        self.status: Status | None = None
        self.started = time.monotonic()

    def __enter__(self) -> "Progress":
        if not self.as_json and self.console.is_terminal:
            self.status = self.console.status("lifting the program")
            self.status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.status is not None:
            self.status.stop()

    def __call__(self, event: Any) -> None:
        """Show one event."""
        seconds = round(time.monotonic() - self.started, 3)
        if self.as_json:
            line = {"event": event.kind, "message": event.message, "seconds": seconds}
            print(json.dumps({**line, "data": event.data}, default=str), flush=True)
            return
        if self.status is not None:
            self.status.update(f"{event.message} ({seconds:.0f} s)")
        if event.kind in _MILESTONES:
            self.console.print(f"{seconds:7.1f} s  {event.message}", markup=False)


def emit(record: dict[str, Any], *, as_json: bool, text: str) -> None:
    """Print a result: as one JSON line, or as text."""
    print(json.dumps(record, default=str) if as_json else text)
    sys.stdout.flush()
