"""The section on int8 files of docs/benchmarks.md, from results/deployment.json."""

from __future__ import annotations

from typing import Any

from page_parts import MISSING, ran_on, table, threads


def deployment(record: dict[str, Any]) -> str:
    setup, runtimes = record["setup"], list(next(iter(record["rows"][0]["ms"].values())))
    batches = [str(batch) for batch in setup["batches"]]
    dense = {row["network"]: row for row in record["rows"] if row["kind"] == "dense"}
    lines = []
    for row in record["rows"]:
        first = dense[row["network"]]
        times = [f"{row['ms'][b][r] / first['ms'][b]['onnxruntime']:.2f}" for r in runtimes for b in batches]
        own = f"{row['agreement']:.1%}" if "agreement" in row else MISSING
        trained = "accuracy" in first
        lines.append(
            [
                row["network"],
                row["kind"],
                f"{row['bytes'] / 1e6:.2f}",
                f"{row['ms'][batches[0]]['onnxruntime']:.1f}",
                *times,
                own if trained or own == MISSING else f"({own})",
                f"{row['accuracy']:.2%}" if trained else MISSING,
            ]
        )
    names = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
    header = ["network", "file", "MB", f"ms, batch {batches[0]}"]
    header += [f"{names[r]}, batch {b}" for r in runtimes for b in batches]
    return f"""## Deployment

What do pruning and int8 weights save, alone and together? `export_int8` made the int8 files. Half of the multiply-accumulates stay. The columns of the runtimes give the time of a call relative to
the dense float file in ONNX Runtime: 0.5 is twice as fast. *Agreement* is the share of held-out queries to which the int8 file gives the answer of its own float network. *Accuracy* is that on the test
images of CIFAR-10. In brackets: the weights are random, so that the answers are close together, and only bytes and times mean something.

{table([*header, "agreement", "accuracy"], lines)}

- All files of a network were timed in turn, in one process with {threads(setup["threads"])}; the fastest tenth of the calls counts. The machine was busy with other work: the ratios mean something, the milliseconds do not.
- The ResNet-56 was pruned with {record["setup"]["images"]} unlabelled training images, which then calibrated and measured the int8 files. Block descent was left out (`Repair(descent=False)`). One seed.
- The processor has AVX-512 VNNI. On processors without it, int8 gains less time; the bytes are the same.

Measured on {ran_on(record["environment"])}
"""
