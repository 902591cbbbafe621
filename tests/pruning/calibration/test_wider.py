"""Queries with other tokens beside a user's texts: what changes, what stays, and what that is good for."""

from __future__ import annotations

import statistics

import pytest
import torch
from torch import nn

from coreprune import Budget, Repair, prune
from coreprune._progress import silent
from coreprune.errors import InputError
from coreprune.graph import Traced, capture, find_groups
from coreprune.pruning.calibration.calibration import Asked, gather
from coreprune.pruning.calibration.wider import other_kinds, other_words, redrawn, token_leaves
from coreprune.queries import Queries
from coreprune.queries.tokenizer import tokens_of
from queries.small_tokenizers import word_piece

START, END, PAD = 1, 2, 0


class Reader(nn.Module):
    """A small text encoder with a padding mask. Two kinds of text, low and high tokens, use different units."""

    def __init__(self, vocabulary=60, d=16, hidden=32):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm = nn.Embedding(vocabulary, d), nn.LayerNorm(d)
        self.up, self.down, self.head = nn.Linear(d, hidden), nn.Linear(hidden, d), nn.Linear(d, 8)

    def forward(self, ids, mask):
        x = self.words(ids)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def texts(n, low, high, seed=0, length=12):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, high, (n, length), generator=g)
    ids[:, 0] = START
    mask = torch.ones_like(ids)
    for i in range(n):
        last = int(torch.randint(4, length, (1,), generator=g))
        ids[i, last], ids[i, last + 1 :], mask[i, last + 1 :] = END, PAD, 0
    return ids, mask


def test_form_stays_and_words_change():
    ids, _ = texts(40, 10, 50)
    new = redrawn(ids, torch.Generator().manual_seed(1))
    assert new.dtype == ids.dtype
    for special in (START, END):
        assert torch.equal(new == special, ids == special)
    runs = (ids == PAD).flip(1).to(torch.int8).cumprod(1).flip(1).bool()
    long = runs & (runs.sum(1, keepdim=True) > 1)
    assert torch.equal(new[long], ids[long])
    words = ids >= 10
    assert int(new[words].min()) >= int(ids[words].min()) - 10
    assert int(new[words].max()) <= 49
    assert float((new[words] != ids[words]).double().mean()) > 0.8
    # Low tokens are frequent in every second text.
    assert float(new[1::2][words[1::2]].double().mean()) < float(new[::2][words[::2]].double().mean()) - 5


def test_words_of_a_small_vocabulary_are_no_form():
    ids = torch.randint(5, 9, (30, 80), generator=torch.Generator().manual_seed(0))  # every text has all four letters
    ids[:, 0], ids[:, -1] = START, END
    new = redrawn(ids, torch.Generator().manual_seed(1))
    assert torch.equal(new[:, [0, -1]], ids[:, [0, -1]])
    assert float((new != ids)[:, 1:-1].double().mean()) > 0.6
    assert set(new[:, 1:-1].unique().tolist()) == {5, 6, 7, 8}


def test_texts_of_one_word():
    ids = torch.arange(5, 35)[:, None]
    assert float((redrawn(ids, torch.Generator().manual_seed(0)) != ids).double().mean()) > 0.8


def test_words_are_those_of_the_tokenizer():
    ids, _ = texts(60, 10, 50)
    ids[5, 2], ids[6, 3] = 55, PAD  # no words: they stay
    ranked = torch.arange(49, 9, -1)  # the most frequent first, wherever it stands in the vocabulary
    new = redrawn(ids, torch.Generator().manual_seed(1), ranked)
    words = (ids >= 10) & (ids < 50)
    assert torch.equal(new[~words], ids[~words])
    assert set(new[words].tolist()) == set(ranked.tolist())
    zipf, even = (float((new[s][words[s]] > 44).double().mean()) for s in (slice(1, None, 2), slice(0, None, 2)))
    law = 1 / (torch.arange(40) + 2.7)
    assert zipf == pytest.approx(float(law[:5].sum() / law.sum()), abs=0.1)
    assert even == pytest.approx(5 / 40, abs=0.1)


def test_padding_in_front_stays():
    ids = torch.arange(10, 40).reshape(5, 6)
    ids[:4, :2] = 3
    new = redrawn(ids, torch.Generator().manual_seed(0))
    assert torch.equal(new[:4, :2], ids[:4, :2])
    assert not torch.equal(new[:4, 2:], ids[:4, 2:])


def test_only_looked_up_tokens_change_and_all_else_is_repeated():
    ids, mask = texts(20, 10, 50)
    captured = capture(Reader().eval(), (ids[:1], mask[:1]))
    assert token_leaves(captured) == {0}
    queries = Queries((ids, mask), {}, "samples", "20 samples")
    other = other_words(captured, queries, torch.Generator().manual_seed(0))
    assert torch.equal(other.args[1], mask)
    assert not torch.equal(other.args[0], ids)
    assert torch.equal(queries.args[0], texts(20, 10, 50)[0])


