"""IgLM, a language model of antibodies (GPT-2, 13 million parameters): a network on which nothing was chosen.

    pip install -e '.[bench]' transformers
    pip install --no-deps iglm==0.1.0
    python benchmarks/antibodies.py [--seeds 2] [--only REGEX] [--threads 2]

No tokenizer is known, so no text of the machine can be read. The texts are sequences that the dense model writes, 64 of
each kind: heavy and light chains of humans and mice. Perplexity of the pruned model over that of the dense one is then
exp of the mean Kullback–Leibler divergence per token, up to sampling. "32 heavy" are as many other sequences, of human
heavy chains alone. Shares are of the parameters of the blocks. Writes results/antibodies.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from children import Row, measured
from coreprune import Budget, prune
from table import Cell, run, told

SHARES, SOURCES, PEERS = (0.7, 0.8), ("32 heavy", "no data", "128 heavy"), ("l2", "random")
KINDS = {"human heavy": ("[HEAVY]", "[HUMAN]"), "mouse heavy": ("[HEAVY]", "[MOUSE]")}
KINDS |= {"human light": ("[LIGHT]", "[HUMAN]"), "mouse light": ("[LIGHT]", "[MOUSE]")}
LENGTH, TEST = 100, 64
LETTERS = range(5, 25)  # the amino acids


def cells(seeds: int) -> Iterator[Cell]:
    """What matters most first."""
    for seed in range(seeds):
        for share in SHARES:
            yield from (Cell("ours", source, share, seed) for source in SOURCES)
            yield from (Cell(peer, "", share, seed) for peer in PEERS)


def trained(folder: Path) -> nn.Module:
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(folder / "IgLM", local_files_only=True).eval()


@torch.no_grad()
def written(model: nn.Module, start: tuple[int, int], n: int, seed: int) -> Tensor:
    """The first LENGTH tokens of n sequences (n, LENGTH): the chain, the species, and amino acids."""
    generator = torch.Generator().manual_seed(seed)
    ids, past = torch.tensor([start]).repeat(n, 1), None
    while ids.shape[1] < LENGTH:
        out = model(input_ids=ids if past is None else ids[:, -1:], past_key_values=past, use_cache=True)
        odds, past = out.logits[:, -1, LETTERS].double().softmax(-1), out.past_key_values
        ids = torch.cat([ids, LETTERS[0] + torch.multinomial(odds, 1, generator=generator)], dim=1)
    return ids


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> float:
    odds = model(input_ids=ids).logits[:, 1:-1].double().log_softmax(-1)
    return math.exp(-float(odds.gather(-1, ids[:, 2:, None]).mean()))


def work(job: Row) -> Row:
    """One row. job: the fields of the cell and the threads."""
    cell = Cell(**{field: job[field] for field in Cell.__dataclass_fields__})
    torch.set_num_threads(job["threads"])
    found = importlib.util.find_spec("iglm")
    assert found is not None, "iglm is not installed"
    folder = Path(str(found.origin)).parent / "trained_models"
    names = (folder / "vocab.txt").read_text().splitlines()
    model = trained(folder)
    starts = {kind: (names.index(chain), names.index(species)) for kind, (chain, species) in KINDS.items()}
    tests = {kind: written(model, start, TEST, 100 + cell.seed) for kind, start in starts.items()}
    asked: dict[str, Any] = {"queries": None, "repair": False, "method": cell.method}
    if cell.method == "ours":
        asked = {"queries": "auto"}
        if cell.source != "no data":
            n, kind = cell.source.split()
            asked = {"queries": {"input_ids": written(model, starts[f"human {kind}"], int(n), 200 + cell.seed)}}
    blocks = sum(p.numel() for name, p in model.named_parameters() if ".h." in name)
    allowed = Budget(params=1 - (1 - cell.share) * blocks / sum(p.numel() for p in model.parameters()))
    example = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64)}
    result, cost = measured(lambda: prune(model, example, allowed, seed=cell.seed, **asked))
    before, after = ({k: perplexity(m, ids) for k, ids in tests.items()} for m in (model, result.model))
    return {"perplexity": {k: {"before": before[k], "after": after[k]} for k in tests}, **told(result), **cost}


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    return ((cell.key, asdict(cell)) for cell in cells(options.seeds))


if __name__ == "__main__":
    run(__file__, __doc__, jobs, work, packages=("transformers", "iglm"), seeds=2, about={"test_sequences": TEST})
