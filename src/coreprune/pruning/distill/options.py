"""Options of the distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from coreprune.errors import InputError


@dataclass(frozen=True)
class Distill:
    """Options of the distillation.

    What is None depends on the outputs. Logits over the words of a vocabulary, as those of language models, take the
    second of two values.

    steps: how many steps of Adam.
    lr: the highest learning rate, after a linear warm-up over a twentieth of the steps; then it decays to zero by a
        cosine. It is relative: the rate of each tensor is lr times the root mean square of the tensor's entries at the
        start. None: 0.02; for logits over words 0.001 √(d/0.3), and at most 0.001, where d is the divergence of the
        first batch in nats a token. The error of a model grows with the square of how far its weights are off, so
        that the way that is left grows with √d; after a shallow cut a larger rate does harm.
    batch_size: inputs per step; all of them if there are fewer. None: 64; 16 for logits over words.
    features: weight of the features relative to the outputs; 0 for outputs alone. With a few hundred queries the
        features need a much larger weight than the outputs: they are many more numbers, which are harder to memorise.
        None: 1000; 0 for logits over words, because a few numbers of a stream of tokens are most of its size.
    temperature: of the softened outputs, whose divergence is added to the squared error of the outputs. None: 4; 1 for
        logits over words, where the divergence alone counts.
    augment: mirror, shift and recombine the inputs if they are images.
    copies: after so many passes over the inputs, the batches come again, with the same variations. What the teacher
        computes from them is kept, up to 1 GiB (then there are fewer passes), so that it need not run in every step.
        0: they never come again.
    save_every: how many steps from one checkpoint to the next.
    """

    steps: int = 1000
    lr: float | None = None
    batch_size: int | None = None
    features: float | None = None
    temperature: float | None = None
    augment: bool = True
    copies: int = 8
    save_every: int = 50

    USUAL: ClassVar = {"lr": 2e-2, "batch_size": 64, "features": 1000.0, "temperature": 4.0}
    OVER_WORDS: ClassVar = {"lr": 1e-3, "batch_size": 16, "features": 0.0, "temperature": 1.0}
    WHOLE_FROM: ClassVar = 0.3  # nats a token

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("save_every", 1), ("copies", 0)):
            value = getattr(self, name)
            if value is None and name == "batch_size":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"Distill.{name} must be a whole number ≥ {least}, not {value!r}.")
        for name, least in (("lr", "> 0"), ("temperature", "> 0"), ("features", "≥ 0")):
            value = getattr(self, name)
            if value is None:
                continue
            good = isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
            if not good or (least == "> 0" and value == 0):
                raise InputError(f"Distill.{name} must be a number {least}, not {value!r}.")

    def settled(self, over_words: bool) -> Settled:
        """The same with numbers for what is None. over_words: whether an output is one of logits over words."""
        usual = self.OVER_WORDS if over_words else self.USUAL
        asked = {name: getattr(self, name) for name in usual if getattr(self, name) is not None}
        least = self.WHOLE_FROM if over_words and self.lr is None else 0.0
        return Settled(self.steps, **{**usual, **asked}, augment=self.augment, copies=self.copies, whole_from=least)


@dataclass(frozen=True)
class Settled:
    """`Distill` with all that the result depends on settled. whole_from: the first loss below which lr is not whole."""

    steps: int
    lr: float
    batch_size: int
    features: float
    temperature: float
    augment: bool
    copies: int
    whole_from: float = 0.0
