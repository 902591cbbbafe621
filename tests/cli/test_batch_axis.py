"""--batch-axis, for models whose batch is not axis 0, or that have none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from coreprune.cli import options
from coreprune.errors import InputError

PAIR = """
import torch
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 32), nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, steps, v):
        return self.c(torch.relu(self.a(steps).mean(0) + self.b(v)))

def pair():
    torch.manual_seed(0)
    return Pair(), {"steps": torch.randn(5, 2, 6), "v": torch.randn(2, 8)}

def points():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(9, 3)
"""
ONE = 5 * 6 * 32 + 8 * 32 + 32 * 4


@pytest.fixture
def pairs(place):
    (place / "pairs.py").write_text(PAIR)


def test_texts_become_axes():
    assert options.batch_axis(None) == "auto"
    assert options.batch_axis(["auto"]) == "auto"
    assert options.batch_axis(["1"]) == 1
    assert options.batch_axis(["none"]) is None
    assert options.batch_axis(["x=1", "mask=none", "2=0"]) == {"x": 1, "mask": None, 2: 0}


@pytest.mark.parametrize("given", [["first"], ["x=one"], ["1", "2"], ["=1"], ["x=1", "x=0"], ["x=1", "0"]])
def test_other_texts_are_refused(given):
    with pytest.raises(InputError, match="--batch-axis"):
        options.batch_axis(given)


def test_inspect_counts_what_one_sample_costs(run, pairs):
    said = ("--batch-axis", "steps=1", "--batch-axis", "v=0")
    for more, macs in (((), ONE), (said, ONE), (("--batch-axis", "none"), 2 * ONE)):
        done = run("inspect", "pairs:pair", "--json", *more)
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["macs"] == macs
    done = run("inspect", "pairs:pair", "--batch-axis", "w=0")
    assert done.exit_code == 2
    assert "batch_axis names the input 'w', but the inputs are 'steps', 'v'" in done.stderr


def test_an_artifact_remembers_it(run, pairs):
    """`bench`, `certify` and `export` use the axis that `prune` was given."""
    done = run(
        "prune", "pairs:points", "--batch-axis", "none", "--n-queries", "20", "--queries", "white-noise",
        "--no-latency", "--out", "small",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    report = json.loads(Path("small/report.json").read_text())
    assert report["macs"]["before"] == 9 * (3 * 16 + 16 * 2)
    done = run("bench", "small", "--seconds", "0.05", "--json")
    assert [row["batch"] for row in json.loads(done.stdout)["rows"]] == [1]
    done = run("export", "small", "--to", "small.pt2", "--json")
    assert "has no batch axis" in json.loads(done.stdout)["summary"]
    done = run("export", "small", "--to", "free.pt2", "--batch-axis", "0", "--json")
    assert "any batch size" in json.loads(done.stdout)["summary"]


def test_samples_in_a_file_lie_as_in_the_example(run, pairs):
    rng = np.random.default_rng(0)
    np.savez("pairs.npz", steps=rng.normal(size=(5, 40, 6)).astype("f4"), v=rng.normal(size=(40, 8)).astype("f4"))
    done = run("prune", "pairs:pair", "--queries", "pairs.npz", "--no-latency", "--out", "small")
    assert done.exit_code == 0, done.stderr
    assert "40 samples of the user" in done.stdout
