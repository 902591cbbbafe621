"""Padding is found by what the model does, not by names; what is there is neither fitted nor counted."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from coreprune import Budget, Repair, prune
from coreprune._progress import silent
from coreprune.graph import Traced, capture, find_groups
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.padding import Ends, Padding, ends
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import collect_readers
from coreprune.pruning.layer.linear_maps import operators
from coreprune.pruning.layer.products import Product
from coreprune.queries import Queries


class Encoder(nn.Module):
    """One layer of attention and one of an MLP. uses_mask: whether padded keys are masked. mean: returns means of all
    tokens, so that padding counts."""

    def __init__(self, uses_mask=True, mean=False, d=8):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.qkv, self.o = nn.Embedding(50, d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 24), nn.Linear(24, d)
        self.uses_mask, self.mean = uses_mask, mean
        self.double()

    def forward(self, ids, mask):
        x = self.words(ids)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        scores = q @ k.transpose(1, 2)
        if self.uses_mask:
            scores = scores + (1.0 - mask[:, None, :].to(scores.dtype)) * -1e9
        x = x + self.o(scores.softmax(-1) @ v)
        x = x + self.down(torch.relu(self.up(x)))
        return x.mean(1) if self.mean else x


def texts(n=12, length=10, left=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, 50, (n, length), generator=g)
    mask = torch.ones_like(ids)
    for i in range(n):
        pads = int(torch.randint(2, 6, (1,), generator=g))
        at = slice(0, pads) if left else slice(length - pads, length)
        ids[i, at], mask[i, at] = 0, 0
    return ids, mask


def found(model, ids, mask):
    captured = capture(model.eval(), (ids, mask), batch=len(ids))
    batch = ((ids, mask), {})
    return ends(captured, dict(model.named_parameters()), [batch]).of(batch).tokens


@pytest.mark.parametrize("left", [False, True])
def test_masked_tokens_are_found(left):
    ids, mask = texts(left=left)
    assert torch.equal(found(Encoder(), ids, mask), mask == 0)


def test_tokens_that_others_see_are_no_padding():
    ids, mask = texts()
    assert found(Encoder(uses_mask=False), ids, mask) is None
    assert found(Encoder(mean=True), ids, mask) is None


def test_text_without_runs_has_none():
    ids = torch.arange(10, 40).reshape(3, 10)
    assert found(Encoder(), ids, torch.ones_like(ids)) is None


def test_one_token_of_padding_is_found_where_others_have_more():
    ids, mask = texts()
    ids[0], mask[0] = torch.arange(10, 20), 1
    ids[0, -1], mask[0, -1] = 0, 0
    assert torch.equal(found(Encoder(), ids, mask), mask == 0)


def test_words_that_are_repeated_by_chance_are_no_padding():
    ids = torch.arange(10, 40).reshape(3, 10)
    ids[:2, -2] = ids[:2, -1]  # every token stands for itself, so that nothing else changes with it
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 3)).double().eval()
    captured = capture(model, (ids,), batch=3)
    assert ends(captured, dict(model.named_parameters()), [((ids,), {})]).of(((ids,), {})).tokens is None


def test_rows_of_a_layer_are_those_of_words():
    model, (ids, mask) = Encoder().eval(), texts()
    captured = capture(model, (ids, mask), batch=len(ids))
    maps = operators(captured)
    tensors = dict(model.named_parameters())
    batches = [((ids, mask), {})]
    at = ends(captured, tensors, batches)
    calibration = Calibration(Queries((ids, mask), {}, "samples"), None, captured, maps, batches, ends=at)
    traced = Traced(model, captured, find_groups(captured))
    generator = torch.Generator().manual_seed(0)
    (reader,) = dict(collect_readers(traced, calibration, Collect(), generator, silent))["up"]
    inputs = []
    handle = model.down.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model(ids, mask)
    handle.remove()
    rows = inputs[0][mask.bool()]
    assert torch.allclose(reader.covariance, torch.cov(rows.T, correction=0))
    # What an output at padding is worth does not count either: the worth is that of the words' gradients.
    layer = maps["down.weight"]
    pads = calibration.padding_of(0)
    assert pads.rows(layer, torch.zeros(*ids.shape, 8), 10**6).tolist() == mask.flatten().nonzero()[:, 0].tolist()
    assert pads.rows(layer, torch.zeros(7, 3, 8), 10**6) is None
    assert Padding().rows(layer, torch.zeros(*ids.shape, 8), 10**6) is None


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (12, 5)], ids=["one head", "heads", "texts and heads in one"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_keys_are_counted_and_centred_without_padding(shape, axis):
    tokens = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    keys = torch.randn(*shape, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    product = Product(*[fx.Graph().placeholder("keys")] * 2, axis, True, "", torch.arange(6))
    rows = Padding(tokens).rows(product, keys.movedim(-1, axis), 10**6)
    found = product.features(Padding(tokens).levelled(product, keys.movedim(-1, axis)), rows)[0]
    by_text = keys.reshape(3, -1, 5, 6)
    wanted = [head[~pads] - head[~pads].mean(0) for text, pads in zip(by_text, tokens, strict=True) for head in text]
    assert torch.allclose(found, torch.cat(wanted))
    plain = Padding().levelled(product, keys.movedim(-1, axis))
    assert torch.equal(plain, keys.movedim(-1, axis))


def test_words_are_fitted_better_without_padding(monkeypatch):
    model, (ids, mask) = Encoder().eval(), texts(n=64)
    other, seen = texts(n=100, seed=1)

    def error():
        budget = Budget(keep={"up": 0.5, "*": 1.0})
        plain = Repair(descent=False)
        small = prune(model, (ids[:1], mask[:1]), budget, queries=(ids, mask), compare=False, repair=plain).model
        with torch.no_grad():
            return float((small(other, seen) - model(other, seen))[seen.bool()].square().mean())

    without = error()
    monkeypatch.setattr("coreprune.pruning.calibration.calibration.ends", lambda *_: Ends())
    assert without < error()