@pytest.mark.parametrize("x", [torch.randn(20, 16), torch.rand(20, 3, 8, 8)])
def test_other_inputs_stay_as_they_are(x):
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    queries = Queries((x,), {}, "samples")
    assert other_words(capture(model, x[:1]), queries, torch.Generator()) is None


def test_columns_of_categories_stay_as_they_are():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Embedding(5, 4), nn.Embedding(90, 4), nn.Linear(8, 2)

        def forward(self, x):
            return self.head(torch.cat([self.a(x[:, 0]), self.b(x[:, 1])], dim=1))

    x = torch.stack([torch.randint(5, (20,)), torch.randint(90, (20,))], dim=1)
    queries = Queries((x,), {}, "samples")
    assert other_words(capture(Columns(), x[:1]), queries, torch.Generator()) is None


def test_one_kind_of_text_does_not_spoil_another(monkeypatch):
    model, budget = Reader().eval(), Budget(keep={"up": 0.5})
    ids, mask = texts(120, 10, 25)
    ids[0, 1], ids[1, 1] = 3, 59  # the vocabulary that the user's texts span
    other = texts(200, 40, 60, seed=1)

    asked = {"queries": (ids, mask), "compare": False, "repair": Repair(descent=False)}

    def error(seed):
        result = prune(model, (ids[:1], mask[:1]), budget, seed=seed, **asked)
        assert torch.equal(result.queries.args[0], ids)
        with torch.no_grad():
            return float((result.model(*other) - model(*other)).square().mean() / model(*other).var())

    wide = [error(seed) for seed in range(5)]
    monkeypatch.setattr("coreprune.pruning.calibration.wider.other_kinds", lambda *_: [])
    assert statistics.median(w / error(seed) for seed, w in enumerate(wide)) < 0.7


def test_kinds_take_turns_and_both_halves_have_each():
    model, (ids, mask) = Reader().eval(), texts(90, 10, 50)
    traced = Traced(model, captured := capture(model, (ids[:1], mask[:1])), find_groups(captured))
    asked = Asked((ids[:1], mask[:1]), (ids, mask))
    found = gather(traced, asked, 0, silent)
    assert set(found.kinds[::2]) == set(found.kinds[1::2]) == {0, 1}
    assert len(found.kinds) == len(found.batches)
    mine = {tuple(row) for row in ids.tolist()}
    for ((words, _), _), kind in zip(found.batches, found.kinds, strict=True):
        assert all((tuple(row) in mine) == (kind == 0) for row in words.tolist())
    assert all(tuple(row) in mine for row in found.fresh.args[0].tolist())
    assert found.given.args[0].shape == ids.shape


def test_texts_of_this_machine_are_a_kind_of_their_own(monkeypatch):
    model, (ids, mask) = Reader().eval(), texts(90, 10, 50)
    traced = Traced(model, captured := capture(model, {"ids": ids[:1], "mask": mask[:1]}), find_groups(captured))
    example, samples = {"ids": ids[:1], "mask": mask[:1]}, {"ids": ids, "mask": mask}

    def kinds(tokenizer):
        return gather(traced, Asked(example, samples, tokenizer=tokenizer), 0, silent)

    found = kinds(word_piece())
    assert set(found.kinds[::2]) == set(found.kinds[1::2]) == {0, 1, 2}
    words = set(tokens_of(word_piece()).words)
    other = torch.cat([kw["ids"] for (_, kw), kind in zip(found.batches, found.kinds, strict=True) if kind == 1])
    assert set(other.flatten().tolist()) <= words | {START, END, PAD}
    assert int(other.max()) >= 50  # words that the texts lack
    theirs = torch.cat([kw["ids"] for (_, kw), kind in zip(found.batches, found.kinds, strict=True) if kind == 2])
    assert set(theirs[:, 0].tolist()) == {3}  # as the tokenizer frames a text
    assert len(found.queries) == len(ids) - len(found.fresh) + 2 * 96  # more than the user's
    assert set(kinds(False).kinds) == set(kinds(None).kinds) == {0, 1}  # there is none beside this model
    with pytest.raises(InputError, match="tokenizer"):
        kinds("no such folder")
    monkeypatch.setattr("coreprune.pruning.calibration.wider.has_text", lambda: False)
    assert set(kinds(word_piece()).kinds) == {0, 1}


def test_samples_of_a_model_whose_tokens_cannot_be_drawn():
    class Typed(Reader):
        def forward(self, type_ids):
            return self.head(self.down(torch.relu(self.up(self.words(type_ids)))).mean(1))

    ids, _ = texts(40, 10, 50)
    result = prune(Typed().eval(), {"type_ids": ids[:1]}, Budget(keep=0.5), queries={"type_ids": ids}, compare=False)
    assert result.model.up.out_features == 16


