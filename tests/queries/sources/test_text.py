"""Text that every machine has, tokenizers, and the mixture of tokens."""

from __future__ import annotations

import json
import string
from collections import Counter
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, InputError, prune
from coreprune.queries import (
    MachineText,
    MadeTokens,
    RandomTokens,
    SelfGenerated,
    Target,
    TokenMixture,
    ZipfTokens,
    make_queries,
)
from coreprune.queries import machine_text as source
from coreprune.queries.sources.tokens import framed, known, padding_mask
from coreprune.queries.tokenizer import beside, tokens_of
from queries.small import gen, none, seeded
from queries.small_tokenizers import TEXT, byte_pairs, word_piece

tokenizers: Any = pytest.importorskip("tokenizers")
T = 12


class Package:
    """An installed package with a description."""

    def __init__(self, name: str, text: str) -> None:
        self.metadata = Message()
        self.metadata["Name"] = name
        self.metadata.set_payload(text)


@pytest.fixture(autouse=True)
def machine(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small machine: a library of three modules, and two packages. The folder of the library."""
    library = tmp_path_factory.mktemp("library")
    for i, word in enumerate(("cat", "dog", "door")):
        lines = "\n\n".join(f"The {word} number {k} of the list sat on a mat, and ran." for k in range(9))
        (library / f"module{i}.py").write_text(f'"""{lines}"""\nraise SystemExit\n')
    packages = [Package("one", "\n\n".join(f"A description of the words {k}, said the cat." for k in range(9)))]
    monkeypatch.setattr(source, "_library", lambda: library)
    monkeypatch.setattr(source, "_installed", lambda: packages)
    return library


class Encoder(nn.Module):
    """Looks at all tokens that the mask leaves."""

    def __init__(self, size: int, folder: Path | None = None) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(size, 8), nn.Linear(8, 3)
        self.hidden = nn.Linear(8, 24)
        self.back = nn.Linear(24, 8)
        self.config = type("Config", (), {"_name_or_path": str(folder or "")})()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.table(input_ids)
        x = x + self.back(torch.relu(self.hidden(x)))
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return self.out(x.mean(1))


class Writer(nn.Module):
    """A causal model: the mean of what came before."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(size, 8), nn.Linear(8, size)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids).cumsum(1)
        return self.out(x / torch.arange(1, x.shape[1] + 1)[None, :, None])


IDS = torch.ones(1, T, dtype=torch.int64)


def encoder(masked: bool = True, **given: Any) -> Target:
    inputs = {"input_ids": IDS} | ({"attention_mask": torch.ones(1, T, dtype=torch.int32)} if masked else {})
    leaves = torch.utils._pytree.tree_leaves(((), inputs))
    leaf = next(i for i, x in enumerate(leaves) if x is inputs["input_ids"])
    return Target(seeded(0, lambda: Encoder(60)), (), inputs, leaf, tokenizer=given.get("tokenizer", word_piece()))


def writer(tokenizer: Any = None) -> Target:
    return Target(seeded(0, lambda: Writer(300)), (), {"input_ids": IDS}, 0, tokenizer=tokenizer)


def test_a_tokenizer_is_read_and_left_as_it_was(tmp_path: Path) -> None:
    mine = word_piece()
    before = mine.to_str()
    found = tokens_of(mine)
    assert mine.to_str() == before
    assert (found.before, found.after, found.pad) == ((3,), (4,), 0)
    assert len(found.encode(" ".join(TEXT))) > 5  # truncation is off
    assert set(found.words) == set(range(60)) - {0, 1, 2, 3, 4}
    mine.save(str(tmp_path / "tokenizer.json"))
    assert tokens_of(tmp_path).words == tokens_of(str(tmp_path / "tokenizer.json")).words == found.words
    bare = tokens_of(byte_pairs())
    assert (bare.before, bare.after, bare.pad) == ((), (), None)


def test_frequent_words_come_first() -> None:
    """ASCII characters, then merges or the vocabulary in their order, then other characters; or probabilities."""
    pairs = byte_pairs()
    merges = json.loads(pairs.to_str())["model"]["merges"]
    first = [pairs.token_to_id("".join(merge)) for merge in merges]
    found = [pairs.id_to_token(i) for i in tokens_of(pairs).words]
    front = {*string.punctuation, *string.digits, *string.ascii_letters, "Ġ", "Ċ"}  # a space and the end of a line
    assert set(found[: len(front)]) == front
    assert list(tokens_of(pairs).words[len(front) :][: len(first)]) == first
    assert "é" in found[len(front) + len(first) :]
    odds = [("<unk>", 0.0), ("ab", -3.0), ("x", -1.0), ("cd", -2.0)]
    unigram = tokenizers.Tokenizer(tokenizers.models.Unigram(odds, unk_id=0))
    assert list(tokens_of(unigram).words) == [2, 3, 1]
    vocabulary = {"ж": 0, "the": 1, "of": 2, "[unused9]": 3, ",": 4}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="ж"))
    assert list(tokens_of(words).words) == [4, 1, 2, 0]


