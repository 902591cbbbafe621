"""Finished batches on the disk, so that an interrupted run goes on and a later one is spared the work."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune.errors import InputError
from coreprune.queries import storage
from coreprune.queries.sources.base import Source


def fingerprint(model: nn.Module, example: Any, sources: list[Source], n: int, seed: int) -> str:
    """Digest of all that the queries depend on: names, shapes and values of the model's tensors, and the arguments."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        _add(digest, name, tensor)
    leaves, tree = pytree.tree_flatten(example)
    for i, leaf in enumerate(leaves):
        _add(digest, f"example {i}", leaf)
    digest.update(repr((tree, sources, n, seed)).encode())
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value!r}".encode())
        return
    digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
    digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


@dataclass(frozen=True)
class Cache:
    """The batches of one run in one file. key: fingerprint of the run; a file with another key is made anew."""

    path: Path
    key: str

    def _read(self) -> dict[str, list[Tensor]]:
        if not self.path.exists():
            return {}
        tree, about = storage.read(self.path)
        if "cache" not in about:
            raise InputError(f"{self.path} holds queries that were saved, not a cache. Choose another file.")
        return tree if about["cache"] == self.key else {}

    def parts(self, leaf: int) -> list[Tensor]:
        """The finished batches of one input."""
        return self._read().get(str(leaf), [])

    def keep(self, leaf: int, parts: list[Tensor]) -> None:
        """Write the finished batches of one input, atomically, beside those of the others."""
        storage.write(self.path, {**self._read(), str(leaf): parts}, {"cache": self.key})
