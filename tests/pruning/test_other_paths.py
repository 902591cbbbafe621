"""What the example does not run: other sizes, other tasks, and what training runs alone."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune import Budget, BudgetError, InputError, apply_plan, list_groups, load, make_plan, prune, save
from coreprune.artifact import read_plan
from small_networks import bits

SMALL, LARGE = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 64)


class AuxNet(nn.Module):
    """An auxiliary head in training, as in GoogLeNet and PSPNet, and another path for large images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, 2, 1), nn.Conv2d(32, 24, 3, 2, 1)
        self.norm = nn.BatchNorm2d(24)
        self.down, self.aux, self.fc = nn.Conv2d(32, 32, 3, 2, 1), nn.Conv2d(32, 5, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = F.relu(self.a(x))
        g = F.relu(self.down(h)) if x.shape[-1] > 32 else h
        out = self.fc(F.relu(self.norm(self.b(g))).mean((2, 3)))
        return (out, self.aux(h).mean((2, 3))) if self.training else out


class Tasks(nn.Module):
    """One trunk, and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(8, 32)
        self.heads = nn.ModuleDict({"one": nn.Linear(32, 3), "two": nn.Linear(32, 7)})

    def forward(self, x: Tensor, task: str = "one") -> Tensor:
        return self.heads[task](torch.relu(self.trunk(x)))


class HeadInTraining(nn.Module):
    """Parameters that evaluation reads, too, but in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(h + self.b(h)) if self.training else self.c(self.b(h))


def made(cls: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls().eval()


def zeroed(model: nn.Module, small: nn.Module, readers: list[str], plan_name: str, plan) -> nn.Module:
    """The original with zeros where it reads the channels of a group that left."""
    gone = [i for i in range(plan.groups[plan_name].size) if i not in plan.groups[plan_name].kept]
    with torch.no_grad():
        for name in readers:
            model.get_parameter(name)[:, gone] = 0
    return model


def test_an_auxiliary_head_of_training_is_cut_with_the_rest() -> None:
    model = made(AuxNet)
    result = prune(model, SMALL, Budget(keep=0.5), "magnitude", queries=None)
    small, plan = result.model, result.plan
    assert (small.a.out_channels, small.aux.in_channels) == (16, 16)
    oracle = zeroed(model, small, ["b.weight", "aux.weight"], "a", plan)
    assert [x.shape for x in small.train()(torch.randn(3, 3, 32, 32))] == [(3, 5), (3, 5)]
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        small.training = oracle.training = True  # the aux head with the norms in evaluation mode
        small.norm.eval()
        assert torch.allclose(small(x)[1], oracle(x)[1], atol=1e-6)


def test_a_path_of_other_inputs_is_named_and_can_be_given(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        blind = prune(made(AuxNet), SMALL, Budget(keep=0.5), "magnitude", queries=None)
    assert "nothing reads down.weight, down.bias" in caplog.text
    assert "also=[...]" in caplog.text
    assert blind.report.unread == ("down.weight", "down.bias")
    assert blind.report.as_dict()["unread"] == ["down.weight", "down.bias"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = prune(made(AuxNet), SMALL, Budget(keep=0.5), "magnitude", queries=None, also=[LARGE])
    assert "nothing reads" not in caplog.text
    assert result.report.unread == ()
    assert result.report.macs == blind.report.macs or result.report.macs[0] == blind.report.macs[0]
    for size in (32, 64, 96):
        assert result.model.eval()(torch.randn(2, 3, size, size)).shape == (2, 5)
        assert result.model.train()(torch.randn(2, 3, size, size))[0].shape == (2, 5)
    assert "also=your_examples" in result.report.settings.call()


def test_the_other_path_is_exact() -> None:
    model = made(AuxNet)
    result = prune(model, SMALL, Budget(keep=0.5), "magnitude", queries=None, repair=False, also=[LARGE])
    readers = {"a": ["b.weight", "aux.weight", "down.weight"], "b": ["fc.weight"], "down": []}
    for name in result.plan.groups:
        zeroed(model, result.model, readers[name], name, result.plan)
    for size in (32, 64):
        x = torch.randn(2, 3, size, size)
        assert torch.allclose(result.model(x), model(x), atol=1e-6)


@pytest.mark.parametrize("size", [32, 64])
def test_a_saved_result_runs_every_path(size: int, tmp_path: Path) -> None:
    result = prune(made(AuxNet), SMALL, Budget(keep=0.5), also=[LARGE], n_queries=32)
    again = load(save(result, tmp_path / "small"), lambda: made(AuxNet))
    x = torch.randn(2, 3, size, size)
    assert torch.equal(again.eval()(x), result.model.eval()(x))
    assert torch.equal(again.train()(x)[1], result.model.train()(x)[1])
    plan = read_plan(tmp_path / "small")
    assert apply_plan(made(AuxNet), plan, also=[LARGE])(x).shape == (2, 5)


def test_heads_of_other_tasks() -> None:
    x = torch.randn(1, 8)
    assert list_groups(made(Tasks), x).unread == ("heads.two.weight", "heads.two.bias")
    other = {"x": x, "task": "two"}
    assert list_groups(made(Tasks), x, also=[other]).unread == ()
    result = prune(made(Tasks), x, Budget(keep=0.5), also=[other], n_queries=64)
    assert result.model.heads["two"].in_features == result.model.heads["one"].in_features == 16
    plan = make_plan(made(Tasks), x, Budget(keep=0.5), "magnitude", queries=None, also=[other])
    small = apply_plan(made(Tasks), plan, x, also=[other])
    assert small(x, "two").shape == (1, 7)


def test_a_way_that_training_goes_alone_is_followed() -> None:
    model = made(HeadInTraining)
    result = prune(model, torch.randn(1, 8), Budget(keep=0.5), "magnitude", queries=None)
    assert result.model.train()(torch.randn(2, 8)).shape == (2, 4)
    assert result.model.a.out_features == 8  # tied to b in training


class OnlyOnValues(HeadInTraining):
    """Training that cannot be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(x.sum()) > -1e9:
            return super().forward(x)
        return self.c(self.b(torch.relu(self.a(x))))


def test_what_breaks_training_and_cannot_be_traced_stays_whole() -> None:
    with pytest.raises(BudgetError, match="a: in training mode, the pruned model does not run"):
        prune(made(OnlyOnValues), torch.randn(1, 8), Budget(macs=0.9), "magnitude", queries=None)


def test_training_that_fails_anyway_locks_nothing() -> None:
    class NeedsLabels(HeadInTraining):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("in training, pass labels")
            return super().forward(x)

    found = list_groups(made(NeedsLabels), torch.randn(1, 8))
    assert [g.name for g in found.groups if g.locked_because is None] == ["a", "b"]


@pytest.mark.parametrize("also", ["large", [3], [SMALL, "large"]])
def test_wrong_further_examples(also: object) -> None:
    with pytest.raises(InputError, match=r"also must be a list|example_inputs is a (int|str)"):
        list_groups(made(AuxNet), SMALL, also=also)  # type: ignore[arg-type]


def test_nothing_changes_for_a_model_of_one_path() -> None:
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(1, 8)
    once, twice = (prune(model, x, Budget(keep=0.5), n_queries=64, also=also) for also in ([], [torch.randn(1, 8)]))
    assert bits(once.model) == bits(twice.model)
