"""What a tokenizer says of a model's tokens: which make up text, which stand around a text, and which is padding."""

from __future__ import annotations

import hashlib
import json
import math
import re
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from coreprune.errors import InputError, first_line

FILE = "tokenizer.json"
LONGEST = ("max_position_embeddings", "n_positions", "n_ctx")  # what configurations call the longest input
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SPACES = "▁ĠĊ"  # as byte-pair tokenizers write a space or the end of a line
_SET_ASIDE = re.compile(r"\[\w+\]|<[^<>]+>")  # [unused7], <0x0A>: tokens that text hardly ever has


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a model.

    encode: from a text to its ids, without special tokens. before, after: the special tokens around one text. words:
    the ids that make up text, roughly the most frequent first. pad: the id of padding, or None. key: a digest, the
    same for the same tokenizer.
    """

    encode: Callable[[str], list[int]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    words: tuple[int, ...]
    pad: int | None
    key: str


def tokens_of(given: Any) -> Tokens:
    """Read a tokenizer.

    given: a `tokenizers.Tokenizer`, a tokenizer of transformers that stands on one, a tokenizer.json, or a folder with
        one. It is not changed. Nothing but data is read from files.

    Raises InputError for anything else.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("a tokenizer needs the package tokenizers. Install it: pip install tokenizers.") from error
    if isinstance(given, (str, Path)):
        path = Path(given) / FILE if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise InputError(f"tokenizer={str(given)!r}: there is no {FILE}. Save one with tokenizer.save_pretrained.")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}).") from error
    else:
        inner = getattr(given, "backend_tokenizer", given)
        if not isinstance(inner, tokenizers.Tokenizer):
            raise InputError(
                f"tokenizer is a {type(given).__name__}. Pass a tokenizers.Tokenizer, a fast tokenizer of "
                f"transformers, or a folder with a {FILE}."
            )
        path, text = "the tokenizer", inner.to_str()
    try:
        own = tokenizers.Tokenizer.from_str(text)  # a copy, so that what is turned off stays on in the user's
        own.no_truncation()
        own.no_padding()
        return _read(own, json.loads(text), hashlib.sha256(text.encode()).hexdigest())
    except Exception as error:  # tokenizers raises plain Exceptions
        raise InputError(f"{path} cannot be read as a tokenizer ({first_line(error)}).") from error


def beside(model: nn.Module) -> Path | None:
    """The tokenizer.json of the folder that a transformers model was loaded from. None if there is none on this disk.

    That is the folder itself, or for a name of the Hugging Face hub its folder in the cache. Nothing is fetched.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not isinstance(name, str) or not name:
        return None
    if Path(name).is_dir():
        return Path(name) / FILE if (Path(name) / FILE).is_file() else None
    hub = sys.modules.get("huggingface_hub")  # who has loaded a model by its name has imported it
    if hub is None or not _REPOSITORY.fullmatch(name):
        return None
    found = hub.try_to_load_from_cache(name, FILE)
    return Path(found) if isinstance(found, str) else None


def _read(tokenizer: Any, about: dict[str, Any], key: str) -> Tokens:
    added = tokenizer.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    vocabulary = {token: i for token, i in tokenizer.get_vocab(with_added_tokens=True).items() if i not in special}
    words = [i for token, i in sorted(vocabulary.items(), key=_rank(about["model"])) if not _SET_ASIDE.fullmatch(token)]
    around = tokenizer.encode("a", add_special_tokens=True)
    own = [place for place, mask in enumerate(around.special_tokens_mask) if not mask]
    first, last = (own[0], own[-1] + 1) if own else (len(around.ids), len(around.ids))
    padding = about.get("padding") or {}
    named = [i for i, token in added.items() if token.content.strip("[]<>|").lower() == "pad"]
    return Tokens(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        before=tuple(around.ids[:first]),
        after=tuple(around.ids[last:]),
        words=tuple(words),
        pad=padding.get("pad_id", named[0] if named else None),
        key=key,
    )


def _rank(model: dict[str, Any]) -> Callable[[tuple[str, int]], tuple[int, float, int]]:
    """A key that sorts (token, id) by how frequent the token may be.

    A unigram model holds log-probabilities. Byte-pair merges are made in the order of frequency, and other vocabularies
    are sorted, but alphabets stand at their front whatever their frequency. Of those, the signs, digits and letters of
    ASCII and spaces are frequent and go first; other characters go last.
    """
    if model.get("type") == "Unigram":
        odds = {token: -float(odds) for token, odds in model["vocab"]}
        return lambda item: (1, odds.get(item[0], math.inf), item[1])
    rank: dict[str, float] = {}
    front = set(string.punctuation + string.digits + string.ascii_letters + _SPACES)
    if model.get("type") == "BPE":
        for place, merge in enumerate(model.get("merges", ())):
            rank.setdefault("".join(merge.split(" ", 1) if isinstance(merge, str) else merge), place)

    def key(item: tuple[str, int]) -> tuple[int, float, int]:
        token, i = item
        kind = 0 if token in front else 2 if len(token.removeprefix("##")) < 2 else 1
        return kind, rank.get(token, float(i)), i

    return key
