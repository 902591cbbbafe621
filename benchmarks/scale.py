"""How seconds and memory of prune() grow with the depth, the width, the queries and their size.

    python benchmarks/scale.py [--only REGEX] [--threads 1] [--fresh]

Llama-shaped decoders with a small vocabulary, and the shapes of ViT and ResNet, with random weights in float32. Queries
are random tokens or images. The budget is 75 % of the multiply-accumulates. Block descent, which runs in small networks
alone, and the comparison at the end are left out; everything else is as by default. Tokens are those of a text, or the
patches of an image. Of a ResNet, they are the positions of its first feature map, hidden is the width of its last
stage, and layers are its blocks. One child process per row. Peaks are of the process's resident memory, above what it
held when the model was made, in all and phase by phase, as the progress calls name them; "own" is the part that no file
backs. With a limit of memory, glibc gives freed memory back at once, which takes time. Writes scale.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from children import Row, measured, memory
from table import run

VOCABULARY = 4096
BASES: dict[str, Row] = {
    "llama": {"layers": 4, "hidden": 512, "queries": 64, "tokens": 128},
    "vit": {"layers": 4, "hidden": 256, "queries": 64, "tokens": 64},
    "resnet": {"layers": 8, "hidden": 256, "queries": 64, "tokens": 256},
}
GROWTH: dict[str, dict[str, tuple[int, ...]]] = {
    "llama": {"layers": (2, 8), "hidden": (256, 768), "queries": (32, 128, 256), "tokens": (64, 256)},
    "vit": {"layers": (8,), "hidden": (512,), "queries": (128,), "tokens": (256,)},
    "resnet": {"layers": (16,), "hidden": (512,), "queries": (128,), "tokens": (1024,)},
}
LIMITS = {"llama": (None, "64MiB"), "vit": (None,), "resnet": (None,)}


def jobs(_: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """The base of each shape, and what grows along one axis at a time."""
    for shape, base in BASES.items():
        grown = ({**base, axis: value} for axis, values in GROWTH[shape].items() for value in values)
        for job in [base, *grown]:
            for limit in LIMITS[shape]:
                name = "-".join([shape, *(f"{axis}{n}" for axis, n in job.items()), *([limit] if limit else [])])
                yield name, {"shape": shape, **job, "memory": limit}


class Decoder(nn.Module):
    """A decoder of transformers without its cache."""

    def __init__(self, layers: int, hidden: int, vocabulary: int = VOCABULARY) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            vocab_size=vocabulary,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
        )
        self.inner = LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(input_ids=ids, use_cache=False).logits


class Classifier(nn.Module):
    """A ViT or a ResNet of transformers, without the wrapping of its outputs."""

    def __init__(self, job: Row) -> None:
        import transformers as hf

        super().__init__()
        side = round(job["tokens"] ** 0.5)
        if job["shape"] == "vit":
            sizes = {"hidden_size": job["hidden"], "intermediate_size": 4 * job["hidden"]}
            sizes |= {"num_hidden_layers": job["layers"], "num_attention_heads": job["hidden"] // 64}
            self.inner: nn.Module = hf.ViTForImageClassification(
                hf.ViTConfig(image_size=4 * side, patch_size=4, **sizes)
            )
        else:
            widths = [job["hidden"] >> step for step in (3, 2, 1, 0)]
            config = hf.ResNetConfig(
                embedding_size=widths[0], hidden_sizes=widths, depths=[job["layers"] // 4] * 4, layer_type="basic"
            )
            self.inner = hf.ResNetForImageClassification(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(pixel_values=x).logits


def made(job: Row) -> tuple[nn.Module, Tensor]:
    """The model and its queries: twice as many as the row says, because half of them are held back."""
    torch.manual_seed(0)
    if job["shape"] == "llama":
        model: nn.Module = Decoder(job["layers"], job["hidden"])
        return model, torch.randint(VOCABULARY, (2 * job["queries"], job["tokens"]))
    side = 4 * round(job["tokens"] ** 0.5)
    model, x = Classifier(job), torch.randn(2 * job["queries"], 3, side, side)
    if norms := [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]:
        for norm in norms:
            norm.momentum = None  # their statistics are those of x, as if the network were trained on the like
        with torch.no_grad():
            model.train()(x)
    return model, x


class Peaks:
    """A progress callback that notes, for every phase, the peak of the resident memory in MiB and the seconds of the
    processor, which other work on the machine does not change much."""

    def __init__(self) -> None:
        self.phase, self.found, self.start = "start", dict[str, float](), memory().get("now", 0.0)
        self.spent, self.since = dict[str, float](), time.process_time()

    def __call__(self, phase: str, done: int, total: int) -> None:  # noqa: ARG002 (one signature)
        if phase == self.phase:
            return
        now = time.process_time()
        self.spent[self.phase] = round(self.spent.get(self.phase, 0.0) + now - self.since, 2)
        self.found[self.phase] = max(self.found.get(self.phase, 0.0), memory().get("peak", 0.0) - self.start)
        self.phase, self.since = phase, now
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def done(self) -> dict[str, int]:
        self("end", 0, 1)
        return {phase: round(value) for phase, value in self.found.items()}


def give_back_freed_memory() -> None:
    """As with MALLOC_TRIM_THRESHOLD_ and MALLOC_MMAP_THRESHOLD_ of 128 KiB: the growth is not that of glibc's pools."""
    for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(parameter, 1 << 17)


def work(job: Row) -> Row:
    from coreprune import Budget, Repair, prune

    if job["memory"]:
        give_back_freed_memory()
    torch.set_num_threads(job["threads"])
    model, x = made(job)
    model.eval()
    peaks, start = Peaks(), memory().get("now", 0.0)
    options: dict[str, Any] = {} if job["memory"] is None else {"memory": job["memory"]}
    cpu = time.process_time()
    own = memory().get("own", 0.0)
    result, row = measured(
        lambda: prune(
            model,
            x[:1],
            Budget(macs=0.75),
            queries=x,
            progress=peaks,
            compare=False,
            repair=Repair(descent=False),
            **options,
        )
    )
    phases = peaks.done()
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    report = result.report
    return {
        **row,
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_memory_mib": max(phases.values()),
        "memory_before_mib": round(start),
        "peak_own_mib": round(row.get("peak_own_mib", 0) - own),
        "phases_mib": phases,
        "cpu_by_phase": peaks.spent,
        "seconds": dict(report.seconds),
        "parameters": report.parameters[0],
        "model_mib": round(size / 2**20, 1),
        "times_the_model": round(max(phases.values()) * 2**20 / size, 1),
        "macs": [report.macs[0], report.macs[1]],
    }


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=("transformers",))
