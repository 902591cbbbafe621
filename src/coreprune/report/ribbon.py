"""The network as a ribbon from its input to its output: how wide every group of channels was, and is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from typing import Any

WIDTH = 1000.0  # of the drawing with few groups, in its own units
HALF = 70.0  # from the middle to the edge where the network is widest
_NARROWEST, _WIDEST = 11.0, 150.0  # along the network, per group
_LABEL = 15.0  # at least so far from one name to the next
_SLOPE = 0.18  # share of a group's length that leads to the next one
_LETTERS = 26


def ribbon(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What the page draws: the outlines before and after as SVG paths, and for every group its place and its name.

    groups: rows with number, name, channels, kept and locked, in the order of the forward. The thickness grows with the
    square root of the channels, so that thin layers are seen beside wide ones. None if there are no channels.
    """
    most = max((g["channels"] for g in groups), default=0)
    if not most:
        return None
    step = min(_WIDEST, max(_NARROWEST, WIDTH / len(groups)))
    every = math.ceil(_LABEL / step)
    shared = _common([str(g["name"]) for g in groups])
    ends = [(i * step + _SLOPE * step, (i + 1) * step - _SLOPE * step) for i in range(len(groups))]
    ends[0] = (0.0, ends[0][1])
    ends[-1] = (ends[-1][0], len(groups) * step)
    heights = {key: [HALF * math.sqrt(g[key] / most) for g in groups] for key in ("channels", "kept")}
    parts = [
        {
            "x": round(i * step, 1),
            "flat": [round(x, 1) for x in ends[i]],
            "half": round(heights["kept"][i], 1),
            "label": _shortened(str(g["name"])[shared:]) if i % every == 0 else "",
            **{key: g[key] for key in ("number", "name", "channels", "kept", "locked")},
        }
        for i, g in enumerate(groups)
    ]
    return {
        "width": round(len(groups) * step, 1),
        "step": round(step, 1),
        "half": HALF,
        "letters": max(len(p["label"]) for p in parts),
        "before": _outline(heights["channels"], ends),
        "after": _outline(heights["kept"], ends),
        "parts": parts,
    }


def _outline(heights: Sequence[float], ends: Sequence[tuple[float, float]]) -> str:
    """A closed path around the middle line, flat between the ends of every group and curved from one to the next."""
    there = [(x, -h) for h, pair in zip(heights, ends, strict=True) for x in pair]
    back = [(x, -y) for x, y in reversed(there)]
    text = f"M{there[0][0]:.1f} {there[0][1]:.1f}"
    for side in (there, back):
        if side is back:
            text += f"L{back[0][0]:.1f} {back[0][1]:.1f}"
        for (x0, y0), (x1, y1) in pairwise(side):
            middle = (x0 + x1) / 2
            text += f"C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"
    return text + "Z"


def _common(names: Sequence[str]) -> int:
    """How many characters all names begin with, up to a dot."""
    if len(names) < 2:
        return 0
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rfind(".") + 1


def _shortened(name: str) -> str:
    return name if len(name) <= _LETTERS else "…" + name[1 - _LETTERS :]
