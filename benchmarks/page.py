"""docs/benchmarks.md from the JSONs in benchmarks/results: python benchmarks/page.py"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def ran_on(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['cpu']}, {environment['cores']} cores, Python {environment['python']}, {versions}."


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

Test accuracy in % against the share of neurons kept in both hidden layers; dense {record["dense"]:.2f} %. Mean and standard deviation
over {cells[best, 0.1]["seeds"]} seeds (sampling, data order and augmentation; `magnitude` selects without chance). Pruning uses no data. Fine-tuning is three
epochs of `benchmarks/lenet_recipe.py`: 60,000 slightly warped images an epoch, labels and the dense model's answers.

![LeNet-300-100: accuracy against neurons kept](lenet_mnist.png)

{chr(10).join(parts[:1])}

{chr(10).join(parts[1:])}

Wanted: at 10 % at least {record["target"]["after_at_least"]:.2f} % after fine-tuning. Best selector: {best} with {reached["mean"]:.2f} %
({reached["least"]:.2f} to {reached["most"]:.2f}). The others stay below it, see the table.

- In both layers of this network n ≤ r (300 neurons in 785 dimensions, 100 in 301). The plain bound of the paper and the Lewis weights
  are then the same for every neuron: `loewner, plain bound` and `lewis` are uniform sampling. For ReLU `mussay` is `norm`.
- The ridge form of `loewner` tells neurons apart; it is no better than the norms here.
- What limits the 10 % point is three epochs, not the size of the network: in a trial of 50 epochs (55,000 images, labels only) the
  `magnitude` start reached 98.07 %.
- `magnitude` keeps its seeds apart only by data order and warping. Its lead at 10 % was known when this table was made; no setting of the
  recipe was chosen on the test images.

Ran on {ran_on(record["environment"])}
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

Time; gap certified by the same code for everyone; iterations; peak memory. One thread, best of {record["config"]["rounds"]} turns, {record["config"]["limit"]:g} s at
most per process ("did not finish" otherwise, out of memory included). How the contenders were started and stopped: `benchmarks/mvee.py`.

{table(header, rows)}

- cvxpy stops at its own tolerance, which is looser than the certified gap asked for at most shapes. It ran on the Gaussian points only; where it did
  not finish it ran out of 12 GiB.
- One cell of the heavy-tailed points is slower than WATY: 5000×20 at 1e-2. WATY's time there is
  that of its first iterate with the gap; a caller cannot stop there.

Ran on {ran_on(record["environment"])}
"""


def main() -> None:
    parts = ["# Benchmarks\n\nMade by `python benchmarks/page.py` from the JSONs in `benchmarks/results`.\n"]
    for name, section in (("lenet_mnist", lenet), ("mvee", mvee)):
        source = RESULTS / f"{name}.json"
        if source.exists():
            parts.append(section(json.loads(source.read_text())))
        if source.with_suffix(".png").exists():
            shutil.copy(source.with_suffix(".png"), DOCS / f"{name}.png")
    (DOCS / "benchmarks.md").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
