"""A run that is killed or interrupted leaves a complete artifact or none, and the next one goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest
from cli_tools import FACTORY, everything
from safetensors.torch import load_file, save_file

import coreprune


def environment() -> dict[str, str]:
    """For a fresh interpreter: the library that is tested here, one thread, no checks of shapes."""
    root = str(Path(coreprune.__file__).parents[1])
    own = {k: v for k, v in os.environ.items() if not k.startswith("COREPRUNE")}
    return {**own, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}


# --- kill -9 -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[14, pytest.param(60, marks=pytest.mark.long)], ids="{} kills".format)
def killed(request, tmp_path_factory):
    """What killed_runs.py found, the user's files before, and its folder."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "net_for_cli.py").write_text(FACTORY)
    space: dict = {}
    exec(FACTORY, space)
    save_file({name: 1.5 * t for name, t in space["net"]().state_dict().items()}, folder / "net.safetensors")
    own = everything(folder)
    script = Path(__file__).with_name("killed_runs.py")
    call = [sys.executable, script, folder, str(request.param), "4"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), own, folder


def kills_of(found):
    return [kill for trial in found["trials"] for kill in trial["kills"]]


@pytest.mark.slow
def test_the_kills_hit_runs_in_all_phases(killed):
    """If they came too late, the tests below would say nothing."""
    found, _, _ = killed
    hits = [kill for kill in kills_of(found) if kill["hit"]]
    assert {kill["by"] for kill in hits} == {"time", "step"}
    phases = Counter(kill["phase"] for kill in hits)
    assert {"queries", "distill", "save"} <= phases.keys(), phases
    assert len(phases) >= 5, phases


@pytest.mark.slow
def test_after_a_kill_there_is_a_whole_artifact_or_none(killed):
    found, _, _ = killed
    assert found["reference"]["out"] == "whole"
    for kill in kills_of(found):
        assert kill["out"] in ("absent", "whole"), kill
        if kill["out"] == "whole":
            assert kill["weights"] == found["reference"]["weights"]
    assert "absent" in {kill["out"] for kill in kills_of(found)}


@pytest.mark.slow
def test_resuming_gives_the_same_bits_as_never_having_been_killed(killed):
    found, _, _ = killed
    for trial in found["trials"]:
        assert trial["end"] == found["reference"], trial
        if trial["kills"][-1]["out"] == "absent":
            assert trial["code"] == 0, trial["said"]
            assert trial["left"] == ["small"], "temporary files and the unfinished work are gone"
        else:
            assert trial["code"] == 2, trial["said"]
            assert "is there already and not empty" in trial["said"], "it was done, and is not done again in silence"


@pytest.mark.slow
def test_the_users_files_are_untouched(killed):
    _, own, folder = killed
    assert {name: (folder / name).read_bytes() for name in own} == own


# --- Ctrl-C --------------------------------------------------------------------------------------------------------

