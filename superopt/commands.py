"""What the verbs of the command line do.

In: parsed options. Out: exit codes, and text or JSON lines on stdout.
"""

import argparse
import importlib
import inspect
import json
import logging
import os
import re
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from superopt.artifact import load_artifact, save_artifact
from superopt.backends import backend_named, timer
from superopt.cache import FOLDER_VARIABLE, Cache, default_folder
from superopt.calibrate import machine
from superopt.codegen import triton
from superopt.codegen.cpu import LOWER, find_compiler
from superopt.codegen.errors import NoCompiler
from superopt.errors import ArtifactError, Unsupported, UsageError
from superopt.frontend import Lifted, LiftError, lift, lift_exported
from superopt.guards import take_guards
from superopt.ir.errors import SuperoptError
from superopt.ir.ops.registry import all_ops
from superopt.ir.target import GPUS
from superopt.ir.text import print_graph
from superopt.ir.types import DType
from superopt.measure import interleaved
from superopt.pipeline import Options, make_options, make_plan, restore, restorer, versions
from superopt.plan import Plan
from superopt.progress import Progress, emit
from superopt.report import equality_text, plan_report
from superopt.runtime import Program, build_program, load_tensor, store_tensor
from superopt.subject import make_request, preserved
from superopt.verify.certificate import CertificateError, read_certificate
from superopt.verify.field import FIELD
from superopt.verify.floating import on, verify_float
from superopt.verify.inputs import draw_inputs
from superopt.verify.reference import DTYPES, TORCH

logger = logging.getLogger("superopt")

DONE: Final = 0
INTERNAL: Final = 1
USAGE: Final = 2
UNSUPPORTED: Final = 3
NOT_VERIFIED: Final = 4
INTERRUPTED: Final = 130
_SPEC: Final = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,\s]*)\](:(?P<limit>\d+))?$")


def exit_code(error: SuperoptError, verb: str) -> int:
    """Return the exit code of an error that ends a verb."""
    if isinstance(error, CertificateError) or (
        verb == "verify" and isinstance(error, ArtifactError)
    ):
        return NOT_VERIFIED
    if isinstance(error, LiftError | NoCompiler | Unsupported):
        return UNSUPPORTED
    if isinstance(error, ArtifactError | UsageError):
        return USAGE
    return INTERNAL


def _folder(options: argparse.Namespace) -> Path:
    chosen: Path | None = getattr(options, "cache", None)
    if chosen is not None:
        return chosen
    variable = os.environ.get(FOLDER_VARIABLE)
    return Path(variable) if variable else default_folder()


# -- optimize ------------------------------------------------------------------------------------


def run_optimize(options: argparse.Namespace) -> int:
    """Search, prove, and write an artifact."""
    if options.output.exists() and not options.force:
        raise UsageError(f"{options.output} exists already: pass --force to replace it")
    if not options.budget > 0:
        raise UsageError("--budget is a number of seconds above 0")
    if not _may_be_made(options.output):
        raise UsageError(f"{options.output} cannot be written: choose another folder")
    chosen = make_options(
        {
            "budget_s": options.budget,
            "seed": options.seed,
            "backend": options.backend,
            "verify": "strict" if options.strict else True,
            "cache": False if options.no_cache else _folder(options),
        }
    )
    started = time.monotonic()
    with Progress(as_json=options.json) as progress:
        function, args, kwargs, lifted = _program(options.program, options.input, options.seed)
        modules = take_guards(function).modules
        with preserved(lifted):
            request, _ = make_request(function, modules, lifted, args, kwargs)
            planned = make_plan(request, chosen, progress, started=started)
    plan = _self_contained(planned.plan, request.tensors[len(request.user_inputs) :])
    save_artifact(plan, options.output, versions(), overwrite=options.force)
    report = plan_report(plan)
    record = {"event": "done", "artifact": str(options.output), "report": plan.report}
    emit(record, as_json=options.json, text=f"{report}\nwritten to {options.output}")
    return INTERRUPTED if plan.report.get("stopped") == "interrupted" else DONE


def _may_be_made(folder: Path) -> bool:
    """Say whether a folder can be made, before a search whose result it is to hold."""
    above = next(p for p in folder.absolute().parents if p.exists())
    return above.is_dir() and os.access(above, os.W_OK | os.X_OK)


def _self_contained(plan: Plan, parameters: tuple[torch.Tensor, ...]) -> Plan:
    """Put the weights into the plan: an artifact runs without the module that it came from."""
    names = [n.attrs.name for n in plan.original.inputs[len(plan.user_inputs) :]]
    stored = {n: store_tensor(t) for n, t in zip(names, parameters, strict=True)}
    return replace(plan, constants=stored, parameters=tuple(f"constant:{n}" for n in names))


