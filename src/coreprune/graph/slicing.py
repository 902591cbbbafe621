"""Which positions of every parameter stay, and the slices that are left of it."""

from __future__ import annotations

import torch
from torch import Tensor

from coreprune.graph.groups import Group


def kept_positions(chosen: list[tuple[Group, Tensor]]) -> dict[tuple[str, int], Tensor]:
    """For every parameter axis, which positions stay: bool [n], or [g, n] for sectioned axes."""
    masks: dict[tuple[str, int], Tensor] = {}
    for group, keep in chosen:
        stays = torch.zeros(group.size + 1, dtype=torch.bool)
        stays[keep] = True
        stays[-1] = True  # index -1: not a channel of this group
        for s in group.slices:
            mask = stays[s.index]
            masks[s.param, s.dim] = masks[s.param, s.dim] & mask if (s.param, s.dim) in masks else mask
    return masks


def cut(tensor: Tensor, masks: dict[int, Tensor]) -> Tensor:
    """Keep the positions that stay, on every axis. Sectioned axes come first, as sections still have their old size."""
    out, layout = tensor.detach(), _layout(tensor)
    for dim, mask in sorted(masks.items(), key=lambda item: -item[1].dim()):
        if mask.dim() == 2:
            sections = out.chunk(mask.shape[0], 0)
            out = torch.cat([_select(b, dim, m) for b, m in zip(sections, mask, strict=True)], 0)
        else:
            out = _select(out, dim, mask)
    out = out if layout is None else out.contiguous(memory_format=layout)
    return out.clone() if out.data_ptr() == tensor.data_ptr() else out


def _layout(tensor: Tensor) -> torch.memory_format | None:
    """The layout of a tensor whose channels come last in memory."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim())
    if last is None or tensor.is_contiguous() or not tensor.is_contiguous(memory_format=last):
        return None
    return last


def _select(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    return tensor.index_select(dim, mask.nonzero()[:, 0].to(tensor.device))
