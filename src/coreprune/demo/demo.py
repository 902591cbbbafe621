"""The demo: a small network on scikit-learn's handwritten digits, pruned in eight ways at three widths."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._telling import Told, Wanted, telling
from coreprune.demo.lines import Line, draw
from coreprune.errors import InputError
from coreprune.finetune import Batches, Tuning, accuracy, fine_tune_
from coreprune.pruning import Budget, prune
from coreprune.pruning.reporting.report import versions
from coreprune.queries import Strokes, make_queries

# The selector, and whether layers that read pruned neurons are repaired on drawings that coreprune makes.
METHODS = {
    "functional": ("functional", True),
    "magnitude+repair": ("magnitude", True),
    **{name: (name, False) for name in ("loewner", "lewis", "norm", "mussay", "uniform", "magnitude")},
}
# Six of the eight are in the plot (for ReLU `mussay` equals `norm`). All are in report.json.
DRAWN = {
    "functional": "functional + repair",
    "magnitude+repair": "magnitude + repair",
    "magnitude": "magnitude",
    "uniform": "uniform",
    "norm": "norm (= mussay)",
    "loewner": "Löwner (the paper)",
}
WIDTHS = (0.5, 0.25, 0.1)

# A description of the inputs: 8×8 drawings with ink 1 on paper 0; strokes are a pixel or more thick and fill the frame.
DRAWINGS = Strokes(shape=(8, 8), low=0.0, high=1.0, radius=(0.06, 0.1), margin=0.05)


@dataclass(frozen=True)
class Row:
    """One pruned network. method: a key of METHODS. Accuracies are shares of the test images.

    certificates: those of the first hidden layer.
    """

    method: str
    keep: float
    widths: tuple[int, ...]
    parameters: int
    accuracy: float
    accuracy_fine_tuned: float
    certificates: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Demo:
    """The results of the demo. parameters, accuracy: of the dense network. rows: one per pruned network."""

    parameters: int
    accuracy: float
    rows: tuple[Row, ...]
    settings: dict[str, Any]


def network(generator: torch.Generator) -> nn.Sequential:
    """A 64-300-100-10 network with ReLU, and He initialisation drawn from `generator`."""
    model = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    with torch.no_grad():
        for layer in model:
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, (2 / layer.in_features) ** 0.5, generator=generator)
                layer.bias.zero_()
    return model


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (N, 64) in [0, 1] and labels (N,), then test images and labels: every fourth image."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the demo needs scikit-learn and matplotlib: pip install 'coreprune[demo]'.") from error
    data: Any = load_digits()
    images = torch.tensor(data.data / 16.0, dtype=torch.float32)
    labels = torch.tensor(data.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 4 == 3
    return images[~test], labels[~test], images[test], labels[test]


def run(seed: int = 0, progress: Wanted = None) -> Demo:
    """Train, prune with every method at every width, fine-tune each result briefly. About 15 seconds on two cores."""
    with telling(progress) as tell:
        return _run(seed, tell)


def _run(seed: int, tell: Told) -> Demo:
    images, labels, test_images, test_labels = digits()
    generator = torch.Generator().manual_seed(seed)
    dense = network(generator)
    fine_tune_(dense, Batches(images, labels, 32, generator), Tuning(20, 2e-3), progress=tell)

    rows = []
    jobs = [(method, keep) for method in METHODS for keep in WIDTHS]
    example = torch.zeros(1, 64)
    drawings = make_queries(dense, example, DRAWINGS, seed=seed)
    for done, (method, keep) in enumerate(jobs):
        tell("prune", done, len(jobs))
        selector, repair = METHODS[method]
        result = prune(dense, example, Budget(keep=keep), selector, queries=drawings if repair else None, seed=seed)
        tuned = copy.deepcopy(result.model)
        fine_tune_(tuned, Batches(images, labels, 32, torch.Generator().manual_seed(seed)), Tuning(3, 2e-3))
        rows.append(
            Row(
                method=method,
                keep=keep,
                widths=tuple(m.out_features for m in result.model.modules() if isinstance(m, nn.Linear)),
                parameters=result.report.parameters[1],
                accuracy=accuracy(result.model, test_images, test_labels),
                accuracy_fine_tuned=accuracy(tuned, test_images, test_labels),
                certificates=tuple(c.as_dict() for c in result.report.groups[0].certificates),
            )
        )
    tell("prune", len(jobs), len(jobs))
    settings = {
        "seed": seed,
        "queries": drawings.note,
        "training_epochs": 20,
        "fine_tuning_epochs": 3,
        "versions": versions(),
    }
    return Demo(
        parameters=sum(p.numel() for p in dense.parameters()),
        accuracy=accuracy(dense, test_images, test_labels),
        rows=tuple(rows),
        settings=settings,
    )


def write(demo: Demo, folder: Path) -> tuple[Path, Path]:
    """Write report.json and accuracy.png into `folder`. Returns their paths."""
    report, plot = folder / "report.json", folder / "accuracy.png"
    prepare(folder)
    report.write_text(json.dumps(asdict(demo), indent=1), encoding="utf-8")
    _plot(demo, plot)
    return report, plot


def prepare(folder: Path) -> None:
    """Make the folder before any other work is done. Raises InputError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".coreprune-writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}. Choose another folder with --out.") from error


def _plot(demo: Demo, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    figure.subplots_adjust(left=0.06, right=0.87, wspace=0.45, top=0.86, bottom=0.12)
    for axis, field, title in (
        (axes[0], "accuracy", "right after pruning"),
        (axes[1], "accuracy_fine_tuned", "after 3 epochs of fine-tuning"),
    ):
        lines = []
        for method, name in DRAWN.items():
            rows = [row for row in demo.rows if row.method == method]
            lines.append(Line(name, [100 * row.keep for row in rows], [100 * getattr(row, field) for row in rows]))
        axis.set(title=title, xlabel="neurons kept in both hidden layers (%)", xscale="log")
        draw(axis, lines, [100 * width for width in WIDTHS], 100 * demo.accuracy)
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle("64-300-100-10 on scikit-learn's digits, no data used for pruning")
    figure.savefig(path, dpi=130)
    plt.close(figure)
