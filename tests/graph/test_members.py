"""Blocks of module lists: which may leave, and what the model computes without them, in float64."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from artifact.hf_cases import BERT, CLIP, GEMMA2, GPT2, GQA, T5, VIT, Case, hf
from coreprune import InputError
from coreprune._twin import quiet
from coreprune.graph import Traced, capture, elements, find_groups, passing_, shallow
from coreprune.graph.costs import CostModel

FOUR = {"num_hidden_layers": 4}


def deep(case: Case, **more: Any) -> nn.Module:
    """A random model of four blocks in float64."""
    values = {k: v for k, v in case[1].to_dict().items() if k != "layer_types"}
    config = type(case[1]).from_dict({**values, **(more or FOUR)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(hf, case[0])(config).double().eval()
        for p in model.parameters():  # no two blocks are alike, and no scale hides what is behind it
            p.data += 0.1 * torch.randn(p.shape, dtype=p.dtype)
    return model


class Basic(nn.Module):
    """A block of a residual network, which writes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.b(self.relu(self.a(x))))
        y += x
        return self.relu(y)


def residual_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = nn.Sequential(Basic(), Basic(), Basic())
        layers = (nn.Conv2d(3, 6, 3), nn.ReLU(), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
        return nn.Sequential(*layers).double().eval()


IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def given(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return (), {k: x.double() if x.is_floating_point() else x for k, x in inputs.items()}


def traced_of(model: nn.Module, inputs: Any) -> Traced:
    args, kwargs = given(inputs)
    captured = capture(model, args, kwargs)
    return Traced(model, captured, find_groups(captured))


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    args, kwargs = given(inputs)
    with quiet(model) as still:
        return [x for x in torch.utils._pytree.tree_leaves(still(*args, **kwargs)) if isinstance(x, Tensor)]


def with_identities(model: nn.Module, names: list[str]) -> nn.Module:
    """The oracle: all modules stay and run, and what the named ones return is replaced by what entered."""

    def back(_: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        return x if isinstance(out, Tensor) else (x, *out[1:])

    twin = copy.deepcopy(model)
    for name in names:
        twin.get_submodule(name).register_forward_pre_hook(lambda _, args: tuple(map(_own, args)))
        twin.get_submodule(name).register_forward_hook(back, with_kwargs=True)
    return twin


def _own(x: Any) -> Any:
    return x.clone() if isinstance(x, Tensor) else x


CASES = [
    pytest.param(deep(GQA), GQA[2], "model.layers", id="llama"),
    pytest.param(deep(GPT2, n_layer=4), GPT2[2], "transformer.h", id="gpt2", marks=pytest.mark.slow),
    pytest.param(deep(BERT), BERT[2], "bert.encoder.layer", id="bert"),
    pytest.param(deep(VIT), VIT[2], "vit.layers", id="vit", marks=pytest.mark.slow),
    pytest.param(
        deep(GEMMA2, **FOUR, sliding_window=3), GEMMA2[2], "model.layers", id="gemma2", marks=pytest.mark.slow
    ),
    pytest.param(residual_network(), IMAGES, "2", id="residual network"),
]


@pytest.mark.parametrize(("model", "inputs", "where"), CASES)
def test_without_blocks_the_model_computes_what_it_does_with_identities(
    model: nn.Module, inputs: Any, where: str
) -> None:
    traced = traced_of(model, inputs)
    found = [e for name, e in traced.elements[0].items() if name.rpartition(".")[0] == where]
    count = len(list(model.get_submodule(where).children()))
    assert [e.name for e in found] == [f"{where}.{i}" for i in range(count)]
    before = copy.deepcopy(model.state_dict())
    for gone in ([found[0]], found[1:]):
        names = [e.name for e in gone]
        small = shallow(model, names)
        want = outputs(with_identities(model, names), inputs)
        torch.testing.assert_close(outputs(small, inputs), want, rtol=0, atol=1e-9)
        assert any(not torch.allclose(a, b) for a, b in zip(want, outputs(model, inputs), strict=True))
        standing = copy.deepcopy(model)
        passing_(standing, names, *given(inputs))
        torch.testing.assert_close(outputs(standing, inputs), want, rtol=0, atol=1e-9)
        assert traced.check.without(gone) is None
        cost = CostModel(traced.captured, traced.groups, gone)()
        assert cost.params == sum(p.numel() for p in small.parameters())
        assert cost.macs == CostModel(*_again(small, inputs))().macs
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def _again(model: nn.Module, inputs: Any) -> tuple[Any, Any]:
    args, kwargs = given(inputs)
    captured = capture(model, args, kwargs)
    return captured, find_groups(captured)


class Counted(nn.Module):
    """A block whose strength is its position."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.a, self.index = nn.Linear(4, 4), index

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x)) * (1 + self.index)


def test_the_check_notices_a_model_that_counts_its_blocks() -> None:
    """Deleting a block moves the others up, and their strength with them: that is not the model with an identity."""
    model = nn.Sequential(*map(Counted, range(3)), nn.Linear(4, 2))
    traced = traced_of(model, torch.randn(2, 4))
    found = traced.elements[0]
    assert "differ" in (traced.check.without([found["0"]]) or "")
    assert traced.check.without([found["2"]]) is None  # no other block moves up


def test_indices_and_settings_of_each_layer_move_up() -> None:
    model = deep(GEMMA2)
    kinds = list(model.config.layer_types)
    small = shallow(model, ["model.layers.1", "model.layers.2"])
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert small.config.layer_types == [kinds[0], kinds[3]]
    assert small.config is small.model.config
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]
    assert model.config.layer_types == kinds


def test_a_number_that_is_only_now_and_then_the_position_stays() -> None:
    class Block(Basic):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.n = n

    model = nn.Module()
    model.n_blocks, model.n_heads = 3, 3
    model.blocks = nn.ModuleList([Block(0), Block(1), Block(5)])
    small = shallow(model, ["blocks.0"])
    assert [b.n for b in small.blocks] == [1, 5]
    assert (small.n_blocks, small.n_heads) == (2, 3)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["2.0", "2.1", "2.2"], "no element of 2 would stay"),
        (["2.7"], "no list of modules '2' with the elements 7"),
        (["2.0.a"], "no list of modules '2.0'"),
        (["nowhere.1"], "no list of modules 'nowhere'"),
    ],
)
def test_what_cannot_be_taken_out(names: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        shallow(residual_network(), names)


class Two(nn.Module):
    """Blocks that hand on two streams."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Pair(), Pair()])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.layers:
            x, y = layer(x, y)
        return x + y


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.a(y), y + self.a(x)


class Tied(nn.Module):
    """Two blocks with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Skip(), Skip()])
        self.layers[1].a.weight = self.layers[0].a.weight

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x))


class Twice(nn.Module):
    """One block that is called two times."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Skip(), Skip()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](torch.relu(self.layers[0](x)))


@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        (Two(), "layers.0", "2 values leave it"),
        (Tied(), "layers.0", "its weights are those of layers.1.a.weight, too"),
        (Twice(), "layers.0", "2 values leave it|no skip connection|several"),
        (Twice(), "layers.1", "its forward is not called"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "0", "no skip connection leads around it"),
        (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), "1", "it has no weights"),
    ],
)
def test_what_stays_and_why(model: nn.Module, name: str, words: str) -> None:
    found, refused = elements(capture(model, (torch.zeros(2, 4),)), model)
    assert name not in found
    assert re.search(words, refused[name])


