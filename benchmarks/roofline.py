"""The roofline plot of a result file: where each workload stands below the machine's two roofs.

In: a result document, as `report.document` makes it. Out: an SVG, the same bytes for the same
document. Both roofs are those that the run measured; a workload's bytes are its inputs and outputs,
its operations those of its contractions (Williams, Waterman and Patterson, "Roofline", 2009).
Workloads without contractions have no place on the axis of intensity: they stand in a lane at its
left end, where their height below the roof still is their share of the bandwidth. What fits in a
cache may stand above the roof of memory.
"""

import io
import itertools
import math
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import SUPEROPT

_LANE: Final = 0.25
"""Workloads without contractions are drawn from here to the left, as FLOP per byte."""
_COLUMNS: Final = 3


def svg(document: dict[str, Any]) -> str:
    """Draw the plot of one result file."""
    figure = Figure(figsize=(8.0, 7.0), layout="constrained")
    axes = figure.add_subplot()
    entries = [e for e in document["workloads"] if SUPEROPT in e["timings"]]
    intensities = _intensities(entries)
    _roof(axes, document["roofline"], intensities)
    for number, (x, entry) in enumerate(zip(intensities, entries, strict=True), start=1):
        superopt = x * bandwidth(entry, SUPEROPT) / 1e9
        if entry["best_other"] is not None:
            other = x * bandwidth(entry, entry["best_other"]) / 1e9
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


def bandwidth(entry: dict[str, Any], contender: str) -> float:
    """Return the rate at which a contender's inputs and outputs pass, in bytes/s."""
    rate: float = entry["moved_bytes"] / entry["timings"][contender]["spread"]["median"]
    return rate


def _intensities(entries: list[dict[str, Any]]) -> list[float]:
    """Return each workload's FLOP per byte, or its place in the lane."""
    lane = (_LANE * 2 ** (-i / 3) for i in itertools.count())
    return [e["flops"] / e["moved_bytes"] if e["flops"] else next(lane) for e in entries]


def _roof(axes: Axes, measured: dict[str, Any], intensities: list[float]) -> None:
    by_size = measured["read_bytes_per_s_by_footprint"]
    memory, peak = by_size[max(by_size, key=int)] / 1e9, measured["flops_per_s"] / 1e9
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
