"""Token sources: ranges, frequencies, and text that has the model's own statistics."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from coreprune import InputError
from coreprune.queries import RandomTokens, SelfGenerated, Target, ZipfTokens, make_queries
from coreprune.queries.sources.self_generated import _cached, _plain
from coreprune.queries.sources.tokens import is_causal, vocabulary
from queries.small import Alone, gen, mlp, none, seeded, target

IDS = torch.zeros(1, 9, dtype=torch.int64)


class Markov(nn.Module):
    """A language model whose next token depends on the last one only, with known odds."""

    def __init__(self, odds: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(odds.log())
        self.places = nn.Embedding(64, odds.shape[1])  # looked up by position, as in many models; adds nothing
        nn.init.zeros_(self.places.weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))


ODDS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 20)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return x + x.mean(dim=1, keepdim=True)


def test_the_vocabulary_is_that_of_the_embedding_that_reads_the_tokens() -> None:
    assert vocabulary(target(Markov(ODDS), torch.ones(1, 9, dtype=torch.int64))) == 3
    with pytest.raises(InputError, match="no embedding or other table"):
        vocabulary(target(nn.Identity(), IDS))
    with pytest.raises(InputError, match="tokens are integers"):
        vocabulary(target(mlp(), torch.zeros(1, 12)))
    assert int(RandomTokens(vocabulary=4)(target(nn.Identity(), IDS), 100, gen(), none).max()) == 3
    with pytest.raises(InputError, match="vocabulary=0"):
        RandomTokens(vocabulary=0)(target(nn.Identity(), IDS), 2, gen(), none)


class Table(nn.Module):
    """Reads a table of 13 rows, in one of the ways that torch has. A longer one is chosen from by place."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.table, self.how = nn.Parameter(torch.randn(13, 4)), how
        self.places = nn.Embedding(64, 4) if how == "function" else torch.randn(64, 4)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1])
        if self.how == "function":
            return functional.embedding(ids, self.table) + self.places(places)
        if self.how == "bag":
            return functional.embedding_bag(ids, self.table) + self.places[places].mean(0)
        if self.how == "index":
            return self.table[ids] + self.places[places]
        if self.how == "index_select":
            return self.table.index_select(0, ids.flatten()).unflatten(0, ids.shape) + self.places[places]
        return functional.one_hot(ids, 13).float() @ self.table + self.places[places]


@pytest.mark.parametrize("how", ["function", "bag", "index", "index_select", "one hot"])
@pytest.mark.parametrize("ids", [IDS, torch.arange(9)[None] % 4], ids=["zeros", "several"])
def test_the_vocabulary_of_any_table(how: str, ids: Tensor) -> None:
    assert vocabulary(target(Table(how), ids)) == 13


class Columns(nn.Module):
    """A table for every column of categories, and perhaps a position that nothing looks up."""

    def __init__(self, sizes: tuple[int, ...], spare: int = 0) -> None:
        super().__init__()
        self.tables, self.spare = nn.ModuleList(nn.Embedding(n, 3) for n in sizes), spare

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], 1) + x[:, -1:].float() * self.spare


@pytest.mark.parametrize("example", [[0, 0, 0, 0], [3, 1, 0, 12]])
@pytest.mark.parametrize("source", [RandomTokens(), ZipfTokens()])
def test_columns_of_categories_have_ranges_of_their_own(example: list[int], source: Any) -> None:
    sizes = (100, 5, 1, 17)
    x = source(target(Columns(sizes), torch.tensor([example])), 3000, gen(), none)
    assert x.shape == (3000, 4)
    assert (x.max(0).values + 1).tolist() == list(sizes)
    assert int(x.min()) == 0


def test_a_column_that_nothing_looks_up_has_no_range() -> None:
    with pytest.raises(InputError, match="no embedding"):
        RandomTokens()(target(Columns((4, 5), spare=1), torch.zeros(1, 3).long()), 4, gen(), none)


def test_random_tokens_are_all_as_likely() -> None:
    x = RandomTokens()(target(Bidirectional(), IDS), 4000, gen(), none)
    assert x.shape == (4000, 9)
    assert x.dtype == torch.int64
    share = torch.bincount(x.flatten(), minlength=20) / x.numel()
    assert torch.allclose(share, torch.full((20,), 0.05), atol=0.005)


def test_zipf_tokens_have_their_law() -> None:
    x = ZipfTokens(power=1.5, shift=2.0, vocabulary=30)(target(nn.Identity(), IDS), 20000, gen(), none)
    share = torch.bincount(x.flatten(), minlength=30) / x.numel()
    law = (torch.arange(30) + 2.0) ** -1.5
    assert torch.allclose(share, law / law.sum(), atol=0.004)
    with pytest.raises(InputError, match="shift"):
        ZipfTokens(shift=0.0)(target(Bidirectional(), IDS), 2, gen(), none)


def test_padding_never_and_the_start_token_first() -> None:
    class Config:
        pad_token_id = 1
        bos_token_id = 2

    model = Bidirectional()
    model.config = Config()  # type: ignore[assignment]
    x = RandomTokens()(target(model, IDS), 500, gen(), none)
    assert set(x.unique().tolist()) == set(range(20)) - {1}
    assert bool((x[:, 0] == 2).all())


def test_self_generated_text_has_the_models_transitions() -> None:
    x = SelfGenerated(batch=700)(target(Markov(ODDS), torch.zeros(1, 20, dtype=torch.int64)), 700, gen(), none)
    assert x.shape == (700, 20)
    counts = torch.zeros(3, 3).index_put_((x[:, :-1].flatten(), x[:, 1:].flatten()), torch.ones(()), accumulate=True)
    assert torch.allclose(counts / counts.sum(1, keepdim=True), ODDS, atol=0.03)


