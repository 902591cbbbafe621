"""Smaller copies of a model or one of its modules: parameters are sliced, and layers of torch told their new sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from coreprune._mapped import stored_as
from coreprune._protect import as_in
from coreprune._twin import duplicate
from coreprune.errors import ModelError
from coreprune.graph.attributes import follow_depthwise, follow_sections, follow_weights
from coreprune.graph.caches import Place, drop
from coreprune.graph.captured import Captured
from coreprune.graph.groups import Group
from coreprune.graph.kept import staying
from coreprune.graph.slicing import cut, kept_positions


def smaller(model: nn.Module, captured: Captured, chosen: list[tuple[Group, Tensor]], inside: str = "") -> nn.Module:
    """A smaller copy. Only the kept part of every parameter is ever allocated for it.

    inside: dotted name of the module to copy; by default all of the model.
    """
    masks = kept_positions(chosen)
    named = dict([*model.named_parameters(), *model.named_buffers()])
    memo: dict[int, object] = {}
    touched = {name for name, _ in masks if relative(name, inside) is not None}
    for name in touched:
        old = named[name]
        new = stored_as(old, cut(old, {dim: m for (n, dim), m in masks.items() if n == name}))
        memo[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    small = duplicate(model.get_submodule(inside), memo)
    if not inside:
        as_in(small, model)
    if chosen:
        drop(small, _within(captured.caches, inside))
    modules = dict(small.named_modules(prefix=inside))
    _follow_weights(modules, captured, {n: named[n].shape[0] for n in touched})
    _follow_norms(modules, captured, masks)
    return small


def relative(path: str, inside: str) -> str | None:
    """A dotted path as it reads inside of a module, or None if it lies elsewhere. inside: "" for the whole model."""
    if not inside or path == inside:
        return "" if path == inside else path
    return path.removeprefix(f"{inside}.") if path.startswith(f"{inside}.") else None


def _within(places: tuple[Place, ...], inside: str) -> Iterator[Place]:
    """The places inside a module, under the names that they have there."""
    for path, keys, absent in places:
        if (at := relative(path, inside)) is not None:
            yield at, keys, absent


def check_shapes(model: nn.Module, captured: Captured) -> None:
    """Raise ModelError if a tensor of the model has another shape than it had when the model was captured."""
    have = dict([*model.named_parameters(), *model.named_buffers()])
    for name, (shape, _) in captured.tensors.items():
        if name not in have or tuple(have[name].shape) != shape:
            found = tuple(have[name].shape) if name in have else "absent"
            raise ModelError(
                f"{name} had shape {shape} when the model was captured and is {found} now; capture it again"
            )


def _follow_weights(modules: Mapping[str, nn.Module], captured: Captured, lengths: dict[str, int]) -> None:
    """Adjust the layers of torch whose parameters were cut. lengths: by parameter, the former length of axis 0."""
    depthwise = captured.channel_ids.depthwise
    for alias, name in captured.aliases.items():
        owner = modules.get(alias.rpartition(".")[0])
        if name not in lengths or owner is None:
            continue
        if name in depthwise and alias.endswith("weight"):
            follow_depthwise(owner, lengths[name])
        else:
            follow_weights(owner)


def _follow_norms(
    modules: Mapping[str, nn.Module], captured: Captured, masks: Mapping[tuple[str, int], Tensor]
) -> None:
    """Adjust how many sections the norms over sections of channels have."""
    tracer = captured.channel_ids
    stays = staying(tracer, masks)
    for norm in tracer.normed:
        left = stays[norm.sections]
        count = int(left.any(1).sum())
        module = None if norm.module is None else modules.get(norm.module)
        if module is not None and count < len(left):
            follow_sections(module, (len(left), count), int(left.sum()))
