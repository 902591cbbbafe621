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


def behind(what, module=None):
    """Which columns of the second layer's incoming rows are known to see no negative input."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), module or nn.Linear(8, 6), nn.Linear(6, 2)
            self.other = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(what(self, x)))

    return layers_of(Two().eval(), {"x": torch.zeros(2, 3)})["b"][1].nonnegative.tolist()


@pytest.mark.parametrize(
    ("what", "never"),
    [
        (lambda m, x: m.b(torch.relu(m.a(x))), True),
        (lambda m, x: m.b(F.relu6(m.a(x))), True),
        (lambda m, x: m.b(m.a(x).sigmoid()), True),
        (lambda m, x: m.b(F.dropout(torch.relu(m.a(x)), training=False).unflatten(1, (2, 4)).flatten(1)), True),
        (lambda m, x: m.b(torch.cat([torch.relu(m.a(x))[:, :4], m.other(x).abs()[:, 4:]], dim=1)), True),
        (lambda m, x: m.b(torch.cat([torch.relu(m.a(x))[:, :4], m.other(x)[:, 4:]], dim=1)), False),
        (lambda m, x: m.b(F.gelu(m.a(x))), False),
        (lambda m, x: m.b(torch.relu(m.a(x)) - 0.1), False),
        (lambda m, x: m.b(-torch.relu(m.a(x))), False),
        (lambda m, x: m.b(m.a(x)), False),
        (lambda m, x: m.b(torch.relu(m.a(x))) + m.b(m.other(x)), False),  # the same weights, read twice
    ],
)
def test_which_inputs_are_never_negative(what, never):
    assert behind(what) == [never] * 8 + [True]  # the bias is read with a 1


def test_which_inputs_of_convolutions_are_never_negative():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, bias=False),
        nn.BatchNorm2d(6), nn.Hardswish(), nn.Conv2d(6, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2),
    ).eval()  # fmt: skip
    found = {n: layer.nonnegative for n, (_, layer) in layers_of(net, {"x": torch.zeros(1, 2, 12, 12)}).items()}
    assert found["0"].tolist() == [False] * 18 + [True]
    assert found["4"].tolist() == [True] * 36 + [True]
    assert found["7"].tolist() == [False] * 6 + [True]
