"""T4″ against the primal linear program, the definition at every breakpoint, and an adversary inside the cone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.coreset import _programs, cone_sensitivities, relative_limit, sensitivities
from coreprune.errors import InputError
from oracles import sensitivity_lp


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def everything(d: int) -> torch.Tensor:
    return torch.ones(d, dtype=torch.bool)


def layer(n: int, d: int, seed: int, kind: str) -> torch.Tensor:
    gen = seeded(seed)
    a = torch.randn(n, d, generator=gen, dtype=torch.float64)
    if kind == "mostly positive":
        a = a + 1.0
    if kind == "of all lengths":
        a = a * 10 ** torch.randn(n, 1, generator=gen, dtype=torch.float64)
    if kind == "whole numbers":  # with ties, parallel rows, and rows of zeros
        a = a.round()
    return a


KINDS = ("normal", "mostly positive", "of all lengths", "whole numbers")


@given(
    n=st.integers(1, 12),
    d=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    one_sided=st.booleans(),
)
@settings(max_examples=40)
def test_t4_cone_is_the_value_of_the_primal_program(n, d, seed, kind, share, one_sided):
    """Never below it, and within 0.2 % above it; exact where no coordinate has a sign, too."""
    a = layer(n, d, seed, kind)
    mask = torch.rand(d, generator=seeded(seed + 1)) < share
    found = cone_sensitivities(a, mask, one_sided=one_sided)
    for i in range(n):
        if not a[i].any():
            assert found[i] == 0
            continue
        exact = sensitivity_lp(a, i, one_sided, mask)
        assert exact - 1e-6 <= float(found[i]) <= 1.002 * exact + 1e-6


def ratio(a: torch.Tensor, x: torch.Tensor, one_sided: bool) -> torch.Tensor:
    """f⟨a_i,x⟩ / Σ_k f⟨a_k,x⟩ for every x and i, (m, n); 0 where nothing answers."""
    f = (x @ a.T).clamp(min=0) if one_sided else (x @ a.T).abs()
    return f / f.sum(dim=1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("one_sided", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_in_the_plane_it_is_the_largest_ratio_at_a_breakpoint(seed, one_sided):
    """Between directions where a channel starts or stops the ratio is monotone: breakpoints and axes decide."""
    a = layer(6, 2, seed, "normal")
    turned = torch.stack([-a[:, 1], a[:, 0]], dim=1)
    x = torch.cat([turned, -turned, torch.eye(2, dtype=torch.float64)])
    x = x[(x >= 0).all(dim=1)]
    near = torch.cat([x + 1e-7 * e for e in (0.0, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))])
    exact = ratio(a, near, one_sided).amax(dim=0)  # a channel may be the only one just beside a breakpoint
    found = cone_sensitivities(a, everything(2), one_sided=one_sided)
    assert torch.allclose(found, exact, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("one_sided", [True, False])
def test_no_input_of_the_cone_exceeds_it(one_sided):
    a = layer(30, 12, 1, "mostly positive")
    found = cone_sensitivities(a, everything(12), one_sided=one_sided)
    assert float(found.max()) < 0.9  # or this would show nothing
    x = torch.rand(4000, 12, generator=seeded(2), dtype=torch.float64) ** 4
    x *= torch.rand(4000, 12, generator=seeded(3)) < 0.3
    x.requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    worst = torch.zeros(30, dtype=torch.float64)
    own = torch.arange(4000) % 30
    for _ in range(60):
        shares = ratio(a, x, one_sided)
        worst = torch.maximum(worst, shares.detach().amax(dim=0))
        optimizer.zero_grad()
        (-shares[torch.arange(4000), own].sum()).backward()
        optimizer.step()
        with torch.no_grad():
            x.clamp_(min=0)
    assert bool((worst <= found * (1 + 1e-9) + 1e-12).all())
    assert float((worst / found).max()) > 0.95


def test_t7_is_about_all_inputs_and_not_about_those_that_end_in_one():
    """p = (1, −1), (1, 0): independent, so over all x both are 1. With x = (t, 1), relu(t − 1) is at most half."""
    a = torch.tensor([[1.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    assert relative_limit(a).independent
    assert sensitivities(a, method="exact", one_sided=True).bounds.tolist() == pytest.approx([1.0, 1.0])
    ends_in_one = torch.tensor([False, True])
    assert cone_sensitivities(a, ends_in_one).tolist() == pytest.approx([0.5, 1.0], rel=2e-3)
    t = torch.linspace(-100, 1e4, 10_001, dtype=torch.float64)
    shares = ratio(a, torch.stack([t, torch.ones_like(t)], dim=1), one_sided=True)
    assert 0.499 < float(shares[:, 0].max()) <= 0.5
    # Two-sided, x and −x are the same, so that the 1 at the end excludes nothing.
    assert cone_sensitivities(a, ends_in_one, one_sided=False).tolist() == pytest.approx([1.0, 1.0], rel=2e-3)


def test_independent_points_need_not_be_vacuous_behind_a_relu():
    a = layer(20, 40, 4, "mostly positive")
    assert relative_limit(a).independent
    found = sensitivities(a, method="cone", one_sided=True, nonnegative=everything(40))
    assert not found.vacuous
    assert found.total < 10 < sensitivities(a, method="exact", one_sided=True).total


def test_a_smaller_cone_never_has_larger_sensitivities():
    a = layer(12, 6, 5, "mostly positive")
    masks = [torch.arange(6) < k for k in range(7)]
    found = [cone_sensitivities(a, mask) for mask in masks]
    assert all(bool((b <= a * 1.002).all()) for a, b in itertools.pairwise(found))


def test_equal_channels_share_and_lengths_of_inputs_do_not_count():
    a = torch.cat([layer(5, 4, 6, "mostly positive"), torch.zeros(1, 4, dtype=torch.float64)])
    once = cone_sensitivities(a, everything(4))
    copies = torch.cat([a, 3.0 * a, a])
    assert torch.allclose(cone_sensitivities(copies, everything(4)), torch.cat([once, 3 * once, once]) / 5, rtol=2e-3)
    units = torch.tensor([1e-3, 1.0, 7.0, 1e3], dtype=torch.float64)
    assert torch.allclose(cone_sensitivities(a * units, everything(4)), once, rtol=2e-3)
    order = torch.randperm(6, generator=seeded(7))
    assert torch.allclose(cone_sensitivities(a[order], everything(4)), once[order], rtol=2e-3)


def test_a_program_that_is_stopped_early_still_bounds(monkeypatch):
    a = layer(10, 6, 8, "mostly positive")
    exact = cone_sensitivities(a, everything(6))
    loose = []
    for rounds in (1, 4, 6, 8):
        monkeypatch.setattr(_programs, "_ITERATIONS", rounds)
        loose.append(cone_sensitivities(a, everything(6)))
        assert bool((loose[-1] >= exact * (1 - 2e-3)).all())
    assert bool((loose[0] > loose[-1]).any())


def test_what_breaks_a_constraint_proves_nothing():
    """v = 0.4 e_1 + 0.4 e_2 reaches the third row, and not twice that row, of which only v = e_3 is known to do so."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.4, 0.4]], dtype=torch.float64)
    for length, proved in ((1.0, 0.4), (2.0, 1.0)):
        rows = torch.cat([a[:2], length * a[2:]])
        own = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
        programs = _programs.Programs(own, torch.ones_like(own), None, rows, two_sided=False)
        y = torch.tensor([[0.4, 0.4, -1.0, 0.0]], dtype=torch.float64)
        assert programs.proved(y).tolist() == [proved]


