"""Regions of autocast and of gradient modes are seen through: the same groups, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, prune
from coreprune.graph import Traced, capture, find_groups, probe
from coreprune.graph.execution import Execution
from small_networks import bits


class Net(nn.Module):
    """forward() runs `body` in a region."""

    def __init__(self, region: str = "none") -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.region = region

    def body(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))

    def forward(self, x: Tensor) -> Tensor:
        if self.region == "autocast":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.body(x).float()
        if self.region == "autocast off":
            with torch.autocast("cpu", enabled=False):
                return self.body(x)
        if self.region == "gradients":
            with torch.enable_grad():
                return self.body(x)
        if self.region == "nested":
            with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
                with torch.no_grad():
                    scale = x.abs().mean(1, keepdim=True)
                return (self.body(x) * scale).float() / scale
        if self.region == "several outputs":
            with torch.enable_grad():
                h = torch.relu(self.a(x))
                g = h * torch.tensor([2.0])  # a tensor that belongs to the region
            return self.c(torch.relu(self.b((h + g) / 3)))
        if self.region == "part":
            with torch.autocast("cpu", dtype=torch.bfloat16):
                h = torch.relu(self.a(x))
            return self.c(torch.relu(self.b(h.float())))
        return self.body(x)


REGIONS = ("autocast", "autocast off", "gradients", "nested", "several outputs", "part")


def made(region: str) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(region).eval()


@pytest.mark.parametrize("region", REGIONS)
def test_the_same_groups_and_the_same_numbers(region: str) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    found, plain = capture(made(region), x, batch=5), capture(made("none"), x, batch=5)
    assert not [n for n in found.graph.graph.nodes if "higher_order" in str(n.target)]
    groups = [[(g.name, g.size) for g in probe(Traced(made(r), c, find_groups(c))).free.values()]
              for r, c in ((region, found), ("none", plain))]  # fmt: skip
    assert groups[0] == groups[1] == [("a", 16), ("b", 12)]
    model = made(region)
    run = Execution(found, dict(model.named_parameters()), [((x,), {})])
    for node in found.graph.graph.nodes:
        run.run(node)
    (got,) = next(reversed(run.values.values()))
    wanted = made("none")(x)
    assert torch.allclose(got[0] if isinstance(got, tuple) else got, wanted, atol=1e-6)


@pytest.mark.parametrize("region", ["autocast", "gradients", "nested"])
def test_selection_and_repair_see_the_layers_inside(region: str) -> None:
    x = torch.randn(1, 6)
    inside, plain = (prune(made(r), x, Budget(keep=0.5), n_queries=64) for r in (region, "none"))
    assert len(inside.report.refits) == len(plain.report.refits) > 0
    if region == "gradients":
        assert bits(inside.model) == bits(plain.model)


def test_a_write_in_front_of_a_region_is_followed() -> None:
    """torch.export forgets that the view which is written reads its tensor; capturing then crashed."""

    class Written(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).clone()
            h[:, :4] = torch.relu(x[:, :4])
            with torch.autocast("cpu", enabled=False):
                return self.c(torch.relu(self.b(h)))

    captured = capture(Written(), torch.randn(2, 6))
    nodes = list(captured.graph.graph.nodes)
    assert all(node in read.users for node in nodes for read in node.all_input_nodes)
    assert not any("copy_" in node.name for node in nodes)
    traced = probe(Traced(model := Written(), capture(model, torch.randn(2, 6)), find_groups(captured)))
    assert "b" in traced.free
