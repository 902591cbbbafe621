"""docs/benchmarks.md and docs/architectures.md from the JSONs in benchmarks/results: python benchmarks/page.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from page_cost import accelerator, agreement, prune_time
from page_deployment import deployment
from page_parts import MISSING, missing, phases, ran_on, several, spread, table, threads
from page_peers import peers
from page_real import ablation, efficientnet, pitch
from page_resnet56 import resnet56
from page_scale import scale, seven_billion
from page_selection import selection
from page_texts import antibodies, minilm, smollm2
from page_zoo import architectures, detectors

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"


def lenet(record: dict[str, Any]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in record["summary"]))
    keeps = list(dict.fromkeys(row["keep"] for row in record["summary"]))
    cells = {(row["method"], row["keep"]): row for row in record["summary"]}
    parts = []
    for field, title in (("before", "Right after pruning, no data used"), ("after", "After three epochs")):
        rows = [
            [m, *(f"{cells[m, k][field]['mean']:.2f} ± {cells[m, k][field]['deviation']:.2f}" for k in keeps)]
            for m in methods
        ]
        parts.append(f"{title}:\n\n" + table(["selector", *(f"{k:.0%}" for k in keeps)], rows))
    best = record["target"]["best"]
    reached = cells[best, 0.1]["after"]
    return f"""## LeNet-300-100 on MNIST

The tables show the test accuracy in %, by the share of neurons kept in both hidden layers. The dense network reaches {record["dense"]:.2f} %. Each cell is the mean and standard deviation
over {cells[best, 0.1]["seeds"]} seeds, which change the sampling, the order of the data and the augmentation (`magnitude` samples nothing). Pruning uses no data. Fine-tuning is three
epochs of `benchmarks/lenet_recipe.py`: 60,000 slightly warped images an epoch, with their labels and the answers of the dense model.

![LeNet-300-100: accuracy against neurons kept](lenet_mnist.png)

{chr(10).join(parts[:1])}

{chr(10).join(parts[1:])}

Our target was at least {record["target"]["after_at_least"]:.2f} % after fine-tuning, with 10 % of the neurons. The best selector, {best}, reaches {reached["mean"]:.2f} %
({reached["least"]:.2f} to {reached["most"]:.2f}). The others are below it, see the table.

- In both layers of this network there are no more neurons than input dimensions (300 neurons in 785 dimensions, 100 in 301). The plain bound of the paper and the Lewis weights
  are then the same for every neuron, so `loewner, plain bound` and `lewis` sample uniformly. For ReLU, `mussay` is the same as `norm`.
- The ridge form of `loewner` distinguishes neurons, but it is no better than the norms here.
- At 10 %, what limits the accuracy is three epochs of training, and not the size of the network: in a trial of 50 epochs (55,000 images, labels only) the
  network from `magnitude` reached 98.07 %.
- The seeds of `magnitude` differ only in the order of the data and the warping. We knew its lead at 10 % when we made this table. No setting of the
  recipe was chosen on the test images.

Measured on {ran_on(record["environment"])}
{no_training(record)}"""


def no_training(record: dict[str, Any]) -> str:
    measured = record.get("no_training", {})
    rows = measured.get("summary", [])
    if not rows:
        return ""
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    cells = {(r["method"], r["repair"], r["images"], r["keep"]): spread(r) for r in rows}
    lines = []
    for method, repair, images in dict.fromkeys(key[:3] for key in cells):
        given = f"{images:,} images" if images else "no data"
        values = [cells.get((method, repair, images, keep), MISSING) for keep in keeps]
        lines.append([method, "repair" if repair else "none", given, *values])
    failed = sum("error" in run for run in measured.get("runs", ()))
    return f"""
### Without any training

This table is about the same network and test images, without labels and without gradient steps. *No data* means {measured["queries_made"]:,} queries made from the network alone. The other rows
use that many unlabelled training images, drawn at random. Each cell is the mean and standard deviation over up to {max(r["seeds"] for r in rows)} seeds. If a selector reads no
queries and nothing is repaired, the network is the same for all of them.{missing(failed, "runs")}

