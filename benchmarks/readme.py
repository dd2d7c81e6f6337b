"""`python -m benchmarks.readme`: put the newest full CPU result file into the README as a table.

The table stands between two comments; a test fails when it is not what the file says.
"""

import json
from pathlib import Path
from typing import Final

from benchmarks.report import markdown

ROOT: Final = Path(__file__).resolve().parent.parent
START: Final = "<!-- results: python -m benchmarks.readme -->"
END: Final = "<!-- end of results -->"


def newest(suite: str, dtype: str) -> Path:
    """Return the newest result file of a whole suite."""
    found = sorted((ROOT / "benchmarks" / "results").glob(f"{suite}-{dtype}-2*.json"))
    if not found:
        raise FileNotFoundError(
            f"no {suite}-{dtype} result file: run `python -m benchmarks {suite}`"
        )
    return found[-1]


def filled(text: str) -> str:
    """Return the README's text with the table of the newest results."""
    head, _, rest = text.partition(START)
    if START not in text or END not in rest:
        raise ValueError(f"the README has no lines {START} and {END}")
    path = newest("cpu", "float32")
    table = markdown(json.loads(path.read_text()))
    source = f"From [{path.name}](benchmarks/results/{path.name})."
    return f"{head}{START}\n{table} {source}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
