"""--depth, for whole blocks."""

from __future__ import annotations

import json

NET = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

def net():
    torch.manual_seed(0)
    blocks = nn.Sequential(*(Block() for _ in range(4)))
    for p in blocks[1].down.parameters():
        p.data.zero_()
    return nn.Sequential(blocks, nn.Linear(8, 3))
"""


def test_a_block_that_does_nothing_leaves(run, place):
    (place / "models.py").write_text(NET)
    done = run("prune", "models:net", "--shape", "1,8", "--queries", "white-noise", "--params", "0.77", "--depth",
               "--no-latency", "--out", "small")  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert "Left out whole, 1 of" in " ".join(done.stdout.split())
    report = json.loads((place / "small" / "report.json").read_text())
    assert report["dropped"] == ["0.1"]
    assert report["settings"]["depth"] is True


def test_what_does_not_go_with_depth_is_said(run, place):
    (place / "models.py").write_text(NET)
    done = run("prune", "models:net", "--shape", "1,8", "--keep", "0.5", "--depth", "--out", "small")
    assert done.exit_code != 0
    assert "needs a budget of macs, params or bytes" in " ".join(done.stderr.split())
