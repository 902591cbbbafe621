"""prune() over several processes: the result of one, and an end with a clear error wherever one of them fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coreprune
from cli.cli_tools import FACTORY
from coreprune import Budget, RankError, prune
from coreprune import _ranks as ranks
from coreprune.pruning.calibration.statistics import owners
from pruning import rank_runs

pytest.importorskip("transformers")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or not hasattr(os, "fork"):
    pytest.skip("no processes that could meet here", allow_module_level=True)

HERE = Path(__file__).parent
SOURCE = Path(coreprune.__file__).parents[1]
LONGEST = 300  # seconds, after which a run counts as one that hangs


def environment(*paths: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "COREPRUNE_CHECK_SHAPES")}
    path = os.pathsep.join(map(str, [SOURCE, *paths]))
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def run(case: str, world: int, folder: Path) -> list[object]:
    """What every process has to say; None of one that has not come to its end."""
    command = [sys.executable, str(HERE / "rank_runs.py"), case, str(world), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONGEST, env=environment())
    files = [folder / f"{rank}.pt" for rank in range(world)]
    found = [torch.load(file, weights_only=False) if file.exists() else None for file in files]
    assert any(one is not None for one in found), done.stderr[-4000:]
    return found


@pytest.fixture(scope="module")
def alone() -> dict:
    return rank_runs.same()


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.long)])
def test_many_processes_give_what_one_gives(world, alone, tmp_path):
    for found in run("same", world, tmp_path):
        assert found is not None
        for name, (plan, weights, compared) in alone.items():
            assert found[name][0] == plan, name
            assert found[name][1].keys() == weights.keys()
            for key, wanted in weights.items():
                torch.testing.assert_close(found[name][1][key], wanted, rtol=1e-5, atol=1e-5, msg=f"{name}: {key}")
            assert [c[0] for c in found[name][2]] == [c[0] for c in compared]
            assert [c[1] for c in found[name][2]] == pytest.approx([c[1] for c in compared], rel=1e-4)


def test_an_error_in_one_process_ends_the_others_with_a_clear_error(tmp_path):
    zero, one = run("trouble", 2, tmp_path)
    for both in (zero, one):
        for name, text in {
            "models": r"the models differ: 0.weight in process 1",
            "kinds of models": r"the models differ: process 0 has a Sequential",
            "arguments": "different arguments: budget is",
            "seeds": "different arguments: seed is 0 in process 0 and 1 in process 1",
            "queries": "these samples are broken",
            "distill": "distill trains in one process",
            "resume": "different arguments: resume is True in process 0 and False in process 1",
            "a file": "is a file. It must be a folder",
        }.items():
            assert both[name][0] == "InputError (ours)", (name, both[name])
            assert text in both[name][1]
        assert both["everywhere"][0] == "BudgetError (ours)"
        assert both["nothing"] == ("", "")
        assert both["afterwards"] == ("2", "")
    assert one["an error"] == ("ValueError", "no room on the disk\nand more")
    assert zero["an error"][0] == "RankError (ours)"
    assert "process 1 of 2 failed" in zero["an error"][1]
    assert "ValueError: no room on the disk." in zero["an error"][1]
    assert "and more" not in zero["an error"][1]


def test_a_process_that_is_killed_ends_the_others(tmp_path):
    zero, one, two = run("killed", 3, tmp_path)
    assert one is None
    for kind, text in (zero, two):
        assert kind == "RankError (ours)"
        assert "process 1 of 3 ended or did not answer in time" in text


def test_a_process_that_sleeps_ends_the_others_after_the_timeout(tmp_path):
    zero, one = run("asleep", 2, tmp_path)
    assert zero[0] == one[0] == "RankError (ours)"
    assert "process 1 of 2 ended or did not answer in time" in zero[1]
    assert "--timeout" in zero[1]


def test_a_process_that_does_not_call_prune_is_missed(tmp_path):
    zero, one = run("absent", 2, tmp_path)
    assert one == ("", "")
    assert zero[0] == "RankError (ours)"
    assert "every process must make the call" in zero[1]


def test_torchrun_writes_one_artifact(tmp_path, monkeypatch):
    (tmp_path / "net_of_ranks.py").write_text(FACTORY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "coreprune", "prune", "net_of_ranks:with_example", "--macs", "0.5", "--n-queries", "64"]
    command += ["--no-latency", "--timeout", "120", "--out", "small"]
    kept = {"timeout": LONGEST, "cwd": tmp_path, "env": environment(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, **kept)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("before and after") == 1
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {"net_of_ranks.py", "small"}

    monkeypatch.syspath_prepend(tmp_path)
    import net_of_ranks

    small = coreprune.load(tmp_path / "small", net_of_ranks.net)
    alone = prune(*net_of_ranks.with_example(), Budget(macs=0.5), n_queries=64)
    for key, wanted in alone.model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[key], wanted, rtol=1e-5, atol=1e-5)


def test_alone_nothing_is_shared():
    with ranks.together():
        assert ranks.world() == 1
        assert ranks.share(5) == ranks.Share(range(5))
        assert ranks.gathered("it", 3) == [3]
        assert ranks.from_first("it", lambda: 4) == 4
        ranks.agree("it", object())


@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_every_batch_is_run_once(n, world, monkeypatch):
    shares = []
    monkeypatch.setattr(ranks, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(ranks.share(n))
    assert [b for share in shares if share.counts for b in share.numbers] == list(range(n))
    assert all(share.numbers for share in shares)


def test_groups_go_to_who_has_the_least_to_do(monkeypatch, unchecked):
    monkeypatch.setattr(ranks, "world", lambda: 2)

    class Sized:
        def __init__(self, size):
            self.size = size

    assert list(owners({str(i): Sized(n) for i, n in enumerate([8, 2, 2, 8, 2])}).values()) == [0, 1, 1, 1, 0]


def test_a_ranking_that_another_process_made_cannot_be_cut():
    from coreprune.pruning.plans.decide import _Elsewhere

    with pytest.raises(RankError, match="process 3 has made this ranking"):
        _Elsewhere(3)(2)
