"""Inputs from several sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coreprune.errors import InputError
from coreprune.queries.sources.base import Source, Target, Tell, draw
from coreprune.queries.sources.function import as_source


@dataclass(frozen=True)
class Mixture:
    """A share of the inputs from each source, in random order.

    sources: sources, or functions (n, generator).
    weights: one positive number per source. Only their ratios matter. None: equal shares.
    """

    sources: tuple[Source | Callable[[int, torch.Generator], Any], ...]
    weights: tuple[float, ...] | None = None
    name = "mixture"

    @property
    def kind(self) -> str:
        """The kind of the sources. Sources of real numbers of any shape go with every kind."""
        kinds = {as_source(source).kind for source in self.sources}
        if "tokens" in kinds:
            return "tokens"
        narrow = kinds - {"reals"}
        return narrow.pop() if len(narrow) == 1 else "reals"

    @property
    def jointly(self) -> bool:
        """Whether some of the sources make inputs that are no independent draws."""
        return any(getattr(as_source(source), "jointly", False) for source in self.sources)

    def at_once(self, target: Target) -> int | None:  # noqa: ARG002
        """Any number at once. The sources are asked in turn."""
        return None

    def __call__(self, target: Target, n: int, generator: torch.Generator, tell: Tell) -> Tensor:
        """Make n inputs for the target."""
        parts, done = [], 0
        for source, share in zip(self.sources, self.shares(n), strict=True):
            if share == 0:
                continue

            def told(step: int, steps: int, before: int = done, size: int = share) -> None:
                tell(before * steps + step * size, n * steps)

            parts.append(draw(as_source(source), target, share, generator, told))
            done += share
        return torch.cat(parts)[torch.randperm(n, generator=generator).to(target.example.device)]

    def shares(self, n: int) -> list[int]:
        """How many inputs come from each source. The largest remainders are rounded up."""
        weights = torch.tensor(self.weights or [1.0] * len(self.sources), dtype=torch.float64)
        if (
            len(weights) != len(self.sources)
            or len(weights) == 0
            or not bool(((weights > 0) & weights.isfinite()).all())
        ):
            raise InputError(f"a mixture needs one positive weight per source, not {self.weights} for {self.sources}.")
        exact = weights / weights.sum() * n
        shares = exact.floor().to(torch.int64)
        short = n - int(shares.sum())
        shares[torch.argsort(exact - shares, descending=True, stable=True)[:short]] += 1
        return shares.tolist()
