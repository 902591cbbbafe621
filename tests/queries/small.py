"""Small models that the tests of the queries share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coreprune.queries import Target


def gen(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(seed: int, build: Any) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return build().eval()


def mlp(d: int = 12, classes: int = 4) -> nn.Module:
    return seeded(0, lambda: nn.Sequential(nn.Linear(d, 10), nn.ReLU(), nn.Linear(10, classes)))


def convnet(channels: int = 3) -> nn.Module:
    """Two convolutions, each with a batch norm whose statistics are still those of no data at all."""
    return seeded(
        1,
        lambda: nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        ),
    )


class Alone(nn.Module):
    """A model that takes one input at a time, as a program does that torch.export wrote with its defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise RuntimeError(f"one input, not {len(x)}")
        return self.model(x)


def calibrated(model: nn.Module, x: Tensor) -> nn.Module:
    """Running statistics of exactly these inputs."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.reset_running_stats()
            m.momentum = None
    model.train()
    with torch.no_grad():
        model(x)
    return model.eval()


def target(model: nn.Module, example: Tensor) -> Target:
    return Target(model, (example,), {}, 0)


def none(done: int, total: int) -> None:
    pass


def state(model: nn.Module) -> dict[str, Any]:
    """All that a model must keep: values, modes, flags, gradients, hooks, and the global random state."""
    return {
        "tensors": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)
