"""Every example runs, as a user would run it, and says what it should."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"
SAYS = {
    "decorate.py": "search:",
    "module.py": "search:",
    "torch_compile.py": "equal to eager",
    "decoder_block.py": "equal to eager",
    "read_the_kernel.py": "kernel @focal_loss",
    "triton_source.py": "sm_90: a cubin of",
    "check_two_programs.py": "forgot_to_divide: not equivalent",
}
ARGUMENTS = {"triton_source.py": ("90",), "decoder_block.py": ("2", "--small")}
"""A search gets 2 seconds; others are told something else."""


@pytest.mark.parametrize("name", SAYS)
def test_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / name), *ARGUMENTS.get(name, ("2",))],
        capture_output=True,
        text=True,
        timeout=240,
        env={"SUPEROPT_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert SAYS[name] in done.stdout


def test_every_example_is_listed() -> None:
    scripts = {p.name for p in FOLDER.glob("*.py")}
    assert scripts == {*SAYS, "demo.py", "programs.py"}
