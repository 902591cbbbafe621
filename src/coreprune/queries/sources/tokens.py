"""Sequences of tokens: random ones, or text that a language model writes itself."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.tokenizer import Tokens

_log = logging.getLogger(__name__)

_MOST_COLUMNS = 512
_SHIFT = 2.7  # Mandelbrot's
_MOVES = 1e-3  # how far logits may move by rounding, of how far the last ones move


def vocabulary(target: Target) -> int:
    """The number of tokens: the rows of the table that the inputs choose from, such as that of an `nn.Embedding`.

    Raises InputError if none does.
    """
    if target.example.is_floating_point() or target.example.dtype == torch.bool:
        raise InputError(f"tokens are integers; these inputs are {target.example.dtype}.")
    looked_up = _looked_up(target, target.example)
    given = target.given.flatten()
    rows = [n for ids, n in looked_up if ids.numel() == given.numel() and torch.equal(ids.flatten(), given)]
    if not rows:
        raise InputError(
            "no embedding or other table looks these integers up, so their range is unknown. Pass samples, or in "
            "Python give the range: RandomTokens(vocabulary=...)."
        )
    return max(rows)  # positions may equal the tokens in an example of zeros; there are fewer of those


def columns(target: Target) -> Tensor | None:
    """How many values every place of the inputs can have, (places,) int64, if each has a table of its own.

    This is how models read columns of categories: x[:, i] chooses a row of the i-th table. None if an embedding looks
    all places up together, or if none reads some place.
    """
    example = target.example[:1].reshape(1, -1)
    if example.is_floating_point() or example.dtype == torch.bool or not 1 < example.shape[1] <= _MOST_COLUMNS:
        return None
    found = torch.zeros(example.shape[1], dtype=torch.int64)
    before = _looked_up(target, target.cast(example))
    if any(ids.numel() >= example.shape[1] for ids, _ in before):
        return None
    for place in range(example.shape[1]):
        other = example.clone()
        other[0, place] = 1 if other[0, place] == 0 else 0
        try:
            after = _looked_up(target, target.cast(other))
        except IndexError:  # a table of one row
            found[place] = 1
            continue
        pairs = zip(before, after, strict=False)
        rows = [n for (was, _), (now, n) in pairs if was.shape == now.shape and not torch.equal(was, now)]
        found[place] = min(rows, default=0)
    return found if bool((found > 0).all()) else None


class _LookUps(TorchDispatchMode):
    """Notes which integers choose rows of a table, and how many rows it has.

    embedded: by an embedding, or a sum or mean of several. indexed: otherwise, such as `table[ids]` and one-hot
    vectors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedded: list[tuple[Tensor, int]] = []
        self.indexed: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name in ("embedding", "_embedding_bag", "_embedding_bag_forward_only"):
            self.embedded.append((args[1].detach().clone(), args[0].shape[0]))
        elif name == "index":
            self.indexed += [
                (i.detach().clone(), args[0].shape[axis])
                for axis, i in enumerate(args[1])
                if i is not None and i.dtype != torch.bool
            ]
        elif name in ("index_select", "gather", "scatter"):
            self.indexed.append((args[2].detach().clone(), args[0].shape[args[1]]))
        return func(*args, **(kwargs or {}))


def _looked_up(target: Target, x: Tensor) -> list[tuple[Tensor, int]]:
    """What the model looks up for an input, and how many rows the tables have, in the order of the calls.

    Where there are embeddings, they alone count: other tables may be chosen from by place, or by what was computed.
    """
    with _LookUps() as found:
        target.call(x)
    return found.embedded or found.indexed


def is_causal(target: Target) -> bool:
    """Whether tokens (1, T) give logits (1, T, vocabulary), and the last token changes no logits before it."""
    if target.example.is_floating_point() or len(target.shape) != 1 or target.shape[0] < 2:
        return False
    target = target.unmasked  # of an example that is padded, the last token changes nothing
    try:
        size = vocabulary(target)
        here = target.logits(target.example)
    except InputError:
        return False
    if here.dim() != 3 or here.shape[1] != target.shape[0] or here.shape[2] != size or size < 2:
        return False
    for place in _ends(target.example):
        other = target.example.clone()
        other[:, place] = (other[:, place] + 1) % size
        there = target.logits(other)
        moved = torch.where(here == there, 0.0, (here - there).abs()).detach()  # masks of infinities do not move
        before, own = float(moved[:, :place].max()), float(moved[:, place].max())
        if not (math.isfinite(before) and before <= _MOVES * own and own > 0):  # NaN, too
            return False
    return True


def _ends(ids: Tensor) -> list[int]:
    """The last token of a text (1, T), and the one before a run at its end: that may be padding, which changes nothing
    if the model is called with a mask by another name."""
    last = ids.shape[1] - 1
    same = (ids[0] == ids[0, last]).flip(0).to(torch.int64).cumprod(0).sum()
    before = last - int(same)
    return [last] if before < 1 or before == last - 1 else [last, before]


