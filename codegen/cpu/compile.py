"""Compile generated C++17 to shared objects with the system compiler, and load them.

In: the text of a translation unit (and the runtime headers beside this file). Out: the path of a
shared object in a cache folder that the caller names, or a `CompileError` with the compiler's words.

Invariants: an entry is addressed by everything that decides its content (source, headers, flags,
compiler, processor); it appears by one atomic rename, so a reader sees all of it or nothing, however
many processes write and whenever they are killed; it ends in the digest of its name and what comes
before, so a damaged or misplaced entry is noticed and built again. A build that was killed leaves a folder that a later process
removes once no build can still be at it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Final, Literal, final

from superopt.codegen.errors import CodegenError, CompileError, NoCompiler

RUNTIME_FOLDER: Final = Path(__file__).parent / "runtime"
ENTRY_POINT: Final = "superopt_kernel"
_MAGIC: Final = b"\nsuperopt-so-1:"
_DIGEST_BYTES: Final = 32
_COMPILE_LIMIT_S: Final = 120.0
_PROBE_LIMIT_S: Final = 20.0
_BUILDING: Final = "building-"
_STALE_S: Final = 3600.0
_ARCH_PRCTL: Final = 158  # of x86-64; ARCH_REQ_XCOMP_PERM of XTILEDATA
_REQUEST_STATE, _TILE_DATA = 0x1023, 18
_running: Final[set["subprocess.Popen[str]"]] = set()
# No -ffast-math, whole or in part: NaN, infinity and signed zero keep PyTorch's meaning. Contraction
# to FMA only removes a rounding; errno is never read. Integers wrap around, as in PyTorch.
_BASE_FLAGS: Final = (
    "-std=c++17",
    "-O2",
    "-ftree-vectorize",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fwrapv",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-w",
)

Products = Literal["", "dots", "tiles"]


@final
@dataclass(frozen=True, slots=True)
class Compiler:
    """A C++ compiler that works on this machine: its command, and the flags for this processor."""

    command: tuple[str, ...]
    version: str
    flags: tuple[str, ...]
    bf16: Products = ""
    """How the processor multiplies bfloat16 as it is, if this compiler knows: tiles (AMX), dots (AVX-512)."""

    @property
    def openmp(self) -> bool:
        """Whether kernels run on several threads."""
        return "-fopenmp" in self.flags


@functools.cache
def find_compiler() -> Compiler | None:
    """Return the first of $CXX, g++, clang++, c++ that works, or None."""
    wanted = os.environ.get("CXX", "").strip()
    for candidate in ([wanted] if wanted else []) + ["g++", "clang++", "c++"]:
        command = tuple(shlex.split(candidate))
        if command and shutil.which(command[0]) and (found := _probe(command)):
            return found
    return None


def compile_source(
    source: str,
    cache_folder: Path,
    *,
    extra_flags: Sequence[str] = (),
    force: bool = False,
    limit_s: float = inf,
) -> Path:
    """Return the shared object built from `source`, from the cache when it is there and whole.

    The compiler is ended after `limit_s`.

    Raises:
        NoCompiler: there is no C++ compiler on this machine.
        CompileError: the compiler refused the source.
        CodegenError: the folder cannot be written.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NoCompiler
    flags = (*compiler.flags, *extra_flags)
    path = cache_folder / f"{_entry_key(source, compiler, flags)}.so"
    if not force and _is_whole(path):
        return path
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        _sweep(cache_folder)
        _build(source, compiler, flags, path, min(limit_s, _COMPILE_LIMIT_S))
    except OSError as error:
        raise CodegenError(f"cannot build in {cache_folder}: {error}") from error
    return path


def compile_many(
    sources: Sequence[str],
    cache_folder: Path,
    *,
    workers: int | None = None,
    limit_s: float = inf,
) -> list[Path | CodegenError]:
    """Compile every source, `workers` compilers at a time; failures are returned in their place.

    So are, after `limit_s` in all, those that are not ready yet.
    """
    end = time.monotonic() + limit_s

    def attempt(source: str) -> Path | CodegenError:
        try:
            return compile_source(source, cache_folder, limit_s=max(0.0, end - time.monotonic()))
        except CodegenError as error:
            return error

    # Threads suffice: each only waits for its compiler, which is a process of its own.
    with ThreadPoolExecutor(max_workers=workers or os.cpu_count() or 1) as pool:
        try:
            return list(pool.map(attempt, sources))
        except BaseException:  # Ctrl-C: the pool would wait for what is not wanted any more
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_running):
                _kill(process)
            raise


def load_kernel(path: Path, pointers: int, symbol: str = ENTRY_POINT) -> Callable[..., None]:
    """Load `symbol(void*, ...)` with `pointers` pointer arguments; call it with integer addresses.

    Import torch first where torch is used at all: its OpenMP runtime carries the name ours asks for,
    so that both share one pool of threads instead of competing for the cores.

    Raises:
        CodegenError: the file is damaged, or not loadable on this machine.
    """
    if not _is_whole(path):
        raise CodegenError(f"{path} is missing or damaged: compile it again")
    try:
        function = getattr(ctypes.CDLL(str(path)), symbol)
    except (OSError, AttributeError) as error:
        raise CodegenError(f"cannot load {symbol} from {path}: {error}") from error
    function.argtypes = [ctypes.c_void_p] * pointers
    function.restype = None
    kernel: Callable[..., None] = function
    return kernel