@pytest.mark.slow
def test_blocks_with_a_second_value_that_passes_through() -> None:
    model = deep(T5, num_layers=3, num_decoder_layers=3)
    traced = traced_of(model, T5[2])
    found, refused = traced.elements
    assert traced.check.without([found["encoder.block.1"], found["decoder.block.2"]]) is None
    assert refused["encoder.block.0"] == "2 values leave it"  # it makes the biases of all
    assert traced.check.without([found["encoder.block.1.layer.0"]]) is not None  # the forward names its parts


@pytest.mark.slow
def test_each_of_two_towers_keeps_a_block() -> None:
    text = {**CLIP[1].text_config.to_dict(), **FOUR}
    vision = {**CLIP[1].vision_config.to_dict(), **FOUR}
    model = deep(CLIP, text_config=text, vision_config=vision)
    traced = traced_of(model, CLIP[2])
    names = ["text_model.encoder.layers.1", "vision_model.encoder.layers.3"]
    assert traced.check.without([traced.elements[0][n] for n in names]) is None


def test_groups_inside_are_locked_and_others_are_not() -> None:
    traced = traced_of(residual_network(), IMAGES)
    fewer = traced.dropping([traced.elements[0]["2.1"]])
    assert fewer.whole is traced
    assert set(traced.free) - set(fewer.free) == {"2.1.a"}
    again = replace(fewer).dropping([traced.elements[0]["2.0"]])
    assert [e.name for e in again.dropped] == ["2.0", "2.1"]
    assert again.whole is traced
