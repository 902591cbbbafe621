"""--weights: state dicts as people keep them."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from coreprune.cli.checkpoints import load_weights
from coreprune.errors import InputError


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


TRAINED, AVERAGE = Net(1), Net(2)


def state(net: Net = TRAINED, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in net.state_dict().items()}


class Config:
    """Something that only its code can unpickle."""


ADAM = torch.optim.Adam(TRAINED.parameters())
CHECKPOINTS = {
    "plain": (state(), TRAINED),
    "under state_dict": ({"epoch": 3, "state_dict": state(), "optimizer": ADAM.state_dict()}, TRAINED),
    "under model": ({"model": state(), "args": {"lr": 0.1}, "best": torch.tensor(0.5)}, TRAINED),
    "data parallel": ({"net": state(prefix="module.")}, TRAINED),
    "compiled": (state(prefix="_orig_mod."), TRAINED),
    "compiled inside": ({k.replace("model.", "model._orig_mod."): v for k, v in state().items()}, TRAINED),
    "lightning": ({"state_dict": {**state(prefix="net."), "metric.weight": torch.zeros(3)}, "hparams": {}}, TRAINED),
    "prefix of a name": (state(prefix="model."), TRAINED),
    "average beside": ({"state_dict": state(), "state_dict_ema": state(AVERAGE)}, AVERAGE),
    "average inside": ({"state_dict": {**state(prefix="net."), **state(AVERAGE, "ema_net.module.")}}, AVERAGE),
    "average deeper": ({"model": state(), "ema": {"decay": 0.9, "shadow": state(AVERAGE)}}, AVERAGE),
    "without counters": ({k: v for k, v in state().items() if "num_batches" not in k}, TRAINED),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_weights_are_found(name, tmp_path):
    found, expected = CHECKPOINTS[name]
    torch.save(found, tmp_path / "weights.ckpt")
    model = Net()
    load_weights(model, tmp_path / "weights.ckpt")
    for key, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_safetensors_may_have_a_prefix_too(tmp_path):
    save_file(state(prefix="module."), tmp_path / "weights.safetensors")
    model = Net()
    load_weights(model, tmp_path / "weights.safetensors")
    assert torch.equal(model.head.weight, TRAINED.head.weight)


def test_which_of_several_is_said_and_can_be_chosen(tmp_path, caplog):
    path = tmp_path / "weights.pt"
    torch.save({"model": state(), "ema": {"shadow": state(AVERAGE)}}, path)
    model = Net()
    with caplog.at_level(logging.WARNING):
        load_weights(model, path)
    assert f"'ema.shadow' is loaded. For another, write --weights {path}::model" in caplog.text
    load_weights(model, path.with_name("weights.pt::model"))
    assert torch.equal(model.head.weight, TRAINED.head.weight)
    with pytest.raises(InputError, match=r"no state dict called 'best'. It has 'model', 'ema.shadow'"):
        load_weights(model, path.with_name("weights.pt::best"))


def test_a_pickled_module_is_refused_and_the_message_converts_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "whole.pt"
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)
    with pytest.raises(InputError, match="would run code from the file") as caught:
        load_weights(nn.Sequential(nn.Linear(2, 2)), path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert len(lines) == 3
    exec("\n".join(lines))
    load_weights(nn.Sequential(nn.Linear(2, 2)), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"epoch": 3}, "holds no state dict"),
        ([1, 2], "holds no state dict"),
        ({"model": state(), "config": Config()}, "would run code"),
        ({k: v for k, v in state().items() if "head" not in k}, "lacks \\['head.weight', 'head.bias'\\]"),
        ({**state(), "more.weight": torch.zeros(2)}, "has \\['more.weight'\\] too many"),
        ({**state(), "head.weight": torch.zeros(3, 4)}, "size mismatch"),
    ],
)
def test_what_does_not_fit_is_said(found, words, tmp_path):
    torch.save(found, tmp_path / "weights.pt")
    with pytest.raises(InputError, match=words):
        load_weights(Net(), tmp_path / "weights.pt")


def test_files_that_are_none(tmp_path):
    (tmp_path / "text.pt").write_text("hello")
    for name in ("text.pt", "absent.pth", "absent.safetensors"):
        with pytest.raises(InputError, match=r"cannot read|would run code"):
            load_weights(Net(), tmp_path / name)
