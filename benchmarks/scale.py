"""How seconds and memory of prune() grow with the depth, the width, the queries and the tokens of a decoder.

    python benchmarks/scale.py [--only REGEX] [--threads 1] [--fresh]

Llama-shaped decoders with random weights and a small vocabulary, in float32; queries are random tokens; a budget of
75 % of the multiply-accumulates, everything else as by default. One child process per row. Peaks are of the process's
resident memory, above what it held when the model was made. A row also tells them phase by phase, as the progress calls
name them. Writes scale.json.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from children import Row, measured, memory
from table import run

VOCABULARY = 4096
BASE: Row = {"layers": 4, "hidden": 512, "queries": 64, "tokens": 128}
GROWTH = {"layers": (2, 8), "hidden": (256, 768), "queries": (32, 128, 256), "tokens": (64, 256)}


def jobs(_: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    """The base, and what grows along one axis at a time."""
    for job in [BASE, *({**BASE, axis: value} for axis, values in GROWTH.items() for value in values)]:
        for memory_limit in (None, "64MiB"):
            key = "-".join(f"{axis}{job[axis]}" for axis in BASE)
            yield key + (f"-{memory_limit}" if memory_limit else ""), {**job, "memory": memory_limit}


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


class Peaks:
    """A progress callback that notes the peak of the resident memory in every phase, in MiB."""

    def __init__(self) -> None:
        self.phase, self.found, self.start = "start", dict[str, float](), memory().get("now", 0.0)

    def __call__(self, phase: str, done: int, total: int) -> None:  # noqa: ARG002 (one signature)
        if phase == self.phase:
            return
        self.found[self.phase] = max(self.found.get(self.phase, 0.0), memory().get("peak", 0.0) - self.start)
        self.phase = phase
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def done(self) -> dict[str, int]:
        self("end", 0, 1)
        return {phase: round(value) for phase, value in self.found.items()}


def work(job: Row) -> Row:
    from coreprune import Budget, prune

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    model = Decoder(job["layers"], job["hidden"]).eval()
    ids = torch.randint(VOCABULARY, (2 * job["queries"], job["tokens"]))  # half of them are held back
    peaks, start = Peaks(), memory().get("now", 0.0)
    options: dict[str, Any] = {} if job["memory"] is None else {"memory": job["memory"]}
    cpu = time.process_time()
    result, row = measured(
        lambda: prune(model, ids[:1], Budget(macs=0.75), queries=ids, progress=peaks, compare=False, **options)
    )
    phases = peaks.done()
    size = sum(t.numel() * t.element_size() for t in model.parameters())
    report = result.report
    return {
        **row,
        "cpu_s": round(time.process_time() - cpu, 1),
        "peak_memory_mib": max(phases.values()),
        "memory_before_mib": round(start),
        "phases_mib": phases,
        "seconds": dict(report.seconds),
        "parameters": report.parameters[0],
        "model_mib": round(size / 2**20, 1),
        "times_the_model": round(max(phases.values()) * 2**20 / size, 1),
        "macs": [report.macs[0], report.macs[1]],
    }


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=("transformers",))
