"""Text that every machine has, as tokens of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coreprune.errors import InputError
from coreprune.queries.machine_text import KINDS, paragraphs
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.tokens import framed, is_causal, known, pad_token
from coreprune.queries.tokenizer import Tokens

_CHARACTERS = 10  # of text read for one token of a query: some four make a token, and texts start at random places
_MOST = 1_000_000  # characters of one kind that are read at most
_SHORTER = 0.5  # share of the texts that are shorter than the queries, where those may be padded
_SHORTEST = 4  # tokens


@dataclass(frozen=True)
class MachineText:
    """Docstrings of Python's standard library and descriptions of the installed packages, half of each.

    It is read from this machine when the queries are made; another machine has other packages, and so other text. It
    needs the model's tokenizer. A causal model reads pieces of running text that fill the queries. Other models read
    texts as their tokenizer frames them; if they take an attention mask, half of them are shorter and are padded.
    """

    name = "machine-text"
    kind = "tokens"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target. Raises InputError without a tokenizer, and without any text."""
        tokens = known(target)
        if tokens is None:
            raise InputError(
                "text needs the model's tokenizer, and there is none in the folder that the model was loaded from. "
                "Pass it: tokenizer=, a tokenizer or a folder with a tokenizer.json."
            )
        causal = is_causal(target)
        lengths = _lengths(target, tokens, n, causal, generator)
        rows: list[list[int]] = []
        for k, kind in enumerate(KINDS):
            found = paragraphs(kind, min(_CHARACTERS * n * target.shape[0] // len(KINDS), _MOST), generator)
            if found:
                rows += texts(found, tokens, lengths[k :: len(KINDS)], "\n\n" if causal else " ", generator)
            tell(k + 1, len(KINDS))
        if not rows:
            raise InputError("this machine has no text: neither Python's library nor its packages come with any.")
        rows = [rows[i % len(rows)] for i in range(n)]  # one kind alone is used twice
        order = torch.randperm(n, generator=generator).tolist()
        return framed(target, tokens, [rows[i] for i in order], causal)

    def remark(self, target: Target, inputs: Tensor) -> str:  # noqa: ARG002
        """Where the text is from, for the report."""
        return f"the text is from this machine ({' and '.join(KINDS)})"


def texts(
    found: list[str], tokens: Tokens, lengths: Sequence[int], between: str, generator: torch.Generator
) -> list[list[int]]:
    """One text of each length in tokens, from paragraphs that follow each other.

    They begin at random paragraphs, at each once before any is used again, and go on from the last to the first.
    """
    ids: dict[int, list[int]] = {}
    rounds = range(-(-len(lengths) // len(found)))
    starts = torch.cat([torch.randperm(len(found), generator=generator) for _ in rounds]).tolist()
    rows: list[list[int]] = []
    for start, length in zip(starts, lengths, strict=False):
        row: list[int] = []
        for step in range(length + 1):  # a paragraph has a token at least
            place = (start + step) % len(found)
            if place not in ids:
                ids[place] = tokens.encode(found[place] + between)
            row += ids[place]
            if len(row) >= length:
                break
        rows.append(row[:length])
    return rows


def _lengths(target: Target, tokens: Tokens, n: int, causal: bool, generator: torch.Generator) -> list[int]:
    """How many tokens the texts have, without special ones."""
    room = max(1, target.shape[0] - len(tokens.before) - (0 if causal else len(tokens.after)))
    lengths = torch.full((n,), room)
    if not causal and target.mask is not None and pad_token(target, tokens) is not None:
        shorter = torch.rand(n, generator=generator) < _SHORTER
        least = min(_SHORTEST, room)
        lengths = torch.where(shorter, torch.randint(least, room + 1, (n,), generator=generator), lengths)
    return lengths.tolist()
