"""Small tokenizers, trained on two sentences."""

from __future__ import annotations

from typing import Any

import pytest

tokenizers: Any = pytest.importorskip("tokenizers")
TEXT = ["the cat sat on the mat and the dog ran to the door", "a list of words is a list of words, said the cat"]


def word_piece() -> Any:
    """A small tokenizer as BERT has it: framed, with truncation and padding switched on."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]"]
    made.train_from_iterator(TEXT, tokenizers.trainers.WordPieceTrainer(vocab_size=60, special_tokens=special))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 3), ("[SEP]", 4)]
    )
    made.enable_truncation(5)
    made.enable_padding(pad_id=0, pad_token="[PAD]")
    return made


def byte_pairs() -> Any:
    """A small tokenizer as GPT-2 has it: bytes first, no frame."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(TEXT, trainer)
    return made