{table(["selector", "then", "queries", *(f"{k:.0%}" for k in keeps)], lines)}

Measured on {ran_on(measured["environment"])}
"""


def resnet50(record: dict[str, Any]) -> str:
    setup, wanted = record["setup"], record["wanted"]
    lines = []
    for row in record["rows"]:
        name = [row["method"], "repair" if row["repair"] else "none"]
        if "error" in row:
            lines.append([*name, "failed; the JSON says why", MISSING, MISSING])
            continue
        lines.append([*name, phases(row["seconds"]), f"{row['wall_s']:.1f}", f"{row.get('peak_memory_mib', 0):,}"])
    return f"""## What a ResNet-50 costs

How long does it take to prune a ResNet-50, and how much memory? The network has {record["parameters"]:,} parameters, random weights, and batch-norm statistics measured on noise. It reads images of {setup["size"]}×{setup["size"]} pixels. We gave {setup["queries"]} queries and kept {setup["macs"]:.0%} of the
multiply-accumulates, with {setup["threads"]} threads and one process per row. Our target on {wanted["cores"]} cores was at most {wanted["seconds"]} s and {wanted["peak_memory_mib"]:,} MiB.

{table(["selector", "then", "seconds of the phases", "seconds in all", "peak memory (MiB)"], lines)}

Measured on {ran_on(record["environment"])}
"""


def mvee(record: dict[str, Any]) -> str:
    rows = []
    for entry in record["summary"]:
        cells = []
        for solver in ("coreprune", "waty", "cvxpy"):
            row = entry[solver]
            if row is None:
                cells.append(entry["missing"][solver])
            else:
                cells.append(
                    f"{1e3 * row['seconds']:.1f} ms; {row['gap']:.0e}; {row['iterations']}; {row['peak_mib']:.0f} MiB"
                )
        ratios = [entry.get(f"times_faster_than_{solver}") for solver in ("waty", "cvxpy")]
        name = f"{entry['kind'].split(':')[-1]} {entry['n']}×{entry['r']}"
        rows.append([name, f"{entry['tol']:.0e}", *cells, *(f"{r:.1f}" if r else "–" for r in ratios)])

    header = ["points", "tol", "coreprune", "WATY (accbpg)", "cvxpy + Clarabel", "× WATY", "× cvxpy"]
    return f"""## Löwner ellipsoids

The table compares three solvers for the smallest ellipsoid around points. Each cell gives the time, the gap to the optimum (certified by the same code for everyone), the iterations and the peak memory. Each solver ran on one thread; the time is the best of {record["config"]["rounds"]} turns. "Did not finish" means that
a process took more than {record["config"]["limit"]:g} s or ran out of memory. `benchmarks/mvee.py` shows how each solver was started and stopped.

{table(header, rows)}

- cvxpy stops at its own tolerance, which at most shapes is looser than the gap that we asked for. It ran on the Gaussian points only. Where it did
  not finish, it ran out of 12 GiB of memory.
- In one cell of the heavy-tailed points, 5000×20 at 1e-2, coreprune is slower than WATY. WATY's time there is
  that of its first iterate with the gap; a caller cannot stop there.

Measured on {ran_on(record["environment"])}
"""


def latency(record: dict[str, Any]) -> str:
    lines, notes = [], []
    for run in record["rows"]:
        for row in run["rows"]:
            before, after = (1e3 * row[side]["median"] for side in ("before", "after"))
            rounded = str(run["round_to"] or "per device")
            lines.append(
                [run["model"], rounded, str(row["batch"]), f"{before:.1f}", f"{after:.1f}", f"{row['speedup']:.2f}"]
            )
        if run["note"]:
            notes.append(f"- {run['model']}, round_to={run['round_to']}: {run['note']}")
    setup = record["setup"]
    return f"""## Latency

The table shows milliseconds per batch before and after pruning to {setup["macs"]:.0%} of the multiply-accumulates. They are medians of calls made in turn. The channels were selected by `{setup["method"]}`;
the selector does not matter for speed.

{table(["model", "widths in multiples of", "batch", "before", "after", "times as fast"], lines)}

{chr(10).join(notes)}

