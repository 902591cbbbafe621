"""Shapes in signatures are checked by beartype while the tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["COREPRUNE_CHECK_SHAPES"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import config, install_import_hook, jaxtyped

CHECKED = ["coreprune.geometry", "coreprune.coreset", "coreprune.pruning", "coreprune.queries"]


def checked(*, typechecker: Any) -> Callable[[Any], Any]:
    """The decorator that the hook puts on everything, kept from functions that say no shapes: they would take a third
    of the time of the tests."""
    check = jaxtyped(typechecker=typechecker)

    def decorate(thing: Any) -> Any:
        told = " ".join(map(str, getattr(thing, "__annotations__", {}).values()))
        says = isinstance(thing, type) or any(f"{kind}[" in told for kind in ("Bool", "Float", "Int", "Num"))
        return check(thing) if says else thing

    return decorate


jaxtyping.jaxtyped = checked
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
def install_package(tmp_path, monkeypatch):
    """Put a package on the path as pip does: install_package(name, entry_points.txt, code of its only module)."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)

    def put(name: str, entry_points: str, code: str) -> None:
        about = folder / f"{name}-1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (about / "entry_points.txt").write_text(entry_points)
        (folder / f"{name}.py").write_text(code)

    yield put
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution of this checkout. Nothing is fetched for the build."""
    absent = [name for name in ("hatchling", "hatch_vcs", "hatch_fancy_pypi_readme") if find_spec(name) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} is not installed: pip install -e '.[test]'")
    folder = tmp_path_factory.mktemp("dist")
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "hatchling", "build", "-d", folder]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def unchecked():
    """Turn the shape checks off: what a user sees who passes the wrong thing, instead of what the tests would see."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
