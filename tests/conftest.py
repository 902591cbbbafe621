"""Shapes in signatures are checked by beartype while the tests run."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["COREPRUNE_CHECK_SHAPES"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook

CHECKED = ["coreprune.geometry", "coreprune.coreset", "coreprune.pruning", "coreprune.queries"]
install_import_hook(CHECKED, "beartype.beartype")

settings.register_profile(
    "coreprune",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("coreprune")

# A worker for every core: more threads each only fight over them.
torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") or os.environ.get("OMP_NUM_THREADS") == "1" else 2)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with MNIST and the trained networks, or a skip where it is absent."""
    for place in (os.environ.get("COREPRUNE_DATA"), Path(__file__).parents[1] / ".." / "shared" / "data"):
        if place and Path(place).is_dir():
            return Path(place)
    pytest.skip("the data folder is absent; set COREPRUNE_DATA to run this test")


@pytest.fixture
def gen() -> torch.Generator:
    """A fresh, seeded generator per test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def unchecked():
    """Turn the shape checks off: what a user sees who passes the wrong thing, instead of what the tests would see."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
