"""Models in half precision on the CPU are computed in float32, and come back in the precision that they had."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, ModelError, Queries, apply_plan, load, make_plan, make_queries, prune, save
from coreprune.pruning.plans.plan import fingerprint
from whole_state import whole_state

HALF = [torch.float16, torch.bfloat16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Conv2d(16, 12, 3, padding=1)
        self.head = nn.Linear(12, 5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        return self.head(h.mean((2, 3)))


def network(dtype: torch.dtype, cls: type[nn.Module] = Net) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls().eval().to(dtype)


def images(n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def stored(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: t.dtype for name, t in [*model.named_parameters(), *model.named_buffers()]}


@pytest.mark.parametrize("dtype", HALF)
def test_the_result_is_that_of_the_model_in_single_precision_rounded(dtype: torch.dtype) -> None:
    model = network(dtype)
    result = prune(model, images(1, dtype), Budget(keep=0.5), queries=images(80, dtype))
    wide = prune(copy.deepcopy(model).float(), images(1, dtype).float(), Budget(keep=0.5), queries=images(80, dtype))
    assert {n: g.kept for n, g in result.plan.groups.items()} == {n: g.kept for n, g in wide.plan.groups.items()}
    assert dtypes(result.model) == dtypes(model)
    theirs = dict([*wide.model.named_parameters(), *wide.model.named_buffers()])
    for name, t in [*result.model.named_parameters(), *result.model.named_buffers()]:
        assert torch.equal(t, theirs[name].to(t.dtype)), name
    assert result.model(images(2, dtype)).dtype == dtype
    assert result.report.bytes == (stored(model), stored(result.model))
    assert any("computed in float32" in note for note in result.report.notes)
    assert not any(vars(t) for t in [*result.model.parameters(), *result.model.buffers()])


def test_bytes_are_those_that_are_stored() -> None:
    model = network(torch.float16)
    most = int(0.4 * stored(model))
    result = prune(model, images(1, torch.float16), Budget(bytes=most, absolute=True), queries=None)
    assert stored(result.model) <= most
    assert result.report.bytes[1] == stored(result.model)


def test_precisions_may_be_mixed() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.norm(self.a(x).to(self.norm.weight.dtype))).to(self.b.weight.dtype)
            return self.head(torch.relu(self.b(h)).mean((2, 3)))

    model = network(torch.float16, Mixed)
    model.norm.float()
    result = prune(model, images(1, torch.float16), Budget(keep=0.5), n_queries=32)
    assert dtypes(result.model) == dtypes(model)
    assert result.report.bytes == (stored(model), stored(result.model))
    assert result.model(images(2, torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("dtype", HALF)
def test_plans_queries_and_artifacts_are_those_of_the_model(dtype: torch.dtype, tmp_path) -> None:
    model = network(dtype)
    result = prune(model, images(1, dtype), Budget(macs=0.5), n_queries=32)
    assert result.plan.fingerprint == fingerprint(model)
    assert isinstance(result.queries, Queries)
    assert result.queries.args[0].dtype == dtype
    plan = make_plan(model, images(1, dtype), Budget(macs=0.5), queries=result.queries)
    assert plan.fingerprint == result.plan.fingerprint
    small = apply_plan(model, plan, queries=result.queries)  # with the example that the plan tells of
    assert dtypes(small) == dtypes(model)
    again = load(save(result, tmp_path / "small"), lambda: network(dtype))
    assert torch.equal(again(images(2, dtype)), result.model(images(2, dtype)))
    made = make_queries(model, images(1, dtype), n=4)
    assert made.args[0].dtype == dtype


def test_in_place_and_excluded_modules() -> None:
    model = network(torch.float16)
    given, own = copy.deepcopy(model), {id(p) for p in model.parameters()}
    samples = images(64, torch.float16)
    result = prune(model, samples[:1], Budget(keep=0.5), queries=samples, exclude=model.b, inplace=True)
    assert result.model is model
    assert {id(p) for p in model.parameters()} == own
    assert model.a.out_channels == 8
    assert model.b.out_channels == 12
    other = prune(given, samples[:1], Budget(keep=0.5), queries=samples, exclude=(given.b,)).model
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_model_is_not_changed() -> None:
    model, x = network(torch.float16), images(1, torch.float16)
    before = whole_state(model, x)
    prune(model, x, Budget(keep=0.5), n_queries=32)
    make_plan(model, x, Budget(keep=0.5), queries=None)
    make_queries(model, x, n=4)
    assert whole_state(model, x) == before


def test_a_model_that_insists_on_half_precision_is_computed_in_it(caplog: pytest.LogCaptureFixture) -> None:
    class Insists(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.half())

    model = network(torch.float16, Insists)
    with caplog.at_level(logging.INFO):
        result = prune(model, images(1, torch.float16), Budget(keep=0.5), "magnitude", queries=None)
    assert "stays in half precision" in caplog.text
    assert dtypes(result.model) == dtypes(model)
    assert result.model(images(2, torch.float16)).shape == (2, 5)


def test_an_example_that_the_model_does_not_take_is_refused_as_before() -> None:
    with pytest.raises(ModelError, match=r"Input type \(float\) and bias type \(c10::Half\)"):
        prune(network(torch.float16), images(1, torch.float32), queries=None)


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from coreprune.pruning import pipeline

    def huge(pruned, *_: object):
        with torch.no_grad():
            pruned.removed.model.head.bias.fill_(1e6)
        return ()

    monkeypatch.setattr(pipeline, "repair_", huge)
    model, x = network(torch.float16), images(64, torch.float16)
    before = whole_state(model, x)
    with pytest.raises(ModelError, match=r"head.bias has entries that are too large for torch.float16"):
        prune(model, x[:1], Budget(keep=0.5), queries=x, compare=False, inplace=True)
    assert whole_state(model, x) == before
