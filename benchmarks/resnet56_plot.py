"""Plots of the ResNet-56 experiment, from its JSON alone: python benchmarks/resnet56_plot.py"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from children import Row
from coreprune.demo.lines import Line, draw
from resnet56_cells import BOTH, FINAL, NO_DATA, PEER, SHARES

NAME = "resnet56_cifar"
HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"


def label(row: Row) -> str:
    """A summary row in a few words."""
    if row["kind"] == "dense":
        return "dense"
    if row["method"].startswith(PEER):
        return row["method"].replace(PEER, "Torch-Pruning")
    return row["method"] + (" + repair + distillation" if row["distill"] else " + repair" if row["repair"] else "")


def plot(record: dict[str, Any], folder: Path) -> None:
    """accuracy.png for the first page; resnet56_cifar_before.png and resnet56_cifar_after.png for the benchmarks."""
    rows = [row for row in record["summary"] if row["kind"] == "prune"]
    dense, dense_tuned = (
        next((r["accuracy"]["mean"] for r in record["summary"] if r["kind"] == "dense" and r["tuned"] == tuned), None)
        for tuned in (False, True)
    )

    def line(name: str, method: str, source: str = NO_DATA, **treated: Any) -> Line:
        asked = {"method": method, "source": source, "repair": False, "distill": 0, "tuned": False} | treated
        return _line(name, [row for row in rows if all(row[key] == value for key, value in asked.items())])

    tuned_peer = "torch-pruning L2 global inner"
    peer = _line("Torch-Pruning,\nbest of eight settings", _best([r for r in rows if _peer(r) and not r["tuned"]]))
    merging = line("neuron merging", "merging")
    distilled = line("coreprune without data,\n1,000 steps of distillation", FINAL, repair=True, distill=1000)
    repaired = line("coreprune without data,\nno training", FINAL, repair=True)
    first = [
        distilled,
        repaired,
        line("Torch-Pruning, then one epoch\non 15,000 labelled images", tuned_peer, "", tuned=True),
        merging,
        peer,
    ]
    alone = [merging, line("folding", "folding"), line("functional", FINAL), line("L2 norms", "l2"),
             line("Löwner (the paper)", "loewner"), peer]  # fmt: skip
    final = [
        line("functional, distilled", FINAL, repair=True, distill=1000),
        line("functional, 256 images\nand 256 made queries", FINAL, BOTH, repair=True),
        line("functional", FINAL, repair=True),
        line("L2 norms", "l2", repair=True),
        line("Löwner (the paper)", "loewner", repair=True),
        line("random", "random", repair=True),
    ]
    after = [
        line("functional + repair, no data", FINAL, repair=True, tuned=True),
        line("L2 norms", "l2", tuned=True),
        line("Torch-Pruning, L2, global", tuned_peer, "", tuned=True),
    ]
    _figure(
        folder / "accuracy.png",
        "ResNet-56 on CIFAR-10 (as JPEG): accuracy kept as the network shrinks",
        [("", first)],
        dense,
    )
    _figure(
        folder / f"{NAME}_before.png",
        "ResNet-56, before any fine-tuning (six of the table's rows each; bars: least and most of the seeds)",
        [("selection alone, no data", alone), ("selection and repair, no data unless named", final)],
        dense,
    )
    _figure(folder / f"{NAME}_after.png", "ResNet-56, after one epoch of fine-tuning on labelled images",
            [("", after)], dense_tuned)  # fmt: skip


def _peer(row: Row) -> bool:
    return row["method"].startswith(PEER)


def _best(rows: Sequence[Row], by: Callable[[Row], float] = lambda row: row["accuracy"]["mean"]) -> list[Row]:
    """The best row of every share."""
    return [max((row for row in rows if row["share"] == share), key=by) for share in {row["share"] for row in rows}]


def _line(name: str, rows: Sequence[Row]) -> Line:
    rows = sorted(rows, key=lambda row: -row["macs"])
    means = [row["accuracy"]["mean"] for row in rows]
    below = [mean - row["accuracy"]["least"] for mean, row in zip(means, rows, strict=True)]
    above = [row["accuracy"]["most"] - mean for mean, row in zip(means, rows, strict=True)]
    return Line(name, [100 * row["macs"] for row in rows], means, (below, above))


def _figure(path: Path, title: str, panels: list[tuple[str, list[Line]]], dense: float | None) -> None:
    """Panels beside each other; one without lines is left out, and a figure without panels too."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    drawn = [(name, found) for name, lines in panels if (found := [line for line in lines if line.values])]
    if not drawn:
        return
    figure, axes = plt.subplots(1, len(drawn), figsize=(8 if len(drawn) == 1 else 13, 4.6), squeeze=False)
    right = 0.7 if len(drawn) == 1 else 0.84
    figure.subplots_adjust(left=0.09 if len(drawn) == 1 else 0.055, right=right, wspace=0.6, top=0.88, bottom=0.12)
    for axis, (name, lines) in zip(axes[0], drawn, strict=True):
        axis.set(title=name, xlabel="multiply-accumulates left (%)")
        draw(axis, lines, [100 * share for share in SHARES], dense)
    axes[0][0].set_ylabel("accuracy (%)")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    plot(json.loads((HERE / "results" / f"{NAME}.json").read_text()), DOCS)
