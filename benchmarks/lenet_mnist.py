"""LeNet-300-100 on MNIST: test accuracy against neurons kept, per selector, before and after fine-tuning.

    python benchmarks/lenet_mnist.py --data DIR [--seeds 5] [--workers 2] [--out benchmarks/results]
    python benchmarks/lenet_mnist.py --plot benchmarks/results/lenet_mnist.json

DIR holds mnist.npz and lenet300_mnist.safetensors. Pruning uses no data. Fine-tuning is three epochs of
`lenet_recipe.py`.
Two methods that give the same pruned network are fine-tuned once. Writes lenet_mnist.json and lenet_mnist.png; a file
of finished runs beside them lets an interrupted benchmark go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from coreprune import Budget, Lewis, Loewner, Magnitude, Mussay, Norm, Uniform, prune
from coreprune.demo.lines import Line, draw
from coreprune.finetune import accuracy
from environment import environment
from lenet_recipe import Recipe, fine_tune

METHODS = {
    "loewner": Loewner(),
    "loewner, plain bound": Loewner(ridge=None),
    "lewis": Lewis(),
    "norm": Norm(),
    "mussay": Mussay(),
    "uniform": Uniform(),
    "magnitude": Magnitude(),
}
# Those whose curves differ, and the others that each stands for.
DRAWN = {
    "loewner": "Löwner (the paper)",
    "norm": "norm\n(mussay is the same)",
    "uniform": "uniform (lewis and the plain\nbound are within 0.1)",
    "magnitude": "magnitude",
}
KEEP = (0.9, 0.5, 0.25, 0.1, 0.05)
DENSE_TARGET, DROP = 98.24, 0.5


def lenet(folder: Path) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    model.load_state_dict(load_file(folder / "lenet300_mnist.safetensors"))
    return model.eval()


def mnist(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Normalised images (N, 784) and labels (N,)."""
    raw = np.load(folder / "mnist.npz")
    images = torch.tensor(raw[f"{split}_images"], dtype=torch.float32).reshape(-1, 784) / 255
    return (images - 0.1307) / 0.3081, torch.tensor(raw[f"{split}_labels"], dtype=torch.int64)


def pruned(folder: Path, method: str, keep: float, seed: int) -> tuple[nn.Sequential, dict[str, Any]]:
    """The pruned network and what is known of it before fine-tuning."""
    torch.set_num_threads(1)
    result = prune(lenet(folder), torch.zeros(1, 784), Budget(keep=keep), METHODS[method], seed=seed)
    weights = b"".join(p.detach().numpy().tobytes() for p in result.model.parameters())
    free = [g for g in result.report.groups if g.locked_because is None]
    return result.model, {
        "method": method,
        "keep": keep,
        "seed": seed,
        "network": hashlib.sha256(weights).hexdigest()[:16],
        "before": 100 * accuracy(result.model, *mnist(folder, "test")),
        "parameters": result.report.parameters[1],
        "notes": {g.name: g.note for g in free},
        "certificates": {g.name: [c.as_dict() for c in g.certificates] for g in free},
    }


def prune_job(folder: Path, method: str, keep: float, seed: int) -> dict[str, Any]:
    return pruned(folder, method, keep, seed)[1]


def tune_job(folder: Path, method: str, keep: float, seed: int) -> float:
    model, _ = pruned(folder, method, keep, seed)
    tuned = fine_tune(model, lenet(folder), *mnist(folder, "train"), seed)
    return 100 * accuracy(tuned, *mnist(folder, "test"))


