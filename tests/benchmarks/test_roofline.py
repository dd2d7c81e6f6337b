"""The plot has every workload, below the roofs that its run measured."""

import json

import pytest

from benchmarks.readme import newest
from benchmarks.roofline import share, svg


def test_every_workload_is_drawn_and_the_same_each_time() -> None:
    document = json.loads(newest("cpu")[0].read_text())
    drawn = svg(document)
    for number, entry in enumerate(document["workloads"], start=1):
        assert f">{number}  {entry['name']}<" in drawn
    assert drawn == svg(document)


def test_a_height_is_a_share_of_the_bound_beside_it() -> None:
    entry = {"bound_s": 0.5, "timings": {"superopt": {"spread": {"median": 2.0}}}}
    assert share(entry, "superopt") == pytest.approx(0.25)
