"""Remove channels from a model: slice its parameters, adjust the numbers that modules store, check the result."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coreprune._twin import duplicate
from coreprune.errors import CoreprunError, ModelError
from coreprune.graph.attributes import Numbers, follow_depthwise, follow_sections, follow_weights, scale_numbers
from coreprune.graph.captured import Captured
from coreprune.graph.groups import Group, check_keep
from coreprune.graph.kept import staying
from coreprune.graph.recipe import number_changes
from coreprune.graph.slicing import cut, kept_positions
from coreprune.graph.traced import Traced

log = logging.getLogger(__name__)


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

    def attempt(names: list[str]) -> tuple[nn.Module | None, str]:
        nonlocal runs
        runs += 1
        chosen = [cuts[n] for n in names]
        try:
            small = _smaller(model, captured, chosen, numbers)
        except CoreprunError:
            raise
        except Exception as error:
            return None, f"its weights cannot be cut: {_first_line(error)}"
        problem = traced.check.difference(small, chosen, kept_positions(chosen)) if check else None
        return (None, problem) if problem else (small, "")

    def grow(good: list[str], names: list[str]) -> list[str]:
        """Extend `good` by those of `names` that work. This takes O(log n) attempts per group that does not."""
        small, problem = attempt(good + names)
        if small is None and len(names) == 1:
            for style in (Numbers.HEADS, Numbers.NONE):  # the guess about the stored numbers may be wrong
                numbers[names[0]] = style
                small, _ = attempt(good + names)
                if small is not None:
                    break
        if small is not None:
            best[0] = small
            return good + names
        if len(names) == 1:
            locked[names[0]] = problem
            log.info("group %s is put back: %s", names[0], problem)
            return good
        half = len(names) // 2
        good = grow(good, names[:half])
        return grow(good, names[half:])

    numbers: dict[str, Numbers] = {}
    best: list[nn.Module | None] = [None]
    # Groups that change a norm's statistics can only be run, not compared. So the others are tried first, without them.
    exact = [n for n, (g, _) in cuts.items() if "norm-statistics" not in g.flags]
    good = grow([], exact) if exact else []
    rest = [n for n in cuts if n not in exact]
    good = grow(good, rest) if rest else good
    small = best[0] if best[0] is not None else _smaller(model, captured, [], numbers)
    if inplace:
        adopt(model, small)
        small = model
    return Removed(small, {n: cuts[n][1] for n in good}, kept_positions([cuts[n] for n in good]), locked, runs)


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


def _smaller(
    model: nn.Module, captured: Captured, chosen: list[tuple[Group, Tensor]], numbers: Mapping[str, Numbers]
) -> nn.Module:
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
    _follow_weights(small, captured, {n: named[n].shape[0] for n in touched})
    _follow_groups(small, chosen, numbers)
    _follow_norms(small, captured, masks)
    return small


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


def _follow_groups(small: nn.Module, chosen: list[tuple[Group, Tensor]], numbers: Mapping[str, Numbers]) -> None:
    """Adjust the numbers that the modules around the cut layers store."""
    modules = dict(small.named_modules())
    for group, keep in chosen:
        total, kept = group.size // group.unit, len(keep) // group.unit
        style = numbers.get(group.name, Numbers.ALL)
        for path in _containers(group, modules) if style is not Numbers.NONE else ():
            widths = _width_changes(group, keep, path) if style is Numbers.ALL else {}
            scale_numbers(modules[path], widths, kept, total if "heads" in group.flags else None)


def _containers(group: Group, modules: dict[str, nn.Module]) -> list[str]:
    """The modules that own weights which make the channels, and those one level up; not linear layers, convolutions."""
    paths: dict[str, None] = {}
    for s in group.producers:
        layer = s.param.rpartition(".")[0]
        paths.setdefault(layer)
        paths.setdefault(layer.rpartition(".")[0])
    return [p for p in paths if p in modules and not isinstance(modules[p], (nn.Linear, nn.modules.conv._ConvNd))]


def _width_changes(group: Group, keep: Tensor, path: str) -> dict[int, int]:
    """Old width -> new width of the layers inside `path` that make or read channels of the group."""
    stays = torch.zeros(group.size + 1, dtype=torch.bool)
    stays[keep] = True
    changes = {}
    for s in group.slices:
        if s.param.startswith(path):
            mask = stays.clone()
            mask[-1] = True
            rows = mask[s.index]
            changes[rows.shape[-1]] = int(rows[0].sum() if rows.dim() == 2 else rows.sum())
    return changes


def adopt(model: nn.Module, small: nn.Module) -> None:
    """Move the smaller tensors and the numbers into the original, and keep its modules, parameters and hooks.

    If a step fails, for example on a parameter that cannot be resized, everything is restored.
    """
    theirs = dict(small.named_modules())
    undo: list[tuple[Tensor, Tensor, Tensor | None] | tuple[dict[str, object], str, object]] = []
    done: set[int] = set()
    try:
        for name, module in model.named_modules():
            other = theirs[name]
            for store in ("_parameters", "_buffers"):
                for key, old in getattr(module, store).items():
                    new = getattr(other, store)[key]
                    if old is None or old.shape == new.shape or id(old) in done:
                        continue
                    done.add(id(old))
                    undo.append((old, old.data, old.grad))
                    _resize(old, new)
            mine = vars(module)
            for key, (before, after) in list(number_changes(module, other)):
                undo.append((mine, key, before))
                mine[key] = after
    except Exception:
        for target, a, b in reversed(undo):
            if isinstance(target, dict):
                target[a] = b  # pyright: ignore[reportArgumentType]
            else:
                target.data, target.grad = a, b  # pyright: ignore[reportAttributeAccessIssue]
        raise


def _resize(old: Tensor, new: Tensor) -> None:
    old.grad = None
    old.data = new.data
