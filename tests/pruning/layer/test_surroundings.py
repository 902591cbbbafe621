"""Where channels can stand for each other, and where it is said that they cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graph.zoo import ZOO, randomise
from layers_by_hand import cut, layers_of


def reasons(model, example) -> dict:
    return {name: (made.no_mean, made.no_scale) for name, (_, made) in layers_of(model, {"x": example}).items()}


class Between(nn.Module):
    """One layer, something, another layer."""

    def __init__(self, what):
        super().__init__()
        self.a, self.what, self.b = nn.Linear(3, 8), what, nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.what(self.a(x)))


@pytest.mark.parametrize(
    "what",
    [
        torch.relu,
        nn.Identity(),
        nn.LeakyReLU(0.2),
        nn.PReLU(),
        nn.Dropout(),
        nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()),
        lambda y: torch.relu(y) * 3,
        lambda y: -torch.relu(-y) / 2,
        lambda y: torch.relu(y) + y.abs(),
        lambda y: torch.relu(y).unsqueeze(1).flatten(1),
    ],
)
def test_positively_homogeneous_ways_let_multiples_through(what):
    assert reasons(Between(what).eval(), torch.zeros(2, 3))["a"] == ("", "")


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (nn.GELU(), "gelu"),
        (nn.ReLU6(), "hardtanh"),
        (torch.tanh, "tanh"),
        (lambda y: torch.relu(y) + 1.0, "add"),
        (lambda y: 1.0 - y, "rsub"),
        (lambda y: y * y, "mul"),
        (lambda y: torch.relu(y) ** 2, "pow"),
        (nn.PReLU(8), "what.weight"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(8)), "what.1.weight"),
    ],
)
def test_other_ways_do_not_and_the_reason_names_them(what, reason):
    mean, scale = reasons(Between(what).eval(), torch.zeros(2, 3))["a"]
    assert mean == ""
    assert reason in scale


def test_padding_with_another_number_than_zero():
    def net(value):
        pad = nn.ConstantPad2d(1, value)
        return nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), pad, nn.Conv2d(6, 2, 3))

    assert reasons(net(0.0), torch.zeros(1, 2, 4, 4))["0"] == ("", "")
    assert "pad" in reasons(net(1.0), torch.zeros(1, 2, 4, 4))["0"][1]


@pytest.mark.parametrize(
    ("name", "part", "mean", "scale"),
    [
        ("resnet-bottleneck", "", "", ""),
        ("bert", "attention", "heads", "heads"),
        ("bert", "intermediate", "", "gelu"),
        ("llama-gqa", "gate_proj", "", "mul"),
        ("mobilenet-v2", "expand_1x1", "", "conv_3x3"),
        ("resnext", "1.body.0.0", "sections", "sections"),
        ("mixtral", "experts", "sections", "sections"),
        ("densenet", "1.conv1", "", ""),
        ("densenet", "1.conv2", "", "norm1"),
        ("se-resnet", "1.body.2.0", "", "mul"),
        ("conv1d-glu", "b", "", "n2.weight"),
    ],
)
def test_the_zoo(name, part, mean, scale):
    entry = ZOO[name]
    found = layers_of(randomise(entry.build()), entry.inputs(1))
    groups = [made for key, (_, made) in found.items() if part in key]
    assert groups
    for made in groups:
        assert (mean in made.no_mean) if mean else made.no_mean == ""
        assert (scale in made.no_scale) if scale else made.no_scale == ""


@pytest.mark.parametrize("method", ["merging", "folding"])
def test_what_cannot_be_merged_is_selected_plainly_and_the_report_says_why(method):
    entry = ZOO["bert"]
    result = cut(randomise(entry.build()), entry.inputs(1), method=method)
    heads = [g for g in result.report.groups if "attention" in g.name and g.locked_because is None]
    assert heads
    for group in heads:
        assert "heads are not averaged" in group.note
        assert result.plan.groups[group.name].targets is None
