"""Compare a pruned model with the original with the removed channels at zero. This finds every wrong rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import as_real
from coreprune._mapped import stored_as
from coreprune.graph.captured import Captured
from coreprune.graph.groups import Group, ParamSlice

# Largest difference that rounding explains, relative to the largest output.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}
_ROUNDED = 1e-5  # in outputs of float64, if the forward converts to float32 in between
_FLIPPED = 0.02  # share of the whole numbers of an output that rounding may change


def zeroed(model: nn.Module, chosen: Sequence[tuple[Group, Tensor]]) -> dict[str, Tensor]:
    """The weights of the consumers by name, with zeros where they read removed channels."""
    named = dict([*model.named_parameters(), *model.named_buffers()])
    gone: dict[str, list[tuple[ParamSlice, Tensor]]] = {}
    for group, keep in chosen:
        leaves = torch.ones(group.size + 1, dtype=torch.bool)
        leaves[keep] = False
        leaves[-1] = False
        for s in (s for consumer in group.consumers for s in consumer.slices):
            gone.setdefault(s.param, []).append((s, leaves))
    return {name: stored_as(named[name], _zeroed(named[name], slices)) for name, slices in gone.items()}


def _zeroed(old: Tensor, gone: Sequence[tuple[ParamSlice, Tensor]]) -> Tensor:
    weight = old.detach().clone()
    for s, leaves in gone:
        mask = leaves[s.index].to(weight.device)
        if mask.dim() == 2:
            for section, m in zip(weight.chunk(mask.shape[0], 0), mask, strict=True):
                section.movedim(s.dim, 0)[m] = 0
        else:
            weight.movedim(s.dim, 0)[mask] = 0
    return weight


def zero_masks(captured: Captured, chosen: Sequence[tuple[Group, Tensor]]) -> dict[str, list[tuple[str, Tensor]]]:
    """Factors 0 and 1 for the inputs of nodes that read removed channels without a parameter."""
    nodes = {n.name: n for n in captured.graph.graph.nodes}
    masks: dict[str, list[tuple[str, Tensor]]] = {}
    for group, keep in chosen:
        stays = torch.zeros(group.size + 1, dtype=torch.bool)
        stays[keep] = True
        stays[-1] = True
        for c in group.consumers:
            if not c.slices and c.source in nodes:
                shape = [1] * nodes[c.source].meta["val"].dim()
                shape[c.axis] = -1
                masks.setdefault(c.node, []).append((c.source, stays[c.index].reshape(shape)))
    return masks


def compare(got: object, want: object, exact: bool = True, rounded: bool = False) -> str | None:
    """None if two outputs agree, otherwise how they differ.

    They agree if they have tensors of the same shapes, finite at the same entries, and with close values. There has to
    be something to compare: outputs without a finite entry do not agree.

    rounded: in between, the forward may compute in a lower precision than that of the outputs.
    """
    a, b = tensors(got), tensors(want)
    if [x.shape for x in a] != [x.shape for x in b]:
        return f"the output changes shape: {[tuple(x.shape) for x in b]} -> {[tuple(x.shape) for x in a]}"
    compared = False
    for x, y in zip(map(as_real, a), map(as_real, b), strict=True):
        if not y.numel():
            continue
        if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
            return "the output is not finite where the original is"
        real = torch.isfinite(y)
        if not bool(real.any()):
            continue
        compared = True
        if not exact:
            continue
        if not y.is_floating_point():
            if float((x != y).double().mean()) > _FLIPPED:
                return "the output differs from the original with these channels at zero (in whole numbers)"
            continue
        error = float((x[real].double() - y[real].double()).abs().max())
        scale = float(y[real].double().abs().max())
        tolerance = max(TOLERANCE.get(y.dtype, 5e-2), _ROUNDED if rounded else 0.0)
        if error > tolerance * max(scale, 1e-6):
            return f"the output differs from the original with these channels at zero (by {error:.1e} of {scale:.1e})"
    return None if compared else "the output is not finite with these channels at zero, so that it cannot be compared"


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a model's output."""
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]


def differ(a: Any, b: Any) -> bool:
    """Whether two outputs differ in a finite entry, or in shape."""
    for x, y in zip(tensors(a), tensors(b), strict=False):
        if x.shape != y.shape:
            return True
        real = torch.isfinite(x) & torch.isfinite(y)
        if bool((x[real] != y[real]).any()):
            return True
    return False
