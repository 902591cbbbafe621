"""One way to say where randomness comes from: `seed=` in every public function, a number or a generator."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import numpy as np
import pytest
import torch

import coreprune
from coreprune._seed import as_generator, check_seed
from coreprune.errors import InputError


def test_a_number_starts_a_new_generator_each_time():
    first, second = (torch.rand(3, generator=as_generator(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(first, torch.rand(3, generator=as_generator(np.int64(5))))
    assert not torch.equal(first, torch.rand(3, generator=as_generator(6)))


def test_a_generator_is_drawn_from():
    gen = torch.Generator().manual_seed(0)
    assert as_generator(gen) is gen


@pytest.mark.parametrize("seed", [True, 0.0, 1.5, "0", None, [0], torch.tensor(0), np.random.default_rng(0)])
def test_what_is_no_whole_number_is_refused(seed):
    with pytest.raises(InputError, match="seed must be a whole number, such as 0, but it is"):
        as_generator(seed)


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1 << 70])
def test_what_is_out_of_range_is_refused(seed):
    with pytest.raises(InputError, match=f"seed must lie between 0 and 2\\*\\*64 - 1, but it is {seed}"):
        as_generator(seed)


def test_the_ends_of_the_range():
    for seed in (0, (1 << 64) - 1):
        assert check_seed(seed) == seed
        as_generator(seed)


def public_callables():
    """(name, function) of all that the public packages export, and of the public methods of exported classes."""
    packages = [f"coreprune.{m.name}" for m in pkgutil.iter_modules(coreprune.__path__) if not m.name.startswith("_")]
    for package in ["coreprune", *packages]:
        module = importlib.import_module(package)
        for name in getattr(module, "__all__", []):
            found = getattr(module, name)
            if isinstance(found, type):
                # `__call__` is the protocol of selectors and sources: there the caller always has a generator.
                yield f"{package}.{name}", found.__init__
                for method, inner in inspect.getmembers(found, callable):
                    if not method.startswith("_"):
                        yield f"{package}.{name}.{method}", inner
            elif callable(found):
                yield f"{package}.{name}", found


def test_no_public_function_has_a_parameter_called_generator():
    seen, wrong = set(), []
    for name, function in public_callables():
        seen.add(name)
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError):  # a builtin
            continue
        if "generator" in parameters:
            wrong.append(name)
    assert {"coreprune.prune", "coreprune.queries.Queries.split", "coreprune.geometry.kmeans"} <= seen
    assert wrong == []