def _program(
    text: str, specs: list[str], seed: int
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Lifted]:
    """Load the program; return it with example arguments and its lifted form."""
    if text.endswith(".pt2"):
        return _exported(Path(text))
    module_name, separator, name = text.partition(":")
    if not separator:
        raise UsageError(f"{text!r} is neither a .pt2 file nor module:function")
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever a user's module raises
        raise UsageError(f"cannot load {text}: {type(error).__name__}: {error}") from error
    found = getattr(found, "original", found)
    if isinstance(found, type):
        raise UsageError(f"{text} is a class: name a function, or an instance of a module")
    if not callable(found):
        raise UsageError(f"{text} is of type {type(found).__name__}, not a function or module")
    if not specs:
        raise UsageError(f"say what {text} takes, once per argument: --input f32[16,4096]")
    args = tuple(parse_input(s, seed + i) for i, s in enumerate(specs))
    _check_arguments(text, found, args)
    return found, args, {}, lift(found, args)


def _check_arguments(text: str, found: Callable[..., Any], args: tuple[Any, ...]) -> None:
    called = found.forward if isinstance(found, torch.nn.Module) else found
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):
        return  # what is written in C tells nobody; the call will
    try:
        signature.bind(*args)
    except TypeError as error:
        raise UsageError(f"{len(args)} inputs do not fit {text}{signature}: {error}") from error


def _exported(path: Path) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Lifted]:
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    if not zipfile.is_zipfile(path):
        # torch would log a traceback of its own
        raise UsageError(f"{path} is not a torch.export file")
    try:
        with warnings.catch_warnings():
            # some versions of torch warn about buffers of their own
            warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
            exported = torch.export.load(path)
    except Exception as error:  # torch raises whatever its readers meet in a foreign file
        raise UsageError(f"{path} is not a torch.export file: {error}") from error
    if exported.example_inputs is None:
        raise UsageError(f"{path} stores no example inputs: export it with some")
    args, kwargs = exported.example_inputs
    return exported.module(), tuple(args), dict(kwargs), lift_exported(exported)


def parse_input(spec: str, seed: int) -> Any:
    """Return an argument made from text: a random tensor such as `f32[16,4096]`, or a number.

    Raises:
        UsageError: the text is neither.
    """
    match = _SPEC.match(spec.strip())
    if match is None:
        try:
            return float(spec) if any(c in spec for c in ".einf") else int(spec)
        except ValueError:
            raise UsageError(
                f"{spec!r} is no input: write f32[16,4096], i64[8]:1000 or a number"
            ) from None
    names = {d.value for d in DType}
    if match["dtype"] not in names:
        raise UsageError(f"{spec!r}: there is no element type {match['dtype']!r}: {sorted(names)}")
    dims = [int(d) for d in match["dims"].split(",") if d.strip()]
    dtype = DTYPES[DType(match["dtype"])]
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(dims, generator=generator).to(dtype)
    limit = int(match["limit"] or 2)
    return torch.randint(0, max(limit, 1), dims, generator=generator).to(dtype)


# -- artifacts -----------------------------------------------------------------------------------


def _loaded(
    options: argparse.Namespace, *, as_graph: bool = False, anyhow: bool = False
) -> tuple[Plan, Program, Program]:
    """Return an artifact's plan, its program, and the original's.

    With `as_graph` the programs return what their graphs do, new values first, and change nothing. With
    `anyhow` the original's graph, in PyTorch, stands in for a program whose kernels cannot be compiled here.
    """
    plan = load_artifact(options.artifact)
    tensors = _inputs(plan, draw_inputs(plan.original, "normal", 0)[: len(plan.user_inputs)])
    original = build_program(
        plan.original,
        {},
        strides=[tuple(t.stride()) for t in tensors],
        outputs=None if as_graph else plan.outputs,
        writes=None if as_graph else plan.writes,
        device=_device(plan),
    )
    chosen = Options(cache=_folder(options))
    if anyhow and not backend_named("auto", chosen.folder(), _device(plan)).usable():
        logger.warning("%s; until then PyTorch runs the original's graph", NoCompiler())
        return plan, original, original
    planned = restore(plan, chosen, tensors, as_graph=as_graph)
    return plan, planned.program or original, original


def _device(plan: Plan) -> torch.device:
    """Return the device that a plan was made for.

    Raises:
        Unsupported: it is not on this machine.
    """
    kind = plan.target.partition(":")[0]
    if kind == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"the artifact was made for {plan.target}, and there is no GPU here")
    if kind not in ("cpu", "cuda"):
        raise Unsupported(f"the artifact was made for {plan.target}, which is not known here")
    return torch.device(kind)


