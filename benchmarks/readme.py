"""`python -m benchmarks.readme`: put the newest full CPU result files into the README as tables.

The tables, one per type and all but the first folded, stand between two comments; a test fails when they are not what the files
say.
"""

import json
from pathlib import Path
from typing import Final

from benchmarks.report import markdown

ROOT: Final = Path(__file__).resolve().parent.parent
START: Final = "<!-- results: python -m benchmarks.readme -->"
END: Final = "<!-- end of results -->"


def newest(suite: str) -> list[Path]:
    """Return the newest result file of a whole suite for each type that was measured."""
    folder = ROOT / "benchmarks" / "results"
    found = (sorted(folder.glob(f"{suite}-{d}-2*.json"))[-1:] for d in ("float32", "bfloat16"))
    files = [path for newest_of_type in found for path in newest_of_type]
    if not files:
        raise FileNotFoundError(f"no {suite} result file: run `python -m benchmarks {suite}`")
    return files


def filled(text: str) -> str:
    """Return the README's text with the tables of the newest results."""
    head, _, rest = text.partition(START)
    if START not in text or END not in rest:
        raise ValueError(f"the README has no lines {START} and {END}")
    first, *others = map(_table, newest("cpu"))
    folded = (
        f"<details><summary>The same in {path.name.split('-')[1]}</summary>\n\n{table}\n\n</details>"
        for path, table in zip(newest("cpu")[1:], others, strict=True)
    )
    tables = "\n\n".join([first, *folded])
    return f"{head}{START}\n{tables}\n{END}{rest.partition(END)[2]}"


def _table(path: Path) -> str:
    table = markdown(json.loads(path.read_text()))
    plot = path.with_suffix(".svg").name
    folder = "benchmarks/results"
    source = f"From [{path.name}]({folder}/{path.name}); [roofline plot]({folder}/{plot})."
    return f"{table} {source}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
