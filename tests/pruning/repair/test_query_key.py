"""q·k of attention: its curve against brute force, and its repair in whole models."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from coreprune import Budget, Repair, prune
from coreprune._progress import silent
from coreprune.graph import Traced, capture, find_groups
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import collect_readers
from coreprune.pruning.layer.linear_maps import operators
from coreprune.queries import Queries


class Attention(nn.Module):
    """One head. way: how the product is written."""

    def __init__(self, way="hand", rank=None, n=8, d=12):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = nn.Linear(d, n), nn.Linear(d, n), nn.Linear(d, 6), nn.Linear(6, d)
        self.way = way
        with torch.no_grad():
            self.q.weight.mul_(3)
            if rank is not None:  # the other channels of k are mixtures of the first ones, up to constants
                mix = torch.randn(n - rank, rank)
                self.k.weight[rank:] = mix @ self.k.weight[:rank]
        self.double()

    def scores(self, q, k):
        if self.way == "transposed":
            return torch.matmul(q, k.permute(0, 2, 1)) / 2
        return (q @ k.transpose(-1, -2)) * 0.5

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.way == "mask":
            mask = torch.zeros(x.shape[1], x.shape[1], dtype=x.dtype).masked_fill(
                torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1), -1e9
            )
            return self.o((self.scores(q, k) + mask).softmax(-1) @ v)
        if self.way == "linear":  # without a softmax constants count
            return self.o(self.scores(q, k) @ v)
        return self.o(torch.softmax(self.scores(q, k), dim=-1) @ v)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def readers_of(model, x, batches=2):
    parts = x.chunk(batches)
    captured = capture(model, parts[0], batch=len(parts[0]))
    found = operators(captured)
    calibration = Calibration(Queries((x,), {}, "samples", ""), None, captured, found, [((p,), {}) for p in parts])
    traced = Traced(model, captured, find_groups(captured))
    return dict(collect_readers(traced, calibration, Collect(rows=1 << 30), torch.Generator().manual_seed(0), silent))


@pytest.mark.parametrize("way", ["hand", "transposed", "mask"])
def test_moments_are_those_of_centred_keys_and_their_gradients(way):
    model, x = Attention(way), normal(8, 5, 12)
    (reader,) = readers_of(model, x)["q"]
    keys = model.k(x).detach()
    keys = (keys - keys.mean(dim=1, keepdim=True)).reshape(-1, 8)
    assert torch.allclose(reader.covariance, keys.T @ keys / len(keys))
    assert reader.partner == "q.weight"
    first, worth = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0))), 0.0
    for b, part in enumerate(x.chunk(2)):
        k = model.k(part).detach().requires_grad_()
        model.k.forward = lambda _, k=k: k
        out = model(part)
        del model.k.forward
        noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(first + b)).to(out)
        scale = out.detach().std(correction=0) * out[0].numel() ** 0.5
        (gradient,) = torch.autograd.grad((out * noise).sum() / scale, k)
        worth = worth + torch.einsum("bta,btc->ac", gradient, gradient) / len(part) / 2
    assert torch.allclose(reader.gram, worth)


def test_without_softmax_constants_count():
    model, x = Attention("linear"), normal(8, 5, 12)
    (reader,) = readers_of(model, x)["q"]
    q = torch.cat([model.k(x), model.q(x)], dim=-1).detach().reshape(-1, 16)
    second = q.T @ q / len(q)
    # Either operand may be the one that is read.
    assert any(torch.allclose(reader.covariance, half) for half in (second[:8, :8], second[8:, 8:]))


def test_predicted_error_of_one_channel_is_what_its_removal_does():
    """To first order: the keys' channel is made a little smaller, which is what its removal does, scaled."""
    model, x = Attention(), normal(400, 5, 12)
    (reader,) = readers_of(model, x, batches=4)["q"]
    whole, small, ratios = model(x).detach(), 1e-3, []
    for c in range(8):
        damped = Attention()
        with torch.no_grad():
            damped.k.weight[c] *= 1 - small
            damped.k.bias[c] *= 1 - small
        got = float((damped(x).detach() - whole).square().mean() / whole.var() / small**2)
        ratios.append(float(reader.covariance[c, c] * reader.gram[c, c]) / got)
    # The curve takes errors at different tokens as uncorrelated, and as independent of their gradients.
    assert 0.4 < min(ratios) <= max(ratios) < 2.5


@pytest.mark.parametrize("way", ["hand", "transposed", "mask"])
def test_channels_of_which_others_are_mixtures_are_removed_without_error(way):
    model, x = Attention(way, rank=4), normal(64, 5, 12)
    budget = Budget(keep={"q": 0.5, "*": 1.0})
    result = prune(model, x[:1], budget, queries=x, compare=False, repair=Repair(descent=False))
    fresh = normal(50, 5, 12, seed=1)
    off = float(((result.model(fresh) - model(fresh)).std() / model(fresh).std()).detach())
    assert result.model.q.weight.shape == (4, 12)
    assert off < 1e-2
    plain = prune(model, x[:1], budget, queries=x, compare=False, repair=False)
    assert float((plain.model(fresh) - model(fresh)).std() / model(fresh).std()) > 20 * off
    (group,) = [g for g in result.report.groups if g.name == "q"]
    assert group.held_out[4] < 1e-3 * group.held_out[0] < group.held_out[3]
    assert result.report.refits[0].weight == "q.weight"


def test_repair_goes_on_where_the_input_has_changed():
    """The layer in front of the product is fitted to the mixture, not to the original's channels."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.attend = nn.Linear(12, 16), nn.Linear(16, 12), Attention(rank=4)
            self.double()

        def forward(self, x):
            return self.attend(self.down(F.relu(self.up(x))))

    model, x = Two(), normal(200, 5, 12)
    budget = Budget(keep={"attend.q": 0.5, "up": 0.75, "*": 1.0})
    result = prune(model, x[:1], budget, queries=x, compare=False, repair=Repair(descent=False))
    fresh = normal(50, 5, 12, seed=1)
    both = prune(
        model, x[:1], Budget(keep={"up": 0.75, "*": 1.0}), queries=x, compare=False, repair=Repair(descent=False)
    )
    off, without = (float((r.model(fresh) - model(fresh)).std()) for r in (result, both))
    assert off < 1.2 * without


def test_fused_layer_is_left_as_it_is():
    class Fused(Attention):
        def __init__(self):
            super().__init__()
            self.qk = nn.Linear(12, 16).double()
            del self.q, self.k

        def forward(self, x):
            q, k = self.qk(x).chunk(2, dim=-1)
            return self.o(torch.softmax(self.scores(q, k), dim=-1) @ self.v(x))

    model, x = Fused(), normal(8, 5, 12)
    found = readers_of(model, x)
    name = next(name for name in found if name.startswith("qk"))
    assert [reader.partner for reader in found[name]] == [""]
