"""Models whose weights accelerate brings when a module runs: pruned as if they were in memory, and left as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from torch import nn

from coreprune import Budget, InputError, ModelError, Repair, apply_plan, list_groups, make_plan, prune

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
HALF = Budget(macs=0.6)
QUICK = {"repair": Repair(descent=False), "compare": False}
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.norm(self.up(x))))


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(Block(), Block(), nn.Linear(16, 4)).eval()


def in_memory(folder: Path) -> nn.Module:
    return accelerate.cpu_offload(net(), execution_device=CPU, offload_buffers=True)


def on_disk(folder: Path) -> nn.Module:
    return accelerate.disk_offload(net(), str(folder), execution_device=CPU)


def in_parts(folder: Path) -> nn.Module:
    parts = {"0": "cpu", "1": "disk", "2": "cpu"}
    return accelerate.dispatch_model(net(), parts, main_device="cpu", offload_dir=str(folder), force_hooks=True)


WAYS: list[Callable[[Path], nn.Module]] = [in_memory, on_disk, in_parts]


@pytest.mark.parametrize("offloaded", WAYS)
def test_the_result_is_that_of_the_model_in_memory(offloaded, tmp_path):
    model, want = offloaded(tmp_path), prune(net(), X[:1], HALF, queries=X, **QUICK)
    assert any(p.is_meta for p in model.parameters())
    before = {n: (id(p), p.is_meta) for n, p in model.named_parameters()}
    hooks = [id(vars(m).get("_hf_hook")) for m in model.modules()]
    result = prune(model, X[:1], HALF, queries=X, **QUICK)
    assert result.plan == want.plan
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), want.model.parameters(), strict=True))
    assert not any("_hf_hook" in vars(m) or "forward" in vars(m) for m in result.model.modules())
    assert before == {n: (id(p), p.is_meta) for n, p in model.named_parameters()}
    assert hooks == [id(vars(m).get("_hf_hook")) for m in model.modules()]
    assert torch.equal(model(X), net()(X))


def test_plans_and_groups_too(tmp_path):
    model = on_disk(tmp_path)
    assert list_groups(model, X[:1]).groups == list_groups(net(), X[:1]).groups
    plan = make_plan(model, X[:1], HALF, queries=X)
    small, want = (apply_plan(m, plan, queries=X, repair=QUICK["repair"]) for m in (model, net()))
    assert torch.equal(small(X), want(X))


def test_modules_of_the_model_name_those_of_the_copy(tmp_path):
    model = on_disk(tmp_path)
    whole = prune(model, X[:1], Budget(keep=0.5), "magnitude", queries=None, exclude=[model[0]])
    assert [b.up.out_features for b in (whole.model[0], whole.model[1])] == [32, 16]
    part = prune(model, X[:1], Budget(keep=0.5), "magnitude", queries=None, part=model[1])
    assert [b.up.out_features for b in (part.model[0], part.model[1])] == [32, 16]


def test_shared_weights_stay_shared():
    def tied() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(12, 16), nn.Flatten(), Block(), nn.Linear(16, 12, bias=False)).eval()
        model[3].weight = model[0].weight
        return model

    model = accelerate.cpu_offload(tied(), execution_device=CPU)
    assert model[3].weight.is_meta
    ids = torch.randint(12, (64, 1), generator=torch.Generator().manual_seed(1))
    small, want = (prune(m, ids[:1], Budget(params=0.8), queries=ids, **QUICK).model for m in (model, tied()))
    assert small[3].weight is small[0].weight
    assert torch.equal(small(ids), want(ids))


def test_what_cannot_be_done_is_said(tmp_path):
    model = on_disk(tmp_path)
    with pytest.raises(InputError, match="inplace=True does not go with a Sequential whose weights accelerate keeps"):
        prune(model, X[:1], HALF, queries=X, inplace=True)

    own = net()
    own[0].forward = own[0].forward  # what a user has patched
    patched = accelerate.cpu_offload(own, execution_device=CPU)
    patched[0].up._old_forward = lambda x: x
    with pytest.raises(ModelError, match=r"0\.up had a forward of its own before accelerate wrapped it"):
        list_groups(patched, X[:1])

    damaged = on_disk(tmp_path / "other")
    next((tmp_path / "other").glob("1.up.weight*")).unlink()
    with pytest.raises(ModelError, match=r"accelerate cannot read weight"):
        list_groups(damaged, X[:1])
