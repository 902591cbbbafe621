"""How much memory a run may take, and a shelf for tensors: in memory while they fit, in files when they do not."""

from __future__ import annotations

import math
import os
import re
import tempfile
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from coreprune import _ranks
from coreprune._mapped import in_file
from coreprune.errors import InputError

_UNITS = {"": 1, "B": 1, **{f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", start=1)}}
_UNITS |= {f"{p}IB": 2 ** (10 * i) for i, p in enumerate("KMGT", start=1)}
_UNKNOWN = 4 << 30  # free bytes, where the system does not say


def bytes_of(memory: Any) -> int:
    """A number of bytes, or text such as "8GiB", as bytes; None means half of what is free.

    Of several processes on one machine, each has its part of that half.

    Raises InputError for anything else.
    """
    if memory is None:
        return free_bytes() // 2 // _ranks.neighbours()
    value: float = math.nan
    if isinstance(memory, str):
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", memory)
        if found is not None and found[2].upper() in _UNITS:
            value = float(found[1]) * _UNITS[found[2].upper()]
    elif isinstance(memory, (int, float)) and not isinstance(memory, bool):
        value = memory
    if not math.isfinite(value) or value < 1:
        raise InputError(f'memory must be a number of bytes above zero, or text such as "8GiB", not {memory!r}.')
    return int(value)


def free_bytes() -> int:
    """The bytes of memory that this process may still take: what the system has free, and what its group may use."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        with suppress(OSError, ValueError):  # "max" is no limit
            group = Path("/sys/fs/cgroup")
            most = int((group / "memory.max").read_text())
            found = min(found, max(0, most - int((group / "memory.current").read_text())))
        return found
    with suppress(OSError, ValueError, AttributeError):  # no Linux: half of all memory may be free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _UNKNOWN


def said(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@dataclass(eq=False)
class Shelf:
    """Keeps tensors that are needed later. What does not fit is written into files, and mapped back from there.

    A mapped tensor is equal to the one that was put, with the same strides, and behaves like it; the system reads its
    pages when they are used, and may drop them again. Its file goes when nothing uses it any more. The files lie in the
    folder for temporary files (TMPDIR). Only tensors in main memory are written.

    limit: bytes that may be held in memory; None for no limit. held: bytes that are held now. most: the most that were
    held. spilled: all bytes that were written.
    """

    limit: int | None = None
    held: int = 0
    most: int = 0
    spilled: int = 0
    _known: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet, repr=False)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False)

    def put(self, value: Any) -> Any:
        """The same value, with those of its tensors in files that do not fit. Their gradients are not kept."""
        return pytree.tree_map_only(Tensor, self._put, value)

    def _put(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.device.type != "cpu" or x.layout != torch.strided or not x.numel() or storage in self._known:
            return x
        if self.limit is not None and self.held + storage.nbytes() > self.limit:
            return self._written(x)
        self._known.add(storage)
        self.held += storage.nbytes()
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._gone, storage.nbytes()).atexit = False
        return x

    def _gone(self, count: int) -> None:
        self.held -= count

    def _written(self, x: Tensor) -> Tensor:
        try:
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(prefix="coreprune-", ignore_cleanup_errors=True)
            mapped = in_file(x, self._folder.name)
        except OSError as error:
            raise InputError(
                f"{said(x.nbytes)} do not fit into memory={said(self.limit or 0)}, and cannot be written into the "
                f"folder for temporary files: {error}. Allow more memory, or set TMPDIR to a folder with more room."
            ) from error
        self._known.add(mapped.untyped_storage())
        self.spilled += x.nbytes
        return mapped
