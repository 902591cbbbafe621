"""Small perceptrons, and what the tests compare of a network."""

from __future__ import annotations

import torch
from torch import nn

EXAMPLE = torch.zeros(1, 8)


def mlp(seed: int = 0, act: type[nn.Module] = nn.ReLU, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 24), act(), nn.Linear(24, 12), act(), nn.Linear(12, 3)).to(dtype)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items()}


def widths(model: nn.Module) -> list[int]:
    return [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
