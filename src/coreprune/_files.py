"""Files and folders that are whole or not there at all: written beside their place, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coreprune.errors import ArtifactError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and put it in its place when the block ends; an error leaves no trace.

    Raises ArtifactError where the disk does not let us.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        readable(temporary, 0o666)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and put it in its place when the block ends; an error leaves no trace.

    overwrite: replace a folder that is there. It is moved aside first, to `path` with ".old" behind, and deleted once
    the new one is in its place. Without it a folder that is there is refused, unless it is empty.

    Raises ArtifactError for a place that is taken, and where the disk does not let us.
    """
    temporary: Path | None = None
    try:
        _refuse_taken(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        yield temporary
        for file in sorted(temporary.rglob("*")):
            readable(file, 0o777 if file.is_dir() else 0o666)
            flush(file)
        readable(temporary, 0o777)
        flush(temporary)
        _refuse_taken(path, overwrite)
        _swap(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def readable(path: Path, mode: int) -> None:
    """Give a file the rights that the user's umask asks for; temporary files are made for their owner alone."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refused(path: Path, error: OSError) -> ArtifactError:
    """The error for a person: what the disk said about which place."""
    advice = {
        errno.ENOSPC: "Free some space, or choose another disk.",
        errno.EDQUOT: "Free some space, or choose another disk.",
        errno.EFBIG: "The file is larger than this process or disk may write; choose another disk.",
        errno.EACCES: "Choose a folder that you may write to.",
        errno.EPERM: "Choose a folder that you may write to.",
        errno.EROFS: "This disk is read-only; choose another folder.",
    }.get(error.errno or 0, "Choose another place.")
    return ArtifactError(f"cannot write {path}: {error.strerror or error}. {advice} Nothing was left half-written.")


def _refuse_taken(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file. Choose another folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ArtifactError(f"{path} is there already and not empty. Choose another folder, or say overwrite.")


def _swap(new: Path, place: Path) -> None:
    """Rename `new` to `place`; what lay there is deleted afterwards."""
    if not place.exists() or not any(place.iterdir()):
        new.replace(place)  # over an empty folder this is one step
        return
    old = place.with_name(f"{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    place.replace(old)
    try:
        new.replace(place)
    except OSError:
        old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
