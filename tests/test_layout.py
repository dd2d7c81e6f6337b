"""The packages that exist on disk, the ones pip installs, and the links agree."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("ir", "search", "codegen", "verify")
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def _packages_on_disk() -> set[str]:
    """Every folder with Python files under superopt/ and the stage folders, as a dotted name."""
    found: set[str] = set()
    for folder, name in [("superopt", "superopt"), *((s, f"superopt.{s}") for s in STAGES)]:
        for file in (ROOT / folder).rglob("*.py"):
            inside = file.parent.relative_to(ROOT / folder).parts
            found.add(".".join((name, *inside)))
    return found


def test_every_package_is_in_the_list_that_pip_reads() -> None:
    assert _packages_on_disk() == set(SETUPTOOLS["packages"])


def test_every_package_has_a_docstring() -> None:
    for package in SETUPTOOLS["packages"]:
        stage = package.removeprefix("superopt").removeprefix(".").split(".")
        folder = ROOT.joinpath(*stage) if stage[0] in STAGES else ROOT.joinpath("superopt", *stage)
        assert (folder / "__init__.py").read_text().startswith('"""'), package


@pytest.mark.parametrize("stage", STAGES)
def test_stage_is_linked_under_superopt(stage: str) -> None:
    link = ROOT / "superopt" / stage
    assert link.is_symlink()
    assert str(link.readlink()) == f"../{stage}"
    assert SETUPTOOLS["package-dir"][f"superopt.{stage}"] == stage


def test_runtime_headers_are_package_data() -> None:
    headers = list((ROOT / "codegen/cpu").rglob("*.h"))
    patterns = SETUPTOOLS["package-data"]["superopt.codegen.cpu"]
    shipped = {path for pattern in patterns for path in (ROOT / "codegen/cpu").glob(pattern)}
    assert set(headers) == shipped


def test_importing_ir_loads_no_framework() -> None:
    code = (
        "import sys, superopt, superopt.ir\n"
        "heavy = {'torch', 'triton', 'z3', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
