"""--part, for models that cannot be traced whole."""

from __future__ import annotations

import json

import pytest

PICKY = """
import torch
from torch import nn

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 4, 3, 2, 1))

    def forward(self, x):
        scores = self.backbone(x).flatten()
        return scores if scores.max() > 0 else -scores

def picky():
    torch.manual_seed(0)
    return Picky()
"""


@pytest.fixture
def picky(place):
    (place / "models.py").write_text(PICKY)


ARGUMENTS = ("models:picky", "--shape", "1,3,16,16")


@pytest.mark.usefixtures("picky")
def test_a_part_is_listed_and_pruned(run, place):
    listed = run("inspect", *ARGUMENTS, "--part", "backbone", "--json")
    assert listed.exit_code == 0, listed.stderr
    assert [g["name"] for g in json.loads(listed.stdout)["groups"]] == ["0", "2"]
    done = run("prune", *ARGUMENTS, "--part", "backbone", "--macs", "0.5", "--queries", "none", "--out", "small")
    assert done.exit_code == 0, done.stderr
    assert "Only 'backbone' of Picky was pruned" in " ".join(done.stdout.split())
    assert json.loads((place / "small" / "plan.json").read_text())["part"] == "backbone"
    again = run("report", "small")
    assert again.exit_code == 0, again.stderr


@pytest.mark.usefixtures("picky")
def test_without_it_the_message_says_so(run):
    done = run("inspect", *ARGUMENTS)
    assert done.exit_code != 0
    assert "part='backbone'" in done.stderr
