"""How to fine-tune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from coreprune.errors import InputError


@dataclass(frozen=True)
class Tuning:
    """How to train.

    epochs: passes over the batches. lr: the highest learning rate, after a linear warm-up over the share `warm_up` of
    all steps; with schedule "cosine" it then decays to zero. optimizer: "adamw", or "sgd" with Nesterov's momentum.
    weight_decay: of matrices and filters alone, not of biases and norms. smoothing: of the labels. soft: how much the
    teacher's answers count against the labels, softened by `temperature` (Hinton et al. 2015). clip: the largest norm
    of the gradient, or None. average: the decay of the averaged weights that the model has in the end, such as 0.999; 0
    for its last ones. precision: of the forward pass; "auto" is bfloat16 on GPUs that compute in it.
    """

    epochs: int = 3
    lr: float = 1e-3
    warm_up: float = 0.05
    schedule: Literal["cosine", "constant"] = "cosine"
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.9
    weight_decay: float = 0.0
    smoothing: float = 0.0
    soft: float = 0.5
    temperature: float = 2.0
    clip: float | None = None
    average: float = 0.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise InputError(f"Tuning.epochs must be a whole number ≥ 1, not {self.epochs!r}.")
        for name in ("lr", "temperature"):
            if not self._number(name) or not 0 < getattr(self, name) < math.inf:
                raise InputError(f"Tuning.{name} must be a number > 0, not {getattr(self, name)!r}.")
        for name, most in (
            ("warm_up", 1),
            ("momentum", 1),
            ("smoothing", 1),
            ("average", 1),
            ("weight_decay", math.inf),
        ):
            if not self._number(name) or not 0 <= getattr(self, name) < most:
                raise InputError(f"Tuning.{name} must be ≥ 0 and < {most}, not {getattr(self, name)!r}.")
        if not self._number("soft") or not 0 <= self.soft <= 1:
            raise InputError(f"Tuning.soft must lie between 0 and 1, and is {self.soft!r}.")
        if self.clip is not None and (not self._number("clip") or not self.clip > 0):
            raise InputError(f"Tuning.clip must be a number > 0 or None, not {self.clip!r}.")
        for name, known in (
            ("schedule", ("cosine", "constant")),
            ("optimizer", ("adamw", "sgd")),
            ("precision", ("auto", "float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"Tuning.{name}={getattr(self, name)!r} must be one of {', '.join(known)}.")

    def _number(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, (int, float)) and not isinstance(value, bool)
