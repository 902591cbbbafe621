"""Line charts of accuracy: at most six lines, each with its name at its end. They also differ without colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

# Okabe and Ito's palette without yellow. The order is such that the greys of neighbours differ.
COLOURS = ("#0072B2", "#D55E00", "#000000", "#E69F00", "#009E73", "#CC79A7")
MARKERS = "osD^vX"
DASHES = ("-", "--", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)))
_SIZE = 9  # font size of the names, in points
_TURNS = 200  # rounds of moving names apart; a few dozen are enough for six names


@dataclass(frozen=True)
class Line:
    """One line. shares: what is left, in percent. values: accuracies in percent. spread: (below, above) every value."""

    name: str
    shares: Sequence[float]
    values: Sequence[float]
    spread: tuple[Sequence[float], Sequence[float]] | None = None


def draw(axis: Any, lines: Sequence[Line], ticks: Sequence[float], dense: float | None = None) -> None:
    """Draw the lines, with the smallest share on the right, where their names are. Set the scales of the axis before.

    ticks: shares to label on the axis. dense: the accuracy of the original network, drawn as a thin line.
    """
    assert len(lines) <= len(COLOURS), "more lines than a reader can tell apart"
    for line, colour, marker, dash in zip(lines, COLOURS, MARKERS, DASHES, strict=False):
        axis.errorbar(
            line.shares, line.values, line.spread, color=colour, marker=marker, linestyle=dash, markersize=6, capsize=3
        )
    if dense is not None:
        axis.axhline(dense, color="0.45", linewidth=1)
        axis.annotate(
            f"dense {dense:.1f}", (1, dense), (-2, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
            fontsize=_SIZE, color="0.35", ha="right",
        )  # fmt: skip
    axis.set_xticks(ticks, [f"{share:g}" for share in ticks])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    _names(axis, lines)


def _names(axis: Any, lines: Sequence[Line]) -> None:
    """Write each line's name beside its last point, moved up or down until no two names overlap."""
    figure = axis.figure
    figure.canvas.draw()  # fixes the positions of values in the figure
    ends = [min(zip(line.shares, line.values, strict=True)) for line in lines]
    point = 72 / figure.dpi
    wanted = [point * axis.transData.transform(end)[1] for end in ends]
    order = sorted(range(len(lines)), key=wanted.__getitem__)
    placed = list(wanted)
    for _ in range(_TURNS):
        for low, high in pairwise(order):
            rows = (lines[low].name.count("\n") + lines[high].name.count("\n") + 2) / 2
            missing = 1.3 * _SIZE * rows - (placed[high] - placed[low])
            if missing > 0:
                placed[low] -= missing / 2
                placed[high] += missing / 2
    for line, end, colour, to, at in zip(lines, ends, COLOURS, placed, wanted, strict=False):
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 1, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 5}
        axis.annotate(
            line.name, end, (24, to - at), textcoords="offset points", fontsize=_SIZE, va="center", color="0.1",
            annotation_clip=False, arrowprops=leader,
        )  # fmt: skip
