"""Arguments of prune() that say what stays whole, how many queries there are, and what may not go together."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune import Budget, BudgetError, InputError, apply_plan, list_groups, make_plan, prune
from small_networks import EXAMPLE, bits, mlp, widths


class Shared(nn.Module):
    """One container under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 12), nn.ReLU())
        self.head = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 3))
        self.again = self.body

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("way", [lambda m: m[2], lambda m: [m[2]], lambda m: (m[2], "2"), lambda m: {m[2]}])
def test_a_module_keeps_what_it_makes_whole(way):
    model = mlp()
    result = prune(model, EXAMPLE, Budget(keep=0.5), "l2", queries=None, exclude=way(model))
    assert widths(result.model) == [12, 12, 3]
    assert result.report.locked["2"] == "excluded by the caller (module '2')"


def test_a_container_keeps_all_inside_it_whole_whatever_it_is_called():
    model = Shared()
    plan = make_plan(model, EXAMPLE, Budget(keep=0.5), "l2", queries=None, exclude=model.again)
    assert set(plan.groups) == {"head.0"}


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (nn.Linear(2, 2), "a Linear is given that is not a module of this model"),
        ("nothing.*", r"exclude='nothing\.\*' matches no group"),
        (3, "names or patterns of groups, or modules"),
        ("", "names or patterns of groups, or modules"),
    ],
)
def test_what_cannot_be_excluded_is_refused(item, said, unchecked):
    model = mlp()
    before = bits(model)
    with pytest.raises(InputError, match=said):
        prune(model, EXAMPLE, Budget(keep=0.5), "l2", queries=None, exclude=(item,))
    assert bits(model) == before


def test_a_module_that_makes_no_channels_is_refused():
    model = mlp()
    with pytest.raises(InputError, match=r"no layer inside '1' \(ReLU\) makes channels"):
        prune(model, EXAMPLE, Budget(keep=0.5), "l2", queries=None, exclude=model[1])


@pytest.mark.parametrize("n", [7, 40])
def test_as_many_queries_as_asked_for(n):
    made = prune(mlp(), EXAMPLE, Budget(keep=0.5), queries="white-noise", n_queries=n)
    given = prune(mlp(), EXAMPLE, Budget(keep=0.5), queries=torch.randn(50, 8), n_queries=n)
    assert len(made.queries) == len(given.queries) == n
    plan = make_plan(mlp(), EXAMPLE, Budget(macs=0.5), queries="white-noise", n_queries=n)
    assert apply_plan(mlp(), plan, EXAMPLE, queries="white-noise", n_queries=n) is not None


@pytest.mark.parametrize("n", [0, -1, 2.5, True, "many"])
def test_a_number_of_queries_that_is_none_is_refused(n, unchecked):
    with pytest.raises(InputError, match="n_queries"):
        prune(mlp(), EXAMPLE, Budget(keep=0.5), n_queries=n)


def test_a_checkpoint_without_distillation_is_refused(tmp_path):
    """It was ignored without a word, and the user waited for a file that never came."""
    with pytest.raises(InputError, match="distill=0 asks for none"):
        prune(mlp(), EXAMPLE, Budget(keep=0.5), checkpoint=tmp_path / "state")


def test_a_result_says_what_it_is_in_one_line():
    """The repr of a dataclass printed the whole network, the plan and every query."""
    result = prune(mlp(), EXAMPLE, Budget(keep=0.5), "l2", queries=None)
    before, after = result.report.macs
    assert f"macs {before:,} → {after:,}" in repr(result)
    assert len(repr(result)) < 200
    assert result._repr_html_() == result.report._repr_html_()
    assert str(list_groups(mlp(), EXAMPLE)).count("\n") >= 3


def test_a_wrong_repair_is_refused_without_queries_too(unchecked):
    """It was ignored where there were no queries, as if it had been understood."""
    with pytest.raises(InputError, match="repair must be True, False or Repair"):
        prune(mlp(), EXAMPLE, Budget(keep=0.5), "l2", queries=None, repair="yes")


def test_the_whole_model_excluded_is_called_so():
    model = mlp()
    with pytest.raises(BudgetError, match=r"excluded by the caller \(the whole model\)"):
        prune(model, EXAMPLE, Budget(macs=0.5), "l2", queries=None, exclude=model)
