"""Remove channels from a model: slice its parameters, adjust the numbers that modules store, check the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._twin import duplicate
from coreprune.errors import CoreprunError, ModelError
from coreprune.graph.attributes import follow_depthwise, follow_sections, follow_weights
from coreprune.graph.caches import Place, drop, kept_tensors
from coreprune.graph.captured import Captured
from coreprune.graph.groups import Group, check_keep
from coreprune.graph.kept import staying
from coreprune.graph.recipe import number_changes, set_numbers
from coreprune.graph.remembered import Slot, numbers_demanded, put_numbers
from coreprune.graph.search import kind_of, working
from coreprune.graph.slicing import cut, kept_positions
from coreprune.graph.traced import Traced
from coreprune.graph.unread import numbers_unread

log = logging.getLogger(__name__)

_ABSENT = object()


class Unread(Enum):
    """Which numbers that the forward does not read change with the sizes of layers."""

    SURE = "those whose meaning is sure"
    GUESS = "those that may be a size"
    STAY = "none"


@dataclass(frozen=True)
class _Failed:
    """The last attempt that failed: with which groups, and with which numbers."""

    names: list[str]
    demanded: dict[Slot, int]
    values: list[dict[Slot, int]]
    problem: str


@dataclass(frozen=True, eq=False)
class Removed:
    """What `remove` did.

    Attributes:
        model: the smaller model.
        kept: name of every group that shrank -> the channels that stayed.
        masks: (parameter, axis) -> which positions stayed, for every axis that was cut (`kept_positions`).
        locked: name of every group that had to stay whole after all -> the reason.
        runs: how many pruned models were tried.
    """

    model: nn.Module
    kept: dict[str, Tensor]
    masks: dict[tuple[str, int], Tensor]
    locked: dict[str, str]
    runs: int


def remove(traced: Traced, keep: Mapping[str, Tensor], *, inplace: bool = False, check: bool = True) -> Removed:
    """Make a physically smaller model in which only the given channels are left.

    Numbers that modules remember, such as widths and numbers of heads, change with them (`remembered.py`).

    The result is run on the captured example. It must equal the original with zeros in the weights that read removed
    channels. Groups that break the run or the equality are found by bisection, left whole, and reported in `locked`.
    The model that was passed in is not changed, unless `inplace` is set, and then only after everything has succeeded.

    Args:
        traced: the model, its graph and its groups. Since it was captured, its weights may have changed, but not its
            shapes.
        keep: group name -> sorted int64 channels that stay. Groups that are not named stay whole.
        inplace: shrink `traced.model` itself. Parameters keep their identity; their gradients are dropped.
        check: run and compare. Use False only if nothing in the forward depends on the sizes.

    Raises:
        InputError: `keep` names an unknown group or a choice that the group does not allow.
        ModelError: the model is not the one that was captured, or cannot be copied.
    """
    model, captured = traced.model, traced.captured
    check_keep(traced.groups, dict(keep))
    _same_shapes(model, captured)
    cuts = {g.name: (g, keep[g.name]) for g in traced.groups if g.name in keep and len(keep[g.name]) < g.size}
    locked: dict[str, str] = {}
    runs = 0

    def attempt(names: list[str], unread: Unread = Unread.SURE) -> tuple[nn.Module | None, str]:
        nonlocal runs
        chosen = [cuts[n] for n in names]
        try:
            small = _smaller(model, captured, chosen)
        except CoreprunError:
            raise
        except Exception as error:
            runs += 1
            return None, f"its weights cannot be cut: {_first_line(error)}"
        tried = failed[0] if failed[0] and failed[0].names == names else None
        demanded = tried.demanded if tried else _demanded(traced, small, chosen)
        values = {**_unread(traced, small, chosen, unread), **demanded}
        if tried and values in tried.values:
            return None, tried.problem
        runs += 1
        put_numbers(small, values)
        problem = traced.check.difference(small, chosen, kept_positions(chosen)) if check else None
        if not problem:
            return small, ""
        failed[0] = _Failed(names, demanded, [*(tried.values if tried else []), values], problem)
        return None, problem

    def works(names: list[str], hard: bool) -> str:
        """What is wrong with the model without the channels of some groups. Empty if it is the best one so far."""
        small, problem = attempt(names)
        for unread in (Unread.GUESS, Unread.STAY):
            if small is None and hard:
                small, _ = attempt(names, unread)
        if small is None:
            return problem
        best[0] = small
        return ""

    failed: list[_Failed | None] = [None]
    best: list[nn.Module | None] = [None]
    kinds = {name: kind_of(g) for name, (g, _) in cuts.items()}
    good: list[str] = []
    # Groups that change a norm's statistics can only be run, not compared. So the others are tried first, without them.
    exact = [n for n, (g, _) in cuts.items() if "norm-statistics" not in g.flags]
    for part in (exact, [n for n in cuts if n not in exact]):
        if part:
            locked.update(working(part, kinds, good, works))
    for name, problem in locked.items():
        log.info("group %s is put back: %s", name, problem)
    small = best[0] if best[0] is not None else _smaller(model, captured, [])
    if inplace:
        adopt(model, small)
        small = model
    return Removed(
        small, {n: cuts[n][1] for n in cuts if n in good}, kept_positions([cuts[n] for n in good]), locked, runs
    )


def probe(traced: Traced) -> Traced:
    """Try to remove half of every free group, and lock the groups that break the forward.

    Run this before widths are chosen, so that the allocation counts only on channels that can really be removed.
    """
    traced = traced.locking(traced.check.unseen(list(traced.free.values())))
    return traced.locking(remove(traced, {name: _half(g) for name, g in traced.free.items()}).locked)


def _half(g: Group) -> Tensor:
    """The channels of the first half of the units in every section."""
    units = g.units()
    sections = torch.zeros(len(units), dtype=torch.int64) if g.sections is None else g.sections
    stay = torch.cat([(w := (sections == b).nonzero()[:, 0])[: max(1, len(w) // 2)] for b in sections.unique()])
    return units[stay].reshape(-1).sort().values


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


def _same_shapes(model: nn.Module, captured: Captured) -> None:
    have = dict([*model.named_parameters(), *model.named_buffers()])
    for name, (shape, _) in captured.tensors.items():
        if name not in have or tuple(have[name].shape) != shape:
            found = tuple(have[name].shape) if name in have else "absent"
            raise ModelError(
                f"{name} had shape {shape} when the model was captured and is {found} now; capture it again"
            )


def _smaller(model: nn.Module, captured: Captured, chosen: list[tuple[Group, Tensor]]) -> nn.Module:
    """A smaller copy. Only the kept part of every parameter is ever allocated for it."""
    masks = kept_positions(chosen)
    named = dict([*model.named_parameters(), *model.named_buffers()])
    memo: dict[int, object] = {}
    touched = {name for name, _ in masks}
    for name in touched:
        old = named[name]
        new = cut(old, {dim: m for (n, dim), m in masks.items() if n == name})
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    small = duplicate(model, memo)
    if chosen:
        drop(small, captured.caches)
    _follow_weights(small, captured, {n: named[n].shape[0] for n in touched})
    _follow_norms(small, captured, masks)
    return small


def _demanded(traced: Traced, small: nn.Module, chosen: list[tuple[Group, Tensor]]) -> dict[Slot, int]:
    return numbers_demanded(traced.check.oracle, small, chosen) if chosen and traced.numbers_read else {}


def _unread(traced: Traced, small: nn.Module, chosen: list[tuple[Group, Tensor]], unread: Unread) -> dict[Slot, int]:
    if unread is Unread.STAY:
        return {}
    return numbers_unread(traced.model, small, chosen, traced.numbers_read, guess=unread is Unread.GUESS)


def _follow_weights(small: nn.Module, captured: Captured, lengths: dict[str, int]) -> None:
    """Adjust the layers of torch whose parameters were cut. lengths: by parameter, the former length of axis 0."""
    modules = dict(small.named_modules())
    depthwise = captured.channel_ids.depthwise
    for alias, name in captured.aliases.items():
        owner = modules.get(alias.rpartition(".")[0])
        if name not in lengths or owner is None:
            continue
        if name in depthwise and alias.endswith("weight"):
            follow_depthwise(owner, lengths[name])
        else:
            follow_weights(owner)


def _follow_norms(small: nn.Module, captured: Captured, masks: Mapping[tuple[str, int], Tensor]) -> None:
    """Adjust how many sections the norms over sections of channels have."""
    modules, tracer = dict(small.named_modules()), captured.channel_ids
    stays = staying(tracer, masks)
    for norm in tracer.normed:
        left = stays[norm.sections]
        count = int(left.any(1).sum())
        if norm.module in modules and count < len(left):
            follow_sections(modules[norm.module], (len(left), count), int(left.sum()))


def adopt(model: nn.Module, small: nn.Module) -> None:
    """Move the tensors that have changed and the numbers into the original, and keep its modules, parameters and hooks.

    If a step fails, for example on a parameter that cannot be resized, everything is restored.
    """
    theirs = dict(small.named_modules())
    undo: list[tuple[Tensor, Tensor, Tensor | None] | tuple[dict[str, object], str, object]] = []
    done: set[int] = set()
    shared: dict[Any, Any] = {}
    try:
        for name, module in model.named_modules():
            other = theirs[name]
            for store in ("_parameters", "_buffers"):
                for key, old in getattr(module, store).items():
                    new = getattr(other, store)[key]
                    if old is None or id(old) in done or _same(old, new):
                        continue
                    done.add(id(old))
                    undo.append((old, old.data, old.grad))
                    _resize(old, new)
            mine, changes = vars(module), dict(number_changes(module, other))
            undo += [(mine, key, mine.get(key, _ABSENT)) for key in {at.split("/")[0] for at in changes}]
            set_numbers(module, {at: after for at, (_, after) in changes.items()}, shared)
    except Exception:
        for target, a, b in reversed(undo):
            if isinstance(target, dict):
                target[a] = b  # pyright: ignore[reportArgumentType]
                if b is _ABSENT:
                    del target[a]  # pyright: ignore[reportArgumentType]
            else:
                target.data, target.grad = a, b  # pyright: ignore[reportAttributeAccessIssue]
        raise
    drop(model, _cached(model, small))


def _cached(model: nn.Module, small: nn.Module) -> list[Place]:
    """The tensors in a model that the smaller one no longer keeps, or has made anew."""
    theirs, fresh = dict(small.named_modules()), {(path, keys): t for path, keys, t in kept_tensors(small)}
    return [
        (path, keys, keys[0] not in vars(theirs[path]))
        for path, keys, old in kept_tensors(model)
        if (new := fresh.get((path, keys))) is None or not (old.is_meta or _same(old, new))
    ]


def _same(old: Tensor, new: Tensor) -> bool:
    return old is new or (old.shape == new.shape and (old.is_meta or torch.equal(old, new)))


def _resize(old: Tensor, new: Tensor) -> None:
    old.grad = None
    old.data = new.data
