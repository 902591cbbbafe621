"""A network on a GPU and on the CPU: seconds by phase, memory, and whether the plans are the same.

    python benchmarks/accelerator.py --device cuda [--only REGEX] [--threads 16]
    python benchmarks/accelerator.py --device cpu [--only REGEX] [--threads 16]

ResNet-50's shape as in resnet50_cost.py (64 images of noise, half of the multiply-accumulates), and a decoder of 1.1
billion weights (Llama's shape, random weights, 16 sequences of 128 random tokens, three quarters of the
multiply-accumulates). Both runs make their weights and inputs on the CPU with one seed. The run that comes second
tells how many of its kept channels the first kept too. Writes results/accelerator.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from children import Row, measured
from coreprune import Budget, Result, prune
from resnet50_cost import ResNet50, Setup, noise, weights
from scale import Decoder
from table import run

SIZES = {"layers": 16, "hidden": 2048, "vocabulary": 32_000}
TEXTS, TOKENS = 16, 128


def resnet50() -> tuple[nn.Module, Tensor, Tensor, float]:
    """The network, an example, the queries and the share of the multiply-accumulates that stays."""
    setup, model = Setup(), ResNet50().eval()
    model.load_state_dict(weights(setup))
    given = noise(setup.queries, setup.size, torch.Generator().manual_seed(setup.seed + 1))
    return model, given[:1], given, setup.macs


def decoder() -> tuple[nn.Module, Tensor, Tensor, float]:
    torch.manual_seed(0)
    model = Decoder(**SIZES).eval()
    ids = torch.randint(SIZES["vocabulary"], (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0))
    return model, ids[:1], ids, 0.75


NETWORKS = {"resnet50": resnet50, "decoder": decoder}


def work(job: Row) -> Row:
    """One row. job: the network and the device."""
    torch.set_num_threads(job["threads"])
    model, example, queries, share = NETWORKS[job["network"]]()
    device = torch.device(job["device"])
    model, example, queries = model.to(device), example.to(device), queries.to(device)
    held: dict[str, Any] = {}
    if device.type == "cuda":
        held = {"model_on_device_mib": round(torch.cuda.memory_allocated(device) / 2**20)}
        torch.cuda.reset_peak_memory_stats(device)
    result, row = measured(lambda: prune(model, example, Budget(macs=share), queries=queries, progress=False))
    if device.type == "cuda":
        held["peak_on_device_mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20)
    report = result.report
    return {
        **row,
        **held,
        **same_kept(result, job["network"], device.type),
        "seconds": dict(report.seconds),
        "parameters": report.parameters[0],
        "macs": list(report.macs),
    }


def same_kept(result: Result, network: str, device: str) -> Row:
    """Write down what is kept, and compare it with what the other device's run has written down."""
    kept = {name: torch.tensor(entry.kept) for name, entry in result.plan.groups.items()}
    mine, *others = (
        Path(f"build/accelerator.{network}.{d}.safetensors") for d in (device, *{"cpu", "cuda"} - {device})
    )
    mine.parent.mkdir(exist_ok=True)
    save_file(kept, mine)
    if not others[0].exists():
        return {}
    other = load_file(others[0])
    shared = sum(len(set(k.tolist()) & set(other[name].tolist())) for name, k in kept.items())
    return {
        "kept": sum(map(len, kept.values())),
        "kept_by_both": shared,
        "groups": len(kept),
        "groups_of_equal_width": sum(len(k) == len(other[name]) for name, k in kept.items()),
    }


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    return ((f"{name}/{options.device}", {"network": name}) for name in NETWORKS)


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=("transformers",), about={"queries": TEXTS, "tokens": TOKENS})
