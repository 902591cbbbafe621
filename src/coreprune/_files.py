"""Write files and folders atomically: first under a temporary name, then flush to the disk, then rename."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from coreprune.errors import ArtifactError

# What a write may raise. safetensors wraps the errors of the disk, with their number in the text.
DISK_ERRORS = (OSError, SafetensorError)
_NUMBER = re.compile(r"\b(?:code: |os error )(\d+)")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and rename it to `path` when the block ends. Errors leave nothing behind.

    Raises ArtifactError if the disk refuses, or if `path` exists and is not a file.
    """
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path} is there already and is not a file. Choose another name.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        yield temporary
        readable(temporary, 0o666)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except DISK_ERRORS as error:
        raise refused(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, and rename it to `path` when the block ends. Errors leave nothing behind.

    overwrite: replace an existing folder. It is moved aside first, and deleted when the new one is in its place and on
    the disk. Without `overwrite` an existing folder is refused, unless it is empty.

    Raises ArtifactError if the place is taken, or if the disk refuses.
    """
    temporary: Path | None = None
    try:
        path = Path(os.path.realpath(path))  # the target of a link, not the link
        refuse_taken(path, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        yield temporary
        for file in sorted(temporary.rglob("*")):
            readable(file, 0o777 if file.is_dir() else 0o666)
            flush(file)
        readable(temporary, 0o777)
        flush(temporary)
        refuse_taken(path, overwrite)
        _swap(temporary, path)
    except DISK_ERRORS as error:
        raise refused(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_place(path: Path, overwrite: bool = False) -> None:
    """Check before hours of work that `whole_folder` can write to `path`. Raises the same ArtifactErrors."""
    absent: list[Path] = []
    try:
        path = Path(os.path.realpath(path))
        refuse_taken(path, overwrite)
        absent = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")).rmdir()
    except OSError as error:
        raise refused(path, error) from error
    finally:
        for folder in absent:  # the innermost first
            with contextlib.suppress(OSError):
                folder.rmdir()


def tidy(path: Path) -> None:
    """Clean up after a process that was killed while it wrote `path` with `whole_folder`.

    What the process had moved aside is restored, and its temporary folders are deleted. Do not call this while another
    process writes there.
    """
    path = Path(os.path.realpath(path))
    ours = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    with contextlib.suppress(OSError):  # the next write reports what is wrong
        for left in sorted(path.parent.iterdir()):
            if left.is_dir() and not left.is_symlink() and (found := ours.fullmatch(left.name)):
                if found[1] == "old" and not path.exists():
                    left.replace(path)
                else:
                    shutil.rmtree(left, ignore_errors=True)


def readable(path: Path, mode: int) -> None:
    """Give a file the permissions of the user's umask. Temporary files are made for their owner alone."""
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


def refused(path: Path, error: Exception) -> ArtifactError:
    """The error for the user, from an OSError or a SafetensorError of the disk: what failed, where, and what to do."""
    found = _NUMBER.search(str(error))
    number = error.errno if isinstance(error, OSError) else int(found[1]) if found else 0
    advice = {
        errno.ENOSPC: "Free some space, or choose another disk.",
        errno.EDQUOT: "Free some space, or choose another disk.",
        errno.EFBIG: "The file is larger than this process or disk may write; choose another disk.",
        errno.EACCES: "Choose a folder that you may write to.",
        errno.EPERM: "Choose a folder that you may write to.",
        errno.EROFS: "This disk is read-only; choose another folder.",
        errno.EEXIST: "A file lies where one of its folders should be; choose another place.",
        errno.ENOTDIR: "A file lies where one of its folders should be; choose another place.",
    }.get(number or 0, "Choose another place.")
    said = os.strerror(number) if number else str(error)
    return ArtifactError(f"cannot write {path}: {said}. {advice} Nothing was left half-written.")


def refuse_taken(path: Path, overwrite: bool) -> None:
    """Raise ArtifactError if no folder may be written to `path`, or if a folder there may not be replaced."""
    if path.exists() and not path.is_dir():
        raise ArtifactError(f"{path} is a file. Choose another folder.")
    if not path.name or (path.is_dir() and path.samefile(".")):  # a shell in it would lose its folder
        raise ArtifactError(f"{path} is the current folder or the root. Choose another folder.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise ArtifactError(f"{path} is there already and not empty. Choose another folder, or say overwrite.")


def _swap(new: Path, place: Path) -> None:
    """Rename `new` to `place`. What was there is deleted when the new one is on the disk."""
    old = new.with_suffix(".old")  # a name that only we use, so that no folder of the user is deleted
    try:
        if place.exists() and any(place.iterdir()):
            place.replace(old)
        new.replace(place)  # if `place` is an empty folder, this replaces it in one step
        flush(place.parent)
    except BaseException:
        if not new.exists():
            place.replace(new)
        if old.exists():
            old.replace(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