def test_sampling_by_it_has_a_variance_that_its_sum_bounds():
    """One draw with q = s/S has the second moment Σ V_k² a_k(x)²/q_k ≤ S · Σ_k c_k a_k(x) · Σ_k |V_k| a_k(x)."""
    points, outgoing = layer(25, 6, 9, "mostly positive"), layer(3, 25, 10, "normal")
    c = outgoing.abs().amax(dim=0)
    s = cone_sensitivities(c[:, None] * points, everything(6))
    x = torch.rand(3000, 6, generator=seeded(11), dtype=torch.float64) ** 3
    x *= torch.rand(3000, 6, generator=seeded(12)) < 0.5
    response = (x @ points.T).clamp(min=0)
    moment = (response.square() * (s.sum() / s)) @ outgoing.square().T
    bound = s.sum() * (response @ c)[:, None] * (response @ outgoing.abs().T)
    assert bool((moment <= bound * (1 + 1e-9)).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: cone_sensitivities(a, torch.ones(2, dtype=torch.bool)), "one entry per column"),
        (lambda a: cone_sensitivities(a, torch.ones(3)), "float32"),
        (lambda a: sensitivities(a, method="cone"), "which inputs are never negative"),
    ],
)
def test_wrong_input_is_explained(unchecked, call, message):
    with pytest.raises(InputError, match=message):
        call(layer(4, 3, 0, "normal"))
