"""prune(resume=folder): a run that was killed ends with the same bits, and the state of another run is refused."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import coreprune
from coreprune import ArtifactError, Budget, InputError, Repair, prune
from coreprune import _checkpoint as checkpoints

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 4))


def bits(result) -> tuple:
    weights = {n: hashlib.sha256(t.numpy().tobytes()).hexdigest() for n, t in result.model.state_dict().items()}
    return result.plan, weights, result.report.compared, [(g.name, g.certificates) for g in result.report.groups]


def run(state: Path | None, weights: int = 0, **more):
    call = {"budget": Budget(macs=0.5), "queries": X, "repair": Repair(descent=False), **more}
    return prune(net(weights), X[:1], resume=state, **call)


def outside(script: str, folder: Path, kills: int) -> dict:
    """What a script of this folder prints that kills runs in processes of its own."""
    own = {k: v for k, v in os.environ.items() if not k.startswith("COREPRUNE")}
    env = {**own, "PYTHONPATH": str(Path(coreprune.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, str(Path(__file__).with_name(script)), str(folder), str(kills), "1"]
    done = subprocess.run(call, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=[6, pytest.param(40, marks=pytest.mark.long)], ids="{} kills".format)
def killed(request, tmp_path_factory):
    return outside("killed_prunes.py", tmp_path_factory.mktemp("killed"), request.param)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(killed):
    assert killed["reference"] == killed["straight"]
    for trial in killed["trials"]:
        assert trial["end"] == killed["straight"], trial


@pytest.fixture(scope="module", params=[3, pytest.param(30, marks=pytest.mark.long)], ids="{} kills of two".format)
def killed_ranks(request, tmp_path_factory):
    return outside("killed_ranks.py", tmp_path_factory.mktemp("ranks"), request.param)


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_another_number_goes_on(killed_ranks):
    """The same plan, and weights up to rounding, because the sums of the moments are of other parts."""
    assert killed_ranks["straight"] == 0
    for trial in killed_ranks["trials"]:
        assert trial["killed"], trial
        assert trial["other"] == "RankError", trial
        assert trial["apart"] < 1e-5, trial


@pytest.mark.slow
def test_the_kills_came_at_several_points(killed):
    left = {len(trial["left"]) for trial in killed["trials"] if trial["killed"]}
    assert len(left) >= 3, killed["trials"]


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"method": "loewner"},
        {"method": "magnitude"},
        {"method": "folding"},
        {"compare": False},
        {"repair": False},
        {"queries": "white-noise", "n_queries": 64},
        {"distill": 2},
    ],
    ids=lambda x: next((f"{k}={v}" for k, v in x.items()), "default"),
)
def test_whatever_is_left_of_the_state_the_result_is_the_same(more, tmp_path):
    want = bits(run(None, **more))
    assert bits(run(tmp_path / "state", **more)) == want
    files = sorted(p.name for p in (tmp_path / "state").iterdir() if p.name != "run.safetensors")
    for name in files:
        (tmp_path / "state" / name).unlink()
        assert bits(run(tmp_path / "state", **more)) == want, name


def test_what_is_finished_is_not_done_again(tmp_path, monkeypatch):
    run(tmp_path)

    def again(*_, **__):
        raise AssertionError("done again")

    monkeypatch.setattr("coreprune.pruning.repair.refit.fitted", again)
    monkeypatch.setattr("coreprune.pruning.stages.collect_readers", again)
    run(tmp_path)


@pytest.mark.parametrize(
    "more",
    [
        {"seed": 3},
        {"budget": Budget(macs=0.6)},
        {"queries": X + 1},
        {"repair": Repair(ridge=0.1)},
        {"exclude": "0"},
        {"method": "loewner"},
    ],
    ids=lambda x: next(iter(x)),
)
def test_the_state_of_another_run_is_refused(more, tmp_path):
    run(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InputError, match="belongs to another run"):
        run(tmp_path, **more)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_other_weights_are_another_run(tmp_path):
    run(tmp_path)
    with pytest.raises(InputError, match="belongs to another run"):
        run(tmp_path, weights=1)


def test_a_damaged_state_is_named(tmp_path):
    run(tmp_path)
    file = tmp_path / "decided-0.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(InputError, match=r"decided-0.safetensors is no checkpoint.*damaged"):
        run(tmp_path)


def test_places_that_hold_no_state(tmp_path):
    (tmp_path / "file").write_text("hello")
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "file")
    save_file({"x": torch.zeros(2)}, tmp_path / "run.safetensors")
    with pytest.raises(InputError, match="is no checkpoint"):
        run(tmp_path)


def test_a_selector_that_cannot_be_recognised(tmp_path):
    class Odd:
        name, reads = "odd", False

        def __call__(self, layer):
            return layer.incoming.abs().sum(1)

    with pytest.raises(InputError, match="nothing tells whether it is the same"):
        run(tmp_path / "state", method=Odd())


def test_a_full_disk_leaves_no_half_written_file(tmp_path, monkeypatch):
    """The third file does not fit; the run that follows goes on from the two that did."""
    want, write, count = bits(run(None)), checkpoints.save_file, 0

    def full(tensors, path, *more):
        nonlocal count
        count += 1
        if count == 3:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(tensors, path, *more)

    model = net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", full)
        with pytest.raises(ArtifactError, match=r"No space left on device\. Free some space"):
            prune(model, X[:1], Budget(macs=0.5), queries=X, repair=Repair(descent=False), resume=tmp_path / "state")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    left = sorted(p.name for p in (tmp_path / "state").iterdir())
    assert len(left) == 2
    assert not any("tmp" in name for name in left)
    assert bits(run(tmp_path / "state")) == want
