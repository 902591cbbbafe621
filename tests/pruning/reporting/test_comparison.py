"""How far two models are apart, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from coreprune.pruning.reporting.comparison import Apart, apart
from coreprune.queries import Queries
from features import normal


def queries(x):
    return Queries((x,), {}, "samples")


def linear(scale):
    layer = nn.Linear(4, 3, bias=False, dtype=torch.float64)
    layer.weight.data = scale * normal(3, 4)
    return layer


def test_errors_are_shares_of_the_variance_query_by_query():
    x, model, small = normal(70, 4), linear(1.0), linear(0.9)
    found = apart(model, small, queries(x))
    y, z = model(x).detach(), small(x).detach()
    assert torch.allclose(found.errors, (y - z).square().mean(1) / y.var(correction=0))
    assert found.same == int((y.argmax(1) == z.argmax(1)).sum()) == 70
    assert found.agreement == 1.0


def test_several_outputs_count_alike_and_are_no_classes():
    class Two(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x):
            return {"image": self.a(x)[:, None, :, None], "score": 1000 * self.b(x)}

    x = normal(10, 4)
    found = apart(Two(linear(1.0), linear(1.0)), Two(linear(0.5), linear(1.0)), queries(x))
    y = linear(1.0)(x).detach()
    assert torch.allclose(found.errors, 0.5 * (0.5 * y).square().mean(1) / y.var(correction=0))
    assert found.same is None


def test_an_output_that_is_not_finite_is_infinitely_far():
    x, broken = normal(5, 4), linear(1.0)
    broken.weight.data[0] = math.nan
    found = apart(linear(1.0), broken, queries(x))
    assert found.error == math.inf
    good = apart(linear(1.0), linear(0.5), queries(x))
    assert good.better_than(found)
    assert not found.better_than(good)


WORDS = 50


class Looked(nn.Module):
    """Tokens (N, T) to logits (N, T, WORDS), one row of a table for each."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids):
        return nn.functional.embedding(ids, self.table)


def tokens(n=6, length=200):
    return torch.randint(WORDS, (n, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_logits_over_a_vocabulary_count_as_they_change_the_probabilities(scale):
    table, other = scale * normal(WORDS, WORDS), scale * normal(WORDS, WORDS)
    found = apart(Looked(table), Looked(other), queries(tokens()), frozenset({WORDS}))
    varies = []
    for own in table[tokens()]:  # T21's variance, with the matrix F itself
        p = own.softmax(-1)
        f = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        centred = own - own.mean(0)
        varies.append((centred[:, None] @ f @ centred[..., None]).mean())
    p, q = (torch.distributions.Categorical(logits=t[tokens()]) for t in (table, other))
    wanted = 2 * torch.distributions.kl_divergence(p, q).mean(1) / torch.stack(varies).mean()
    assert torch.allclose(found.errors, wanted)


def test_what_is_added_to_all_logits_is_no_error_and_elsewhere_it_is():
    table = normal(WORDS, WORDS)
    models = Looked(table), Looked(table + 3 * normal(WORDS, 1))
    assert apart(*models, queries(tokens()), frozenset({WORDS})).error < 1e-12
    assert apart(*models, queries(tokens())).error > 0.1
    assert apart(*models, queries(tokens()), frozenset({WORDS + 1})).error > 0.1


def test_small_changes_of_logits_count_to_second_order():
    table, change = normal(WORDS, WORDS), normal(WORDS, WORDS)[torch.randperm(WORDS)]
    small, large = (
        apart(Looked(table), Looked(table + step * change), queries(tokens()), frozenset({WORDS})).error
        for step in (1e-4, 1e-3)
    )
    assert math.isclose(large / small, 100, rel_tol=1e-2)


def test_words_that_both_models_mask_are_no_error_and_those_of_one_alone_are():
    table, other = normal(WORDS, WORDS), 0.5 * normal(WORDS, WORDS)
    table[:, :7] = other[:, :7] = -math.inf
    found = apart(Looked(table), Looked(other), queries(tokens()), frozenset({WORDS}))
    p, q = (torch.distributions.Categorical(logits=t[tokens()][..., 7:]) for t in (table, other))
    kl = torch.distributions.kl_divergence(p, q).mean(1)
    assert torch.allclose(found.errors / found.errors.sum(), kl / kl.sum())
    other[0, 8] = -math.inf
    assert apart(Looked(table), Looked(other), queries(tokens()), frozenset({WORDS})).error == math.inf
    other[0, 8] = math.nan
    assert apart(Looked(table), Looked(other), queries(tokens()), frozenset({WORDS})).error == math.inf


def test_better_by_more_than_the_noise():
    """One query in ten decides the mean: that is noise. The same gain on all of them is not."""
    base = torch.ones(10, dtype=torch.float64)
    lucky, steady = base + 0.05, base - 0.1 + torch.linspace(0, 1e-3, 10, dtype=torch.float64)
    lucky[0] = 0.0
    assert float(lucky.mean()) < float(base.mean())
    assert Apart(steady, None).better_than(Apart(base, None))
    assert not Apart(lucky, None).better_than(Apart(base, None))
    assert not Apart(base, None).better_than(Apart(base, None))


def test_models_without_a_tensor_cannot_be_compared():
    class Text(nn.Module):
        def forward(self, x):
            return str(x.shape)

    assert apart(Text(), Text(), queries(normal(4, 4))) is None
