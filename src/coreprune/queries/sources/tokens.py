"""Sequences of tokens: random ones, or text that a language model writes itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell

_MOST_COLUMNS = 512


def vocabulary(target: Target) -> int:
    """The number of tokens: the rows of the `nn.Embedding` that looks the inputs up.

    Raises InputError if none does.
    """
    if target.example.is_floating_point() or target.example.dtype == torch.bool:
        raise InputError(f"tokens are integers; these inputs are {target.example.dtype}.")
    looked_up = _looked_up(target, target.example)
    given = target.given.flatten()
    rows = [n for ids, n in looked_up if ids.numel() == given.numel() and torch.equal(ids.flatten(), given)]
    if not rows:
        raise InputError(
            "no embedding looks these integers up, so their range is unknown. Pass samples, or in Python give the "
            "range: RandomTokens(vocabulary=...)."
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


def _looked_up(target: Target, x: Tensor) -> list[tuple[Tensor, int]]:
    """What the embeddings of the model look up for an input, and how many rows they have, in the order of the calls."""
    found: list[tuple[Tensor, int]] = []

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        found.append((args[0].detach().clone(), module.num_embeddings))

    handles = [m.register_forward_pre_hook(hook) for m in target.model.modules() if isinstance(m, nn.Embedding)]
    try:
        target.call(x)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _config(target: Target, name: str) -> int | None:
    value = getattr(getattr(target.model, "config", None), name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _drawn(
    target: Target, asked: int | None, law: Callable[[int], Tensor], n: int, generator: torch.Generator
) -> Tensor:
    """Tokens (n, *shape). law: the weights of so many values. asked: how many there are; None to find out."""
    sizes = columns(target) if asked is None else None
    if sizes is None:
        return _draw(target, law(_size(asked, target)), n, generator)
    drawn = [torch.multinomial(law(k), n, replacement=True, generator=generator) for k in sizes.tolist()]
    return target.cast(torch.stack(drawn, dim=1))


def _draw(target: Target, weights: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Tokens (n, *shape) without padding. The start token comes first if the configuration names one."""
    pad, start = _config(target, "pad_token_id"), _config(target, "bos_token_id")
    if pad is not None and 0 <= pad < len(weights) > 1:
        weights[pad] = 0
    count = n * max(1, target.example[0].numel())
    ids = torch.multinomial(weights, count, replacement=True, generator=generator).reshape(n, *target.shape)
    if start is not None and 0 <= start < len(weights) and ids.dim() > 1:
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
    shift: float = 2.7  # Mandelbrot's
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

        def law(k: int) -> Tensor:
            return (torch.arange(k, dtype=torch.float64) + self.shift) ** -self.power

        return _drawn(target, self.vocabulary, law, n, generator)


def _size(asked: int | None, target: Target) -> int:
    size = vocabulary(target) if asked is None else asked
    if size < 1 or target.example.is_floating_point():
        raise InputError(
            f"vocabulary={asked} for inputs of {target.example.dtype}: tokens are integers below a size ≥ 1."
        )
    return size


@dataclass(frozen=True)
class SelfGenerated:
    """Text that a causal language model writes itself, token by token.

    It begins with the start token if the configuration names one, otherwise with a random token.

    temperature: divides the logits. Below 1 the text is more likely and less varied.
    batch: number of sequences that are made together.
    """

    temperature: float = 1.0
    batch: int = 64
    name = "self-generated"
    kind = "tokens"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """A batch at once."""
        return self.batch

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        if not self.temperature > 0:
            raise InputError(f"temperature={self.temperature} has to be positive.")
        if len(target.shape) != 1 or not is_causal(target):
            raise InputError(
                "only a causal language model, from tokens (N, T) to logits (N, T, vocabulary), can write its own "
                "queries. Choose random-tokens or zipf-tokens, or pass samples."
            )
        ids = RandomTokens()(target, n, generator, lambda done, total: None)  # noqa: ARG005
        length = target.shape[0]
        step = _cached(target) or _plain(target)
        with torch.no_grad():
            for t in range(1, length):
                odds = torch.softmax(step(ids, t).to("cpu", torch.float64) / self.temperature, dim=-1)
                ids[:, t] = torch.multinomial(odds, 1, generator=generator)[:, 0].to(ids)
                tell(t, length - 1)
        return ids


def is_causal(target: Target) -> bool:
    """Whether tokens (1, T) give logits (1, T, vocabulary), and the last token changes no logits before it."""
    if target.example.is_floating_point() or len(target.shape) != 1 or target.shape[0] < 2:
        return False
    try:
        size = vocabulary(target)
        here = target.logits(target.example)
    except InputError:
        return False
    if here.dim() != 3 or here.shape[1] != target.shape[0] or here.shape[2] != size or size < 2:
        return False
    other = target.example.clone()
    other[:, -1] = (other[:, -1] + 1) % size
    there = target.logits(other)
    same = torch.allclose(here[:, :-1], there[:, :-1], rtol=1e-3, atol=1e-4 * float(here.detach().abs().max()) + 1e-8)
    return same and not torch.allclose(here[:, -1], there[:, -1])


def _plain(target: Target) -> Any:
    """Logits of token t from the whole sequence. A causal model ignores what comes after token t - 1."""
    return lambda ids, t: target.logits(ids)[:, t - 1]


def _cached(target: Target) -> Any:
    """The same with the key/value cache of a transformers model. None for any other model."""
    parameters = inspect.signature(target.model.forward).parameters
    config = getattr(target.model, "config", None)
    only = target.axes.first and target.kwargs.get("input_ids", target.args[0] if target.args else None) is target.given
    if not only or getattr(config, "is_encoder_decoder", config is None):
        return None
    if not {"input_ids", "past_key_values", "use_cache"} <= set(parameters) or not target.together:
        return None
    past: list[Any] = [None]

    def step(ids: Tensor, t: int) -> Tensor:
        # Not through the twin's hooks, which turn the cache into a dict.
        out = target.model.forward(input_ids=ids[:, t - 1 : t], past_key_values=past[0], use_cache=True)
        past[0] = out.past_key_values
        return out.logits[:, -1]

    return step
