"""The random projection of the outputs: plain outputs, and logits over a vocabulary."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune._progress import silent
from coreprune.graph import Traced, capture, find_groups
from coreprune.pruning.calibration import vocabulary
from coreprune.pruning.calibration.calibration import Calibration
from coreprune.pruning.calibration.projection import projection
from coreprune.pruning.calibration.sites import Collect
from coreprune.pruning.calibration.statistics import collect_readers
from coreprune.pruning.calibration.vocabulary import in_parts, vocabularies
from coreprune.pruning.layer.linear_maps import operators
from coreprune.queries import Queries

WORDS, LONGEST = 40, 24


class Writer(nn.Module):
    """Tokens (N, T) to (N, T, outputs). positions: looked up by numbers of the model, or computed from the tokens."""

    def __init__(self, outputs=WORDS, words=WORDS, computed=False):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(words, 8), nn.Embedding(LONGEST, 8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, outputs)
        self.computed = computed

    def forward(self, ids):
        at = (ids >= 0).cumsum(1) if self.computed else torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + self.places(at)
        return self.head(x + self.down(torch.relu(self.up(x))))


class Twice(nn.Module):
    """Two sequences of tokens, each with a table of its own, as in an encoder and its decoder."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.up, self.head = nn.Embedding(30, 8), nn.Embedding(50, 8), nn.Linear(8, 9), nn.Linear(9, 50)

    def forward(self, a, b):
        return self.head(torch.relu(self.up(self.b(b) + self.a(a).mean(1, keepdim=True))))


def ids(n=4, words=WORDS):
    return torch.randint(words, (n, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("computed", [False, True])
def test_the_tables_of_tokens_that_are_given_are_vocabularies(computed):
    assert vocabularies(capture(Writer(computed=computed).eval(), ids(1))) == {WORDS}


def test_positions_and_tables_that_are_no_longer_than_wide_are_not():
    assert vocabularies(capture(Writer(words=8).eval(), ids(1, 8))) == frozenset()
    assert (
        vocabularies(capture(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3)))
        == frozenset()
    )


def test_an_encoder_and_its_decoder_have_one_each():
    assert vocabularies(capture(Twice().eval(), (ids(1, 30), ids(1, 30)))) == {30, 50}


def worth(model, x, by):
    """tr(GK) of the channels between `up` and `down`: the first-order error of the outputs without all of them."""
    captured = capture(model, x[:50], batch=50)
    calibration = Calibration(
        Queries((x,), {}, "samples", ""), None, captured, operators(captured), [((part,), {}) for part in x.split(50)]
    )
    traced = Traced(model, captured, find_groups(captured))
    found = dict(collect_readers(traced, calibration, Collect(rows=1 << 30), torch.Generator().manual_seed(0), silent))
    (reader,) = found[by]
    return float((reader.gram * reader.covariance).sum())


def logits_and_change(model, x):
    """The logits, and how they change when the mean over all tokens takes the place of what `down` adds."""
    with torch.no_grad():
        full = model(x).double()
        h = model.words(x) + model.places(torch.arange(x.shape[1]))
        adds = model.down(torch.relu(model.up(h)))
        return full, ((adds.mean((0, 1)) - adds) @ model.head.weight.T).double()


def test_errors_of_logits_count_as_they_change_the_probabilities():
    """The head is linear, so nothing is cut off: the mean curvature and the covariance of the change, by hand."""
    model, x = Writer().eval(), ids(800)
    nn.init.normal_(model.head.weight, std=1.5)
    z, change = (each.flatten(0, 1) for each in logits_and_change(model, x))
    p = z.exp() / z.exp().sum(-1, keepdim=True)
    curvature = torch.diag(p.mean(0)) - p.T @ p / len(p)
    far = z - z.mean(0)
    varies = float(((p * far**2).sum(-1) - (p * far).sum(-1) ** 2).mean())
    wanted = float((curvature * (change.T @ change)).sum()) / len(p) / varies
    plain = float(change.square().mean() / z.var(correction=0))
    assert worth(model, x, "up") == pytest.approx(wanted, rel=0.06)
    assert abs(plain / wanted - 1) > 0.3  # so that the test tells the two apart


def test_other_outputs_of_the_same_shape_count_by_their_variance():
    model, x = Writer(outputs=17).eval(), ids(800)
    z, change = logits_and_change(model, x)
    assert worth(model, x, "up") == pytest.approx(float(change.square().mean() / z.var(correction=0)), rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1e4])
def test_constant_and_certain_logits_give_finite_noise(dtype, value):
    logits = torch.zeros(2, 3, WORDS, dtype=dtype)
    logits[..., 0] = value
    noise = projection(logits, 2, frozenset({WORDS}), torch.Generator().manual_seed(0))
    assert noise.shape == logits.shape
    assert noise.dtype == dtype
    assert bool(torch.isfinite(noise).all())


def test_a_single_token_counts_like_other_outputs():
    """It has no other tokens to vary over, so there is no share of that."""
    logits = torch.randn(1, 1, WORDS, generator=torch.Generator().manual_seed(0))
    made = [
        projection(logits, 1, words, torch.Generator().manual_seed(0)) for words in (frozenset(), frozenset({WORDS}))
    ]
    assert torch.equal(*made)


@pytest.mark.parametrize("rows", [1, 128, 303, 1000])
def test_logits_are_worked_on_in_parts_of_any_number_of_rows(rows, monkeypatch):
    """More rows than one part, and a last part that is not full: the noise of a row depends on its own logits alone."""
    monkeypatch.setattr(vocabulary, "_TOGETHER", rows * WORDS)
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 101, WORDS, generator=g)
    noise = projection(logits, 3, frozenset({WORDS}), torch.Generator().manual_seed(0)).double()
    xi = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)).double()
    p = logits.double().softmax(-1)
    wanted = p.sqrt() * xi - p * (p.sqrt() * xi).sum(-1, keepdim=True)
    assert torch.allclose(noise / noise.norm(), wanted / wanted.norm(), atol=1e-7)


@pytest.mark.parametrize(("rows", "words"), [(1, 5), (300, 49152), (7, 3_000_000), (0, 9)])
def test_logits_are_worked_on_in_parts_that_stay_small(rows, words):
    logits = torch.empty(rows, words, device="meta")
    parts = in_parts(logits)
    assert sum(len(part) for part in parts) == rows
    assert all(part.numel() * 8 <= 2 << 20 or len(part) == 1 for part in parts)
    assert len(parts) <= 1 + 2 * logits.numel() * 8 / (2 << 20)
