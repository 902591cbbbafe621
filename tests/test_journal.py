"""The log for programs: rows of JSON, whole after a kill, and never the reason that hours of work are lost."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import coreprune
from coreprune import ArtifactError, Budget, InputError, prune
from coreprune._journal import Journal, line
from coreprune._telling import telling

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))


def rows(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_a_log_of_a_whole_run(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    result = prune(mlp(), X[:1], Budget(macs=0.5), queries=X, distill=4, progress=False, log=path)
    found = rows(path)
    assert found[0]["phase"] == "start"
    assert (found[0]["model"], found[0]["version"]) == ("Sequential", coreprune.__version__)
    assert all({"time", "phase", "seconds"} <= set(row) for row in found)
    for key in ("time", "seconds"):
        assert [row[key] for row in found] == sorted(row[key] for row in found)
    for phase in ("capture", "statistics", "select", "repair", "distill"):
        steps = [(row["done"], row["total"]) for row in found if row["phase"] == phase]
        assert steps, phase
        assert steps[-1][0] == steps[-1][1], phase
    trained = [row for row in found if row["phase"] == "distill"]
    assert [row["done"] for row in trained] == [1, 2, 3, 4]
    assert all(row["loss"] > 0 for row in trained)
    last, report = found[-1], result.report
    assert last["phase"] == "result"
    for name in ("parameters", "macs", "bytes"):
        assert (last[f"{name}_before"], last[f"{name}_after"]) == getattr(report, name)
    (chosen,) = [one for one in report.compared if one.chosen]
    assert last["error"] == chosen.error
    assert last["agreement_at_least"] == 1 - report.agreement.bound
    assert last["phases"] == report.seconds


def test_a_second_run_is_appended_and_the_log_changes_nothing(tmp_path):
    path = tmp_path / "run.jsonl"
    options = {"queries": None, "method": "magnitude", "progress": False}
    first, second = (prune(mlp(), X[:1], Budget(keep=0.5), log=log, **options) for log in (path, str(path)))
    assert [row["phase"] for row in rows(path)].count("result") == 2
    alone = prune(mlp(), X[:1], Budget(keep=0.5), **options)
    assert first.plan == second.plan == alone.plan
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), alone.model.parameters(), strict=True))


def test_a_run_that_fails_says_so_in_its_last_row(tmp_path):
    def stop(phase, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(mlp(), X[:1], queries=X, progress=stop, log=tmp_path / "a.jsonl")
    assert rows(tmp_path / "a.jsonl")[-1]["error"] == "KeyboardInterrupt"
    with pytest.raises(coreprune.BudgetError):
        prune(mlp(), X[:1], Budget(macs=10, absolute=True), progress=False, log=tmp_path / "b.jsonl")
    last = rows(tmp_path / "b.jsonl")[-1]
    assert last["phase"] == "failed"
    assert last["error"].startswith("BudgetError: ")


KILLED = """
import os, sys
import torch
from torch import nn
from coreprune import Budget, prune

def stop(phase, done, total):
    if phase == "distill" and done == 4:
        os._exit(9)

net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3))
prune(net, torch.zeros(1, 8), Budget(keep=0.5), queries=torch.randn(32, 8), distill=50, progress=stop, log=sys.argv[1])
"""


@pytest.mark.slow
def test_after_a_kill_every_row_is_there_and_whole(tmp_path):
    """os._exit writes no buffer of Python's to the disk."""
    path = tmp_path / "run.jsonl"
    env = {"PYTHONPATH": str(Path(coreprune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, path], env=env, check=False)
    assert done.returncode == 9
    assert path.read_text().endswith("}\n")
    assert [row["done"] for row in rows(path) if row["phase"] == "distill"] == [1, 2, 3]


@pytest.mark.parametrize("bad", [3, "", True, b"run.jsonl"])
def test_what_is_no_path_is_refused(bad, unchecked):
    with pytest.raises(InputError, match="log must be the path of a file"):
        prune(mlp(), X[:1], queries=None, log=bad)


def test_a_place_that_cannot_be_written_is_found_before_the_work(tmp_path):
    model, seen = mlp(), []
    with pytest.raises(ArtifactError, match="cannot write"):
        prune(model, X[:1], queries=X, progress=lambda *call: seen.append(call), log=tmp_path)
    assert not seen


class Full(io.StringIO):
    name = "run.jsonl"

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_disk_that_becomes_full_costs_the_log_and_not_the_work(caplog):
    journal = Journal(Full())
    for done in range(1, 4):
        journal.step("distill", done, 4, loss=1.0)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "cannot write run.jsonl: No space left on device" in caplog.messages[0]


def test_rows_without_figures_come_once_a_second_and_at_the_ends(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("coreprune._journal.time.monotonic", lambda: now[0])
    journal = Journal(io.StringIO())
    for done in range(1, 41):
        journal.step("queries", done, 40)
        journal.step("select", done, 400)
        now[0] += 0.125
    found = [json.loads(text) for text in journal.file.getvalue().splitlines()]
    assert [row["done"] for row in found if row["phase"] == "queries"] == [1, 9, 17, 25, 33, 40]
    assert [row["done"] for row in found if row["phase"] == "select"] == [1, 9, 17, 25, 33]


def test_numbers_that_json_lacks_are_null():
    row = json.loads(line(phase="é", a=math.inf, b={"c": [math.nan, 1.5]}))
    assert (row["phase"], row["a"], row["b"]) == ("é", None, {"c": [None, 1.5]})


def test_every_row_goes_to_the_log_whatever_is_shown(tmp_path):
    with telling(False, tmp_path / "run.jsonl") as tell:
        tell("distill", 1, 2, loss=0.5)
        tell.note("measured", accuracy=0.9)
    assert [row["phase"] for row in rows(tmp_path / "run.jsonl")] == ["distill", "measured"]
