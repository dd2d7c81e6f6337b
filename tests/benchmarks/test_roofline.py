"""The plot has every workload, below the roofs that its run measured."""

import json

import pytest

from benchmarks.readme import newest
from benchmarks.roofline import bandwidth, svg


def test_every_workload_is_drawn_and_the_same_each_time() -> None:
    document = json.loads(newest("cpu")[0].read_text())
    drawn = svg(document)
    for number, entry in enumerate(document["workloads"], start=1):
        assert f">{number}  {entry['name']}<" in drawn
    assert drawn == svg(document)


def test_a_height_is_bytes_over_time() -> None:
    entry = {"moved_bytes": 6e9, "timings": {"superopt": {"spread": {"median": 2.0}}}}
    assert bandwidth(entry, "superopt") == pytest.approx(3e9)