def _inputs(plan: Plan, user: list[torch.Tensor]) -> list[torch.Tensor]:
    stored = [load_tensor(plan.constants[p.partition(":")[2]]) for p in plan.parameters]
    return [on(t, _device(plan)) for t in (*user, *stored)]


def run_run(options: argparse.Namespace) -> int:
    """Run an artifact once."""
    plan, program, _ = _loaded(options, anyhow=True)
    count = len(plan.user_inputs)
    if options.inputs is None:
        user = draw_inputs(plan.original, "normal", options.seed)[:count]
    else:
        user = _read_inputs(options.inputs, plan)
    tensors = _inputs(plan, user)
    with torch.no_grad():
        results = program.run(*tensors)
    found = {f"output{i}": r for i, r in enumerate(results)}
    for target in plan.writes.values():
        found[f"changed_{plan.original.inputs[target].attrs.name}"] = tensors[target]
    if options.outputs is not None:
        arrays = {name: _as_numpy(r) for name, r in found.items()}
        np.savez(options.outputs, **arrays)  # type: ignore[arg-type]
    facts = [
        {
            "name": name,
            "shape": list(r.shape),
            "dtype": str(r.dtype),
            "mean": float(r.double().mean()) if r.numel() else None,
        }
        for name, r in found.items()
    ]
    text = "\n".join(f"{f['name']}: {f['dtype']}{f['shape']}" for f in facts)
    emit({"outputs": facts}, as_json=options.json, text=text)
    return DONE


def _as_numpy(tensor: torch.Tensor) -> "np.ndarray[Any, Any]":
    wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
    array: np.ndarray[Any, Any] = wide.detach().cpu().contiguous().numpy()
    return array


def _read_inputs(path: Path, plan: Plan) -> list[torch.Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            named = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} is no .npz file of arrays: {error}") from error
    wanted = plan.original.inputs[: len(plan.user_inputs)]
    names = [n.attrs.name for n in wanted]
    given = [named[n] for n in names] if set(names) == set(named) else list(named.values())
    if len(given) != len(wanted):
        raise UsageError(f"the program takes {len(wanted)} arrays, {path} holds {len(given)}")
    tensors = []
    for node, tensor in zip(wanted, given, strict=True):
        if tuple(tensor.shape) != node.shape:
            raise UsageError(f"{node.attrs.name} is {node.type}, got {tuple(tensor.shape)}")
        lies = torch.empty_strided(
            node.shape, node.tensor.element_strides, dtype=DTYPES[node.tensor.dtype]
        )
        tensors.append(lies.copy_(tensor))
    return tensors


def run_bench(options: argparse.Namespace) -> int:
    """Time the artifact against its original graph in PyTorch."""
    plan, program, original = _loaded(options)
    user = draw_inputs(plan.original, "normal", 0)[: len(plan.user_inputs)]
    tensors = _inputs(plan, user)
    again = restorer([tensors[t] for t in plan.writes.values()])

    def call(chosen: Program) -> object:
        again()
        return chosen.run(*tensors)

    with torch.no_grad():
        calls = [lambda: call(original), lambda: call(program)]
        timed = timer(_device(plan))
        before, after = interleaved(calls, limit_s=options.seconds, rounds=1000, timed=timed)
    text = f"original {before * 1e3:.3f} ms, optimized {after * 1e3:.3f} ms: {before / after:.2f}x"
    record = {"original_s": before, "optimized_s": after, "ratio": before / after}
    emit(record, as_json=options.json, text=text)
    return DONE


def run_verify(options: argparse.Namespace) -> int:
    """Check an artifact's proof again, and its compiled kernels in floating point."""
    plan, program, _ = _loaded(options, as_graph=True)
    if plan.program is None:
        emit(
            {"verified": True, "reason": "the original runs"},
            as_json=options.json,
            text="the artifact runs the original: there is nothing to prove",
        )
        return DONE
    if plan.certificate is None:
        return _failed(options, "the artifact has no certificate")
    certificate = read_certificate(json.dumps(plan.certificate))
    stored = (plan.original.digest(), plan.program.digest())
    if (certificate.original_digest, certificate.candidate_digest) != stored:
        return _failed(options, "the certificate is about other programs than the artifact's")
    verdict = certificate.recheck(error_bound=options.bound)
    floating = verify_float(
        plan.original,
        lambda tensors: list(program.run(*tensors)),
        seed=certificate.seed,
        device=_device(plan),
    )
    if not floating.accurate:
        return _failed(options, f"the kernels fail in floating point: {floating.reason}")
    equality = equality_text(verdict.tests, len(verdict.pieces))
    text = (
        f"verified: {equality}, wrong with probability at most "
        f"{verdict.bound:.1e}; kernels as accurate as the original in floating point"
    )
    record = {
        "verified": True,
        "tests": verdict.tests,
        "pieces": len(verdict.pieces),
        "bound": verdict.bound,
    }
    emit(record, as_json=options.json, text=text)
    return DONE


