"""Places where coreprune prune cannot write: said before any work, and where that is impossible, without a trace.

The tests may run as root, whom no rights stop; so they mount small file systems where they may, and skip where not.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_tools import everything


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """disk("size=64k") -> the folder of a file system in memory with these options."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        call = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(call, capture_output=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test if anything is loaded: the place is looked at first."""
    monkeypatch.setattr("coreprune.cli.source.load", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("taken", "taken is there already and not empty. Choose another folder, or say overwrite."),
        ("file", "file is a file. Choose another folder."),
        ("file/small", "A file lies where one of its folders should be; choose another place."),
        ("file/new/small", "A file lies where one of its folders should be; choose another place."),
        (".", "is the current folder or the root"),
        ("/", "is the current folder or the root"),
        ("/proc/small", "cannot write /proc/small"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written(place, prune, monkeypatch, out, said):
    untouched(monkeypatch)
    (place / "file").write_text("mine")
    (place / "taken").mkdir()
    (place / "taken" / "notes.txt").write_text("mine")
    before = everything(place)
    done = prune("--out", out)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert everything(place) == before


@pytest.mark.parametrize("out", ["small", "new/deep/small"])
def test_a_disk_that_is_read_only(disk, prune, monkeypatch, out):
    untouched(monkeypatch)
    done = prune("--out", str(disk("ro") / out))
    assert done.exit_code == 2
    assert "Read-only file system. This disk is read-only; choose another folder." in done.stderr


def test_a_disk_that_is_full_from_the_start(disk, prune, monkeypatch):
    """No folder fits on it."""
    untouched(monkeypatch)
    done = prune("--out", str(disk("nr_inodes=1") / "small"))
    assert done.exit_code == 2
    assert "No space left on device. Free some space, or choose another disk." in done.stderr


@pytest.mark.parametrize("size", ["4k", "64k", "256k"])
def test_a_disk_that_fills_up(disk, prune, size):
    """While the weights are written, or the report behind them."""
    folder = disk(f"size={size}")
    done = prune("--out", str(folder / "small"))
    assert done.exit_code == 2
    assert "No space left on device" in done.stderr
    assert "Nothing was left half-written" in done.stderr
    assert everything(folder) == {}


def test_a_disk_that_is_full_is_said_where_it_is_large_enough(disk, prune):
    """The same with room: so it is the size that the tests above are about."""
    folder = disk("size=8m")
    assert prune("--out", str(folder / "small")).exit_code == 0
    assert [p.name for p in folder.iterdir()] == ["small"]


def test_a_full_disk_keeps_the_artifact_that_was_there(disk, prune):
    folder = disk("size=1300k")
    assert prune("--out", str(folder / "small")).exit_code == 0
    before = everything(folder)
    done = prune("--out", str(folder / "small"), "--overwrite", "--seed", "2")
    assert done.exit_code == 2, "there is no room for two"
    assert everything(folder) == before
