"""A folder with a user's files in it, as the current one, and the commands run inside this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_tools import FACTORY, samples
from click.testing import Result
from typer.testing import CliRunner

from coreprune.cli.commands import app

Run = Callable[..., Result]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None) -> Iterator[Path]:
    """The current folder: a module with factories, 48 samples, and 40 with labels. Shapes are not checked, as a user
    has it. One thread: on a busy machine the barriers of two take longer than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "net_for_cli.py").write_text(FACTORY)
    np.savez(tmp_path / "samples.npz", samples(48))
    np.savez(tmp_path / "labelled.npz", inputs=samples(40, seed=1), labels=np.arange(40) % 3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name, module in list(sys.modules.items()):  # the next test has a folder of its own
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]
    torch.set_num_threads(threads)


@pytest.fixture
def run(place: Path) -> Run:
    """run("report", "small") -> what the command answered; an exception that is no exit is raised."""

    def call(*arguments: str | Path) -> Result:
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def prune(run: Run) -> Run:
    """run("prune", …) on the factory's network with the 48 samples, and without measuring latency."""

    def call(*arguments: str | Path) -> Result:
        own = () if "--queries" in arguments else ("--queries", "samples.npz")
        return run("prune", "net_for_cli:net", "--shape", "1,8", "--no-latency", *own, *arguments)

    return call
