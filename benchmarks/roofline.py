"""The roofline plot of a result file: where each workload stands below the machine's two roofs.

In: a result document, as `report.document` makes it. Out: an SVG, the same bytes for the same
document. The roofs are the run's medians; a workload's bytes are its inputs and outputs, its operations
those of its contractions (Williams, Waterman and Patterson, "Roofline", 2009). How far a point lies
below the roof is the share that the contender has of the bound measured beside that very workload, from
the caches if it fits there: the speed of a shared machine changes within a run. Workloads without
contractions have no place on the axis of intensity: they stand in a lane at its left end.
"""

import io
import itertools
import math
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import SUPEROPT
from benchmarks.report import roofs

_LANE: Final = 0.25
"""Workloads without contractions are drawn from here to the left, as FLOP per byte."""
_COLUMNS: Final = 3


def svg(document: dict[str, Any]) -> str:
    """Draw the plot of one result file."""
    figure = Figure(figsize=(8.0, 7.0), layout="constrained")
    axes = figure.add_subplot()
    entries = [e for e in document["workloads"] if SUPEROPT in e["timings"]]
    intensities = _intensities(entries)
    memory, peak = (rate / 1e9 for rate in roofs(document))
    _roof(axes, memory, peak, intensities)
    for number, (x, entry) in enumerate(zip(intensities, entries, strict=True), start=1):
        roof = min(memory * x, peak) if entry["flops"] else memory * x
        superopt = roof * share(entry, SUPEROPT)
        if entry["best_other"] is not None:
            other = roof * share(entry, entry["best_other"])
            axes.plot([x, x], [other, superopt], color="0.7", lw=1, zorder=1)
            axes.plot(x, other, "_", color="0.5", zorder=2)
        name = f"{number}  {entry['name']}"
        axes.plot(x, superopt, "o", color="C0", ms=4, zorder=3, label=name)
        axes.annotate(str(number), (x, superopt), (4, -3), textcoords="offset points", fontsize=7)
    axes.set_title(
        f"{document['machine']['cpu']}, {document['machine']['threads']} threads", fontsize=9
    )
    if entries:
        figure.legend(
            loc="outside lower center", ncols=_COLUMNS, fontsize=7, frameon=False, handlelength=0
        )
    return _text(figure)


def share(entry: dict[str, Any], contender: str) -> float:
    """Return the share of its bound that a contender reaches."""
    return float(entry["bound_s"] / entry["timings"][contender]["spread"]["median"])


def _intensities(entries: list[dict[str, Any]]) -> list[float]:
    """Return each workload's FLOP per byte, or its place in the lane."""
    lane = (_LANE * 2 ** (-i / 3) for i in itertools.count())
    return [e["flops"] / e["moved_bytes"] if e["flops"] else next(lane) for e in entries]


def _roof(axes: Axes, memory: float, peak: float, intensities: list[float]) -> None:
    ridge = peak / memory
    left, right = min(intensities, default=_LANE) / 2, 2 * max([ridge, *intensities])
    axes.plot([left, ridge, right], [memory * left, peak, peak], "k-", lw=1)
    middle = math.sqrt(left * ridge)
    for text, place, offset in (
        (f"{memory:.1f} GB/s from memory", (middle, memory * middle), (-110, 10)),
        (f"{peak:.0f} GFLOP/s of a large product", (ridge, peak), (0, 5)),
    ):
        axes.annotate(text, place, offset, textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axes.grid(visible=True, which="major", color="0.92")


def _text(figure: Figure) -> str:
    out = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "superopt", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
