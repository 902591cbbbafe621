"""Tokens of several kinds, so that what is repaired on them is not learned for one kind alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coreprune.queries.machine_text import has_text
from coreprune.queries.sources.base import Source, Target, Tell
from coreprune.queries.sources.mixture import Mixture
from coreprune.queries.sources.self_generated import SelfGenerated
from coreprune.queries.sources.text import MachineText
from coreprune.queries.sources.tokens import RandomTokens, ZipfTokens, is_causal, known, padding_mask

_TEMPERATURES = (0.7, 1.0, 1.3)


@dataclass(frozen=True)
class MadeTokens:
    """Tokens that need no text: independent ones, all equally likely or by Zipf's law, and what the model writes.

    A causal language model writes half of them, at temperatures from 0.7 to 1.3.
    """

    name = "made-tokens"
    kind = "tokens"

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once. The sources are asked in turn."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        return self._mixture(target)(target, n, generator, tell)

    def also(self, target: Target, inputs: Tensor) -> dict[int, Tensor]:
        """The mask of the padding."""
        return padding_mask(target, inputs)

    def remark(self, target: Target, inputs: Tensor) -> str:
        """How many of each kind there are, for the report."""
        mixture = self._mixture(target)
        counts = zip(mixture.sources, mixture.shares(len(inputs)), strict=True)
        told = [f"{count} {source.name}" for source, count in counts if isinstance(source, Source)]
        texts = [s.remark(target, inputs) for s in mixture.sources if isinstance(s, MachineText)]
        return "; ".join((", ".join(told), *texts))

    def _mixture(self, target: Target) -> Mixture:
        made = (SelfGenerated(temperature=_TEMPERATURES),) if is_causal(target) else ()
        return Mixture((ZipfTokens(), RandomTokens(), *made), (2.0, 1.0, *(3.0 for _ in made)))


@dataclass(frozen=True)
class TokenMixture(MadeTokens):
    """`MachineText` and `MadeTokens`, as far as the model allows: text needs a tokenizer.

    The shares were chosen by what pruned models do on kinds of text that are not among the queries.
    """

    name = "token-mixture"

    def _mixture(self, target: Target) -> Mixture:
        made = super()._mixture(target)
        if known(target) is None or not has_text():
            return made
        return Mixture((MachineText(), *made.sources), (4.0, *(made.weights or ())))
