"""Where there is an accelerator: a model on it gets the plan that it gets on the CPU, and the same weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune import Budget, Distill, Repair, load, prune, save
from coreprune.selectors import Folding, Loewner, Merging, Mussay
from graph.zoo import ZOO
from zoo_examples import call, example

HERE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = pytest.mark.skipif(HERE is None, reason="this machine has no accelerator")

NETWORKS = ("vgg", "densenet", "mobilenet-v2", "efficientnet", "swin", "bert", "llama-gqa", "t5", "mixtral", "unet")
CALLS: dict[str, dict[str, Any]] = {
    "functional": {},
    "without queries": {"method": "magnitude", "queries": None, "n_queries": None},
    "loewner": {"method": Loewner()},
    "mussay": {"method": Mussay()},
    "merging": {"method": Merging()},
    "folding": {"method": Folding()},
    "distilled": {"distill": Distill(steps=20)},
    "with descent": {"repair": Repair(descent=True)},
    "memory": {"memory": "64MiB"},
}


def there(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(HERE), value)


def pruned(model: nn.Module, inputs: Any, **options: Any) -> Any:
    return prune(model, inputs, Budget(macs=0.6), **options)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_plan_and_weights(name):
    entry = ZOO[name]
    model = entry.build().double().eval()
    inputs, queries = example(entry.inputs(2)), example(entry.inputs(32))
    repair = Repair(descent=False)  # training, of queries too, multiplies the errors of rounding
    here = pruned(copy.deepcopy(model), inputs, queries=queries, repair=repair)
    moved = copy.deepcopy(model).to(HERE)
    far = pruned(moved, there(inputs), queries=there(queries), repair=repair)
    assert far.plan.groups.keys() == here.plan.groups.keys()
    assert {n: g.kept for n, g in far.plan.groups.items()} == {n: g.kept for n, g in here.plan.groups.items()}
    assert {p.device.type for p in far.model.parameters()} == {HERE.type}
    assert {p.device.type for p in moved.parameters()} == {HERE.type}
    wanted = call(here.model, entry.inputs(3))
    found = call(far.model, there(entry.inputs(3))).cpu()
    assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", CALLS)
def test_every_way_to_call_it(name, tmp_path):
    entry = ZOO["vgg"]
    model = entry.build().double().eval().to(HERE)
    inputs = there(example(entry.inputs(2)))
    result = pruned(model, inputs, **{"n_queries": 32, **CALLS[name]})
    assert result.report.macs[1] <= 0.6 * result.report.macs[0]
    save(result, tmp_path / "small")
    again = load(tmp_path / "small", model)
    x = there(entry.inputs(3))
    assert torch.allclose(call(again, x), call(result.model, x))
