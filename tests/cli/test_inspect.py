"""coreprune inspect, as its user meets it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

from coreprune.cli.commands import app
from coreprune.cli.source import example, load
from coreprune.errors import InputError

FACTORY = """
import torch
from torch import nn

def mlp():
    return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))

def with_example():
    return mlp(), torch.zeros(1, 8)

number = 3
def not_a_model():
    return 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder with models_under_test.py, as the current one."""
    (tmp_path / "models_under_test.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_table_and_json():
    shown = CliRunner().invoke(app, ["inspect", "models_under_test:with_example"])
    assert shown.exit_code == 0
    assert "locked: model output" in shown.stdout
    machine = CliRunner().invoke(app, ["inspect", "models_under_test:mlp", "--shape", "1,8", "--json"])
    found = json.loads(machine.stdout)
    assert [(g["name"], g["channels"], g["locked_because"]) for g in found["groups"]] == [
        ("0", 24, None),
        ("2", 3, "model output"),
    ]
    assert found["macs"] == 8 * 24 + 24 * 3


def test_weights_are_loaded(folder):
    weights = {"0.weight": torch.full((24, 8), 2.0), "0.bias": torch.zeros(24)}
    weights |= {"2.weight": torch.zeros(3, 24), "2.bias": torch.zeros(3)}
    save_file(weights, folder / "w.safetensors")
    model, given = load("models_under_test:with_example", folder / "w.safetensors", [])
    assert model[0].weight[0, 0].item() == 2.0
    assert given.shape == (1, 8)


def test_examples_from_text():
    (x,) = example(["1,3,4,4"])
    assert x.shape == (1, 3, 4, 4)
    named = example(["input_ids=2,5:int", "mask=2,5:bool"])
    assert named["input_ids"].dtype == torch.int64
    assert named["mask"].dtype == torch.bool


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("models_under_test", None, []), "package.module:factory"),
        (("no_such_module_here:f", None, []), "cannot import"),
        (("models_under_test:nothing", None, []), "has no 'nothing'"),
        (("models_under_test:not_a_model", None, []), "gave a int, not"),
        (("models_under_test:mlp", None, []), "no example input"),
        (("models_under_test:mlp", None, ["1,x"]), "is not a shape"),
        (("models_under_test:mlp", None, ["0,8"]), "is not a shape"),
        (("models_under_test:mlp", None, ["1,8:complex"]), "float, int or bool"),
        (("models_under_test:mlp", None, ["1,8", "y=1,8"]), "name all inputs"),
    ],
)
def test_wrong_input_is_explained(arguments, message):
    with pytest.raises(InputError, match=message):
        load(*arguments)


def test_weights_that_do_not_fit(folder):
    with pytest.raises(InputError, match="cannot read"):
        load("models_under_test:mlp", folder / "absent.safetensors", ["1,8"])
    (folder / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(InputError, match="cannot read"):
        load("models_under_test:mlp", folder / "broken.safetensors", ["1,8"])
    save_file({"0.weight": torch.zeros(5, 5)}, folder / "w.safetensors")
    with pytest.raises(InputError, match="does not fit Sequential"):
        load("models_under_test:mlp", folder / "w.safetensors", ["1,8"])
    save_file({"other": torch.zeros(1)}, folder / "w.safetensors")
    with pytest.raises(InputError, match="it lacks"):
        load("models_under_test:mlp", folder / "w.safetensors", ["1,8"])


def test_a_module_is_a_source_too(monkeypatch):
    import models_under_test

    monkeypatch.setattr(models_under_test, "ready", nn.Linear(8, 3), raising=False)
    model, _ = load("models_under_test:ready", None, ["1,8"])
    assert isinstance(model, nn.Linear)
