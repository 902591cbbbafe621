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
from coreprune.queries.sources.tokens import RandomTokens, ZipfTokens, is_causal, known

TEMPERATURES = (0.7, 1.0, 1.3)  # at which a model writes


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

    def remark(self, target: Target, inputs: Tensor) -> str:
        """How many of each kind there are, for the report."""
        mixture = self._mixture(target)
        counts = zip(mixture.sources, mixture.shares(len(inputs)), strict=True)
        told = [f"{count} {source.name}" for source, count in counts if isinstance(source, Source)]
        texts = [s.remark(target, inputs) for s in mixture.sources if isinstance(s, MachineText)]
        return "; ".join((", ".join(told), *texts))

    def _mixture(self, target: Target) -> Mixture:
        return _of(target, writes=3.0)


@dataclass(frozen=True)
class TokenMixture(MadeTokens):
    """Half of it `MachineText`, the rest of the kinds of `MadeTokens`. Without a tokenizer, `MadeTokens` alone.

    The shares go by what narrowed models do on kinds of text that are not among the queries: MiniLM with three quarters
    of its hidden units, refitted on 256 texts of 64 tokens, mean cosine with the original's embeddings (one seed). On
    an encyclopedia it is 0.93 with random tokens, 0.97 with Zipf's, 0.91 with text, and 0.96 with a mixture of half
    text; on documentation 0.83, 0.89, 0.96 and 0.96.
    """

    name = "token-mixture"

    def _mixture(self, target: Target) -> Mixture:
        if known(target) is None or not has_text():
            return super()._mixture(target)
        return _of(target, writes=1.0, reads=4.0)


def _of(target: Target, writes: float, reads: float = 0.0) -> Mixture:
    """Zipf and random tokens 2 : 1, and shares of what the model writes, if it can, and of the machine's text."""
    parts = {
        MachineText(): reads,
        ZipfTokens(): 2.0,
        RandomTokens(): 1.0,
        SelfGenerated(temperature=TEMPERATURES): writes if is_causal(target) else 0.0,
    }
    taken = {source: share for source, share in parts.items() if share}
    return Mixture(tuple(taken), tuple(taken.values()))