def test_longer_samples_than_the_example_get_no_texts_of_this_machine():
    model, (ids, mask) = Reader().eval(), texts(40, 10, 50, length=20)
    captured, queries = capture(model, (ids[:1, :12], mask[:1, :12])), Queries((ids, mask), {}, "samples")
    args = (model, captured, (ids[:1, :12], mask[:1, :12]), queries, word_piece(), torch.Generator().manual_seed(0))
    assert [one.source for one in other_kinds(*args)] == ["other words"]


class Writer(nn.Module):
    """A small language model. It ignores what comes later."""

    def __init__(self, vocabulary=60, d=16, hidden=32):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.norm, self.out = nn.Embedding(vocabulary, d), nn.LayerNorm(d), nn.Linear(d, vocabulary)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, input_ids):
        x = self.words(input_ids)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x.cumsum(1)))))
        return 3 * self.out(x)


def given(model, ids, tokenizer=None, n=None):
    example, samples = {"input_ids": ids[:1]}, {"input_ids": ids}
    traced = Traced(model, captured := capture(model, example), find_groups(captured))
    return gather(traced, Asked(example, samples, n, tokenizer=tokenizer), 0, silent)


def of_kind(found, kind):
    return torch.cat([kw["input_ids"] for (_, kw), k in zip(found.batches, found.kinds, strict=True) if k == kind])


def test_a_language_model_without_a_tokenizer_writes_the_texts_that_need_no_data():
    model, ids = Writer().eval(), texts(200, 10, 50)[0]
    found = given(model, ids)
    assert set(found.kinds[::2]) == set(found.kinds[1::2]) == {0, 1, 2}
    written = of_kind(found, 2)

    def likelihood(x):
        with torch.no_grad():
            odds = model(input_ids=x)[:, :-1].log_softmax(-1)
        return float(odds.gather(-1, x[:, 1:, None]).mean())

    assert likelihood(written) > likelihood(of_kind(found, 1)) + 1
    assert set(given(model, ids, word_piece()).kinds) == {0, 1, 2}  # the third are texts of this machine
    assert set(of_kind(given(model, ids, word_piece()), 2).flatten().tolist()) <= set(tokens_of(word_piece()).words) | {
        START, END, PAD, 3, 4,
    }  # fmt: skip


def test_a_model_that_is_told_more_of_every_token_gets_no_written_texts():
    class Told(Writer):
        def forward(self, ids, mask):
            x = self.words(ids)
            x = x + self.down(nn.functional.gelu(self.up(self.norm((x * mask[..., None]).cumsum(1)))))
            return 3 * self.out(x)

    model, (ids, mask) = Told().eval(), texts(60, 10, 50)
    example, samples = {"ids": ids[:1], "mask": mask[:1]}, {"ids": ids, "mask": mask}
    traced = Traced(model, captured := capture(model, example), find_groups(captured))
    assert set(gather(traced, Asked(example, samples), 0, silent).kinds) == {0, 1}


def test_few_texts_do_not_make_the_other_kinds_few():
    model, ids = Writer().eval(), texts(20, 10, 50)[0]
    found = given(model, ids)
    counts = [len(of_kind(found, kind)) for kind in range(3)]
    assert counts == [10, 95, 95]  # 96 in batches of five
    assert len(found.fresh) == 10
    halves = [found.kinds[i::2].count(kind) for kind in range(3) for i in range(2)]
    assert halves == [1, 1, 10, 9, 9, 10]
    mine = {tuple(row) for row in ids.tolist()}
    assert all((tuple(row) in mine) == (kind == 0) for kind in range(3) for row in of_kind(found, kind).tolist())
    asked = given(model, ids, n=20)  # a number is a number
    assert [len(of_kind(asked, kind)) for kind in range(3)] == [10, 10, 10]


@pytest.mark.parametrize("n", [4, 6, 14])
def test_very_few_texts_are_no_kind_of_their_own(n):
    model, ids = Writer().eval(), texts(n, 10, 50)[0]
    found = given(model, ids)
    assert len(found.queries) == n - n // 2 + 2 * 96
    assert set(found.kinds[::2]) == set(found.kinds[1::2]) == {0, 1}
    assert len(found.batches[0][1]["input_ids"]) > 10


def test_a_text_that_is_all_form_has_written_ones_beside_it():
    found = given(Writer().eval(), texts(1, 10, 50)[0])
    assert len(found.queries) == 1 + 96
    assert found.fresh is None
    assert set(found.kinds) == {0}


def test_forms_come_again_with_other_words_where_more_are_wanted():
    ids, mask = texts(6, 10, 50)
    ids[:, 0] = START
    captured = capture(Reader().eval(), (ids[:1], mask[:1]))
    other = other_words(captured, Queries((ids, mask), {}, "samples"), torch.Generator().manual_seed(0), n=15)
    assert len(other) == 15
    assert torch.equal(other.args[1], mask[torch.arange(15) % 6])
    assert not any(torch.equal(other.args[0][i], other.args[0][i + 6]) for i in range(9))