Measured on {ran_on(record["environment"])}
"""


def latency_budget(record: dict[str, Any]) -> str:
    setup, wanted = record["setup"], record["wanted"]
    queries = " or ".join(str(n) for n in sorted({row["queries"] for row in record["rows"]}))
    lines, failed = [], []
    for row in record["rows"]:
        name = [row["model"], str(row["batch"]), row["runtime"]]
        if "failed" in row:
            failed.append(f"- {', '.join(name)}: {row['failed']}")
            continue
        before, after = (1e3 * row[side] for side in ("before", "after"))
        met = row.get("met", {})
        told = [f"{1e3 * met[key]:.2f}" for key in ("limit", "predicted")] if met else [MISSING, MISSING]
        speed = [f"{before:.2f}", f"{after:.2f}", f"{row['speedup']:.2f}"]
        corrections = str(met["corrections"]) if met else MISSING
        per_mac = f"{row['time_per_mac']:.2f}" if "time_per_mac" in row else MISSING
        lines.append(
            [*name, row["budget"], *speed, *told, corrections, f"{row['macs']:.1%}", per_mac, f"{row['error']:.3f}"]
        )
    head = [
        "model",
        "batch",
        "runtime",
        "budget",
        "before",
        "after",
        "times as fast",
        "limit",
        "predicted",
        "corrections",
    ]
    return f"""## A time as the budget

Each network was pruned to {setup["latency"]:.0%} of its time (`Budget(latency={setup["latency"]:g})`), and to the largest share of its multiply-accumulates with which it takes no longer. Times are milliseconds per
batch: medians of calls in turn, measured again after both were made. *Time per MAC* is the share of the time that left, over the share of the MACs that left. The error is that of the outputs on
{setup["fresh"]} new inputs, relative to their variance, after the repair {setup["repair"]} on {queries} inputs. The weights are random, so it compares the widths and not the methods.
Our target was at least {wanted["speedup"]:g} times as fast, with an error {wanted["error"]}.

{table([*head, "MACs left", "time per MAC", "error"], lines)}

{chr(10).join(failed)}

Where the error is above 1, the cut has destroyed what an untrained network computes, and the errors of both budgets say nothing. Times vary most at batch 32, because the machine was busy: the limit is half of what the dense
network took while it was pruned, and *before* is what it took at the end.

Measured with other work on the other core, with {threads(setup["threads"])} on {ran_on(record["environment"])}{several(record["rows"])}
"""


def main() -> None:
    parts = [
        "# Benchmarks\n\nWhat coreprune reaches, what it costs, and how it compares. [Selectors](selectors.md) explains the names in the tables, and [Limits](limits.md) "
        "says what these numbers do not show. The page is made by `python benchmarks/page.py` from the JSON files in `benchmarks/results`, which name versions and hardware.\n"
    ]
    for name, section in (
        ("resnet56_cifar", resnet56),
        ("peers", peers),
        ("efficientnet", efficientnet),
        ("ablation", ablation),
        ("pitch", pitch),
        ("minilm", minilm),
        ("smollm2", smollm2),
        ("antibodies", antibodies),
        ("agreement", agreement),
        ("resnet50_cost", resnet50),
        ("accelerator", accelerator),
        ("scale", scale),
        ("seven_billion", seven_billion),
        ("prune_time", prune_time),
        ("latency", latency),
        ("latency_budget", latency_budget),
        ("deployment", deployment),
        ("lenet_mnist", lenet),
        ("mvee", mvee),
        ("selection", selection),
    ):
        source = RESULTS / f"{name}.json"
        if source.exists():
            parts.append(section(json.loads(source.read_text())))
        if source.with_suffix(".png").exists():
            shutil.copy(source.with_suffix(".png"), DOCS / f"{name}.png")
    (DOCS / "benchmarks.md").write_text("\n".join(parts))
    zoo = json.loads((RESULTS / "zoo.json").read_text())
    yolo = json.loads((RESULTS / "yolo.json").read_text())
    (DOCS / "architectures.md").write_text(f"{architectures(zoo)}\n{detectors(yolo)}")


if __name__ == "__main__":
    main()
