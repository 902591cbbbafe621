"""Widths from error curves: against every choice that there is."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch import nn

from coreprune import Budget
from coreprune.errors import BudgetError
from coreprune.graph import CostModel, capture, find_groups
from coreprune.pruning.allocation.allocate import allocate, balanced, widths_curve

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
    found = allocate(Budget(macs=least), groups, cost, slopes(WIDE) if curves else None)
    assert found == {"0": 1, "2": 1, "4": 1}
    with pytest.raises(BudgetError, match="round_to"):
        allocate(Budget(macs=least, round_to=8), groups, cost)


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
    found = allocate(Budget(**{kind: least}), groups, cost, convex() if curves else None)
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
    assert [Budget(**{k: 0.5}).kind for k in ("keep", "macs", "params", "bytes", "error")] == [
        "keep", "macs", "params", "bytes", "error",
    ]  # fmt: skip


def test_min_width_above_a_group_is_refused():
    _, groups, cost = chain()
    with pytest.raises(BudgetError, match="Lower min_width to"):
        allocate(Budget(macs=0.5, min_width=7), groups, cost, convex())
