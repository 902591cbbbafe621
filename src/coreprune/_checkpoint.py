"""A checkpoint of an unfinished run: one safetensors file. It is never half-written, and fits only its own run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coreprune._files import whole_file
from coreprune.errors import InputError

_KEY = "coreprune.checkpoint"
_VERSION = 1


def digest(parts: Iterable[tuple[str, Any]]) -> str:
    """Fingerprint of named values: name, dtype, shape and every bit of tensors; name and repr of other values."""
    total: Any = hashlib.sha256()  # takes arrays as well, though its annotations do not say so
    for name, value in parts:
        if isinstance(value, Tensor):
            total.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            total.update(f"{name} {value!r};".encode())
    return total.hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """The file for the state of a run. key: the fingerprint of everything that the run depends on."""

    path: Path
    key: str

    def write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file atomically: a temporary file beside it, flushed to the disk, then renamed.

        step: how many steps are done. tensors: any names, shapes, dtypes and devices.
        """
        # Copies of their own: safetensors refuses tensors that share memory.
        own = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()}
        text = json.dumps({"version": _VERSION, "run": self.key, "step": step})
        with whole_file(self.path) as temporary:
            save_file(own, temporary, {_KEY: text})

    def read(self) -> tuple[int, dict[str, Tensor]] | None:
        """(steps done, tensors on the CPU), or None if there is no file yet.

        Raises InputError if the file is damaged, of another kind, or from another run.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[_KEY])
                version, run, step = about["version"], about["run"], int(about["step"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise InputError(
                f"{self.path} is no checkpoint that coreprune wrote, or it is damaged "
                f"({type(error).__name__}: {error}). Choose another file, or delete it to start afresh."
            ) from error
        if version != _VERSION:
            raise InputError(
                f"{self.path} has format {version}; this version of coreprune reads {_VERSION}. "
                "Choose another file, or delete it to start afresh."
            )
        if run != self.key:
            raise InputError(
                f"{self.path} belongs to another run: the models, the inputs, the options and the seed must all be "
                "those that it was made with. Choose another file, or delete it to start afresh."
            )
        return step, tensors