# A shell that starts a job in the background has it ignore Ctrl-C, and a test may run in such a job. The command sends
# the signal to itself when it is about to write its state for the second time, however fast the machine is.
MAIN = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
written = []
def watch(event, args):
    if event == "os.rename" and str(args[1]).endswith("distill.safetensors"):
        written.append(args[1])
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(watch)
from coreprune.cli import main
main()
"""
LONG = ("--queries", "white-noise", "--keep", "0.5", "--distill", "600", "--out", "small")


@pytest.mark.slow
def test_control_c_in_the_middle_of_the_distillation(place, prune):
    """Exit code 130, a sentence, no OUT; then the next run refuses, and with --resume goes on."""
    call = [sys.executable, "-c", MAIN, "prune", "net_for_cli:net", "--shape", "1,8", "--no-latency", *LONG]
    process = subprocess.run(call, capture_output=True, text=True, env=environment(), check=False)
    state = place / ".small.unfinished" / "distill.safetensors"
    stdout, stderr = process.stdout, process.stderr
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert f"interrupted. {place / 'small'} was not written." in stderr
    assert f"What was made so far is in {state.parent}; --resume goes on." in stderr
    assert "Traceback" not in stderr
    assert not (place / "small").exists()

    refused = prune(*LONG)
    assert refused.exit_code == 2
    assert f"an earlier run that did not end left {state.parent}. Add --resume to go on with it" in refused.stderr
    assert state.exists()

    other = prune(*LONG, "--seed", "1", "--resume")
    assert other.exit_code == 2, "another run than the one that was interrupted"
    assert "belongs to another run" in other.stderr
    done = prune(*LONG, "--resume")
    assert done.exit_code == 0, done.stderr
    assert not state.parent.exists()
    prune(*LONG[:-1], "straight")
    weights = [load_file(place / name / "model.safetensors") for name in ("small", "straight")]
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.parametrize("at", ["source.load", "prune.measured", "save"])
@pytest.mark.parametrize("options", [(), ("--queries", "white-noise")], ids=["samples", "made"])
def test_control_c_at_other_times(place, prune, monkeypatch, at, options):
    """While the model is loaded, after distillation, and while the artifact is written, which used to say nothing."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "save":
            patch.setattr(sys.modules["coreprune.artifact.saving"], "save_file", interrupted)
        else:
            patch.setattr(f"coreprune.cli.{at}", interrupted)
        done = prune(*options, "--out", "new/small")
    assert done.exit_code == 130
    assert f"interrupted. {place / 'new' / 'small'} was not written." in done.stderr
    made = bool(options) and at != "source.load"
    assert ("--resume goes on" in done.stderr) == made, "only where something was made that is worth it"
    left = [p for p in (place / "new").iterdir()] if (place / "new").exists() else []
    assert [p.name for p in left] == ([".small.unfinished"] if made else [])
    assert prune(*options, "--out", "new/small", "--resume").exit_code == 0
    assert [p.name for p in (place / "new").iterdir()] == ["small"]


def test_control_c_while_torch_is_imported_shows_no_traceback(tmp_path):
    """It takes seconds, and the interpreter answered before coreprune could."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["coreprune"].partition(":")
    script = f"signal.signal(signal.SIGINT, signal.default_int_handler); from {module} import {function}; {function}()"
    # torch itself swallows what is raised while it imports numpy
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    )
    own = environment()
    done = subprocess.run(
        [sys.executable, "-c", f"import signal; {script}", "--help"],
        capture_output=True,
        text=True,
        env={**own, "PYTHONPATH": os.pathsep.join([str(tmp_path), own["PYTHONPATH"]])},
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr == "interrupted\n"
    assert done.stdout == ""


def test_control_c_in_another_command(place, run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("coreprune.cli.source.load", interrupted)
    done = run("inspect", "net_for_cli:net", "--shape", "1,8")
    assert done.exit_code == 130
    assert done.stderr.strip() == "interrupted"


def test_a_run_that_ended_but_for_tidying_up(place, prune, monkeypatch):
    """It used to be called one that did not end, although the artifact was there."""
    with monkeypatch.context() as patch:
        patch.setattr("coreprune.cli.prune.Unfinished.done", lambda self: None)
        assert prune("--queries", "white-noise", "--out", "small").exit_code == 0
    assert (place / ".small.unfinished").exists()
    for more in ((), ("--resume",)):
        done = prune("--out", "small", *more)
        assert done.exit_code == 2
        assert "small is there already and not empty" in done.stderr
    assert prune("--out", "small", "--overwrite", "--resume").exit_code == 0
    assert not (place / ".small.unfinished").exists()


def test_what_a_killed_overwrite_moved_aside_comes_back(place, prune):
    """Killed between the two renames: the former artifact lies under another name until the next run."""
    assert prune("--out", "small").exit_code == 0
    before = everything(place / "small")
    (place / "small").rename(place / ".small.abcd1234.old")
    (place / ".small.abcd1234.tmp").mkdir()
    assert prune("--out", "small").exit_code == 2
    assert everything(place / "small") == before
    assert not list(place.glob(".small*"))