@pytest.mark.parametrize("wrong", ["no such folder", 3, "damaged"])
def test_what_is_no_tokenizer(wrong: Any, tmp_path: Path) -> None:
    if wrong == "damaged":
        (tmp_path / "tokenizer.json").write_text('{"model": 3}')
        wrong = tmp_path
    with pytest.raises(InputError, match="tokenizer"):
        tokens_of(wrong)


def test_the_tokenizer_beside_the_model_is_found(tmp_path: Path) -> None:
    assert beside(Encoder(60)) is None
    assert beside(Encoder(60, tmp_path)) is None
    word_piece().save(str(tmp_path / "tokenizer.json"))
    model = seeded(0, lambda: Encoder(60, tmp_path))
    assert beside(model) == tmp_path / "tokenizer.json"
    queries = make_queries(model, {"input_ids": IDS}, n=8, seed=0)
    assert queries.source == "token-mixture"
    assert "a tokenizer is known" in queries.note
    (tmp_path / "tokenizer.json").write_text("{")  # one that nobody asked for is left out, with a warning
    assert "no tokenizer" in make_queries(model, {"input_ids": IDS}, n=8, seed=0).note


def test_a_tokenizer_of_another_model_is_refused_if_it_was_passed(tmp_path: Path) -> None:
    small = seeded(0, lambda: Encoder(20))
    with pytest.raises(InputError, match="59, but the model has 20 tokens"):
        make_queries(small, {"input_ids": IDS}, n=4, seed=0, tokenizer=word_piece())
    word_piece().save(str(tmp_path / "tokenizer.json"))
    found = make_queries(seeded(0, lambda: Encoder(20, tmp_path)), {"input_ids": IDS}, n=4, seed=0)
    assert int(found.kwargs["input_ids"].max()) < 20


def test_texts_are_framed_cut_and_padded_as_the_tokenizer_does_it() -> None:
    """The oracle is the tokenizer itself, with its own truncation and padding."""
    mine, target = word_piece(), encoder()
    mine.enable_truncation(T)
    mine.enable_padding(pad_id=0, pad_token="[PAD]", length=T)
    tokens = known(target)
    assert tokens is not None
    texts = ["the cat", " ".join(TEXT), "words, words"]
    ids = framed(target, tokens, [tokens.encode(text) for text in texts], causal=False)
    wanted = mine.encode_batch(texts)
    assert ids.tolist() == [w.ids for w in wanted]
    (mask,) = padding_mask(target, ids).values()
    assert mask.tolist() == [w.attention_mask for w in wanted]
    assert mask.dtype == torch.int32


def test_the_mask_is_found_by_the_name_that_forward_gives_it() -> None:
    model = encoder().model
    mask = torch.tensor([[1, 1, 1] + [0] * (T - 3)])
    named = Target(model, (IDS,), {"attention_mask": mask}, 0)
    bare = Target(model, (IDS, mask), {}, 0)
    assert named.mask == bare.mask == 1
    assert torch.equal(bare.unmasked.args[1], torch.ones_like(mask))
    assert torch.equal(bare.args[1], mask)
    assert bare.unmasked.args[0] is IDS
    assert Target(model, (IDS,), {}, 0).mask is None
    assert Target(model, (IDS, mask[:, :3]), {}, 0).mask is None  # of another shape
    assert Target(nn.Identity(), (IDS, mask), {}, 0).mask is None  # its forward has one name


