"""Plots of the ResNet-56 experiment, from its JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from children import Row
from resnet56_cells import BOTH, FINAL, IMAGES, NO_DATA, PEER

NAME = "resnet56_cifar"
MARKERS = "osD^vXPd<>*h"


def label(row: Row) -> str:
    """A summary row in a few words."""
    if row["kind"] == "dense":
        return "dense"
    if row["method"].startswith(PEER):
        return row["method"].replace(PEER, "Torch-Pruning")
    extra = " + repair + polish" if row["distill"] else " + repair" if row["repair"] else ""
    return (
        row["method"] + extra + {IMAGES: ", given images", BOTH: ", given images and made ones"}.get(row["source"], "")
    )


def plot(record: dict[str, Any], folder: Path) -> None:
    """resnet56_cifar_before.png and resnet56_cifar_after.png; one that would be empty is left out."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in record["summary"] if row["kind"] == "prune"]
    dense = next((r["accuracy"]["mean"] for r in record["summary"] if r["kind"] == "dense" and not r["tuned"]), None)
    plain = [r for r in rows if not r["tuned"] and not r["repair"] and r["source"] in ("", NO_DATA)]
    final = [r for r in rows if not r["tuned"] and r["repair"] and (r["source"] == NO_DATA or r["method"] == FINAL)]
    panels = {
        "before": [("selection alone, no data", plain), ("with repair; no data unless said", final)],
        "after": [("started from", [r for r in rows if r["tuned"]])],
    }
    for when, parts in panels.items():
        drawn = [(title, found) for title, found in parts if found]
        if not drawn:
            continue
        size = (8.5 * len(drawn), 5)
        figure, axes = plt.subplots(1, len(drawn), figsize=size, layout="constrained", squeeze=False)
        for axis, (title, found) in zip(axes[0], drawn, strict=True):
            _panel(axis, title, found, dense if when == "before" else _tuned_dense(record))
        axes[0][0].set_ylabel("accuracy on the test images (%)")
        epochs = record["recipe"]["epochs"]
        what = (
            "before any fine-tuning"
            if when == "before"
            else f"after {'one epoch' if epochs == 1 else f'{epochs} epochs'} on the labelled training images"
        )
        figure.suptitle(f"ResNet-56, CIFAR-10 as JPEG, {what}\n(bars: least and most of the seeds)")
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{NAME}_{when}.png", dpi=120)
        plt.close(figure)


def _tuned_dense(record: dict[str, Any]) -> float | None:
    return next((r["accuracy"]["mean"] for r in record["summary"] if r["kind"] == "dense" and r["tuned"]), None)


def _panel(axis: Any, title: str, rows: list[Row], dense: float | None) -> None:
    from matplotlib import colormaps

    colours = colormaps["tab20"]
    names = list(dict.fromkeys(label(row) for row in rows))
    for place, name in enumerate(names):
        mine = sorted((row for row in rows if label(row) == name), key=lambda row: row["macs"])
        means = [row["accuracy"]["mean"] for row in mine]
        below = [m - row["accuracy"]["least"] for m, row in zip(means, mine, strict=True)]
        above = [row["accuracy"]["most"] - m for m, row in zip(means, mine, strict=True)]
        axis.errorbar(
            [100 * row["macs"] for row in mine],
            means,
            yerr=[below, above],
            label=name,
            marker=MARKERS[place % len(MARKERS)],
            markersize=5,
            capsize=2,
            color=colours(place % 20),
            linestyle=":" if name.startswith("Torch-Pruning") else "-",
            linewidth=2.4 if mine[0]["method"] == FINAL else 1.1,
            alpha=0.9,
        )
    if dense is not None:
        axis.axhline(dense, color="0.4", linestyle="--", linewidth=1, label="dense")
    axis.set(title=title, xlabel="multiply-accumulates kept, whole network (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
