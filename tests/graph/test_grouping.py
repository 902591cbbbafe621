"""Which parameters make the channels of a group, which read them, and which only go along."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune.graph import capture, find_groups


def roles(model: nn.Module, x: torch.Tensor, name: str) -> tuple[set[str], set[str], set[str]]:
    (group,) = [g for g in find_groups(capture(model, x)) if g.name == name]
    read = {s.param for c in group.consumers for s in c.slices}
    return {s.param for s in group.producers}, {s.param for s in group.others}, read


def test_a_bias_makes_channels_together_with_its_weight():
    """It is a part of the row p_i that the theorems speak of, and no number that goes along with the channel."""
    linear = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    assert roles(linear, torch.zeros(1, 4), "0") == ({"0.weight", "0.bias"}, set(), {"2.weight"})
    conv = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 1))
    assert roles(conv, torch.zeros(1, 3, 5, 5), "0") == ({"0.weight", "0.bias"}, set(), {"2.weight"})


def test_norms_and_depthwise_filters_go_along():
    model = nn.Sequential(
        nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    made, others, read = roles(model, torch.zeros(1, 3, 5, 5), "0")
    assert (made, read) == ({"0.weight"}, {"4.weight"})
    assert others == {
        *("1.weight", "1.bias", "1.running_mean", "1.running_var"),
        *("2.weight", "2.bias"),
    }


class Steps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x).roll(2, 1))


class Meets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x) * y)


class OneHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))
        self.out = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize(
    ("model", "example", "name", "unit", "reason"),
    [
        (Steps(), torch.zeros(1, 4), "a", 1, "fixed step along the channels"),
        (Meets(), (torch.zeros(1, 4), torch.zeros(1, 6)), "a", 1, "meets a tensor of a fixed size"),
        (OneHead(), torch.zeros(1, 3, 4), "q", 6, "only leave together"),
    ],
    ids=["steps", "meets", "one head"],
)
def test_what_cannot_leave_is_known_without_trying(model, example, name, unit, reason):
    """The comparison of outputs would put these back too, but only after a budget was spent on them."""
    (group,) = [g for g in find_groups(capture(model, example)) if g.name == name]
    assert group.unit == unit
    assert reason in (group.locked_because or "")
