"""Random small networks against the oracle: the original that reads zeros."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coreprune.graph import CostModel, Traced, capture, find_groups, remove
from graph.oracle import assert_same, measured_macs, random_halves, zeroed_original
from graph.random_networks import KINDS, LOCKING, RandomNet
from graph.zoo import gen, randomise

steps = st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from([4, 6, 8, 10])), min_size=1, max_size=6)


def check(kinds: list[tuple[str, int]], flatten: bool, seed: int, free: bool = False) -> None:
    model = randomise(RandomNet(kinds, flatten), seed)
    x = tuple(torch.randn(3, c, 4, 4, generator=gen(seed + c), dtype=torch.float64) for c in (3, 2))
    captured = capture(model, x)
    groups = find_groups(captured)
    keep = random_halves(groups, gen(seed + 1))
    result = remove(Traced(model, captured, groups), keep)
    with torch.no_grad():
        want = zeroed_original(model, groups, result.kept)(*x)
        assert_same([result.model(*x)], [want])
        # What the rules promise also holds without the comparison that `remove` makes: a lock is then the only excuse.
        if not result.locked and keep:
            trusting = remove(Traced(model, captured, groups), keep, check=False)
            assert_same([trusting.model(*x)], [want])
    costs = CostModel(captured, groups)
    left = costs({n: len(k) for n, k in result.kept.items()})
    assert left.params == sum(p.numel() for p in result.model.parameters())
    assert [costs().macs, left.macs] == [measured_macs(m, captured) for m in (model, result.model)]
    if free:
        assert not result.locked


@pytest.mark.slow
@pytest.mark.parametrize("flatten", [False, True])  # two tests, for two processes
@settings(max_examples=250)
@given(kinds=steps, seed=st.integers(0, 100))
def test_random_networks_equal_their_zeroed_originals(flatten: bool, kinds: list[tuple[str, int]], seed: int) -> None:
    check(kinds, flatten, seed)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("part", range(10))
@settings(max_examples=int(os.environ.get("COREPRUNE_NETWORKS", "100")))
@given(kinds=steps, flatten=st.booleans(), seed=st.integers(0, 10_000))
def test_many_random_networks(part: int, kinds: list[tuple[str, int]], flatten: bool, seed: int) -> None:
    """In ten parts, for several processes. COREPRUNE_NETWORKS: how many networks in each, 1,000 for the docs' count."""
    # Every part gets the same draws, because they are derandomised: it makes other networks of them.
    others = [(KINDS[(KINDS.index(kind) + 5 * part) % len(KINDS)], width) for kind, width in kinds]
    check(others, flatten, 10_001 * part + seed)


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_alone(kind: str) -> None:
    check([("conv", 8), (kind, 6), ("conv", 4)], False, 0, free=kind not in LOCKING)
