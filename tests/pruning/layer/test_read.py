"""Which activation lies between a layer and its consumers, as far as the certificates may rely on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers_by_hand import layers_of


@torch.library.custom_op("readtest::relu", mutates_args=())
def relu(x: Tensor) -> Tensor:
    """Not what aten's relu does."""
    return x.clamp(max=0)


relu.register_fake(torch.empty_like)


class Between(nn.Module):
    def __init__(self, what) -> None:
        super().__init__()
        self.a, self.what, self.b = nn.Linear(3, 8), what, nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.what(self.a(x)))


def read(what):
    return layers_of(Between(what).eval(), {"x": torch.zeros(2, 3)})["a"][1].activation


@pytest.mark.parametrize(
    ("what", "name", "lipschitz"),
    [
        (lambda y: y, "identity", 1.0),
        (torch.relu, "relu", 1.0),
        (lambda y: y.relu_(), "relu", 1.0),
        (F.gelu, "gelu", 1.129),
        (torch.special.expit, "sigmoid", 0.25),
        (lambda y: F.dropout(torch.relu(y), training=False), "relu", 1.0),
        (lambda y: F.alpha_dropout(torch.relu(y), training=False), "relu", 1.0),
        (lambda y: torch.relu(y).unflatten(1, (2, 4)).flatten(1), "relu", 1.0),
        (lambda y: torch.relu(y.unsqueeze(1)).squeeze(1), "relu", 1.0),
        (lambda y: F.leaky_relu(y, 0.3), "leaky_relu", 1.0),
    ],
)
def test_the_activation_is_found(what, name, lipschitz):
    found = read(what)
    assert (found.name, found.lipschitz) == (name, lipschitz)


@pytest.mark.parametrize(
    "what",
    [
        lambda y: torch.tanh(torch.relu(y)),
        lambda y: F.leaky_relu(y, 2.0),
        lambda y: F.dropout(torch.relu(y), training=True),
        lambda y: torch.relu(y) + 1,
        lambda y: torch.relu(y).repeat_interleave(2, 1)[:, ::2],
        torch.selu,
    ],
)
def test_of_anything_else_nothing_is_certified(what):
    found = layers_of(Between(what).eval(), {"x": torch.zeros(2, 3)})
    assert all(layer.activation.lipschitz == float("inf") for _, layer in found.values())


def test_somebody_elses_relu_is_not_torchs():
    from coreprune.graph import Call, Value, rule
    from coreprune.graph.rules.registry import RULES

    @rule("readtest::relu")
    def same(call: Call) -> Value:
        return call.args[0]

    try:
        assert read(relu_of).lipschitz == float("inf")
    finally:
        RULES.pop("readtest::relu")


def relu_of(y: Tensor) -> Tensor:
    return relu(y)
