"""Dense, pruned, int8, and both: bytes, milliseconds and agreement of ONNX files in ONNX Runtime, and in OpenVINO.

    python benchmarks/deployment.py [--data ../shared/data] [--threads 1] [--seconds 10] [--only REGEX] [--quick]

ResNet-56 with its trained weights (the accuracy is that on the test images), and the shapes of ResNet-18, MobileNetV2
and a small BERT with random weights, for which only bytes and times mean something. Half of the multiply-accumulates
stay, once in the default's widths and once in multiples of 16 (of 8 in the narrow ResNet-56). All files of a network
are timed in turn in one process, so that a busy machine slows all of them alike, and the fastest tenth of the calls
counts: read the ratios, not the milliseconds. OpenVINO is timed where it is installed. Writes deployment.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from children import Row
from cifar import normalised, pictures, trained
from coreprune import Budget, Repair, export_int8, export_onnx, prune
from environment import environment

RESULT = Path(__file__).parent / "results/deployment.json"
SHARE, IMAGES, NOISE, WORDS = 0.5, 512, 64, 30_522
Call = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class Network:
    """queries: (N, …) inputs that calibrate and measure. test: images and labels, or None for random weights. round_to:
    the multiples that widths are rounded to in the second pruned copy; the first has the default's."""

    model: nn.Module
    queries: dict[str, Tensor]
    test: tuple[Tensor, Tensor] | None = None
    round_to: int = 16

    @property
    def example(self) -> dict[str, Tensor]:
        return {name: x[:1] for name, x in self.queries.items()}

    def pruned(self, round_to: int | None = None) -> nn.Module:
        """Half of the cost. Of random weights it does not matter which channels stay."""
        budget = Budget(macs=SHARE, round_to=round_to)
        if self.test is None:
            return prune(self.model, self.example, budget, "magnitude", queries=None).model
        return prune(self.model, self.example, budget, queries=self.queries, repair=Repair(descent=False)).model


def images(model: nn.Module, side: int) -> Network:
    return Network(model.eval(), {"pixel_values": torch.randn(NOISE, 3, side, side)})


def networks(data: Path, quick: bool) -> dict[str, Callable[[], Network]]:
    """By name: what builds it."""
    side, count = (64, 500) if quick else (224, 10_000)

    def resnet56() -> Network:
        rows = torch.randperm(15_000, generator=torch.Generator().manual_seed(0))[:IMAGES].tolist()
        queries = normalised(pictures(data, "train", rows)[0])
        # It is too narrow for half of the cost in multiples of 16.
        return Network(trained(data), {"x": queries}, pictures(data, "test", range(count)), round_to=8)

    def bert() -> Network:
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=3
        )
        tokens = {"input_ids": torch.randint(WORDS, (NOISE, 64)), "attention_mask": torch.ones(NOISE, 64).long()}
        return Network(BertForSequenceClassification(config).eval(), tokens)

    resnet = ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=1000)
    return {
        "ResNet-56, trained": resnet56,
        "ResNet-18 shape": lambda: images(ResNetForImageClassification(resnet), side),
        "MobileNetV2 shape": lambda: images(
            MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=1000)), side
        ),
        "BERT shape, 6 layers of 384": bert,
    }


def onnx_call(path: Path, threads: int) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)[0]


def openvino_call(path: Path, threads: int) -> Call:
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_NUM_THREADS": threads})
    return lambda inputs: compiled(inputs)[0]


def timed(calls: Mapping[str, Call], inputs: dict[str, np.ndarray], seconds: float) -> dict[str, float]:
    """Milliseconds of a call: the fastest tenth of calls made in turn, which a busy machine disturbs least."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call(inputs)
    start = perf_counter()
    while perf_counter() - start < seconds * len(calls) or len(next(iter(spent.values()))) < 10:
        for name, call in calls.items():
            before = perf_counter()
            call(inputs)
            spent[name].append(1e3 * (perf_counter() - before))
    return {name: round(sorted(times)[len(times) // 10], 3) for name, times in spent.items()}


def accuracy(call: Call, test: tuple[Tensor, Tensor]) -> float:
    pixels, labels = test
    found = [call({"x": normalised(part).numpy()}).argmax(axis=1) for part in pixels.split(32)]
    return float((np.concatenate(found) == labels.numpy()).mean())


def measure(name: str, network: Network, batches: tuple[int, ...], options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    runtimes = {"onnxruntime": onnx_call}
    if importlib.util.find_spec("openvino"):
        runtimes["openvino"] = openvino_call
    with tempfile.TemporaryDirectory() as folder:
        files: dict[str, Path] = {}
        models = {
            "dense": network.model,
            "pruned": network.pruned(),
            f"pruned to multiples of {network.round_to}": network.pruned(network.round_to),
        }
        tolerance = 1.0 if network.test is None else 0.1
        for number, (kind, model) in enumerate(models.items()):
            path = Path(folder) / f"{number}.onnx"
            export_onnx(model, network.example, path)
            place = path.with_name(f"{number}-int8.onnx")
            done = export_int8(model, network.example, place, network.queries, tolerance=tolerance)
            files |= {kind: path, f"{kind}, int8": place}
            rows.append({"network": name, "kind": kind})
            rows.append({"network": name, "kind": f"{kind}, int8", **done.as_dict()})
        calls = {(kind, r): make(path, options.threads) for kind, path in files.items() for r, make in runtimes.items()}
        times: dict[int, Any] = {}
        for batch in batches:
            inputs = {key: x[:batch].numpy() for key, x in network.queries.items()}
            named = {f"{kind}/{r}": call for (kind, r), call in calls.items()}
            times[batch] = timed(named, inputs, options.seconds)
        for row in rows:
            row.pop("path", None)
            row["bytes"] = files[row["kind"]].stat().st_size
            row["ms"] = {str(b): {r: times[b][f"{row['kind']}/{r}"] for r in runtimes} for b in batches}
            if network.test is not None:
                row["accuracy"] = accuracy(calls[row["kind"], "onnxruntime"], network.test)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="per file and batch size")
    parser.add_argument("--only", default="", help="a regular expression for the networks")
    parser.add_argument("--quick", action="store_true", help="64×64 pixels, few images, into build/quick")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batches = (1, 8)
    console, rows = Console(highlight=False, soft_wrap=True), []
    for name, build in networks(options.data, options.quick).items():
        if re.search(options.only, name):
            with console.status(name):
                found = measure(name, build(), batches, options)
            rows += found
            for row in found:
                console.print(json.dumps(row))
    record = {
        "benchmark": "deployment",
        "environment": environment("onnxruntime", "onnx", "openvino", "transformers"),
        "setup": {
            "macs": SHARE,
            "images": IMAGES,
            "seconds": options.seconds,
            "threads": options.threads,
            "batches": batches,
            "seed": 0,
        },
        "rows": rows,
    }
    target = options.out or (Path("build/quick/deployment.json") if options.quick else RESULT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
