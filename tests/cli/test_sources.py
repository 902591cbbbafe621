"""SOURCE: models of timm and torchvision, folders of the hub, factories that raise."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch
from torch import nn

from coreprune.cli import prune, source
from coreprune.errors import InputError


class Image(nn.Sequential):
    def __init__(self, classes: int = 10) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
        self.pretrained_cfg = {"input_size": (3, 40, 32)}


@pytest.fixture
def timm(monkeypatch):
    """Stands for timm, which is not among the test dependencies: its one function that we call."""

    def create_model(name, pretrained, num_classes=10, **more):
        assert not pretrained
        if name != "small":
            raise RuntimeError(f"Unknown model ({name})")
        return Image(num_classes)

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))


@pytest.mark.usefixtures("timm")
def test_a_model_of_timm_comes_with_an_image_of_its_size():
    model, given = source.load("timm:small", None, [])
    assert model(given).shape == (1, 10)
    assert given.shape == (1, 3, 40, 32)
    with pytest.raises(InputError, match="timm cannot make 'large': RuntimeError: Unknown model"):
        source.load("timm:large", None, [])


@pytest.mark.usefixtures("timm")
def test_a_folder_that_timm_wrote(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "small", "num_classes": 7, "model_args": {}}))
    with pytest.raises(InputError, match=r"neither model.safetensors nor pytorch_model.bin"):
        source.load(str(tmp_path), None, [])
    trained = Image(7)
    torch.save(trained.state_dict(), tmp_path / "pytorch_model.bin")
    model, given = source.load(str(tmp_path), None, [])
    assert torch.equal(model(given), trained(given))


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_that_is_not_installed(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"pip install {library}"):
        source.load(f"{library}:small", None, [])


FACTORIES = """
import torch

def deep():
    return look({})

def look(found):
    return found["weights"]

def wants(path):
    return torch.nn.Linear(2, 2)
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("deep", ["made_deep:deep raised KeyError: 'weights'", "return look({})", 'return found["weights"]']),
        ("wants", ["made_wants:wants raised TypeError", "missing 1 required positional argument", "without arguments"]),
    ],
)
def test_a_factory_that_raises_shows_its_own_lines(run, place, name, words):
    (place / f"made_{name}.py").write_text(FACTORIES)
    done = run("prune", f"made_{name}:{name}", "--shape", "1,2", "--out", "small")
    assert done.exit_code == 2
    text = " ".join(done.stderr.split())
    assert all(word in text for word in words), text
    assert "coreprune/cli" not in text


MLP = """
import torch
from torch import nn

def random():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))

def trained():
    model = random()
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.1, 2, 64)[:, None]
    return model
"""


@pytest.mark.parametrize("name", ["random", "trained"])
def test_random_weights_are_called_so(run, place, monkeypatch, name):
    told: list[str] = []  # caplog hears nothing, because its handler hangs on torch's loggers, too, which we silence
    monkeypatch.setattr(prune.log, "warning", told.append)
    (place / f"mlp_{name}.py").write_text(MLP)
    done = run("prune", f"mlp_{name}:{name}", "--shape", "1,64", "--keep", "0.5", "--queries", "none", "--out", "small")
    assert done.exit_code == 0, done.stderr
    assert [text.partition(":")[0] for text in told] == ["the weights look as initialisation draws them"] * (
        name == "random"
    )
