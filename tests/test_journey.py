"""From the wheel to a running ONNX file: what a user does, in an environment of its own, with the installed command."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.slow

NETS = """
import torch
from torch import nn


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    ), torch.zeros(1, 3, 12, 12)


def mlp():
    net = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4))
    for parameter in net.parameters():  # the trained weights are in a file
        nn.init.zeros_(parameter)
    return net
"""

# Runs in the new environment: what the ONNX file computes, and what the pruned model does.
COMPARE = """
import json, sys
from pathlib import Path
import numpy as np
import onnxruntime
import torch
import coreprune
import nets

def bert():
    from transformers import AutoModelForSequenceClassification
    return AutoModelForSequenceClassification.from_pretrained("bert")

inputs = {
    "cnn": torch.randn(3, 3, 12, 12), "mlp": torch.randn(3, 10), "bert": torch.randint(0, 40, (3, 16)),
}
found = {"package": coreprune.__file__}
for name, dense in (("cnn", lambda: nets.cnn()[0]), ("mlp", nets.mlp), ("bert", bert)):
    small = coreprune.load(f"small-{name}", dense).eval()
    session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
    (first, *others) = session.get_inputs()
    given = {"input_ids": inputs[name]} if name == "bert" else {first.name: inputs[name]}
    if others:  # masks and the like, as the example has them
        given |= {one.name: torch.ones_like(inputs[name]) for one in others}
    with torch.no_grad():
        wanted = small(**given).logits if name == "bert" else small(inputs[name])
    (got, *_) = session.run(None, {key: value.numpy() for key, value in given.items()})
    found[name] = {
        "difference": float(np.abs(got - wanted.numpy()).max()),
        "spread": float(wanted.std(dim=0).max()),
        "parameters": sum(p.numel() for p in small.parameters()),
    }
print(json.dumps(found))
"""

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a module with two networks, the weights of one, and the folder of a Hugging Face model."""
    folder = tmp_path_factory.mktemp("journey")
    (folder / "nets.py").write_text(NETS)
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 4)).state_dict(), folder / "mlp.pt")
        config = BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=16,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder / "bert")
    return folder


@pytest.fixture(scope="module")
def run(built: Path, place: Path) -> Run:
    """run("python" or "coreprune", …) in an environment that has the wheel, and what else it needs from this one's."""
    folder = place / "environment"
    venv.create(folder, with_pip=False)
    programs = folder / ("Scripts" if sys.platform == "win32" else "bin")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")

    def call(program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [programs / program, *arguments],
            cwd=place,
            env={"PATH": str(programs), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{program} {' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}"
        return done

    (wheel,) = built.glob("*.whl")
    call("python", "-m", "pip", "install", "--no-index", "--disable-pip-version-check", f"{wheel}[cli,report,onnx]")
    return call


@pytest.fixture(scope="module")
def pruned(run: Run) -> dict[str, dict]:
    """The report of each of the three models."""
    models = {
        "cnn": ("nets:cnn", "--macs", "0.5"),
        "mlp": ("nets:mlp", "--weights", "mlp.pt", "--shape", "1,10", "--keep", "0.5"),
        "bert": ("bert", "--params", "0.85"),
    }
    few = ("--n-queries", "32", "--no-latency", "--json")
    return {
        name: json.loads(run("coreprune", "prune", *call, *few, "--out", f"small-{name}").stdout)
        for name, call in models.items()
    }


def test_the_three_models_are_smaller_and_run_as_onnx(run, place, pruned):
    for name in pruned:
        run("coreprune", "export", f"small-{name}", "--to", f"{name}.onnx")
    found = json.loads(run("python", "-c", COMPARE).stdout.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(place / "environment")
    for name, report in pruned.items():
        assert found[name]["parameters"] == report["parameters"]["after"] < report["parameters"]["before"], name
        assert found[name]["difference"] < 1e-4, name
        assert found[name]["spread"] > 1e-3, f"{name}: the weights are those of the files, not zeros"


def test_the_results_are_measured_and_reported(run, place, pruned):
    timed = json.loads(run("coreprune", "bench", "small-mlp", "--batch", "2", "--seconds", "0.05", "--json").stdout)
    assert [row["batch"] for row in timed["rows"]] == [2]
    shown = run("coreprune", "report", *(f"small-{name}" for name in pruned), "--html", "runs.html").stdout
    for name in pruned:
        assert f"small-{name}" in shown
    assert "</html>" in (place / "runs.html").read_text(encoding="utf-8")
    assert all((place / f"small-{name}" / "report.html").exists() for name in pruned)
