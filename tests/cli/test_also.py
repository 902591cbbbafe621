"""--also, for parts of a model that the example does not run."""

from __future__ import annotations

import json

import pytest

from coreprune.cli import source
from coreprune.errors import InputError

TWO_WAYS = """
import torch
from torch import nn

class TwoWays(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.down, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, 2, 1), nn.Conv2d(16, 4, 3, 2, 1)

    def forward(self, x):
        h = torch.relu(self.a(x))
        h = torch.relu(self.down(h)) if x.shape[-1] > 16 else h
        return self.b(h).mean((2, 3))

def two_ways():
    torch.manual_seed(0)
    return TwoWays(), torch.randn(1, 3, 16, 16)
"""


@pytest.fixture
def ways(place):
    (place / "ways.py").write_text(TWO_WAYS)


def test_inspect_lists_what_nothing_reads(run, ways):
    for more, unread in (((), ["down.weight", "down.bias"]), (("--also", "1,3,32,32"), [])):
        done = run("inspect", "ways:two_ways", "--json", *more)
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["unread"] == unread


def test_prune_cuts_the_other_way_too(run, ways):
    asked = ("--keep", "0.5", "--method", "l2", "--no-repair", "--queries", "none", "--no-latency", "--out", "small")
    done = run("prune", "ways:two_ways", *asked, "--also", "1,3,32,32", "--json")
    assert done.exit_code == 0, done.stderr
    widths = {g["name"]: g["kept"] for g in json.loads(done.stdout)["groups"]}
    assert widths == {"a": 8, "b": 4}  # b reads the channels of a and of down


def test_texts_become_examples():
    (one,), two = source.further(["1,3,8,8", "ids=1,4:int mask=1,4:bool"])
    assert one.shape == (1, 3, 8, 8)
    assert {name: (tuple(x.shape), x.is_floating_point()) for name, x in two.items()} == {
        "ids": ((1, 4), False),
        "mask": ((1, 4), False),
    }
    assert source.further(None) == []
    with pytest.raises(InputError, match="--also 'large' is not a shape"):
        source.further(["large"])