def _probe(command: tuple[str, ...]) -> Compiler | None:
    """Ask a compiler for its version and for a library that loads here, with OpenMP or without."""
    version = _run([*command, "--version"], limit_s=_PROBE_LIMIT_S)
    if version is None or version.returncode != 0 or not version.stdout.strip():
        return None
    native = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    flags = (*_BASE_FLAGS, native)
    with tempfile.TemporaryDirectory() as folder:
        for number, candidate in enumerate(((*flags, "-fopenmp"), flags)):
            output = Path(folder, f"probe{number}.so")
            arguments = [*command, *candidate, "-x", "c++", "-", "-o", str(output)]
            _run(arguments, "void probe(){\n#pragma omp parallel\n;}", limit_s=_PROBE_LIMIT_S)
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(output))
                bf16 = _bf16_products([*command, *candidate])
                return Compiler(command, version.stdout.strip().splitlines()[0], candidate, bf16)
    return None


def _bf16_products(command: list[str]) -> Products:
    found = _run([*command, "-dM", "-E", "-x", "c++", "-"], limit_s=_PROBE_LIMIT_S)
    if found is None or "__AVX512BF16__" not in found.stdout:
        return ""
    return "tiles" if "__AMX_BF16__" in found.stdout and _tiles_allowed() else "dots"


def _tiles_allowed() -> bool:
    """Ask Linux for the state of matrix tiles, as kernels do: a container or an old system may refuse."""
    try:
        return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_STATE, _TILE_DATA) == 0)
    except (OSError, AttributeError):
        return False


def _run(
    arguments: list[str], stdin: str = "", *, limit_s: float
) -> subprocess.CompletedProcess[str] | None:
    """Run a compiler, with all that it starts; None when it cannot be run or does not answer."""
    try:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},
            process_group=0,
        )
    except OSError:
        return None
    with process:
        _running.add(process)
        try:
            out, err = process.communicate(stdin, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _running.discard(process)
            if process.returncode is None:
                _kill(process)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a compiler and the processes that it started, which would work on."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _entry_key(source: str, compiler: Compiler, flags: Sequence[str]) -> str:
    digest = hashlib.sha256(_MAGIC)
    parts = (source, runtime_digest(), *compiler.command, compiler.version, *flags, _processor())
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()[:40]


@functools.cache
def runtime_digest() -> str:
    """Digest of the runtime headers: part of what a compiled kernel depends on."""
    digest = hashlib.sha256()
    for header in sorted(RUNTIME_FOLDER.glob("*.h")):
        digest.update(header.name.encode() + b"\0" + header.read_bytes())
    return digest.hexdigest()


@functools.cache
def _processor() -> str:
    """Name the processor and its instruction sets: what -march=native means here."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    first_processor = text.split("\n\n", 1)[0]
    return "\n".join(line for line in first_processor.splitlines() if line.startswith(wanted))


def _build(
    source: str, compiler: Compiler, flags: Sequence[str], path: Path, limit_s: float
) -> None:
    with tempfile.TemporaryDirectory(prefix=_BUILDING, dir=path.parent) as folder:
        source_path, object_path = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        source_path.write_text(source, encoding="utf-8")
        arguments = [*compiler.command, *flags, "-iquote", str(RUNTIME_FOLDER), str(source_path)]
        done = _run([*arguments, "-o", str(object_path)], limit_s=limit_s)
        if done is None or done.returncode != 0 or not object_path.is_file():
            words = done.stderr if done else f"no answer within {limit_s:.0f} s"
            refused = done is not None and done.returncode > 0
            kept = _keep(source_path, path) if refused else None
            in_time = done is not None or limit_s >= _COMPILE_LIMIT_S
            raise CompileError(shlex.join(arguments), words, kept, in_time=in_time)
        content = object_path.read_bytes()
        # A loader ignores what follows the last section, so the seal can live in the file itself
        # and needs no second file that could disagree with it.
        with object_path.open("ab") as file:
            file.write(_MAGIC + _seal(path, content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(object_path, path)


_swept: Final[set[Path]] = set()
_sweeping: Final = threading.Lock()


def _sweep(cache_folder: Path) -> None:
    """Remove, once per process, what builds left that were killed: they are longer over by then."""
    with _sweeping:
        if cache_folder in _swept:
            return
        _swept.add(cache_folder)
    oldest = time.time() - _STALE_S
    for left in cache_folder.glob(f"{_BUILDING}*"):
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < oldest:
                shutil.rmtree(left, ignore_errors=True)


def _keep(source_path: Path, path: Path) -> str:
    """Move a refused source beside the entry it should have become, for a bug report."""
    kept = path.with_suffix(".refused.cpp")
    os.replace(source_path, kept)
    return str(kept)


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    split = len(content) - _DIGEST_BYTES - len(_MAGIC)
    if split <= 0 or content[split : split + len(_MAGIC)] != _MAGIC:
        return False
    return _seal(path, content[:split]) == content[-_DIGEST_BYTES:]


def _seal(path: Path, content: bytes) -> bytes:
    return hashlib.sha256(path.stem.encode() + b"\0" + content).digest()