def run(folder: Path, seeds: int, workers: int, journal: Path) -> list[dict[str, Any]]:
    """All runs. Finished fine-tunings are kept in the journal, one JSON line each."""
    tuned: dict[str, float] = {}
    if journal.exists():
        tuned = {r["key"]: r["after"] for r in map(json.loads, journal.read_text().splitlines())}
    with ProcessPoolExecutor(workers) as pool:
        jobs = [pool.submit(prune_job, folder, m, k, s) for m in METHODS for k in KEEP for s in range(seeds)]
        runs = [job.result() for job in track(jobs, "pruning    ")]
        todo = {f"{r['network']}-{r['seed']}": r for r in runs}
        # The deepest cuts first: the number that matters is there early.
        order = sorted((r["keep"], key) for key, r in todo.items() if key not in tuned)
        futures = {}
        for _, key in order:
            r = todo[key]
            futures[pool.submit(tune_job, folder, r["method"], r["keep"], r["seed"])] = key
        for future in track(as_completed(futures), "fine-tuning", total=len(futures)):
            tuned[futures[future]] = future.result()
            with journal.open("a") as file:
                file.write(json.dumps({"key": futures[future], "after": future.result()}) + "\n")
    for r in runs:
        r["after"] = tuned[f"{r['network']}-{r['seed']}"]
    return runs


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds, per method and width."""
    rows = []
    for method in METHODS:
        for keep in KEEP:
            mine = [r for r in runs if (r["method"], r["keep"]) == (method, keep)]
            row: dict[str, Any] = {
                "method": method,
                "keep": keep,
                "parameters": mine[0]["parameters"],
                "seeds": len(mine),
            }
            for field in ("before", "after"):
                values = [r[field] for r in mine]
                row[field] = {
                    "mean": statistics.fmean(values),
                    "deviation": statistics.stdev(values) if len(values) > 1 else 0.0,
                    "least": min(values),
                    "most": max(values),
                }
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="LeNet-300-100 on MNIST, test accuracy in % (mean ± deviation over seeds)")
    shown.add_column("method")
    for keep in KEEP:
        shown.add_column(f"{keep:.0%}", justify="right")
    for field in ("before", "after"):
        shown.add_section()
        for method in METHODS:
            cells = [r[field] for r in rows if r["method"] == method]
            shown.add_row(f"{method}, {field}", *(f"{c['mean']:.2f} ± {c['deviation']:.2f}" for c in cells))
    return shown


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 4.6))
    figure.subplots_adjust(left=0.055, right=0.85, wspace=0.6, top=0.86, bottom=0.12)
    for axis, field, title in zip(
        axes, ("before", "after"), ("right after pruning", "after 3 epochs of fine-tuning"), strict=True
    ):
        lines = []
        for method, name in DRAWN.items():
            rows = [r for r in record["summary"] if r["method"] == method]
            spread = [r[field]["deviation"] for r in rows]
            lines.append(
                Line(name, [100 * r["keep"] for r in rows], [r[field]["mean"] for r in rows], (spread, spread))
            )
        axis.set(title=title, xlabel="neurons kept in both hidden layers (%)", xscale="log")
        draw(axis, lines, [100 * keep for keep in KEEP], record["dense"])
    axes[0].set_ylabel("test accuracy (%)")
    figure.suptitle("LeNet-300-100 on MNIST, pruned without data (bars: one standard deviation over seeds)")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with mnist.npz and lenet300_mnist.safetensors")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--plot", type=Path, help="draw an earlier result again and stop")
    options = parser.parse_args()
    if options.plot:
        plot(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
        return
    if options.data is None or not (options.data / "mnist.npz").exists():
        parser.error("--data DIR must hold mnist.npz and lenet300_mnist.safetensors")
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "lenet_mnist.json"
    journal = target.with_suffix(".journal")
    runs = run(options.data, options.seeds, options.workers, journal)
    rows = summarise(runs)
    dense = 100 * accuracy(lenet(options.data), *mnist(options.data, "test"))
    at_ten = {r["method"]: r["after"]["mean"] for r in rows if r["keep"] == 0.1}
    record = {
        "benchmark": "lenet_mnist",
        "environment": environment("matplotlib", "safetensors"),
        "recipe": asdict(Recipe()),
        "dense": dense,
        "target": {"keep": 0.1, "after_at_least": DENSE_TARGET - DROP, "best": max(at_ten, key=at_ten.__getitem__)},
        "summary": rows,
        "runs": [{k: v for k, v in r.items() if k != "certificates"} for r in runs],
        "certificates": [r for r in runs if r["seed"] == 0 and r["keep"] in (0.5, 0.1)],
    }
    if target.exists():  # what lenet_no_training.py measured
        record |= {k: v for k, v in json.loads(target.read_text()).items() if k == "no_training"}
    target.write_text(json.dumps(record, indent=1) + "\n")
    plot(record, target.with_suffix(".png"))
    Console(width=140).print(table(rows))
    journal.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
