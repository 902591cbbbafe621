"""Tensors whose numbers lie in files: the system reads a page when it is used, and may drop it again.

A map is private: writing into such a tensor changes this process's pages, never the file. What is made of a mapped
tensor, such as a copy in another precision or a part of it, is mapped as well (`stored_as`), from a file without a name
in the folder for temporary files, which is gone with the last tensor that uses it or with the process.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from coreprune.errors import ArtifactError

_SMALL = 1 << 16  # bytes up to which a tensor stays in memory
_LENGTH = 8  # bytes at the start of a safetensors file that say how long its header is
_MOST_OPEN = 4096  # files that are kept open, so that they can be mapped again
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class _Open:
    """An open file. It is closed when nothing holds it any more."""

    count = 0

    def __init__(self, handle: int) -> None:
        self.handle = handle
        _Open.count += 1

    def __del__(self) -> None:
        _Open.count -= 1
        with suppress(OSError):
            os.close(self.handle)


@dataclass(frozen=True, eq=False)
class _Place:
    """Where a storage came from: bytes of an open file; None if it is not open any more."""

    file: _Open | None = None
    start: int = 0


_PLACES: WeakKeyDictionary[Any, _Place] = WeakKeyDictionary()  # by storage


def is_mapped(x: Any) -> bool:
    """Whether the numbers of a tensor lie in a file."""
    return isinstance(x, Tensor) and x.layout == torch.strided and not x.is_meta and x.untyped_storage() in _PLACES


def mapped_file(path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file by name, mapped. The file must not be changed while they are used; replacing
    it by renaming another one over it is safe.

    Raises ArtifactError if the file cannot be read, is cut off, or is not one.
    """
    try:
        with safe_open(path, framework="pt"):  # checks the header, and that the tensors fill the file
            pass
        file = _Open(os.open(path, os.O_RDONLY))
        length = int.from_bytes(os.pread(file.handle, _LENGTH, 0), "little")
        header = json.loads(os.pread(file.handle, length, _LENGTH))
        whole = mmap.mmap(file.handle, 0, access=mmap.ACCESS_COPY)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"cannot read {path}: there is no such file. Copy it there, or download the model again."
        ) from error
    except (OSError, SafetensorError, ValueError) as error:
        raise ArtifactError(
            f"cannot read {path} as safetensors: {error}. It may be cut off; copy or download it again."
        ) from error
    out: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise ArtifactError(f"{name} in {path} has dtype {entry['dtype']}, which cannot be read piece by piece.")
        out[name] = _part(whole, file, _LENGTH + length + entry["data_offsets"][0], _DTYPES[entry["dtype"]], entry)
    return out


def _part(whole: mmap.mmap, file: _Open, start: int, dtype: torch.dtype, entry: Mapping[str, Any]) -> Tensor:
    shape = tuple(entry["shape"])
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    first, last = entry["data_offsets"]
    flat = torch.frombuffer(whole, dtype=torch.uint8, count=last - first, offset=start)
    if start % dtype.itemsize:  # an old writer that did not align
        return flat.clone().view(dtype).reshape(shape)
    _PLACES[flat.untyped_storage()] = _Place(file, start)
    return flat.view(dtype).reshape(shape)


def stored_as(old: Tensor, new: Tensor) -> Tensor:
    """`new`, moved into a file if `old` lies in one and `new` is large. It does not share memory with any tensor then.

    old: what `new` was made of. Raises ArtifactError if there is no room.
    """
    if is_mapped(new) or not is_mapped(old) or new.nbytes < _SMALL or new.device.type != "cpu":
        return new
    try:
        moved = in_file(new, keep_open=True)
    except OSError as error:
        raise ArtifactError(
            f"weights of {new.nbytes / 2**20:.0f} MiB cannot be written into the folder for temporary files "
            f"({tempfile.gettempdir()}): {error.strerror or error}. Set TMPDIR to a folder with more room."
        ) from error
    return moved


def in_file(x: Tensor, folder: str | None = None, keep_open: bool = False) -> Tensor:
    """An equal tensor with the same strides, mapped from a new file without a name. Gradients are not kept.

    folder: where the file is made; that for temporary files by default. keep_open: so that it can be mapped again.

    Raises OSError.
    """
    order = sorted(range(x.dim()), key=lambda axis: (-x.stride(axis), axis))
    flat = x.detach().resolve_conj().resolve_neg().permute(order).contiguous()
    handle, path = tempfile.mkstemp(dir=folder, prefix="coreprune-")
    try:
        with os.fdopen(os.dup(handle), "wb") as file:
            flat.reshape(-1).view(torch.uint8).numpy().tofile(file)
        mapped = torch.from_file(path, shared=False, size=flat.numel(), dtype=flat.dtype)
        kept = keep_open and _Open.count < _most_open()
        _PLACES[mapped.untyped_storage()] = _Place(_Open(os.dup(handle)) if kept else None)
    finally:
        os.close(handle)
        with suppress(OSError):  # a system that keeps the names of open files removes them with the folder
            os.unlink(path)
    back = sorted(range(x.dim()), key=order.__getitem__)
    return mapped.view(flat.shape).permute(back)


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies to write into. Those of mapped tensors are mapped, from the same file where that has the same numbers."""
    wholes: dict[int, mmap.mmap] = {}
    return {name: _copy(x, wholes) for name, x in tensors.items()}


def _copy(x: Tensor, wholes: dict[int, mmap.mmap]) -> Tensor:
    place = _PLACES.get(x.untyped_storage()) if is_mapped(x) else None
    if place is not None and place.file is not None:
        try:
            handle = place.file.handle
            if handle not in wholes:
                wholes[handle] = mmap.mmap(handle, 0, access=mmap.ACCESS_COPY)
            storage = x.untyped_storage()
            flat = torch.frombuffer(wholes[handle], dtype=torch.uint8, count=storage.nbytes(), offset=place.start)
        except (OSError, ValueError):  # too many open files: the copy is written anew
            pass
        else:
            _PLACES[flat.untyped_storage()] = place
            new = flat.view(x.dtype).as_strided(x.shape, x.stride(), x.storage_offset())
            if _equal(new, x):  # somebody may have written into the tensor
                return new
    return stored_as(x, x.detach().clone(memory_format=torch.preserve_format))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, piece by piece."""
    return torch.equal(a, b) or torch.equal(a.nan_to_num(), b.nan_to_num())


def write_(tensor: Tensor, value: Tensor) -> None:
    """Write a value of the same shape into a parameter or buffer, in place.

    If it is mapped, its data are replaced by a mapped tensor: pages that are written into would stay in memory.
    """
    with torch.no_grad():
        if is_mapped(tensor) and not is_mapped(value):
            tensor.data = stored_as(tensor, value.detach().to(tensor.dtype, copy=True))
        elif is_mapped(tensor):
            tensor.data = copies({"": value.detach().to(tensor.dtype)})[""]
        else:
            tensor.copy_(value)


def mapped_copies(tensors: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Mapped copies of those tensors that are mapped, by id. Parameters are parameters again."""
    found = {name: x for name, x in tensors.items() if is_mapped(x)}
    out: dict[int, Tensor] = {}
    for name, new in copies({name: x.detach() for name, x in found.items()}).items():
        old = found[name]
        held = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
        vars(held).update(vars(old))
        out[id(old)] = held
    return out


def _most_open() -> int:
    try:
        import resource
    except ImportError:
        return 0
    return min(_MOST_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
