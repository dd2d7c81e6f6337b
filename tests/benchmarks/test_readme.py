"""The README shows the figures of the newest committed result file, and no others."""

from benchmarks.readme import ROOT, filled


def test_the_readme_shows_the_newest_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert filled(text) == text, "run `python -m benchmarks.readme`"
