"""Which numbers a module has to remember after a cut, found by watching the original run.

The original runs twice, with zeros where removed channels are read and with two sets of weights that make these
channels. So the two runs differ in the removed channels and nowhere else, and every activation shows which of its
positions stay. The numbers that modules remember are replaced by numbers that know where they came from, through sums
and products too. A call that gets such a number shows what the number has to become: the value with which the call
makes, of what is left of its inputs, what is left of its outputs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._mapped import stored_as
from coreprune.graph.groups import Group
from coreprune.graph.numbers import Keys, change_numbers, numbers
from coreprune.graph.slicing import kept_positions
from coreprune.graph.tracked import Number, Slot, known
from coreprune.graph.watching import Demand, Seen, Watch

log = logging.getLogger(__name__)

Chosen = Sequence[tuple[Group, Tensor]]
Run = Callable[[Chosen], AbstractContextManager[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]]

_MOST_ALONE = 64  # groups that are looked at one by one, in two runs each
_MOST_WAYS = 512  # to put together what several groups demand of one call


def numbers_read(run: Run) -> frozenset[Slot]:
    """The numbers that modules remember and that reach a function of tensors when the original runs.

    A number that only gives new tensors their shape, such as a bias of zeros for every head, is none of them: nothing
    shows what it has to become.
    """
    try:
        with run(()) as (still, args, kwargs):
            values = _follow(still)
            if not values:
                return frozenset()
            watch = Watch(values)
            with watch:
                still(*args, **kwargs)
    except Exception as error:  # a forward may refuse numbers of ours
        log.debug("the numbers that modules remember cannot be followed: %s", error)
        return frozenset()
    return frozenset(watch.read)


def numbers_demanded(run: Run, small: nn.Module, chosen: Chosen) -> dict[Slot, int]:
    """What the numbers that modules remember have to become when only the given channels are left.

    run: gives the original with zeros where removed channels are read, and inputs for it. small: the copy of it whose
        layers of torch are cut.
    """
    exact = [(g, keep) for g, keep in chosen if "functional" not in g.flags]
    odd = [(g, keep) for g, keep in chosen if "functional" in g.flags]  # these may move everything behind them
    calls: dict[int, list[Demand]] = {}
    values: dict[Slot, int] = {}
    for together in ([exact] if exact else []) + [[one] for one in odd[:_MOST_ALONE]]:
        try:
            watch, values = _watched(run, small, chosen, together)
        except Exception as error:
            log.debug("the numbers that modules remember cannot be followed: %s", error)
            continue
        for call, demand in watch.demands.items():
            calls.setdefault(call, []).append(demand)
    return _agreed([_together(demands, values) for demands in calls.values()])


def put_numbers(model: nn.Module, values: Mapping[Slot, int]) -> None:
    """Change numbers that modules remember. Containers that several modules hold are not changed, but copied."""
    modules, by_path = dict(model.named_modules()), {}
    for (path, keys), n in values.items():
        by_path.setdefault(path, {})[keys] = n
    shared: dict[Any, Any] = {}
    for path, changes in by_path.items():
        change_numbers(modules[path], lambda keys, old, changes=changes: changes.get(keys, old), shared)


def _watched(run: Run, small: nn.Module, chosen: Chosen, moved: Chosen) -> tuple[Watch, dict[Slot, int]]:
    """The demands of all calls, seen by moving the channels of some groups; and the numbers as they are."""
    ratios = frozenset((g.size // g.unit, len(keep) // g.unit) for g, keep in moved)
    masks = kept_positions(list(chosen))
    before: list[Seen] | None = None
    watch = None
    for again in (False, True):
        with run(chosen) as (still, args, kwargs):
            if again:
                _shake(still, moved)
            values = _follow(still, small)
            watch = Watch(values, _cuts(still, masks), ratios, before)
            with watch:
                still(*args, **kwargs)
        before = watch.events
    assert watch is not None
    return watch, values


def _together(demands: list[Demand], values: Mapping[Slot, int]) -> Demand:
    """The demand of one call, from those when only some groups move, each with its own numbers.

    Where several channels leave, a number becomes what the group demands that changes it. If two change it to different
    values, only the first demand counts.
    """
    found: Demand = []
    for options in islice(product(*demands), _MOST_WAYS):
        changes = [{s: n for s, n in option.items() if n != values[s]} for option in options]
        merged = {s: values[s] for option in options for s in option}
        for change in changes:
            merged.update(change)
        if all(merged[s] == n for change in changes for s, n in change.items()):
            found.append(merged)
    return found or demands[0]


def _agreed(demands: list[Demand]) -> dict[Slot, int]:
    """Values that satisfy the demands, as far as these do not contradict each other."""
    fixed: dict[Slot, int] = {}
    waiting = list({str(d): d for d in demands}.values())
    while waiting:
        fits = [[o for o in demand if all(fixed.get(s, n) == n for s, n in o.items())] for demand in waiting]
        waiting = sorted((demand for demand in fits if demand), key=len)
        if waiting:
            first, *waiting = waiting
            fixed.update(first[0])
    return fixed


def _follow(model: nn.Module, small: nn.Module | None = None) -> dict[Slot, int]:
    """Put numbers that know where they came from in the place of those that modules remember, and return those.

    small: the copy whose layers of torch are cut. It says what the numbers of these layers become.
    """
    values: dict[Slot, int] = {}
    theirs = {} if small is None else dict(small.named_modules())
    for path, module in model.named_modules():
        if remembers(module):
            change_numbers(module, partial(_tracked, values, path))
        elif path in theirs:
            change_numbers(module, partial(known, dict(numbers(theirs[path]))))
    return values


def _tracked(values: dict[Slot, int], path: str, keys: Keys, value: int) -> int:
    if value < 2:
        return value
    slot = (path, keys)
    values[slot] = value
    return Number(value, frozenset([slot]), lambda env: env.get(slot, value))


def remembers(module: nn.Module) -> bool:
    """Whether a module has numbers that do not follow its weights (`attributes.py`)."""
    return not (type(module).__module__.startswith("torch.nn.") and module._parameters.get("weight") is not None)


def _shake(model: nn.Module, moved: Chosen) -> None:
    """Other weights for what makes the removed channels."""
    generator = torch.Generator().manual_seed(1)
    named = dict([*model.named_parameters(), *model.named_buffers()])
    for group, keep in moved:
        gone = torch.ones(group.size + 1, dtype=torch.bool)
        gone[keep] = gone[-1] = False
        for s in (*group.producers, *group.others):
            weight, mask = named[s.param].data, gone[s.index]
            if not weight.is_floating_point():
                continue
            spread = float(weight.float().std()) if weight.numel() > 1 else 1.0
            new = weight.clone()
            sections = mask if mask.dim() == 2 else mask[None]
            for section, m in zip(new.chunk(len(sections)), sections, strict=True):
                rows = section.movedim(s.dim, 0)
                shape = (int(m.sum()), *rows.shape[1:])
                if weight.dim() == 1:  # biases, and the statistics and scales of norms: positive
                    noise = 0.5 + torch.rand(shape, generator=generator)
                else:
                    noise = torch.randn(shape, generator=generator) * (spread or 1.0)
                rows[m.to(weight.device)] = noise.to(weight)
            named[s.param].data = stored_as(weight, new)


def _cuts(model: nn.Module, masks: Mapping[tuple[str, int], Tensor]) -> dict[int, dict[int, Tensor]]:
    """For parameters and buffers that are cut, by id: the positions that stay, per axis."""
    named = dict([*model.named_parameters(), *model.named_buffers()])
    out: dict[int, dict[int, Tensor]] = {}
    for (name, dim), mask in masks.items():
        out.setdefault(id(named[name]), {})[dim] = mask
    return out
