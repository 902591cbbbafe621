"""What works without the optional packages, and what is said where something does not.

A subprocess in which they cannot be imported stands for an environment that lacks them.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {"pillow": "PIL", "scikit-learn": "sklearn"}  # where a package and its module have different names

BLOCK = """
import importlib.abc, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
for name in {blocked}:
    sys.modules[name] = None  # importlib.util.find_spec asks here first
"""

PRUNE = """
import logging
import torch
from torch import nn
import coreprune
from coreprune import *

net = lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
result = prune(net(), torch.zeros(1, 16), Budget(keep=0.5), queries=torch.randn(32, 16))
save(result, "small")
load("small", net)
str(result.report)
"""


def modules(*extras: str) -> set[str]:
    names = {line.split(">")[0] for extra in extras for line in PROJECT["optional-dependencies"][extra]}
    return {MODULES.get(name, name) for name in names if not name.startswith("coreprune")}


def without(blocked: set[str], code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=sorted(blocked)) + code, *arguments],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_library_itself_needs_four_packages():
    assert {line.split(">")[0] for line in PROJECT["dependencies"]} == {"torch", "numpy", "scipy", "safetensors"}
    assert modules("cli", "report") == {"typer", "rich", "jinja2", "markupsafe", "PIL"}


@pytest.mark.slow
def test_pruning_and_saving_without_any_extra(tmp_path):
    """Every package but the four; the folder lacks the page alone, and that is logged."""
    done = without(modules("cli", "report", "demo", "onnx"), PRUNE, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "report.html was not written, because it needs jinja2, markupsafe, pillow. Run: pip install 'coreprune[report]'"
    ) in done.stderr
    found = {path.name for path in (tmp_path / "small").iterdir()}
    assert found == {"manifest.json", "model.safetensors", "plan.json", "queries.safetensors", "report.json"}


@pytest.mark.parametrize("package", ["jinja2", "markupsafe", "pillow"])
def test_a_page_says_which_package_it_needs(package, tmp_path):
    code = "from coreprune.report import render\nrender({})"
    done = without({MODULES.get(package, package)}, code, tmp_path)
    assert done.stderr.splitlines()[-1] == (
        f"coreprune.errors.InputError: a report's page needs {package}, which cannot be found here. "
        "Run: pip install 'coreprune[report]'"
    )


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_says_which_package_it_needs(package, tmp_path):
    """Before: a traceback."""
    done = without({package}, "from coreprune.__main__ import main\nmain()", tmp_path, "--help")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: the command needs {package}, which cannot be found here. Run: pip install 'coreprune[cli]'\n"
    )


def test_another_missing_module_is_no_missing_extra(tmp_path):
    """It is a fault, and its traceback says where."""
    done = without({"safetensors"}, "from coreprune.__main__ import main\nmain()", tmp_path, "--help")
    assert done.returncode == 1
    assert "safetensors" in done.stderr.splitlines()[-1]
    assert "coreprune[cli]" not in done.stderr


@pytest.mark.slow
def test_the_commands_without_pages(tmp_path):
    """prune and report do their work; --html says what is missing."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))\n"
    )
    blocked, code = modules("report"), "from coreprune.__main__ import main\nmain()"
    options = ("--queries", "white-noise", "--keep", "0.5", "--no-latency", "--out", "small")
    done = without(blocked, code, tmp_path, "prune", "nets:net", "--shape", "1,16", *options)
    assert done.returncode == 0, done.stderr
    assert "report.html" not in done.stdout
    assert "pip install 'coreprune[report]'" in done.stderr.replace("\n", " ")
    done = without(blocked, code, tmp_path, "report", "small")
    assert done.returncode == 0, done.stderr
    assert "report.html" not in done.stdout
    done = without(blocked, code, tmp_path, "report", "small", "--html", "page.html")
    assert done.returncode == 2
    assert "Run: pip install 'coreprune[report]'" in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_the_command_and_the_module_are_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "coreprune", "--help"],
        env={"PYTHONPATH": str(ROOT / "src")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "python -m coreprune [OPTIONS] COMMAND" in done.stdout
    assert "Exit codes" in done.stdout
