"""Perplexity before and after, and the next token as an answer."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, InputError, certify, prune
from coreprune.perplexity import compare_perplexity, windows
from coreprune.queries import Queries

tokenizers: Any = pytest.importorskip("tokenizers")
LETTERS = "abcdefg "
EXAMPLE = {"input_ids": torch.zeros(1, 6, dtype=torch.int64)}


def tokenizer() -> Any:
    """One token for every letter."""
    vocabulary = {letter: i for i, letter in enumerate(LETTERS)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    return made


class Markov(nn.Module):
    """The next letter depends on the last one alone, with odds that are known."""

    def __init__(self, odds: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(odds.log())

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table(input_ids)


def odds(seed: int) -> Tensor:
    return torch.rand(8, 8, generator=torch.Generator().manual_seed(seed)).add(0.05).softmax(dim=1)


TEXT = "bad cab fed a deaf gaffe add bee " * 4


def test_perplexity_is_that_of_the_definition() -> None:
    first, second = odds(0), odds(1)
    model, small = Markov(first), Markov(second)
    read = windows(model, EXAMPLE, TEXT, tokenizer=tokenizer(), context=10)
    assert read.ids.shape == (len(TEXT) // 10, 10)
    assert "".join(LETTERS[i] for i in read.ids.flatten()) == TEXT[: read.ids.numel()]
    found = compare_perplexity(model, small, EXAMPLE, read)
    pairs = [(a, b) for row in read.ids.tolist() for a, b in pairwise(row)]
    for p, value in ((first, found.before), (second, found.after)):
        likelihood = math.prod(float(p[a, b]) ** (1 / len(pairs)) for a, b in pairs)
        assert value == pytest.approx(1 / likelihood, rel=1e-5)
    same = sum(int(first[a].argmax()) == int(second[a].argmax()) for a, _ in pairs)
    assert found.same == same / len(pairs)
    assert found.tokens == len(pairs)
    assert compare_perplexity(model, model, EXAMPLE, read).same == 1
    assert "10" in str(found)


def test_long_texts_are_read_evenly_and_short_ones_whole(tmp_path: Path) -> None:
    model = Markov(odds(0))
    file = tmp_path / "words.txt"
    file.write_text(TEXT)
    some = windows(model, EXAMPLE, file, tokenizer=tokenizer(), context=4, most=3)
    assert some.text == "words.txt"
    everything = windows(model, EXAMPLE, file, tokenizer=tokenizer(), context=4).ids
    assert len(everything) == len(TEXT) // 4
    assert len(some.ids) == 3
    assert torch.equal(some.ids[[0, 2]], everything[[0, -1]])
    assert windows(model, EXAMPLE, "abc", tokenizer=tokenizer()).ids.shape == (1, 3)


@pytest.mark.parametrize(
    ("model", "text", "given", "said"),
    [
        (Markov(odds(0)), "abc", None, "needs the model's tokenizer"),
        (Markov(odds(0)), "a", tokenizer(), "at least 2"),
        (Markov(odds(0)), Path("no such file"), tokenizer(), "no such file"),
        (nn.Sequential(nn.Embedding(8, 3)), "abc", tokenizer(), "causal language models"),
    ],
)
def test_what_cannot_be_measured(model: nn.Module, text: Any, given: Any, said: str) -> None:
    example = EXAMPLE if isinstance(model, Markov) else EXAMPLE["input_ids"]
    with pytest.raises(InputError, match=said):
        windows(model, example, text, tokenizer=given)


def test_without_a_text_one_is_made() -> None:
    model = Markov(odds(0))
    written = windows(model, EXAMPLE)
    assert written.text == "self-generated"
    assert written.ids.shape == (32, 6)
    assert torch.equal(written.ids, windows(model, EXAMPLE).ids)
    assert not torch.equal(written.ids, windows(model, EXAMPLE, seed=1).ids)
    read = windows(model, EXAMPLE, tokenizer=tokenizer())
    assert read.text == "machine-text"


class Masked(nn.Module):
    """A causal model with a hidden layer, which pruning can narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(30, 8), nn.Linear(8, 24), nn.Linear(24, 30)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.out(torch.relu(self.hidden(x.cumsum(1))))


def masked() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Masked().eval()


def test_the_next_token_is_the_answer_that_is_certified() -> None:
    model = masked()
    ids = torch.randint(30, (60, 7), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(7) < torch.randint(2, 8, (60, 1), generator=torch.Generator().manual_seed(1))).long()
    example = {"input_ids": ids[:1], "attention_mask": mask[:1]}
    small = prune(model, example, Budget(keep=0.4), "l2", queries=None).model
    queries = Queries((), {"input_ids": ids, "attention_mask": mask}, "samples")
    found = certify(model, small, example, queries)
    last = mask.sum(1) - 1
    with torch.no_grad():
        answers = [m(ids, mask)[torch.arange(60), last].argmax(1) for m in (model, small)]
    different = int((answers[0] != answers[1]).sum())
    assert 0 < different < 60
    assert f"{different} of 60 queries" in found.statement


def test_prune_reports_the_agreement_of_language_models_and_of_no_tagger() -> None:
    ids = torch.randint(30, (64, 7), generator=torch.Generator().manual_seed(0))
    result = prune(masked(), {"input_ids": ids[:1]}, Budget(keep=0.5), queries={"input_ids": ids})
    assert result.report.agreement is not None
    assert all(one.agreement is not None for one in result.report.compared)
    tagger = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 5)).eval()
    assert prune(tagger, ids[:1], Budget(keep=0.5), queries=ids).report.agreement is None
