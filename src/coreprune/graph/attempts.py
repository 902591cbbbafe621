"""Attempts to cut some groups: a smaller copy is made, its remembered numbers are changed, and it is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from coreprune.errors import CoreprunError, first_line
from coreprune.graph.blame import blamed
from coreprune.graph.groups import Group
from coreprune.graph.remembered import numbers_demanded, put_numbers
from coreprune.graph.slicing import kept_positions
from coreprune.graph.smaller import relative, smaller
from coreprune.graph.traced import Traced
from coreprune.graph.tracked import Slot
from coreprune.graph.unread import numbers_unread

Chosen = Sequence[tuple[Group, Tensor]]


class Unread(Enum):
    """Which numbers that the forward does not read change with the sizes of layers."""

    SURE = "those whose meaning is sure"
    GUESS = "those that may be a size"
    STAY = "none"


@dataclass(frozen=True)
class _Failed:
    """The last attempt that failed: with which groups, and with which numbers."""

    names: frozenset[str]
    demanded: dict[Slot, int]
    values: list[dict[Slot, int]]
    problem: str


class Attempts:
    """Tries some of many cuts, and keeps the model of the last attempt that succeeded.

    cuts: by name of the group, the group and the channels that stay. check: whether a smaller model is run at all.
    runs: how many were tried. best: the last model that works, or None.
    """

    def __init__(self, traced: Traced, cuts: Mapping[str, tuple[Group, Tensor]], check: bool) -> None:
        self.runs = 0
        self.best: nn.Module | None = None
        self._traced, self._cuts, self._check = traced, cuts, check
        self._failed: _Failed | None = None

    def __call__(self, names: list[str], hard: bool) -> str:
        """What is wrong with the model without the channels of some groups. Empty if it is the best one so far."""
        small, problem = self._attempt(names)
        for unread in (Unread.GUESS, Unread.STAY):
            if small is None and hard:
                small, _ = self._attempt(names, unread)
        if small is None:
            return problem
        self.best = small
        return ""

    def blame(self, names: list[str]) -> dict[str, str]:
        """Those of the groups that make a module fail, whatever numbers it remembers, and what is wrong."""
        traced, chosen = self._traced, [self._cuts[n] for n in names]
        if not self._check or traced.check.blind:
            return {}
        try:
            small = smaller(traced.model, traced.captured, chosen)
        except CoreprunError:
            raise
        except Exception:
            return {}
        self.runs += 1
        demanded = self._demanded(names, small)
        ways = [{**self._unread(small, chosen, unread), **demanded} for unread in Unread] + [{}]
        put_numbers(small, ways[0])

        def part(path: str, left: Chosen) -> Iterator[nn.Module]:
            inside = [
                {(at, keys): n for (whole, keys), n in way.items() if (at := relative(whole, path)) is not None}
                for way in ways
            ]
            for i, way in enumerate(inside):
                if way in inside[:i] or (i == 0 and len(left) == len(chosen)):  # as it was, it fails
                    continue
                try:
                    module = smaller(traced.model, traced.captured, list(left), path)
                except Exception:
                    return
                put_numbers(module, way)
                yield module

        return blamed(traced.check, small, chosen, part)

    def _attempt(self, names: list[str], unread: Unread = Unread.SURE) -> tuple[nn.Module | None, str]:
        """The model without the channels of some groups; or None, and what is wrong with it."""
        traced, chosen = self._traced, [self._cuts[n] for n in names]
        try:
            small = smaller(traced.model, traced.captured, chosen)
        except CoreprunError:
            raise
        except Exception as error:
            self.runs += 1
            return None, f"its weights cannot be cut: {first_line(error)}"
        demanded = self._demanded(names, small)
        values = {**self._unread(small, chosen, unread), **demanded}
        tried = self._failed if self._failed and self._failed.names == frozenset(names) else None
        if tried and values in tried.values:
            return None, tried.problem
        self.runs += 1
        put_numbers(small, values)
        problem = traced.check.difference(small, chosen, kept_positions(chosen)) if self._check else None
        if not problem:
            return small, ""
        self._failed = _Failed(frozenset(names), demanded, [*(tried.values if tried else []), values], problem)
        return None, problem

    def _demanded(self, names: list[str], small: nn.Module) -> dict[Slot, int]:
        if self._failed and self._failed.names == frozenset(names):
            return self._failed.demanded
        if not names or not self._traced.numbers_read:
            return {}
        return numbers_demanded(self._traced.check.oracle, small, [self._cuts[n] for n in names])

    def _unread(self, small: nn.Module, chosen: Chosen, unread: Unread) -> dict[Slot, int]:
        if unread is Unread.STAY:
            return {}
        traced = self._traced
        return numbers_unread(traced.model, small, chosen, traced.numbers_read, guess=unread is Unread.GUESS)
