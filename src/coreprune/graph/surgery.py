"""Remove channels from a model: slice its parameters, adjust the numbers that modules store, check the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coreprune.graph.attempts import Attempts
from coreprune.graph.caches import Place, drop, kept_tensors
from coreprune.graph.groups import Group, check_keep
from coreprune.graph.recipe import number_changes, set_numbers
from coreprune.graph.search import kind_of, working
from coreprune.graph.slicing import kept_positions
from coreprune.graph.smaller import check_shapes, smaller
from coreprune.graph.traced import Traced

log = logging.getLogger(__name__)

_ABSENT = object()


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


def remove(
    traced: Traced,
    keep: Mapping[str, Tensor],
    *,
    inplace: bool = False,
    check: bool = True,
    hopeless: str | None = None,
) -> Removed:
    """Make a physically smaller model in which only the given channels are left.

    Numbers that modules remember, such as widths and numbers of heads, change with them (`remembered.py`).

    The result is run on the captured example. It must equal the original with zeros in the weights that read removed
    channels. Groups that break the run or the equality are found (`search.py`), left whole, and reported in `locked`.
    The model that was passed in is not changed, unless `inplace` is set, and then only after everything has succeeded.

    Args:
        traced: the model, its graph and its groups. Since it was captured, its weights may have changed, but not its
            shapes.
        keep: group name -> sorted int64 channels that stay. Groups that are not named stay whole.
        inplace: shrink `traced.model` itself. Parameters keep their identity; their gradients are dropped.
        check: run and compare. Use False only if nothing in the forward depends on the sizes.
        hopeless: if what is wrong with all cuts together begins with these words, no search for the groups that cause
            it is made, and all groups stay whole.

    Raises:
        InputError: `keep` names an unknown group or a choice that the group does not allow.
        ModelError: the model is not the one that was captured, or cannot be copied.
    """
    model, captured = traced.model, traced.captured
    check_keep(traced.groups, dict(keep))
    check_shapes(model, captured)
    cuts = {g.name: (g, keep[g.name]) for g in traced.groups if g.name in keep and len(keep[g.name]) < g.size}
    locked: dict[str, str] = {}
    attempts = Attempts(traced, cuts, check)
    kinds = {name: kind_of(g) for name, (g, _) in cuts.items()}
    doubtful = [n for n, (g, _) in cuts.items() if "functional" in g.flags]
    good: list[str] = []
    # Groups that change a norm's statistics can only be run, not compared. So the others are tried first, without them.
    exact = [n for n, (g, _) in cuts.items() if "norm-statistics" not in g.flags]
    for part in (exact, [n for n in cuts if n not in exact]):
        if part:
            locked.update(working(part, kinds, good, attempts, attempts.blame, hopeless, doubtful))
    for name, problem in locked.items():
        log.info("group %s is put back: %s", name, problem)
    small = attempts.best if attempts.best is not None else smaller(model, captured, [])
    if inplace:
        adopt(model, small)
        small = model
    return Removed(
        small,
        {n: cuts[n][1] for n in cuts if n in good},
        kept_positions([cuts[n] for n in good]),
        locked,
        attempts.runs,
    )


def probe(traced: Traced, hopeless: str | None = None) -> Traced:
    """Try to remove half of every free group, and lock the groups that break the forward.

    Run this before widths are chosen, so that the allocation counts only on channels that can really be removed.

    hopeless: as for `remove`.
    """
    traced = traced.locking(traced.check.unseen(list(traced.free.values())))
    halves = {name: _half(g) for name, g in traced.free.items()}
    return traced.locking(remove(traced, halves, hopeless=hopeless).locked)


def _half(g: Group) -> Tensor:
    """The channels of the first half of the units in every section."""
    units = g.units()
    sections = torch.zeros(len(units), dtype=torch.int64) if g.sections is None else g.sections
    stay = torch.cat([(w := (sections == b).nonzero()[:, 0])[: max(1, len(w) // 2)] for b in sections.unique()])
    return units[stay].reshape(-1).sort().values


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