@pytest.mark.parametrize("by_keyword", [True, False])
def test_lengths_vary_where_the_model_takes_a_mask(by_keyword: bool) -> None:
    inputs = encoder().kwargs
    example = inputs if by_keyword else (inputs["input_ids"], inputs["attention_mask"])
    queries = make_queries(encoder().model, example, MachineText(), n=60, seed=0, tokenizer=word_piece())
    ids, mask = queries.kwargs.values() if by_keyword else queries.args
    assert bool(((ids == 0) == (mask == 0)).all())
    assert len(mask.sum(1).unique()) > 3
    assert bool((ids[:, 0] == 3).all())
    assert bool(((ids == 4).sum(1) == 1).all())
    without = MachineText()(encoder(masked=False), 20, gen(), none)
    assert not bool((without == 0).any())


def test_a_causal_model_reads_running_text() -> None:
    pairs = byte_pairs()
    found = MachineText()(writer(pairs), 30, gen(), none)
    assert found.shape == (30, T)
    whole = [2 * "".join(f"{part}\n\n" for part in source.paragraphs(kind, 10**6, gen())) for kind in source.KINDS]
    texts = [pairs.decode(row.tolist()) for row in found]
    for text in texts:
        # Files come in another order in every call, but two paragraphs that follow each other are never farther apart.
        assert any(all(piece in one for piece in text.split("\n\n")) for one in whole)
    assert len(set(texts)) > 10
    assert len({next(i for i, one in enumerate(whole) if text[:8] in one) for text in texts}) == 2
    assert torch.equal(found, MachineText()(writer(pairs), 30, gen(), none))
    assert not torch.equal(found, MachineText()(writer(pairs), 30, gen(1), none))