def _failed(options: argparse.Namespace, why: str) -> int:
    emit({"verified": False, "reason": why}, as_json=options.json, text=f"NOT verified: {why}")
    return NOT_VERIFIED


def run_inspect(options: argparse.Namespace) -> int:
    """Print what is in an artifact."""
    plan = load_artifact(options.artifact)
    parts = {
        "report": str(plan_report(plan)),
        "original": print_graph(plan.original),
        "program": "" if plan.program is None else print_graph(plan.program),
        "schedule": "\n".join(plan.report.get("notes", ())),
        "source": "\n".join(k.text for k in plan.kernels.values()),
    }
    if options.python or options.json:
        _, program, _ = _loaded(options)
        parts["python"] = program.source
    chosen = [n for n in parts if getattr(options, n, False)] or list(parts)
    text = "\n\n".join(f"== {name}\n{parts[name]}" for name in chosen)
    if len(chosen) == 1:
        text = parts[chosen[0]]
    emit({name: parts[name] for name in chosen}, as_json=options.json, text=text)
    return DONE


# -- the machine ---------------------------------------------------------------------------------


def run_targets(options: argparse.Namespace) -> int:
    """Print what this machine can do, and what is known of GPUs that need not be here."""
    here = machine(_folder(options))
    compiler = find_compiler()
    record = {
        "target": here.name,
        **asdict(here),
        "compiler": None if compiler is None else compiler.version,
        "openmp": compiler is not None and compiler.openmp,
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
    }
    lines = [
        f"{here.name}",
        f"  {here.cores} cores, vectors of {here.vector_lanes} float32",
        f"  caches {here.inner_cache_bytes >> 10} KiB per core, {here.outer_cache_bytes >> 20} MiB shared",
        f"  memory bandwidth {here.memory_bandwidth / 1e9:.1f} GB/s (measured, reading)",
        f"  peak {here.peak_flops / 1e9:.0f} GFLOP/s (measured, float32 matmul)",
        f"  compiler {record['compiler'] or 'none: programs run as they were'}",
        "known, from data sheets: Triton kernels are compiled for them ahead of time",
    ]
    for gpu in GPUS.values():
        lines.append(
            f"  {gpu.name:<14} {gpu.cores} multiprocessors, {gpu.memory_bandwidth / 1e9:.0f} GB/s, "
            f"{gpu.peak_flops / 1e12:.1f} TFLOP/s float32, {gpu.half_flops / 1e12:.0f} 16-bit"
        )
    emit(record, as_json=options.json, text="\n".join(lines))
    return DONE


def run_cache(options: argparse.Namespace) -> int:
    """List, measure or clear the cache folder."""
    store = Cache(_folder(options))
    if options.action == "clear":
        count = store.clear()
        text = f"removed {count} files from {store.folder}"
        emit({"removed": count}, as_json=options.json, text=text)
        return DONE
    entries = list(store.entries())
    total = sum(e.size_bytes for e in entries)
    record: dict[str, Any] = {
        "folder": str(store.folder),
        "files": len(entries),
        "bytes": total,
    }
    lines = []
    if options.action == "list":
        record["entries"] = [
            {"path": str(e.path), "kind": e.kind, "bytes": e.size_bytes} for e in entries
        ]
        lines = [f"{e.size_bytes:>10} {e.kind:<15} {e.path}" for e in entries]
    summary = f"{store.folder}: {len(entries)} files, {total / 1e6:.1f} MB"
    emit(record, as_json=options.json, text="\n".join([*lines, summary]))
    return DONE


def run_ops(options: argparse.Namespace) -> int:
    """Print which meanings every operator has."""
    tables: Mapping[str, Any] = {
        "torch": TORCH,
        "field": FIELD,
        "cpu": LOWER,
        "triton": triton.LOWER,
    }
    rows = []
    for op in all_ops():
        state = {
            name: "rule" if op in table else table.unsupported.get(op, "missing")
            for name, table in tables.items()
        }
        if options.missing and all(s == "rule" for s in state.values()):
            continue
        rows.append({"op": op.name, "kind": op.kind.value, "meaning": op.meaning, **state})
    marks = {"rule": "yes", "missing": "MISSING"}
    lines = [f"{'op':<16}{'kind':<13}" + "".join(f"{n:<9}" for n in tables) + "meaning"]
    for row in rows:
        cells = "".join(f"{marks.get(row[n], '-'):<9}" for n in tables)
        lines.append(f"{row['op']:<16}{row['kind']:<13}{cells}{row['meaning']}")
    emit({"ops": rows}, as_json=options.json, text="\n".join(lines))
    return DONE
