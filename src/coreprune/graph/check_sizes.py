"""Inputs of other sizes for the check after surgery: a cut may be right at the example's size alone.

Axes of length 1 become longer, because one time step or one sample hides what happens along an axis. Other axes become
half or twice as long, because channels may lie along them: a reshape that mixes channels with positions puts them
elsewhere at another size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from torch import Tensor

from coreprune.graph.check_inputs import BATCH, LENGTH, Drawing

Axis = tuple[int, int]  # of a leaf of the inputs
Made = Callable[[Drawing], Any]  # what the original makes of inputs; None if it does not run on them


def longer(base: Drawing, made: Made) -> dict[Drawing, Any]:
    """The same inputs with as many axes of length 1 made longer as the model takes, and their outputs.

    Empty if it takes none.
    """
    single = list(base.single())
    first = {at: BATCH for at in single if at[1] == 0}
    others = {at: LENGTH for at in single if at[1] != 0}
    by_axis = [dict(part) for _, part in groupby(sorted(others.items(), key=_axis), key=_axis)]
    found: dict[Axis, int] = {}
    longest: dict[Drawing, Any] = {}
    for tried in (first, dict(list(first.items())[:1]), others, *by_axis, *({at: n} for at, n in others.items())):
        if not tried.keys() <= found.keys() and (not found or tried is not first):
            larger = replace(base, lengths={**found, **tried})
            got = made(larger)
            if got is not None:
                found, longest = dict(larger.lengths), {larger: got}
    return longest


def resized(base: Drawing, batch: Mapping[int, int | None], made: Made, cheap: bool) -> dict[Drawing, Any]:
    """The same inputs with the axes that may have another length half as long, or twice, and their outputs.

    Empty if the model takes no other size. All axes together are tried first, then those behind the second, which are
    the positions of images, then each alone.

    batch: by leaf, the axis of the samples, which keeps its length. cheap: whether inputs twice as long may be tried.
    """
    several = {at: n for at, n in base.axes().items() if n > 1 and at[1] != batch.get(at[0])}
    if not _indices_stay_inside(base):
        return {}
    for lengths in _sizes(several, cheap):
        other = replace(base, lengths=lengths)
        got = made(other)
        if got is not None:
            return {other: got}
    return {}


def _sizes(several: Mapping[Axis, int], cheap: bool) -> Iterator[dict[Axis, int]]:
    """Other lengths of some axes, what is most likely to run first."""
    tried: list[dict[Axis, int]] = []
    half = {at: (n + 1) // 2 for at, n in several.items()}
    double = {at: 2 * n for at, n in several.items()} if cheap else {}
    alone = sorted({axis for _, axis in several})
    behind = [a for a in alone if a > 1]
    each = [[a] for a in alone]
    for sizes, part in (*((half, part) for part in (alone, behind, *each)), (double, alone), (double, behind)):
        lengths = {at: n for at, n in sizes.items() if at[1] in part}
        if lengths and lengths not in tried:
            tried.append(lengths)
            yield lengths


def _indices_stay_inside(base: Drawing) -> bool:
    """Whether no index can point beyond an axis that becomes shorter: on a GPU nothing runs after that."""
    tensors = [leaf for leaf in base.leaves if isinstance(leaf, Tensor)]
    real = [x.is_floating_point() or x.is_complex() for x in tensors]
    return all(real) or not any(real) or all(x.device.type == "cpu" for x in tensors)


def _axis(item: tuple[Axis, int]) -> int:
    return item[0][1]