def _config(target: Target, name: str) -> int | None:
    value = getattr(getattr(target.model, "config", None), name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _drawn(
    target: Target, asked: int | None, law: Callable[[int], Tensor], n: int, generator: torch.Generator
) -> Tensor:
    """Tokens (n, *shape). law: the weights of so many values. asked: how many there are; None to find out."""
    sizes = columns(target) if asked is None else None
    tokens = known(target) if asked is None and sizes is None else None
    if tokens is not None:
        words = torch.tensor(tokens.words)
        count = n * target.shape[0]
        places = torch.multinomial(law(len(words)), count, replacement=True, generator=generator)
        return framed(target, tokens, words[places].reshape(n, -1).tolist(), is_causal(target))
    if sizes is None:
        return _draw(target, law(_size(asked, target)), n, generator)
    drawn = [torch.multinomial(law(k), n, replacement=True, generator=generator) for k in sizes.tolist()]
    return target.cast(torch.stack(drawn, dim=1))


def known(target: Target) -> Tokens | None:
    """What is known of the model's tokens; None without a tokenizer, or if the one that was found has other tokens.

    Raises InputError if the caller's tokenizer is not that of the model.
    """
    try:
        tokens = target.tokens
    except InputError as error:
        if target.tokenizer is not None:
            raise
        _log.warning("the tokenizer beside the model is not used: %s", error)
        return None
    if tokens is None or len(target.shape) != 1:
        return None
    rows, most = vocabulary(target), max((*tokens.words, *tokens.before, *tokens.after))
    if most < rows:
        return tokens
    text = f"the tokenizer has ids up to {most}, but the model has {rows} tokens"
    if target.tokenizer is not None:
        raise InputError(f"{text}. Pass the tokenizer that belongs to this model.")
    _log.warning("%s. It is not used.", text)
    return None


def framed(target: Target, tokens: Tokens, rows: Sequence[Sequence[int]], causal: bool) -> Tensor:
    """Texts without special tokens as inputs (n, T), as the tokenizer would make them: framed, cut, and padded.

    A causal model gets no token behind the text, since a text goes on after what is cut. Too short rows are padded.
    """
    length = target.shape[0]
    before, after = list(tokens.before), [] if causal else list(tokens.after)
    if len(before) + len(after) >= length:
        before, after = [], []
    room, pad = length - len(before) - len(after), pad_token(target, tokens)
    whole = [[*before, *row[:room], *after] for row in rows]
    return target.cast(torch.tensor([[*row, *[0 if pad is None else pad] * (length - len(row))] for row in whole]))


def padding_mask(target: Target, ids: Tensor) -> dict[int, Tensor]:
    """The mask of padding for tokens (n, T), by its position; empty if the model is called without one. Where nothing
    is known to be padding, every token is left."""
    if target.mask is None:
        return {}
    tokens = known(target)
    pad = None if tokens is None else pad_token(target, tokens)
    read = ids != pad if pad is not None else torch.ones_like(ids)
    read = read.long().flip(1).cummax(1).values.flip(1)  # only at the end is it padding
    return {target.mask: read.to(pytree.tree_leaves((target.args, target.kwargs))[target.mask])}


def start_token(target: Target) -> int | None:
    """The start token that the model's configuration names."""
    start = _config(target, "bos_token_id")
    return start if start is not None and start >= 0 else None


def pad_token(target: Target, tokens: Tokens) -> int | None:
    """The token that pads texts, by the model's configuration or by the tokenizer."""
    pad = _config(target, "pad_token_id")
    return tokens.pad if pad is None else pad


def _draw(target: Target, weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Tokens (n, *shape) without padding. The start token comes first if the configuration names one."""
    pad, start = _config(target, "pad_token_id"), start_token(target)
    if pad is not None and 0 <= pad < len(weights) > 1:
        weights[pad] = 0
    count = n * max(1, target.example[0].numel())
    ids = torch.multinomial(weights, count, replacement=True, generator=generator).reshape(n, *target.shape)
    if start is not None and start < len(weights) and ids.dim() > 1:
        ids[:, 0] = start
    return target.cast(ids)


@dataclass(frozen=True)
class RandomTokens:
    """Independent tokens, all equally likely.

    vocabulary: number of tokens. None: the rows of the embedding that looks them up. Columns of categories, each with
        an embedding of its own, each get their own range.
    """

    vocabulary: int | None = None
    name = "random-tokens"
    kind = "tokens"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        tell(1, 1)
        return _drawn(target, self.vocabulary, lambda k: torch.ones(k, dtype=torch.float64), n, generator)


@dataclass(frozen=True)
class ZipfTokens:
    """Independent tokens, where token i has a probability in proportion to 1/(i + shift)^power.

    Most vocabularies are sorted by frequency, and words follow such a law (Zipf, Mandelbrot).

    power, shift: of the law.
    vocabulary: as for `RandomTokens`.
    """

    power: float = 1.0
    shift: float = _SHIFT
    vocabulary: int | None = None
    name = "zipf-tokens"
    kind = "tokens"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        if not self.shift > 0:
            raise InputError(f"shift={self.shift} has to be positive.")
        tell(1, 1)
        return _drawn(target, self.vocabulary, lambda k: zipf(k, self.power, self.shift), n, generator)


def zipf(k: int, power: float = 1.0, shift: float = _SHIFT) -> Tensor:
    """Weights (k,) of words, the most frequent first, by the law of Zipf and Mandelbrot; float64."""
    return (torch.arange(k, dtype=torch.float64) + shift) ** -power


def _size(asked: int | None, target: Target) -> int:
    size = vocabulary(target) if asked is None else asked
    if size < 1 or target.example.is_floating_point():
        raise InputError(
            f"vocabulary={asked} for inputs of {target.example.dtype}: tokens are integers below a size ≥ 1."
        )
    return size
