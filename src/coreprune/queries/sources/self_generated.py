"""Text that a causal language model writes itself."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coreprune.errors import InputError
from coreprune.queries.sources.base import Target, Tell
from coreprune.queries.sources.tokens import RandomTokens, ZipfTokens, is_causal, known, start_token

_CACHES = ("cache", "past_key_values")  # what transformers calls the keys and values so far: from 5.24 on, before that


@dataclass(frozen=True)
class SelfGenerated:
    """Text that a causal language model writes itself, token by token.

    It begins with the start token if the configuration names one, otherwise with a random token. If a tokenizer is
    known, every second text begins with a word instead, frequent ones more often.

    temperature: divides the logits. Below 1 the text is more likely and less varied. Several are used in turn.
    batch: number of sequences that are made together.
    """

    temperature: float | tuple[float, ...] = 1.0
    batch: int = 64
    name = "self-generated"
    kind = "tokens"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """A batch at once."""
        return self.batch

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        each = torch.as_tensor(self.temperature, dtype=torch.float64).reshape(-1)
        if len(each) == 0 or not bool((each > 0).all()):
            raise InputError(f"temperature={self.temperature} has to be positive.")
        if len(target.shape) != 1 or not is_causal(target):
            raise InputError(
                "only a causal language model, from tokens (N, T) to logits (N, T, vocabulary), can write its own "
                "queries. Choose random-tokens or zipf-tokens, or pass samples."
            )
        target = target.unmasked  # the mask of the example is about the example
        ids = self._starts(target, n, generator)
        divisors = each[torch.arange(n) % len(each), None]
        length = target.shape[0]
        step = _cached(target) or _plain(target)
        with torch.no_grad():
            for t in range(1, length):
                odds = torch.softmax(step(ids, t).to("cpu", torch.float64) / divisors, dim=-1)
                ids[:, t] = torch.multinomial(odds, 1, generator=generator)[:, 0].to(ids)
                tell(t, length - 1)
        return ids

    def _starts(self, target: Target, n: int, generator: torch.Generator) -> Tensor:
        """Tokens (n, T), of which the first will be kept."""
        if known(target) is None:
            return RandomTokens()(target, n, generator, _silent)
        ids, start = ZipfTokens()(target, n, generator, _silent), start_token(target)
        if start is not None:
            ids[::2, 0] = start
        return ids


def _silent(done: int, total: int) -> None:
    pass


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
    name = next((name for name in _CACHES if name in parameters), None)
    if name is None or not {"input_ids", "use_cache"} <= set(parameters) or not target.together:
        return None
    past: list[Any] = [None]

    def step(ids: Tensor, t: int) -> Tensor:
        # Not through the twin's hooks, which turn the cache into a dict.
        out = target.model.forward(input_ids=ids[:, t - 1 : t], use_cache=True, **{name: past[0]})
        past[0] = getattr(out, name)
        return out.logits[:, -1]

    return step
