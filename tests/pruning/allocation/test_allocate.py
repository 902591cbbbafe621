"""Widths from error curves: against every choice that there is."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from dataclasses import asdict

import pytest
import torch
from torch import nn

from coreprune import Budget, Plan, prune
from coreprune.errors import BudgetError, InputError
from coreprune.graph import CostModel, capture, find_groups
from coreprune.pruning.allocation.allocate import allocate
from coreprune.pruning.allocation.curves import balanced, widths_curve
from coreprune.pruning.plans import decide
from small_networks import EXAMPLE, mlp, widths

SIZES = (8, 10, 6)


def chain(sizes=SIZES):
    """An MLP with a group per hidden layer."""
    dims = [5, *sizes, 3]
    layers = [m for a, b in itertools.pairwise(dims) for m in (nn.Linear(a, b), nn.ReLU())][:-1]
    captured = capture(nn.Sequential(*layers), torch.zeros(1, 5))
    groups = find_groups(captured)
    return [g for g in groups if g.locked_because is None], groups, CostModel(captured, groups)


def convex(sizes=SIZES, seed=0, scale=(1.0, 3.0, 0.3)):
    """Falling convex error curves: sums of the smallest of decreasing gains."""
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for size, s, name in zip(sizes, scale, ("0", "2", "4"), strict=True):
        gains = torch.rand(size, generator=generator, dtype=torch.float64).sort(descending=True).values * s / 10
        curves[name] = torch.cat([gains.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    return curves


def total(curves, widths):
    return sum(float(curves[n][w]) for n, w in widths.items())


def every(free):
    for choice in itertools.product(*(range(1, g.size + 1) for g in free)):
        yield dict(zip((g.name for g in free), choice, strict=True))


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("seed", [0, 1])
def test_close_to_the_best_of_all_widths_and_never_above_the_budget(kind, share, seed):
    free, groups, cost = chain()
    curves = convex(seed=seed)
    found = allocate(Budget(**{kind: share}), groups, cost, curves)
    limit = share * getattr(cost(), kind)
    assert getattr(cost(found), kind) <= limit
    best = min(total(curves, w) for w in every(free) if getattr(cost(w), kind) <= limit)
    step = max(float(curves[n][w - 1] - curves[n][w]) for n, w in found.items() if w > 1)
    assert best <= total(curves, found) <= best + step + 1e-12
    for name, width in found.items():
        if width < len(curves[name]) - 1:
            assert getattr(cost({**found, name: width + 1}), kind) > limit


def greedy(curves, cost, limit, kind="macs"):
    """From the top: the step with the least error per unit of cost, at new prices every time; then what still fits."""
    widths = {name: len(curve) - 1 for name, curve in curves.items()}

    def spent(w):
        return getattr(cost(w), kind)

    def price(name):
        saved = spent(widths) - spent({**widths, name: widths[name] - 1})
        return float(curves[name][widths[name] - 1] - curves[name][widths[name]]) / saved

    while spent(widths) > limit:
        name = min((n for n in widths if widths[n] > 1), key=price)
        widths[name] -= 1
    raised = True
    while raised:
        raised = False
        steps = {n: float(curves[n][w + 1] - curves[n][w]) for n, w in widths.items() if w + 1 < len(curves[n])}
        for name in sorted(steps, key=lambda n: steps[n]):
            if spent({**widths, name: widths[name] + 1}) <= limit:
                widths[name] += 1
                raised = True
    return widths


@pytest.mark.parametrize("sizes", [(8, 10, 6), (4, 40, 8), (12, 3, 12)])
def test_the_cheapest_step_goes_first_at_the_price_that_it_has_now(sizes):
    """Prices rise as the neighbours shrink: one that was worked out before may no longer be the least."""
    _, groups, cost = chain(sizes)
    for seed in range(8):
        curves = convex(sizes, seed=seed)
        for share in (0.2, 0.35, 0.5, 0.65, 0.8):
            found = allocate(Budget(macs=share), groups, cost, curves)
            assert found == greedy(curves, cost, share * cost().macs), (seed, share)


def test_a_group_that_is_done_does_not_end_the_others():
    """Another step of group 0 is beyond the error that is left; a step of group 2 is dearer per MAC, and within it."""
    _, groups, cost = chain((4, 40, 4))
    curves = {
        "0": torch.linspace(1.6, 0, 5, dtype=torch.float64),
        "2": torch.linspace(4.0, 0, 41, dtype=torch.float64),
        "4": torch.linspace(400, 0, 5, dtype=torch.float64),
    }
    assert allocate(Budget(error=0.55), groups, cost, curves) == {"0": 3, "2": 39, "4": 4}


def test_curves_decide_and_uniform_ignores_them():
    _, groups, cost = chain()
    curves = convex(scale=(1.0, 1e-6, 1e-6))
    by_curve = allocate(Budget(macs=0.5), groups, cost, curves)
    assert by_curve["0"] == 8
    uniform = allocate(Budget(macs=0.5, uniform=True), groups, cost, curves)
    assert uniform == allocate(Budget(macs=0.5, uniform=True), groups, cost, None)
    assert uniform == allocate(Budget(macs=0.5), groups, cost, None)  # no two of these groups are alike
    shares = [w / s for w, s in zip(uniform.values(), SIZES, strict=True)]
    assert max(shares) - min(shares) <= 2 / 6


def test_a_cheap_step_behind_a_dear_one_is_seen():
    """The first unit of group 0 is dearer than any other step, and the seven behind it cost nothing more."""
    _, groups, cost = chain((8, 8, 8))
    cliff = torch.tensor([1.5] * 8 + [0.0], dtype=torch.float64)
    slope = torch.linspace(8, 0, 9, dtype=torch.float64)
    curves = {"0": cliff, "2": slope, "4": slope}
    full = {"0": 8, "2": 8, "4": 8}
    first_steps = {
        n: float(curves[n][7] - curves[n][8]) / (cost(full).macs - cost({**full, n: 7}).macs) for n in curves
    }
    assert max(first_steps, key=lambda n: first_steps[n]) == "0"  # so the curve itself gives this group up last
    found = allocate(Budget(macs=0.6), groups, cost, curves)
    assert found["0"] <= 2
    assert min(found["2"], found["4"]) >= 7


def test_equal_and_flat_curves_come_to_an_end():
    """Rounding can leave a curve that falls as units leave: two equal negative prices must not wait for each other."""
    _, groups, cost = chain((8, 8, 8))
    flat = torch.zeros(9, dtype=torch.float64)
    flat[-1] = 1e-3
    found = allocate(Budget(macs=0.4), groups, cost, {"0": flat, "2": flat, "4": flat})
    assert cost(found).macs <= 0.4 * cost().macs


@pytest.mark.parametrize("limit", [{"macs": 0.5}, {"params": 0.6}, {"error": 0.2}, {"keep": 0.4}])
@pytest.mark.parametrize("curves", [True, False])
def test_round_to_and_min_width_hold(limit, curves):
    if not curves and "error" in limit:
        pytest.skip("an error needs curves")
    _, groups, cost = chain((16, 24, 12))
    found = allocate(Budget(**limit, round_to=4, min_width=5), groups, cost, convex((16, 24, 12)) if curves else None)
    assert all(w % 4 == 0 and w >= 8 for w in found.values())


WIDE = (128, 200, 100)


def slopes(sizes):
    """Error curves of unequal slopes for `chain(sizes)`."""
    return {str(2 * i): torch.linspace(i + 3.0, 0, size + 1, dtype=torch.float64) ** 2 for i, size in enumerate(sizes)}


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
@pytest.mark.parametrize("share", [0.3, 0.55])
@pytest.mark.parametrize("curves", [True, False])
def test_wide_groups_keep_multiples_of_8_narrow_ones_any_number_and_none_could_keep_more(kind, share, curves):
    _, groups, cost = chain(WIDE)
    found = allocate(Budget(**{kind: share}), groups, cost, slopes(WIDE) if curves else None)
    limit = share * getattr(cost(), kind)
    assert getattr(cost(found), kind) <= limit
    assert found["0"] % 8 == 0
    assert found["2"] % 8 == 0
    for name, step in (("0", 8), ("2", 8), ("4", 1)):
        full = WIDE[int(name) // 2]
        if found[name] < full:
            assert getattr(cost({**found, name: min(found[name] + step, full)}), kind) > limit, name


@pytest.mark.parametrize("curves", [True, False])
def test_narrow_groups_are_free_in_their_widths(curves):
    sizes, odd = (127, 120, 100), set()
    _, groups, cost = chain(sizes)
    for share in (0.3, 0.35, 0.4):
        found = allocate(Budget(macs=share), groups, cost, slopes(sizes) if curves else None)
        odd |= {name for name, width in found.items() if width % 8}
    assert odd == {"0", "2", "4"}


def test_an_error_budget_rounds_wide_groups_too():
    _, groups, cost = chain(WIDE)
    found = allocate(Budget(error=0.3), groups, cost, slopes(WIDE))
    assert found["0"] % 8 == found["2"] % 8 == 0
    assert found != dict(zip(("0", "2", "4"), WIDE, strict=True))


def test_a_share_of_the_channels_is_a_number_of_channels():
    _, groups, cost = chain(WIDE)
    assert allocate(Budget(keep=0.41), groups, cost) == {"0": 52, "2": 82, "4": 41}


def test_an_explicit_round_to_is_obeyed_in_wide_and_narrow_groups():
    _, groups, cost = chain(WIDE)
    finest = allocate(Budget(macs=0.5, round_to=1), groups, cost)
    limit = 0.5 * cost().macs
    assert all(cost({**finest, name: width + 1}).macs > limit for name, width in finest.items())
    assert any(width % 8 for width in (finest["0"], finest["2"]))
    assert all(width % 5 == 0 for width in allocate(Budget(macs=0.5, round_to=5), groups, cost).values())


@pytest.mark.parametrize("curves", [True, False])
def test_no_budget_is_out_of_reach_because_of_rounding_that_nobody_asked_for(curves):
    free, groups, cost = chain(WIDE)
    least = cost({g.name: 1 for g in free}).macs
    found = allocate(Budget(macs=least, absolute=True), groups, cost, slopes(WIDE) if curves else None)
    assert found == {"0": 1, "2": 1, "4": 1}
    with pytest.raises(BudgetError, match="round_to"):
        allocate(Budget(macs=least, round_to=8, absolute=True), groups, cost)


@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.62, 0.8])
@pytest.mark.parametrize("sizes", [(16, 24, 16, 24, 16), (128, 30, 30, 128)])
def test_alike_groups_get_the_same_width_and_no_class_could_keep_one_step_more(kind, share, sizes):
    free, groups, cost = chain(sizes)
    found = allocate(Budget(**{kind: share}, uniform=True), groups, cost)
    limit = share * getattr(cost(), kind)
    assert getattr(cost(found), kind) <= limit
    for size in set(sizes):
        names = [g.name for g in free if g.size == size]
        width = found[names[0]]
        assert {found[name] for name in names} == {width}
        if width < size:
            wider = min(width + (8 if size >= 128 else 1), size)
            assert getattr(cost({**found, **dict.fromkeys(names, wider)}), kind) > limit
    shares = [width / size for width, size in zip(found.values(), sizes, strict=True)]
    assert max(shares) - min(shares) <= 2 * max(8 / 128, 1 / 16)


def test_without_uniform_alike_groups_share_out_what_is_left():
    """The finest filling: one of two alike groups may be a step wider."""
    sizes = (16, 16, 16)
    _, groups, cost = chain(sizes)
    apart = [
        share
        for share in torch.linspace(0.3, 0.7, 21).tolist()
        if len(set(allocate(Budget(macs=share), groups, cost).values())) > 1
    ]
    assert apart
    assert all(len(set(allocate(Budget(macs=s, uniform=True), groups, cost).values())) == 1 for s in apart)


def test_heads_and_blocks_are_counted_in_channels():
    captured = capture(
        nn.Sequential(
            nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 128, 1, groups=4), nn.ReLU(), nn.Conv2d(128, 3, 1)
        ),
        torch.zeros(1, 3, 2, 2),
    )
    groups = find_groups(captured)
    cost = CostModel(captured, groups)
    found = allocate(Budget(macs=0.4), groups, cost)
    for g in groups:
        if g.name in found:
            channels = found[g.name] * g.unit * (1 if g.sections is None else int(g.sections.max()) + 1)
            assert channels % 8 == 0
            assert channels < g.size


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.4])
def test_the_error_is_kept_and_no_group_can_give_up_more(epsilon):
    _, groups, cost = chain()
    curves = convex()
    found = allocate(Budget(error=epsilon), groups, cost, curves)
    assert total(curves, found) <= epsilon
    assert found != dict(zip(("0", "2", "4"), SIZES, strict=True))
    for name, width in found.items():
        if width > 1:
            assert total(curves, {**found, name: width - 1}) > epsilon


def test_an_error_budget_needs_curves():
    _, groups, cost = chain()
    with pytest.raises(BudgetError, match="queries"):
        allocate(Budget(error=0.1), groups, cost)


@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
@pytest.mark.parametrize("curves", [True, False])
def test_a_budget_out_of_reach_names_the_least_that_can_be_reached(kind, curves):
    free, groups, cost = chain()
    least = min(getattr(cost(w), kind) for w in every(free))
    with pytest.raises(BudgetError, match=re.escape(f"{least:,} are left")):
        allocate(Budget(**{kind: 0.01}), groups, cost, convex() if curves else None)
    found = allocate(Budget(**{kind: least}, absolute=True), groups, cost, convex() if curves else None)
    assert getattr(cost(found), kind) == least


def test_blocks_keep_the_same_number_each():
    captured = capture(
        nn.Sequential(nn.Conv2d(3, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1, groups=4), nn.ReLU(), nn.Conv2d(8, 3, 1)),
        torch.zeros(1, 3, 4, 4),
    )
    groups = find_groups(captured)
    group = next(g for g in groups if g.sections is not None and g.locked_because is None)
    units, blocks = group.size // group.unit, int(group.sections.max()) + 1
    order = torch.randperm(units, generator=torch.Generator().manual_seed(0))
    fair = balanced(order, group)
    for w in range(units // blocks + 1):
        counts = torch.bincount(group.sections[fair[: w * blocks]], minlength=blocks)
        assert counts.tolist() == [w] * blocks
    for b in range(blocks):  # within a block the order stays
        mine = group.sections == b
        assert fair[mine[fair]].tolist() == order[mine[order]].tolist()
    errors = torch.arange(units + 1, 0, -1, dtype=torch.float64)
    assert widths_curve(errors, group).tolist() == errors[::blocks].tolist()
    assert len(widths_curve(errors, group)) == units // blocks + 1


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"macs": 0.5, "keep": 0.5}, "one of"),
        ({"macs": 0.5, "error": 0.1}, "one of"),
        ({"keep": 0}, "remove every channel"),
        ({"macs": -1}, "remove every channel"),
        ({"keep": 1.5}, "more than everything"),
        ({"params": float("nan")}, "number"),
        ({"bytes": float("inf")}, "number"),
        ({"macs": True}, "number"),
        ({"macs": "half"}, "number"),
        ({"error": 1.0}, "below 1"),
        ({"error": 0.1, "uniform": True}, "uniform"),
        ({"keep": {}}, "shares by names or patterns"),
        ({"keep": {3: 0.5}}, "shares by names or patterns"),
        ({"keep": {"": 0.5}}, "shares by names or patterns"),
        ({"keep": [("0", 0.5)]}, "must be a number"),
        ({"keep": {"0": 0.5, "2": 1.5}}, "groups '2': keep=1.5 is more than everything"),
        ({"keep": {"2": 0}}, "groups '2': keep=0 would remove every channel"),
        ({"keep": {"2": True}}, "groups '2': keep must be a number"),
        ({"keep": {"2": float("nan")}}, "groups '2': keep must be a number"),
        ({"keep": {"2": 0.5}, "macs": 0.5}, "keep and macs are given"),
        ({"cost": 0}, "remove every channel"),
        ({"cost": 0.5, "macs": 0.5}, "macs and cost are given"),
        ({"macs": 0.5, "absolute": True}, "a share of the dense model, so it does not go with absolute"),
        ({"bytes": 1, "absolute": True}, "a share of the dense model"),
        ({"keep": 0.5, "absolute": True}, "keep is always a share"),
        ({"keep": {"2": 0.5}, "absolute": True}, "keep is always a share"),
        ({"error": 0.5, "absolute": True}, "error is always a share"),
        ({"absolute": True}, "keep is always a share"),
        ({"macs": 500, "absolute": 1}, "absolute must be True or False"),
        ({"min_width": 0}, "min_width"),
        ({"round_to": 2.5}, "round_to"),
        ({"round_to": True}, "round_to"),
        ({"round_to": 0}, "round_to"),
        ({"min_width": None}, "min_width"),
    ],
)
def test_budgets_that_contradict_themselves_are_refused(given, match, unchecked):
    with pytest.raises(BudgetError, match=match):
        Budget(**given)


def test_no_budget_is_half_of_the_channels():
    assert (Budget().kind, Budget().keep, Budget().round_to) == ("keep", 0.5, None)
    assert [Budget(**{k: 0.5}).kind for k in ("keep", "macs", "params", "bytes", "cost", "error")] == [
        "keep", "macs", "params", "bytes", "cost", "error",
    ]  # fmt: skip


@pytest.mark.parametrize("value", [1.5, 50, 99.9, 100])
@pytest.mark.parametrize(("kind", "word"), [("macs", " MACs"), ("params", " parameters"), ("bytes", " bytes")])
def test_a_number_that_may_be_a_percentage_is_asked_about(kind, word, value):
    _, groups, cost = chain(WIDE)
    dense = f"{getattr(cost(), kind):,}"
    asked = f"{value:g}{word} of {dense}: did you mean {value / 100:g}?"
    with pytest.raises(BudgetError, match=re.escape(asked)) as caught:
        allocate(Budget(**{kind: value}), groups, cost)
    assert f"Budget({kind}={value:g}, absolute=True)" in str(caught.value)
    least = getattr(cost(dict.fromkeys(("0", "2", "4"), 1)), kind)
    if least <= value:  # what it says works
        found = allocate(Budget(**{kind: value}, absolute=True), groups, cost)
        assert getattr(cost(found), kind) <= value


def test_larger_numbers_are_absolute_without_being_asked_about():
    _, groups, cost = chain(WIDE)
    assert allocate(Budget(macs=400), groups, cost) == allocate(Budget(macs=400, absolute=True), groups, cost)


def test_the_question_comes_before_any_query_is_made(unchecked):
    def never(*_):
        raise AssertionError("queries were made")

    with pytest.raises(BudgetError, match=r"did you mean 0\.5"):
        prune(mlp(), EXAMPLE, Budget(macs=50), queries=never)


# Shares by patterns


def test_the_first_pattern_decides_and_the_others_stay_whole():
    _, groups, cost = chain(WIDE)
    assert allocate(Budget(keep={"2": 0.5}), groups, cost) == {"0": 128, "2": 100, "4": 100}
    assert allocate(Budget(keep={"0": 0.25, "*": 0.5}), groups, cost) == {"0": 32, "2": 100, "4": 50}
    assert allocate(Budget(keep={"[02]": 0.25, "4": 1}), groups, cost) == {"0": 32, "2": 50, "4": 100}
    assert allocate(Budget(keep={"*": 0.41}), groups, cost) == allocate(Budget(keep=0.41), groups, cost)


def test_rounding_and_the_least_width_hold_for_the_groups_that_are_named():
    _, groups, cost = chain(WIDE)
    found = allocate(Budget(keep={"2": 0.01, "4": 0.33}, min_width=5, round_to=8), groups, cost)
    assert found == {"0": 128, "2": 8, "4": 40}
    small = chain((8, 10, 6))[1]
    assert allocate(Budget(keep={"2": 0.1}, min_width=7), small, cost)["4"] == 6  # which is whole


@pytest.mark.parametrize(
    ("keep", "error", "says"),
    [
        ({"layer1.*": 0.5}, InputError, r"keep=\{'layer1\.\*': …\} matches no group .* e\.g\. 0, 2, 4"),
        ({"*": 0.5, "2": 0.8}, BudgetError, r"'2': …\} has no effect, because '\*' comes before it .* put '2' first"),
        ({"6": 0.5}, BudgetError, r"have to stay whole \(6: model output\)"),
        ({"[6]": 0.5}, BudgetError, r"have to stay whole \(6: model output\)"),
        ({"6": 0.5, "*": 0.5}, BudgetError, r"have to stay whole \(6: model output\)"),
    ],
)
def test_patterns_that_mean_nothing(keep, error, says):
    _, groups, cost = chain()
    with pytest.raises(error, match=says):
        allocate(Budget(keep=keep), groups, cost)


def test_a_budget_by_patterns_is_frozen_hashable_and_json():
    given = {"2": 0.5, "*": 0.25}
    budget = Budget(keep=given)
    given["0"] = 1
    assert budget == Budget(keep={"2": 0.5, "*": 0.25})
    assert hash(budget) == hash(Budget(keep={"2": 0.5, "*": 0.25}))
    assert Budget(**json.loads(json.dumps(asdict(budget)))) == budget
    with pytest.raises(dataclasses.FrozenInstanceError):
        budget.keep = 0.5


def test_a_plan_by_patterns_survives_json_and_the_call_in_the_report():
    result = prune(mlp(), EXAMPLE, Budget(keep={"0": 0.25}), "l2", queries=None)
    assert widths(result.model) == [6, 12, 3]
    assert Plan.from_json(result.plan.to_json()).budget["keep"] == {"0": 0.25}
    assert 'Budget(keep={"0": 0.25})' in result.report.settings.call()


# A cost of one's own


def milliseconds(widths):
    """A layer's time goes up with every eighth channel only."""
    return 0.02 + sum(w * 1e-3 * -(-channels // 8) for w, channels in zip((5, 1, 3, 2), widths.values(), strict=True))


@pytest.mark.parametrize("share", [0.55, 0.7, 0.9])
@pytest.mark.parametrize("curves", [True, False])
@pytest.mark.parametrize("sizes", [(40, 64, 24), WIDE])
def test_a_cost_in_steps_is_met_and_every_group_is_as_wide_as_its_step_allows(share, curves, sizes):
    _, groups, _ = chain(sizes)
    dense = milliseconds({g.name: g.size for g in groups})
    found = allocate(Budget(cost=share), groups, milliseconds, slopes(sizes) if curves else None)
    everything = {g.name: g.size for g in groups} | found
    assert milliseconds(everything) <= share * dense
    for name, full in zip(("0", "2", "4"), sizes, strict=True):
        if found[name] < full:
            wider = min(found[name] + (8 if full >= 128 else 1), full)
            assert milliseconds({**everything, name: wider}) > share * dense


def test_a_cost_in_steps_takes_the_cheap_error_first():
    """Stepping down a channel at a time saves nothing at first; the group must not look useless for that."""
    _, groups, _ = chain((64, 64, 64))
    curves = {n: s * torch.linspace(1, 0, 65, dtype=torch.float64) for n, s in (("0", 1.0), ("2", 1e-3), ("4", 1.0))}
    found = allocate(Budget(cost=0.97), groups, lambda w: sum(-(-c // 8) for c in w.values()), curves)
    assert found == {"0": 64, "2": 56, "4": 64}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("curves", [True, False])
@pytest.mark.parametrize("limit", [{"cost": 0.6}, {"cost": 45.0, "absolute": True}, {"cost": 0.5, "uniform": True}])
def test_a_cost_that_is_not_monotone_is_never_exceeded(seed, curves, limit):
    """Measured tables have dents: the wider layer is at times the faster one."""
    _, groups, _ = chain((16, 24, 16))
    generator = torch.Generator().manual_seed(seed)
    table = {g.name: torch.arange(g.size + 1) + 8 * torch.rand(g.size + 1, generator=generator) for g in groups}

    def cost(widths):
        return sum(float(table[name][width]) for name, width in widths.items())

    whole = {g.name: g.size for g in groups}
    budget = Budget(**limit)
    found = allocate(budget, groups, cost, slopes((16, 24, 16)) if curves else None)
    most = budget.cost if budget.absolute else budget.cost * cost(whole)
    assert cost(whole | found) <= most
    if not budget.uniform:
        for name, width in found.items():
            if width < whole[name]:
                assert cost(whole | found | {name: width + 1}) > most


def test_a_cost_whose_narrowest_widths_do_not_fit_is_refused():
    _, groups, _ = chain()
    with pytest.raises(BudgetError, match=r"cost=0\.5 allows 5 of the dense model's 10, but .* least width 9 are left"):
        allocate(Budget(cost=0.5), groups, lambda w: 10.0 if w["0"] == 8 else 9.0 if w["0"] == 1 else 0.1)


def test_an_error_budget_makes_the_own_cost_as_small_as_it_allows():
    _, groups, cost = chain((8, 8, 8))
    curves = {n: 0.1 * torch.linspace(1, 0, 9, dtype=torch.float64) for n in ("0", "2", "4")}
    by_cost = allocate(Budget(error=0.1), groups, lambda w: 100 * w["4"] + w["0"] + w["2"], curves)
    assert by_cost["4"] == 1
    assert allocate(Budget(error=0.1), groups, cost, curves) != by_cost


def test_the_cost_sees_all_groups_and_may_be_a_tensor():
    _, groups, cost = chain()
    seen = []

    def my_cost(widths):
        seen.append(dict(widths))
        return torch.tensor(float(cost(widths).params))

    assert allocate(Budget(cost=0.5), groups, my_cost) == allocate(Budget(params=0.5), groups, cost)
    assert all(set(widths) == {g.name for g in groups} for widths in seen)


def raises(widths):
    return {"0": 1.0}[widths["0"]]


@pytest.mark.parametrize(
    ("cost", "says"),
    [
        (lambda w: None, r"returned None at the widths \{'0': 8, '2': 10"),
        (lambda w: float("nan"), "returned nan"),
        (lambda w: -1.0, r"returned -1\.0"),
        (lambda w: True, "returned True"),
        (lambda w: "3", "returned '3'"),
        (lambda w: torch.ones(2), r"returned tensor\(\[1\., 1\.\]\)"),
        (raises, "the cost function failed with KeyError: 8"),
    ],
)
def test_what_a_cost_must_not_return(cost, says):
    with pytest.raises(InputError, match=says):
        allocate(Budget(cost=0.5), chain()[1], cost)


def test_the_budget_and_the_cost_go_together():
    _, groups, cost = chain()
    with pytest.raises(InputError, match="limits a cost of your own, but none is given"):
        allocate(Budget(cost=0.5), groups, cost)
    with pytest.raises(InputError, match=r"limits macs\. Limit it with Budget"):
        allocate(Budget(macs=0.5), groups, milliseconds)
    with pytest.raises(BudgetError, match=r"50 of 10\.2: did you mean 0\.5\?.*Budget\(cost=50, absolute=True\)"):
        allocate(Budget(cost=50), groups, lambda w: 10.2)
    assert allocate(Budget(cost=0.9, absolute=True), groups, lambda w: w["0"] / 10) == {"0": 8, "2": 10, "4": 6}
    assert allocate(Budget(cost=0.5, absolute=True), groups, lambda w: w["0"] / 10) == {"0": 5, "2": 10, "4": 6}


def test_min_width_above_a_group_is_refused():
    _, groups, cost = chain()
    with pytest.raises(BudgetError, match="Lower min_width to"):
        allocate(Budget(macs=0.5, min_width=7), groups, cost, convex())


def test_groups_without_a_share_are_not_ranked(monkeypatch):
    """They stay whole whatever their ranking says; those of a model of 7 billion parameters take an hour."""
    ranked, real = [], decide._ranked
    note = lambda traced, selector, name, *more: ranked.append(name) or real(traced, selector, name, *more)  # noqa: E731
    monkeypatch.setattr(decide, "_ranked", note)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4))
    result = prune(model, torch.zeros(1, 6), Budget(keep={"0": 0.5, "2": 1.0}), queries=None, repair=False)
    assert ranked == ["0"]
    assert [layer.out_features for layer in result.model[::2]] == [4, 10, 4]
    reasons = {group.name: group.locked_because for group in result.report.groups}
    assert reasons["2"] == "keep=... gives no share for it"