def test_what_the_machine_lacks(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in machine.iterdir():
        file.unlink()
    assert source.paragraphs(source.DOCSTRINGS, 100, gen()) == []
    assert MachineText()(writer(byte_pairs()), 5, gen(), none).shape == (5, T)  # the other kind alone
    monkeypatch.setattr(source, "_installed", lambda: [])
    with pytest.raises(InputError, match="has no text"):
        MachineText()(writer(byte_pairs()), 5, gen(), none)
    note = make_queries(writer().model, {"input_ids": IDS}, n=8, seed=0, tokenizer=byte_pairs()).note
    assert "machine-text" not in note


def test_docstrings_are_read_without_running_anything(machine: Path) -> None:
    about = "This paragraph says what the module is for, at some length."
    for file in machine.iterdir():
        file.unlink()
    (machine / "loud.py").write_text(f'"""{about}"""\nraise SystemExit\n\n\ndef f():\n    """Too short."""\n')
    (machine / "broken.py").write_text("def (")
    (machine / "test").mkdir()
    (machine / "test" / "left_out.py").write_text(f'"""Not {about}"""')
    assert source.paragraphs(source.DOCSTRINGS, 10**6, gen()) == [about]


def test_descriptions_lose_their_links(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'This package <img src="x">does [much](https://a.b) and is described at https://c.d in some detail.'
    broken = type("Broken", (), {"metadata": {"Name": None}})()
    monkeypatch.setattr(source, "_installed", lambda: [broken, Package("a", text), Package("A", text)])
    (found,) = source.paragraphs(source.DESCRIPTIONS, 10**6, gen())
    assert found == "This package does  and is described at  in some detail."


def test_this_machine_has_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for kind in source.KINDS:
        assert sum(map(len, source.paragraphs(kind, 2000, gen()))) >= 2000


def test_text_needs_a_tokenizer_and_is_switched_off_by_a_word() -> None:
    with pytest.raises(InputError, match="tokenizer"):
        MachineText()(writer(), 2, gen(), none)
    same: dict[str, Any] = {"n": 40, "seed": 0, "tokenizer": byte_pairs()}
    model = writer().model
    on, off = (make_queries(model, {"input_ids": IDS}, spec, **same) for spec in ("auto", "made-tokens"))
    assert "machine-text" in on.note
    assert "standard library" in on.note
    assert "machine-text" not in off.note
    assert "self-generated" in on.note
    assert "self-generated" in off.note


def test_the_report_names_how_many_there_are_of_each_kind() -> None:
    target = writer(byte_pairs())
    told = TokenMixture().remark(target, torch.zeros(100, T))
    counts = {name: int(n) for n, name in (part.split(" ", 1) for part in told.split(";")[0].split(", "))}
    assert sum(counts.values()) == 100
    assert set(counts) == {"machine-text", "zipf-tokens", "random-tokens", "self-generated"}
    assert "machine-text" not in TokenMixture().remark(writer(), torch.zeros(100, T))
    assert "self-generated" not in MadeTokens().remark(encoder(), torch.zeros(100, T))


def test_random_and_zipf_tokens_are_words_in_a_frame() -> None:
    target = encoder()
    for made in (RandomTokens(), ZipfTokens()):
        ids = made(target, 200, gen(), none)
        assert bool((ids[:, 0] == 3).all())
        assert bool((ids[:, -1] == 4).all())
        assert not set(ids[:, 1:-1].flatten().tolist()) & {0, 1, 2, 3, 4}
    tokens = known(target)
    assert tokens is not None
    counts = Counter(ZipfTokens()(target, 4000, gen(), none)[:, 1:-1].flatten().tolist())
    weights = 1 / (torch.arange(len(tokens.words)) + 2.7)
    shares = torch.tensor([counts[i] / counts.total() for i in tokens.words])
    assert torch.allclose(shares, (weights / weights.sum()).float(), atol=0.005)


def test_prune_takes_a_tokenizer() -> None:
    target = encoder()
    result = prune(target.model, target.kwargs, Budget(keep=0.5), n_queries=48, tokenizer=word_piece(), seed=1)
    assert "machine-text" in result.report.queries
    assert "tokenizer=your_Tokenizer" in result.report.settings.call()
    assert result.queries is not None
    assert int(result.queries.kwargs["attention_mask"].min()) == 0


@pytest.mark.parametrize("tokenizer", [None, False, word_piece()], ids=["unknown", "none", "known"])
@pytest.mark.parametrize("source", ["auto", "made-tokens", "random-tokens", "zipf-tokens"])
def test_the_mask_is_that_of_the_made_texts_and_not_of_the_example(tokenizer: Any, source: str) -> None:
    padded = {"input_ids": IDS.clone(), "attention_mask": torch.ones(1, T, dtype=torch.int32)}
    padded["input_ids"][:, 3:], padded["attention_mask"][:, 3:] = 0, 0
    model = encoder().model
    found = make_queries(model, padded, source, n=40, seed=0, tokenizer=tokenizer).kwargs
    ids, mask = found["input_ids"], found["attention_mask"]
    if tokenizer:  # 0 pads
        wanted = (ids != 0).flip(1).cummax(1).values.flip(1)
        assert torch.equal(mask.bool(), wanted)
        assert int(mask[:, 3:].sum()) > 40
    else:
        assert bool((mask == 1).all())
    assert mask.dtype == torch.int32


def test_a_model_writes_the_same_whatever_the_example_masks() -> None:
    class Masking(Writer):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = (self.table(input_ids) * attention_mask[..., None]).cumsum(1)
            return self.out(4 * x / attention_mask.cumsum(1)[..., None])

    model, whole = seeded(0, lambda: Masking(30)), torch.ones_like(IDS)
    short = whole.clone()
    short[:, T // 2 :] = 0
    examples = ({"input_ids": IDS, "attention_mask": mask} for mask in (whole, short))
    first, second = (make_queries(model, each, SelfGenerated(), n=8, seed=0).kwargs for each in examples)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert torch.equal(first["attention_mask"], second["attention_mask"])
