"""The cache folder: plans by key, aliases of keys, kernels by content, rates of the machine.

In: keys and sealed text. Out: the text, or None when it is absent or damaged. Invariants: a file appears
by one atomic rename, so that a reader sees all of it or nothing, however many processes write and
whenever one is killed; what does not match its seal, which its name is part of, is treated as absent,
removed, and made again. What a killed writer leaves is removed by a later one, a day on.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar, final

from platformdirs import user_cache_path

from superopt.errors import PlanError
from superopt.plan import Plan, seal, unseal

logger = logging.getLogger("superopt")

T = TypeVar("T")
FOLDER_VARIABLE: Final = "SUPEROPT_CACHE_DIR"
_WRITING: Final = ".writing-"
_STALE_S: Final = 86400.0


def default_folder() -> Path:
    """Return the user's cache folder."""
    return user_cache_path("superopt")


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=_WRITING, dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def key_of(*parts: Any) -> str:
    """Return the key of an entry: a digest of everything that decides its content."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """One stored file, for listings."""

    path: Path
    kind: str
    size_bytes: int
    modified_s: float


@final
@dataclass(frozen=True, slots=True)
class Cache:
    """One cache folder."""

    folder: Path

    @property
    def kernels(self) -> Path:
        """Where compiled kernels are kept."""
        return self.folder / "kernels"

    def _path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / f"{key}.json"

    def load_plan(self, key: str) -> Plan | None:
        """Return the plan under `key`; None when there is none or it is damaged."""
        return self._load(self._path("plans", key), Plan.from_json)

    def load_alias(self, alias: str) -> tuple[str, str] | None:
        """Return the key of the plan that `alias` leads to, and how it is bound; None as for plans."""
        text = self._load(self._path("aliases", alias), str)
        return None if text is None else (text.partition(" ")[0], text.partition(" ")[2])

    def _load(self, path: Path, read: Callable[[str], T]) -> T | None:
        try:
            name, _, text = unseal(path.read_text(encoding="utf-8")).partition("\n")
            if name != path.stem:
                raise PlanError("it is another entry's")
            return read(text)
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError, PlanError) as error:
            logger.warning("cache entry %s is made again: %s", path, error)
            with contextlib.suppress(OSError):
                path.unlink()
            return None

    def save_plan(self, key: str, plan: Plan) -> None:
        """Store a plan; a full or read-only disk costs the entry, not the program."""
        self._save(self._path("plans", key), plan.to_json())

    def save_alias(self, alias: str, key: str, bound: str) -> None:
        """Let `alias` lead to the plan under `key`, if that is `bound` so (`binding_digest`)."""
        self._save(self._path("aliases", alias), f"{key} {bound}")

    def _save(self, path: Path, text: str) -> None:
        try:
            write_atomically(path, seal(f"{path.stem}\n{text}"))
        except OSError as error:
            logger.warning("the plan is not cached: %s", error)
        _sweep(self.folder)

    def entries(self) -> Iterator[Entry]:
        """Yield all stored files, oldest first."""
        found = []
        for path in self.folder.rglob("*") if self.folder.is_dir() else ():
            with contextlib.suppress(OSError):
                if path.is_file():
                    status = path.stat()
                    kind = {".so": "kernel", ".py": "kernel", ".cpp": "refused source"}.get(
                        path.suffix, "plan"
                    )
                    kind = "machine" if path.name.startswith("machine-") else kind
                    kind = "alias" if path.is_relative_to(self.folder / "aliases") else kind
                    kind = "unfinished" if path.name.startswith(_WRITING) else kind
                    found.append(Entry(path, kind, status.st_size, status.st_mtime))
        yield from sorted(found, key=lambda e: (e.modified_s, str(e.path)))

    def clear(self) -> int:
        """Remove what superopt stored here; return how many files there were."""
        count = sum(1 for _ in self.entries())
        for name in ("plans", "aliases", "kernels"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for path in self.folder.glob("machine-*.json"):
            path.unlink(missing_ok=True)
        return count


@cache
def _sweep(folder: Path) -> None:
    """Remove, once per process, what writers left that were killed: nobody writes for a day."""
    oldest = time.time() - _STALE_S
    for left in folder.rglob(f"{_WRITING}*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < oldest:
                left.unlink()
