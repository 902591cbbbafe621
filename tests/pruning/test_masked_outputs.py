"""Outputs that a model masks with an infinity are no error; all others count as if the masked ones were not there."""

import math

import pytest
import torch
from torch import nn

from coreprune import Budget, Distill, Repair, prune
from coreprune._masked import entries, finite, floored, infinite, mean_square
from coreprune.pruning.calibration.projection import projection
from coreprune.pruning.reporting.comparison import apart
from coreprune.queries import make_queries

LEFT = 7  # outputs that are not masked


class Masked(nn.Module):
    """Ten outputs, of which three are masked. Without a value for them, they are cut off instead."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 10)
        with torch.no_grad():
            self.a.weight[::2] *= 0.1
        self.register_buffer("mask", torch.arange(10) >= LEFT)
        self.value = value

    def forward(self, x):
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return y[:, :LEFT] if self.value is None else y.masked_fill(self.mask, self.value)


def samples(n=256):
    return torch.randn(n, 16, generator=torch.Generator().manual_seed(0))


def run(value, **settings):
    model = Masked(value).eval()
    return model, prune(model, samples()[:1], Budget(macs=0.4), queries=samples(), progress=False, **settings)


@pytest.mark.parametrize("value", [-math.inf, math.inf])
def test_the_safety_net_sees_the_error_of_every_cut(value, caplog):
    found = [run(each, method="magnitude", repair=Repair(descent=False))[1] for each in (value, None)]
    masked, cut = ([(c.name, c.error) for c in result.report.compared] for result in found)
    assert [name for name, _ in masked] == [name for name, _ in cut]
    for name, error in masked:
        assert math.isfinite(error), name
    assert not any("is not finite on the queries" in record.message for record in caplog.records)


def test_the_error_is_that_of_the_other_outputs():
    models = [Masked(-math.inf).eval(), Masked(None).eval()]
    queries = make_queries(models[0], samples()[:1], samples(64), seed=0)
    errors = []
    for model in models:
        other = Masked(model.value).eval()
        with torch.no_grad():
            other.b.weight.mul_(0.9)
        errors.append(apart(model, other, queries))
    torch.testing.assert_close(errors[0].errors, errors[1].errors, rtol=1e-12, atol=0)
    assert errors[0].same == errors[1].same
    x = samples(64)
    with torch.no_grad():
        y, z = models[1](x).double(), other(x).double()
    torch.testing.assert_close(errors[1].error, float((y - z).square().mean() / y.var(correction=0)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_an_infinity_of_one_model_alone_is_an_error_without_end(odd):
    model, other = Masked(-math.inf).eval(), Masked(odd).eval()
    queries = make_queries(model, samples()[:1], samples(8), seed=0)
    assert apart(model, other, queries).error == math.inf


def test_errors_in_front_of_a_mask_are_worth_what_they_are_without_it():
    output = torch.randn(8, 10, generator=torch.Generator().manual_seed(1)).double()
    masked = output.masked_fill(torch.arange(10) >= LEFT, -math.inf)
    noise = projection(masked, None, frozenset(), torch.Generator().manual_seed(2))
    assert bool((noise[:, LEFT:] == 0).all())
    drawn = torch.randn(8, 10, generator=torch.Generator().manual_seed(2)).double()[:, :LEFT]
    share = float(output[:, :LEFT].std(correction=0)) * math.sqrt(LEFT)
    torch.testing.assert_close(noise[:, :LEFT], drawn / share, rtol=1e-6, atol=0)


def test_masked_words_change_nothing_in_a_softmax():
    logits = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(1)).double()
    never = torch.zeros(12, dtype=torch.bool)
    never[9:] = True
    masked = logits.masked_fill(never, -math.inf)
    noise = projection(masked, None, frozenset({12}), torch.Generator().manual_seed(2))
    assert bool(torch.isfinite(noise).all())
    assert float(noise[..., never].abs().max()) < 1e-15
    # The curvature's null space are the constants over the words that are left.
    torch.testing.assert_close(noise[..., ~never].sum(-1), torch.zeros(2, 4).double(), rtol=0, atol=1e-12)
    assert float(noise[..., ~never].abs().min()) > 0


def true_error(model, small):
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        y, z = model(x)[:, :LEFT], small(x)[:, :LEFT]
    return float((y - z).square().mean() / y.var(correction=0))


def test_the_descent_and_the_distillation_train_through_a_mask():
    options = {"repair": Repair(descent=True), "distill": Distill(steps=20)}
    (model, masked), (whole, cut) = run(-math.inf, **options), run(None, **options)
    assert all(math.isfinite(block.before) for block in masked.report.descended)
    assert true_error(model, masked.model) < 1.2 * true_error(whole, cut.model)
    assert bool((masked.model(samples(8))[:, LEFT:] == -math.inf).all())


def test_the_result_is_as_good_as_without_the_masked_outputs():
    (model, masked), (whole, cut) = run(-math.inf), run(None)
    assert true_error(model, masked.model) < 1.2 * true_error(whole, cut.model)


def test_an_output_that_is_nan_is_said_not_to_count(caplog):
    run(math.nan, repair=Repair(descent=False))
    assert any("is not finite on the queries" in record.message for record in caplog.records)


def test_the_parts():
    x = torch.tensor([1.0, -math.inf, 3.0, math.inf], requires_grad=True)
    y = torch.tensor([2.0, -math.inf, 5.0, math.inf])
    found = mean_square(x, y)
    assert found.item() == 2.5
    (gradient,) = torch.autograd.grad(found, x)
    assert gradient.tolist() == [-1.0, 0.0, -2.0, 0.0]
    assert float(mean_square(torch.tensor([1.0, 0.0]), torch.tensor([1.0, math.inf]))) == math.inf
    assert entries(y).tolist() == [2.0, 5.0]
    assert floored(y).tolist() == [2.0, -98.0, 5.0, -98.0]
    assert floored(torch.full((2,), math.inf)).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize(
    "odd", [(), (math.inf,), (-math.inf,), (math.nan,), (math.nan, math.inf), (math.inf, -math.inf)]
)
def test_which_entries_are_infinite_is_found_in_every_dtype(odd, dtype):
    if odd and not dtype.is_floating_point:
        pytest.skip("it has no infinities")
    x = torch.arange(40, dtype=dtype).reshape(4, 10) - 20
    for i, value in enumerate(odd):
        x[i + 1, 3 * i] = value
    assert finite(x) == (not odd)
    masked, wanted = infinite(x), [[math.isinf(v) for v in row] for row in x.tolist()]
    assert (masked is None) == (not any(map(any, wanted)))
    assert masked is None or masked.tolist() == wanted
    assert not finite(x[:0])
    assert infinite(x[:0]) is None
