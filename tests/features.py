"""What the layers of a network see on some inputs, found with hooks and unfolding: the oracle of the walk."""

from __future__ import annotations

import torch
from torch import nn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seen(model: nn.Module, x: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every module, copied before anything overwrites them."""
    found, handles = {}, []
    for name, m in model.named_modules():
        handles.append(m.register_forward_pre_hook(lambda m, a, name=name: found.update({name: a[0].clone()})))
        handles.append(
            m.register_forward_hook(lambda m, a, y, name=name: found.update({name: (found[name], y.clone())}))
        )
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def patches(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    found = nn.functional.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    return found.transpose(1, 2).flatten(0, 1)


def rows_of(y: torch.Tensor) -> torch.Tensor:
    return y.movedim(1, -1).flatten(0, -2)
