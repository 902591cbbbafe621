"""Networks that compute their weights are pruned as any other, and keep nothing of the computation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from coreprune import Budget, InputError, apply_plan, list_groups, load, make_plan, prune, save
from coreprune._plain import plain
from graph.oracle import assert_same, zeroed_original
from layers_that_compute_weights import MAKE, Centred, Masked, Padded, Scaled, Standardised, old_weight_norm


def conv_net(name: str) -> nn.Module:
    """The layer in the middle reads one group of channels and makes another."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem, head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(12, 4, 3)
        return nn.Sequential(stem, nn.ReLU(), MAKE[name](), nn.ReLU(), head).double().eval()


def image(b: int = 2, h: int = 12, w: int = 12) -> Tensor:
    return torch.randn(b, 3, h, w, generator=torch.Generator().manual_seed(h), dtype=torch.float64)


@pytest.mark.parametrize("name", MAKE)
def test_the_result_is_the_original_with_zeros(name: str) -> None:
    model = conv_net(name)
    state = copy.deepcopy(model.state_dict())
    found = {g.name: g for g in list_groups(model, image()).groups}
    assert found["0"].locked_because is None
    assert found["2"].locked_because is None
    result = prune(model, image(), Budget(keep=0.5), "magnitude", queries=None)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert result.model[2].weight.numel() == plain(model, result.recipe.plain)[2].weight.numel() // 4
    note = result.report.notes[-1]
    assert "plain parameters in the pruned model" in note
    assert "2.weight" in note

    from coreprune.graph import capture, find_groups

    same = plain(model, result.recipe.plain)
    kept = {n: torch.tensor(e.kept) for n, e in result.plan.groups.items()}
    zeros = zeroed_original(same, find_groups(capture(same, image())), kept)
    for x in (image(), image(3, 15, 10)):
        assert_same([same(x)], [model(x)], 1e-12)
        assert_same([result.model(x)], [zeros(x)])


@pytest.mark.parametrize("name", MAKE)
def test_an_artifact_comes_back(name: str, tmp_path: Any) -> None:
    result = prune(conv_net(name), image(), Budget(keep=0.5), "magnitude", queries=None)
    save(result, tmp_path / "a")
    for dense in (lambda: conv_net(name), conv_net(name)):
        again = load(tmp_path / "a", dense)
        assert again.state_dict().keys() == result.model.state_dict().keys()
        assert torch.equal(again(image()), result.model(image()))


def test_another_dense_model_is_refused(tmp_path: Any) -> None:
    result = prune(conv_net("weight norm"), image(), Budget(keep=0.5), "magnitude", queries=None)
    save(result, tmp_path / "a")
    with pytest.raises(InputError, match="pruned"):
        load(tmp_path / "a", lambda: conv_net("several"))
    with pytest.raises(InputError, match="pruned"):
        load(tmp_path / "a", lambda: nn.Linear(3, 4))


def sequence() -> nn.Module:
    """The case of the report: weight norm in one dimension."""
    first, second = nn.Conv1d(8, 32, 3), nn.Conv1d(32, 4, 3)
    return nn.Sequential(parametrizations.weight_norm(first), nn.ReLU(), parametrizations.weight_norm(second)).eval()


def test_weight_norm_in_one_dimension() -> None:
    before, after = prune(sequence(), torch.randn(1, 8, 9), Budget(keep=0.5), queries=None).report.macs
    assert after * 2 == before


def test_plans_fit_another_checkpoint() -> None:
    model = conv_net("scaled")
    plan = make_plan(model, image(), Budget(keep=0.5), queries=None, exclude=(model[0],))
    assert set(plan.groups) == {"2"}
    small = apply_plan(conv_net("scaled"), plan)
    assert small[2].out_channels == 6
    with pytest.raises(InputError, match="another architecture"):
        apply_plan(conv_net("orthogonal"), plan)


def test_modules_of_the_users_model_can_be_excluded() -> None:
    model = conv_net("weight norm")
    result = prune(model, image(), Budget(keep=0.5), "magnitude", queries=None, exclude=(model[2],))
    assert set(result.plan.groups) == {"0"}
    assert result.report.locked["2"] == "excluded by the caller (module '2')"
    assert result.report.settings.exclude == ("2",)
    with pytest.raises(InputError, match="not a module of this model"):
        prune(model, image(), Budget(keep=0.5), queries=None, exclude=(nn.Linear(2, 2),))


def test_in_place_is_refused_before_any_work() -> None:
    model = conv_net("weight norm")
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"inplace=True .* 2.weight is computed"):
        prune(model, image(), Budget(keep=0.5), queries=None, inplace=True)
    plan = make_plan(model, image(), Budget(keep=0.5), queries=None)
    with pytest.raises(InputError, match="inplace=True"):
        apply_plan(model, plan, inplace=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_what_nothing_can_leave_stays_computed() -> None:
    """The stream is locked by the layer norms, so nothing is asked of the weight norm between them."""
    inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    layers = [nn.Linear(5, 8), nn.LayerNorm(8), parametrizations.weight_norm(nn.Linear(8, 8)), nn.LayerNorm(8), inner]
    model = nn.Sequential(*layers, nn.Linear(8, 2)).eval()
    x = torch.randn(3, 5)
    kinds = [type(m).__name__ for m in model]
    small = prune(model, x, Budget(keep={"4.0": 0.5}), queries=None)
    assert small.recipe.plain == ()
    assert small.report.notes == ()
    assert [type(m).__name__ for m in small.model] == kinds
    prune(model, x, Budget(keep={"4.0": 0.5}), queries=None, inplace=True)
    assert model[4][0].out_features == 8


def test_masks_keep_their_layers() -> None:
    model = nn.Sequential(nn.Linear(5, 12), nn.ReLU(), Masked(12, 12), nn.ReLU(), nn.Linear(12, 3)).eval()
    result = prune(model, torch.randn(2, 5), Budget(keep=0.5), "magnitude", queries=None)
    assert result.recipe.plain == ()
    assert type(result.model[2]) is Masked
    assert result.model[2].mask.shape == (6, 6)


def test_layers_that_do_more_stay_as_they_are() -> None:
    """Their inputs are locked, and they keep standardising."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Padded(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    rows = {g.name: g.locked_because for g in list_groups(model, torch.randn(2, 3, 8, 8)).groups}
    assert rows["0"] is not None
    assert rows["2"] is None


def test_a_network_without_normalisation_with_repair() -> None:
    """Residual, scaled weights, a head: half of the channels, refitted on queries."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = (
                Scaled(3, 12, 3),
                Scaled(12, 16, 3, padding=1),
                Standardised(16, 12, 3, padding=1),
            )
            self.c, self.head = old_weight_norm(nn.Conv2d(12, 12, 1)), Centred(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = x + 0.2 * self.b(torch.relu(self.a(torch.relu(x))))
            return self.head(torch.relu(self.c(x)).mean((2, 3)))

    torch.manual_seed(0)
    model = Net().eval()
    x = torch.randn(48, 3, 8, 8)
    result = prune(model, x[:1], Budget(macs=0.5), queries=x)
    assert result.report.macs[1] <= 0.5 * result.report.macs[0]
    assert set(result.recipe.plain) == {"stem.weight", "a.weight", "b.weight", "c.weight", "head.weight"}
    assert result.model(torch.randn(3, 3, 11, 9)).shape == (3, 5)
