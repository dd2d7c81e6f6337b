"""Artifacts: a folder with everything about one optimized program, for people and for other engines.

In: a plan. Out: a folder of `manifest.json` (format, versions, sha256 of every file), `plan.json`, the graphs
as text, the kernels' sources, `certificate.json` and the stored tensors. Loading checks every file
against the manifest before any is read further, and executes nothing; what does not fit is an
`ArtifactError`.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from superopt.errors import ArtifactError, PlanError
from superopt.ir.text import print_graph
from superopt.plan import Plan, StoredTensor

FORMAT: Final = "superopt artifact 1"
_SUFFIXES: Final = {"cpu": "cpp", "triton": "py"}


def save_artifact(
    plan: Plan, folder: Path, versions: Mapping[str, str], *, overwrite: bool = False
) -> None:
    """Write the artifact; it appears as a whole.

    Raises:
        ArtifactError: the folder exists and holds something else, or cannot be written.
    """
    if folder.exists() and not (overwrite and _is_artifact(folder)):
        what = "pass --force to replace it" if _is_artifact(folder) else "it is no artifact"
        raise ArtifactError(f"{folder} exists already: {what}")
    files = _files(plan)
    manifest = {
        "format": FORMAT,
        "versions": dict(versions),
        "target": plan.target,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files["manifest.json"] = (json.dumps(manifest, indent=1) + "\n").encode()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".superopt-", dir=folder.parent))
        try:
            for name, data in files.items():
                path = temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            if folder.exists():
                shutil.rmtree(folder)
            os.chmod(temporary, 0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(f"cannot write {folder}: {error}") from error


def load_artifact(folder: Path) -> Plan:
    """Read an artifact.

    Raises:
        ArtifactError: it is missing, damaged, foreign, or from another version.
    """
    manifest = _manifest(folder)
    data: dict[str, bytes] = {}
    for name, digest in manifest.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtifactError(f"{folder}: the manifest names a file outside: {name}")
        try:
            data[name] = path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{folder}: {name} cannot be read ({error})") from error
        if hashlib.sha256(data[name]).hexdigest() != digest:
            raise ArtifactError(
                f"{folder}: {name} was changed or damaged (its sha256 does not match); "
                "optimize again"
            )
    try:
        plan = Plan.from_json(data["plan.json"].decode())
        tensors = json.loads(data["tensors/index.json"])
        stored = {
            name: StoredTensor(tuple(t["shape"]), t["dtype"], data[t["file"]])
            for name, t in tensors.items()
        }
    except (PlanError, KeyError, ValueError, TypeError) as error:
        raise ArtifactError(f"{folder}: {error}") from error
    return replace(plan, constants=stored)


def _is_artifact(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and (folder / "plan.json").is_file()


def _manifest(folder: Path) -> dict[str, str]:
    path = folder / "manifest.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ArtifactError(
                f"{folder} has the format {content['format']!r}, this version reads {FORMAT!r}; "
                "optimize again"
            )
        files = {str(name): str(digest) for name, digest in content["files"].items()}
    except FileNotFoundError:
        raise ArtifactError(f"{folder} is no artifact: it has no manifest.json") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}); optimize again") from error
    if "plan.json" not in files:
        raise ArtifactError(f"{path} is damaged: it lists no plan.json")
    return files


def _files(plan: Plan) -> dict[str, bytes]:
    bare = replace(plan, constants={})
    files = {
        "plan.json": bare.to_json().encode(),
        "original.mu": print_graph(plan.original).encode(),
        "report.json": (json.dumps(plan.report, indent=1) + "\n").encode(),
    }
    if plan.program is not None:
        files["program.mu"] = print_graph(plan.program).encode()
    if plan.certificate is not None:
        text = json.dumps(plan.certificate, indent=1, sort_keys=True) + "\n"
        files["certificate.json"] = text.encode()
    for digest, kernel in plan.kernels.items():
        suffix = _SUFFIXES.get(kernel.backend, "txt")
        files[f"kernels/{kernel.name}-{digest[:12]}.{suffix}"] = kernel.text.encode()
        files[f"kernels/{kernel.name}-{digest[:12]}.mu"] = kernel.block.encode()
    index = {}
    for number, (name, tensor) in enumerate(plan.constants.items()):
        file = f"tensors/{number}.bin"
        files[file] = tensor.data
        index[name] = {"shape": tensor.shape, "dtype": tensor.dtype, "file": file}
    files["tensors/index.json"] = json.dumps(index).encode()
    return files
