"""Sweeps over several parameters, thinned: a part of the combinations runs always, all of them in `make long`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def thinned(values: Iterable[Any], step: int = 2) -> list[Any]:
    """All values, of which all but one of `step` are marked long."""
    return [pytest.param(v, marks=pytest.mark.long if i % step else ()) for i, v in enumerate(values)]


def in_turn(first: Iterable[Any], *others: Sequence[Any], step: int = 1) -> list[Any]:
    """Every value of `first`, or one of `step`, with one of each of the others, in turn. All other combinations are
    marked long."""
    found = []
    for i, value in enumerate(first):
        turn = None if i % step else tuple(values[i // step % len(values)] for values in others)
        for rest in itertools.product(*others):
            found.append(pytest.param(value, *rest, marks=() if rest == turn else pytest.mark.long))
    return found
