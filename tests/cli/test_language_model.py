"""`coreprune prune` on the folder of a language model: text, perplexity, generation afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coreprune import load

hf: Any = pytest.importorskip("transformers")
tokenizers: Any = pytest.importorskip("tokenizers")
WORDS = "the cat sat on the mat and the dog ran to the door while a list of words is a list of words , said the cat"


def save_tokenizer(folder: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([WORDS], tokenizers.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    made.save(str(folder / "tokenizer.json"))


@pytest.fixture
def folder(place: Path) -> Path:
    config = hf.LlamaConfig(
        vocab_size=290, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, max_position_embeddings=24, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).save_pretrained(place / "llama")
    save_tokenizer(place / "llama")
    (place / "words.txt").write_text(" ".join([WORDS] * 12))
    return place / "llama"


@pytest.mark.slow
def test_a_language_model_is_pruned_measured_and_writes_on(folder: Path, run: Any) -> None:
    done = run(
        "prune", "./llama", "--params", "0.95", "--uniform", "--text", "words.txt", "--n-queries", "24",
        "--no-latency", "--out", "small",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("small/report.json").read_text())
    assert "machine-text" in report["queries"]
    read = report["perplexity"]
    assert (read["text"], read["context"]) == ("words.txt", 24)
    assert 0 < read["same"] <= 1
    assert report["agreement"]["theorem"] == "T11"
    assert "tokens of words.txt" in done.stdout
    small, stock = load("small"), hf.AutoModelForCausalLM.from_pretrained("small")
    tokens = hf.AutoTokenizer.from_pretrained("small")
    ids = tokens(WORDS[:20], return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    plain = stock.generate(ids, use_cache=False, **settings)
    for model in (small, stock):
        for how in (None, "static"):
            assert torch.equal(model.generate(ids, cache_implementation=how, **settings), plain)


def test_a_text_that_cannot_be_read_is_refused_first(folder: Path, run: Any) -> None:
    done = run("prune", "./llama", "--text", "no.txt", "--out", "small")
    assert done.exit_code == 2
    assert "no.txt" in done.stderr
    (folder / "tokenizer.json").unlink()
    done = run("prune", "./llama", "--text", "words.txt", "--out", "small")
    assert "--tokenizer" in done.stderr
    done = run("prune", "./llama", "--tokenizer", "nowhere", "--out", "small")
    assert "tokenizer='nowhere'" in done.stderr
    assert not Path("small").exists()