def test_temperature_sharpens() -> None:
    x = SelfGenerated(temperature=0.005)(target(Markov(ODDS), IDS), 64, gen(), none)
    # After the first, random, token: 0 → 0, 1 → 2, 2 → 1.
    assert torch.equal(x[:, 1:], torch.tensor([0, 2, 1])[x[:, :-1]])
    with pytest.raises(InputError, match="temperature"):
        SelfGenerated(temperature=0.0)(target(Markov(ODDS), IDS), 2, gen(), none)


def test_a_model_of_one_text_at_a_time_writes_what_it_would_write_together() -> None:
    x, wanted = (SelfGenerated()(target(m, IDS), 5, gen(), none) for m in (Alone(Markov(ODDS)), Markov(ODDS)))
    assert torch.equal(x, wanted)


def test_only_causal_language_models_write() -> None:
    assert is_causal(target(Markov(ODDS), IDS))
    seven = seeded(0, lambda: nn.Sequential(nn.Embedding(20, 7)))  # per-token classes, not tokens
    shortened = seeded(0, lambda: nn.Sequential(nn.Embedding(20, 4), nn.Flatten(), nn.Linear(36, 20)))
    others = [target(Bidirectional(), IDS), target(shortened, IDS), target(mlp(), torch.zeros(1, 12))]
    assert not any(is_causal(other) for other in others)
    assert not is_causal(target(seven, IDS))
    with pytest.raises(InputError, match="only a causal language model"):
        SelfGenerated()(others[0], 2, gen(), none)


@pytest.mark.parametrize("mask", [-torch.inf, torch.inf, torch.finfo(torch.float32).min, -1e9])
def test_a_mask_in_the_logits_hides_nothing(mask: float) -> None:
    class Masked(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = self.model(ids)
            return logits.masked_fill(torch.arange(logits.shape[-1]) == 1, mask)

    assert is_causal(target(Masked(Markov(ODDS)), IDS))
    assert not is_causal(target(Masked(Bidirectional()), IDS))


def tiny(kind: str) -> Any:
    import transformers as hf

    if kind == "gpt2":
        config = hf.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0)
        return seeded(0, lambda: hf.GPT2LMHeadModel(config))
    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = hf.LlamaConfig(**small, intermediate_size=24, num_key_value_heads=1, bos_token_id=0)
    return seeded(0, lambda: hf.LlamaForCausalLM(config))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_found_under_the_names_of_all_versions(name: str) -> None:
    """transformers renamed it in 5.24, and then text was written without it, in ten times the time."""
    model = tiny("llama")
    theirs = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)
    inside, lengths = model.forward, []

    def forward(input_ids: Any, attention_mask: Any = None, use_cache: Any = None, **more: Any) -> Any:
        lengths.append(input_ids.shape[1])
        out = inside(
            input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache, **{theirs: more.get(name)}
        )
        return SimpleNamespace(logits=out.logits, **{name: getattr(out, theirs)})

    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
    keys = ("input_ids", "attention_mask", "use_cache", name)
    forward.__signature__ = inspect.Signature([inspect.Parameter(k, kinds, default=None) for k in keys])  # type: ignore[attr-defined]
    model.forward = forward
    place = Target(model, (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 0)
    cached = _cached(place)
    assert cached is not None
    ids = torch.randint(50, (3, 9), generator=gen())
    with torch.no_grad():
        wanted, lengths[:] = _plain(replace(place, model=tiny("llama")))(ids, 8), []
        for t in range(1, 9):
            found = cached(ids, t)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert lengths == [1] * 8


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_cache_changes_nothing(kind: str) -> None:
    """Logits with and without the key/value cache, and the model's configuration afterwards."""
    model = tiny(kind)
    place = Target(model, (), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, 0)
    ids = torch.randint(50, (3, 9), generator=gen())
    cached, plain = _cached(place), _plain(place)
    with torch.no_grad():
        for t in range(1, 9):
            torch.testing.assert_close(cached(ids, t), plain(ids, t), rtol=1e-4, atol=1e-5)
    used = model.config.use_cache
    queries = make_queries(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, n=5, seed=0)
    assert queries.source == "token-mixture"
    assert queries.kwargs["input_ids"].shape == (5, 9)
    assert torch.equal(queries.kwargs["attention_mask"], torch.ones(5, 9, dtype=torch.int64))
    assert model.config.use_cache == used


@pytest.mark.slow
def test_encoders_and_encoder_decoders() -> None:
    """Regression: the decoder's tokens went through the cached path, which feeds the encoder."""
    import transformers as hf

    small = {"vocab_size": 40, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    t5 = seeded(0, lambda: hf.T5ForConditionalGeneration(hf.T5Config(**small, decoder_start_token_id=0)))
    queries = make_queries(t5, {"input_ids": IDS, "decoder_input_ids": IDS}, n=4, seed=0)
    assert queries.source == "token-mixture"
    assert queries.kwargs["decoder_input_ids"].shape == (4, 9)

    config = hf.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    bert = seeded(0, lambda: hf.BertForMaskedLM(config))
    example = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "token_type_ids": torch.zeros_like(IDS)}
    queries = make_queries(bert, example, n=4, seed=0)
    assert queries.source == "token-mixture"
    assert list(queries.kwargs) == list(example)
    assert int(queries.kwargs["token_type_ids"].abs().max()) == 0
