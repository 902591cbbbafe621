"""The smallest model on a path whose expected loss is shown to be small enough: tests in a fixed order (T19)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from coreprune._shapes import Num, Tensor
from coreprune.errors import InputError
from coreprune.risk.bounds import upper_bound


@dataclass(frozen=True)
class Step:
    """One tested model. number: its place on the path, from 0. risk: its mean loss. bound: T18's bound on the expected
    loss at level δ. passed: whether the bound is at most the level.
    """

    number: int
    risk: float
    bound: float
    passed: bool


@dataclass(frozen=True)
class Path:
    """The tested models, in order; the last one is the first that failed, or the end of the path.

    level, delta: what was tested. With probability at least 1 − δ, every model that passed has an expected loss of at
    most `level`.
    """

    steps: tuple[Step, ...]
    level: float
    delta: float

    @property
    def chosen(self) -> int | None:
        """The number of the last model that passed; None if the first one failed."""
        return max((step.number for step in self.steps if step.passed), default=None)


def fixed_sequence(models: Iterable[Callable[[], Num[Tensor, " n"]]], level: float, delta: float = 0.01) -> Path:
    """T19: test models from the safest to the smallest, each at δ, and stop at the first that fails.

    Every model is tested on the same n held-out samples, and the order and all models are fixed before any of these is
    seen. With probability at least 1 − δ, no model that passes has an expected loss above the level, however long the
    path is: for that, the first one whose expected loss is above the level must pass, which has at most probability δ
    (T18). Learn-then-Test, Angelopoulos et al. 2021; testing in a fixed sequence is older (Maurer et al. 1995). A
    bisection would look at other models, depending on the samples, and has no such guarantee.

    models: for each model a function that returns its losses, (n,), bool or in [0, 1], called only when it is its turn.

    Raises InputError for a level outside (0, 1), and what `upper_bound` raises.
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, but it is {level}.")
    steps: list[Step] = []
    for number, model in enumerate(models):
        losses = model()
        bound = upper_bound(losses, delta)
        steps.append(Step(number, float(losses.double().mean()), bound, bound <= level))
        if not steps[-1].passed:
            break
    return Path(tuple(steps), level, delta)
