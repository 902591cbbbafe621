"""No public function changes a model, its inputs or the random state, whether it succeeds or fails somewhere."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune import (
    ArtifactError,
    Budget,
    Distill,
    apply_plan,
    certify,
    compare_latency,
    export_program,
    list_groups,
    make_plan,
    make_queries,
    prune,
    save,
)
from graph.zoo import ZOO
from sweeps import thinned
from whole_state import whole_state
from zoo_examples import example


class Busy(nn.Module):
    """Writes wherever a forward can: buffers, caches, attributes, its input; draws numbers; has hooks and a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 12), nn.Linear(12, 3)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("table", None)
        self.cache: dict[str, Tensor] = {}
        self.seen: list[Tensor] = []
        self.config = SimpleNamespace(use_cache=True, heads=4)
        self.a.weight.requires_grad_(False)
        self.b.register_forward_hook(self.keep)
        self.keeper = lambda y: self.seen.append(y)

    def keep(self, _module: nn.Module, _given: tuple[Tensor, ...], made: Tensor) -> None:
        self.last = made

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[-1])
        h = F.relu(self.norm(self.a(x + self.table)))
        self.mean.mul_(0.9).add_(0.1 * h.mean(0).detach())
        self.cache["h"] = h
        self.keeper(h)
        h = F.dropout(F.relu(self.b(h - self.mean)), 0.5, self.training)
        return self.c(h + 0 * torch.rand(1))


def busy() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Busy().train()
        model.c.eval()
        model(torch.randn(4, 6)).sum().backward()  # warm: caches are filled, and there are gradients
        return model, torch.randn(1, 6)


SAMPLES = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
USES = {
    "list_groups": lambda m, x: list_groups(m, x),
    "make_plan": lambda m, x: make_plan(m, x, Budget(keep=0.5), n_queries=32),
    "apply_plan": lambda m, x: apply_plan(m, make_plan(m, x, Budget(keep=0.5), queries=None), x, queries=SAMPLES),
    "prune": lambda m, x: prune(m, x, Budget(keep=0.5), queries=SAMPLES),
    "prune, made queries": lambda m, x: prune(m, x, Budget(macs=0.5), n_queries=32),
    "prune, distilled": lambda m, x: prune(m, x, Budget(keep=0.5), queries=SAMPLES, distill=Distill(steps=3)),
    "make_queries": lambda m, x: make_queries(m, x, n=8),
    "certify": lambda m, x: certify(m, prune(m, x, queries=None).model, x, SAMPLES),
    "latency": lambda m, x: compare_latency(m, prune(m, x, queries=None).model, x, seconds=0.01),
}


@pytest.mark.parametrize("name", USES)
def test_nothing_is_changed(name: str) -> None:
    model, x = busy()
    before = whole_state(model, x, SAMPLES)
    USES[name](model, x)
    assert whole_state(model, x, SAMPLES) == before


def test_saving_and_exporting_change_nothing(tmp_path) -> None:
    model, x = busy()
    result = prune(model, x, Budget(keep=0.5), "magnitude", queries=None)
    several = torch.randn(2, 6)
    before, small = whole_state(model, x), whole_state(result.model, x)
    save(result, tmp_path / "one.coreprune")
    with contextlib.suppress(ArtifactError):  # a file whose forward adds to a buffer gives other numbers
        export_program(result.model, several, tmp_path / "one.pt2", batch="static")
    assert whole_state(model, x) == before
    assert whole_state(result.model, x) == small


class Stop(Exception):
    """Raised on purpose."""


# Where a call of prune() goes through.
PLACES = (
    "graph.captured.flatten",
    "graph.grouping.settle",
    "graph.smaller.cut",
    "graph.check.compare",
    "graph.check_runs.zeroed",
    "pruning.calibration.calibration.capture",
    "pruning.calibration.statistics.add",
    "pruning.stages.rank",
    "pruning.stages.decide",
    "pruning.stages.pour_",
    "pruning.repair.refit.fitted",
    "pruning.repair.descent._walked",
    "pruning.safety_net.apart_from",
    "pruning.summing_up.group_report",
    "pruning.stages.recipe_of",
    "graph.surgery._resize",
)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_failure_anywhere_leaves_everything_as_it_was(place: str, inplace: bool, monkeypatch) -> None:
    model, x = busy()
    before, reached = whole_state(model, x, SAMPLES), []

    def fail(*_: object, **__: object) -> None:
        reached.append(place)
        raise Stop

    monkeypatch.setattr(f"coreprune.{place}", fail)
    try:
        prune(model, x, Budget(keep=0.5), queries=SAMPLES, inplace=inplace)
    except Exception:
        assert whole_state(model, x, SAMPLES) == before
    else:  # what is not needed may fail, and the call succeed
        assert inplace or whole_state(model, x, SAMPLES) == before
    assert reached or (place.endswith("_resize") and not inplace)


def test_an_interruption_at_any_moment_leaves_everything_as_it_was() -> None:
    model, x = busy()
    calls: list[str] = []
    prune(model, x, Budget(keep=0.5), queries=SAMPLES, progress=lambda phase, *_: calls.append(phase))
    before = whole_state(model, x, SAMPLES)
    for stop in range(0, len(calls), max(1, len(calls) // 12)):
        left = [stop]

        def interrupt(*_: object, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune(model, x, Budget(keep=0.5), queries=SAMPLES, progress=interrupt, inplace=True)
        assert whole_state(model, x, SAMPLES) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", thinned(ZOO, 5))
def test_nothing_is_changed_in_any_architecture(name: str) -> None:
    entry = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        model = entry.build().double().train()
    inputs = entry.inputs(1)
    before = whole_state(model, *inputs.values())
    list_groups(model, example(inputs))
    plan = make_plan(model, example(inputs), Budget(keep=0.5), "magnitude", queries=None)
    apply_plan(model, plan, example(inputs))
    assert whole_state(model, *inputs.values()) == before
