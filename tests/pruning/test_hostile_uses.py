"""Odd ways to call the library: each works, or ends in an error of ours that says what to do."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

from coreprune import Budget, InputError, list_groups, prune
from coreprune._twin import guarded, quiet
from coreprune.pruning.selectors.lookup import resolve
from small_networks import EXAMPLE, bits, mlp


@pytest.mark.parametrize(
    ("example", "advice"),
    [
        (torch.eye(8)[:1].to_sparse(), r"sparse_coo tensor.*to_dense"),
        (torch.eye(8)[:1].to_sparse_csr(), r"sparse_csr tensor.*to_dense"),
        (torch.nested.nested_tensor([torch.ones(2, 8)]), r"nested tensor.*to_padded_tensor"),
    ],
)
def test_examples_of_other_layouts(example, advice):
    with pytest.raises(InputError, match=advice):
        list_groups(mlp(), example)


@pytest.mark.parametrize("name", ["L2", "l2", "Bn_Scale", "FUNCTIONAL", "Auto"])
def test_names_of_selectors_in_any_case(name):
    assert resolve(name).name.casefold() in (name.casefold().replace("_", "-"), "functional")


@pytest.mark.parametrize("seed", [2**70, -1, True])
def test_seeds_that_are_none(seed):
    with pytest.raises(InputError, match="seed"):
        prune(mlp(), EXAMPLE, seed=seed)


def test_another_default_device_or_dtype():
    wanted = prune(mlp(), EXAMPLE, Budget(keep=0.5), n_queries=32)
    model = mlp()
    with torch.device("meta"):
        found = prune(model, EXAMPLE, Budget(keep=0.5), n_queries=32)
    assert bits(found.model) == bits(wanted.model)
    try:
        torch.set_default_dtype(torch.float64)
        found = prune(model, EXAMPLE, Budget(keep=0.5), n_queries=32)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert bits(found.model).keys() == bits(wanted.model).keys()


SEEN: set[str] = set()


class Makes(nn.Linear):
    def forward(self, x):
        SEEN.add(torch.zeros(1).device.type)
        return super().forward(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_forward_sees_the_callers_default_device(device):
    model = Makes(8, 3)
    SEEN.clear()
    with torch.device(device):
        with guarded(model), quiet(model) as still:
            still(EXAMPLE)
            assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).device.type == device
    assert {device} == SEEN


def test_results_can_be_pickled_and_copied():
    result = prune(mlp(), EXAMPLE, Budget(keep=0.5), n_queries=32)
    for other in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert bits(other.model) == bits(result.model)
        assert other.plan == result.plan
        assert str(other.report) == str(result.report)


def test_several_threads_at_once():
    model, found = mlp(), []
    wanted = prune(model, EXAMPLE, Budget(keep=0.5), n_queries=32)

    def work():
        found.append(prune(model, EXAMPLE, Budget(keep=0.5), n_queries=32))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bits(r.model) for r in found] == [bits(wanted.model)] * 3


def test_an_example_that_needs_gradients():
    x = EXAMPLE.clone().requires_grad_()
    result = prune(mlp(), x, Budget(keep=0.5), n_queries=32)
    assert x.grad is None
    assert bits(result.model) == bits(prune(mlp(), EXAMPLE, Budget(keep=0.5), n_queries=32).model)
