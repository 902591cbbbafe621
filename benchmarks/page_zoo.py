"""docs/architectures.md from results/zoo.json."""

from __future__ import annotations

from statistics import median
from typing import Any

from page_parts import MISSING, ran_on, several, table

NAMES = {
    "coreprune": "Small networks of our tests, built from configurations",
    "torchvision": "torchvision",
    "timm": "timm",
    "ultralytics": "ultralytics",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
}


def architectures(record: dict[str, Any]) -> str:
    rows = sorted(record["rows"], key=lambda r: (list(NAMES).index(r["package"]), r["architecture"].lower()))
    by_package = {name: found for name in NAMES if (found := [r for r in rows if r["package"] == name])}
    fine, wrong, refused, whole = (sum(_state(r) == state for r in rows) for state in ("yes", "no", "refused", "whole"))
    peer = [r["torch_pruning"]["status"] for r in rows if "torch_pruning" in r]
    summary = [_summary(NAMES[name], found) for name, found in by_package.items()]
    sections = [f"## {NAMES[name]}\n\n{_models(found)}" for name, found in by_package.items()]
    version = record["environment"]["versions"].get("torch-pruning", "")
    return f"""# Architectures

coreprune works on any architecture that torch.export can trace: convolutions, residual and dense connections, attention heads, gated units, experts, detectors.

This page tests on {len(rows)} architectures whether coreprune cuts them correctly. The weights are random. Half of the units of every group that can shrink are removed, at random. The result must equal, in float64,
at other batch sizes and, where the model takes them, other image sizes, the original in which the weights that read a removed channel are zero. If the original runs in training mode, so must the result.

With coreprune, {fine} are equal, {wrong} are not, {whole} have no group that can shrink and be compared, and {refused} are refused with an error, for example because torch.export cannot trace them.
With Torch-Pruning {version}, called as its README does, {peer.count("ok")} of {len(peer)} are equal to the original with zeros in float32, {peer.count("other values")} run and give other values, {peer.count("not comparable")} run and could not be compared, {peer.count("wrong output") + peer.count("broken model")} are broken or
return other shapes, and {peer.count("error")} end in an error. Torch-Pruning also narrows channels inside of norms over channels, where no cut can be equal. coreprune leaves those whole unless it is asked.

{table(["package", "models", "equal", "not equal", "whole", "refused", "free MACs (median)", "seconds to list groups (median, largest)", "Torch-Pruning equal"], summary)}

*Free MACs*: the share of multiply-accumulates that disappears when every free group shrinks to one unit. A group is *locked* when its channels cannot be removed, or when removing
them breaks the model's own forward. *List*: seconds that `list_groups` takes: to trace the model, to find its groups, and to try half of every group.

{(chr(10) * 2).join(sections)}

Measured on {ran_on(record["environment"])} One thread, while other work ran on the machine: times are upper ends.{several(record["rows"])} The page is made by `python benchmarks/page.py` from `benchmarks/results/zoo.json`.
"""


def detectors(record: dict[str, Any]) -> str:
    """The section on results/yolo.json."""
    lines = []
    for row in record["rows"]:
        if "error" in row:
            lines.append([row["key"], *[MISSING] * 6, row["error"]])
            continue
        onnx = f"{row['onnx_difference']:.0e}, batch {row['onnx_batch']}" if "onnx_difference" in row else row["onnx"]
        told = [f"{row['macs']:.1%}", *("yes" if row[k] else "**no**" for k in ("unchanged", "other_sizes"))]
        lines.append([row["network"], "yes" if row["warm"] else "no", *told, f"{row['trained']:.0%}", onnx])
    header = [
        "network",
        "ran before",
        "MACs left",
        "given model unchanged",
        "other sizes",
        "parameters with a gradient",
    ]
    return f"""## Detectors, from pruning to export

The detectors and segmenters of ultralytics from their yaml, random weights: `prune(model, x, Budget(macs=0.5), "magnitude", queries=None)`. *Ran before*: the model had run on an image of another size, and holds the
anchors of that. *Other sizes*: the pruned model returns the same shapes as the original at three other batch and image sizes. *Parameters with a gradient*: in one step in training mode.
*ONNX*: the largest difference between the outputs of the exported file in ONNX Runtime and the pruned model's, relative to the largest output, and the batch sizes that the file takes.

{table([*header, "ONNX"], lines)}

Measured on {ran_on(record["environment"])}
"""


def _state(row: dict[str, Any]) -> str:
    found = row.get("coreprune", {"error": row.get("error", "")})
    if "error" in found:
        return "refused"
    return {True: "yes", False: "no", None: "whole"}[found["equal"]]


def _seconds(row: dict[str, Any]) -> float:
    return row["coreprune"]["list_s"]


def _summary(name: str, rows: list[dict[str, Any]]) -> list[str]:
    states = [_state(r) for r in rows]
    known = [r for r in rows if _state(r) != "refused"]
    counts = [str(states.count(s)) for s in ("yes", "no", "whole", "refused")]
    free = f"{median(r['coreprune']['free_share_macs'] for r in known):.0%}" if known else MISSING
    spent = [_seconds(r) for r in known]
    equal = sum(r.get("torch_pruning", {}).get("status") == "ok" for r in rows)
    times = f"{median(spent):.1f}, {max(spent):.1f}" if spent else MISSING
    return [name, str(len(rows)), *counts, free, times, str(equal)]


def _models(rows: list[dict[str, Any]]) -> str:
    header = ["architecture", "free of groups", "free MACs", "list (s)", "equal", "locked because"]
    lines = []
    for row in rows:
        other = row.get("torch_pruning", {"status": MISSING})
        peer = other["status"] + (f": `{other['detail']}`" if other.get("detail") else "")
        state = _state(row)
        if state == "refused":
            error = row.get("coreprune", row).get("error", "")
            lines.append([row["architecture"], *[MISSING] * 4, _plain(error), _plain(peer)])
            continue
        found = row["coreprune"]
        why = "; ".join(f"{reason} ({n})" for reason, n in sorted(found["locked"].items()))
        if state == "no":
            why = f"{found['why']}; {why}"
        lines.append(
            [
                row["architecture"],
                f"{found['free']} of {found['groups']}",
                f"{found['free_share_macs']:.0%}",
                f"{_seconds(row):.1f}",
                "**no**" if state == "no" else state if state == "whole" else "yes",
                _plain(why),
                _plain(peer),
            ]
        )
    return table([*header, "Torch-Pruning"], lines)


def _plain(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
