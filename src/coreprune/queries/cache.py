"""Finished batches on the disk, so that an interrupted run can go on and a later run need not make them again."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune.errors import InputError
from coreprune.queries import storage
from coreprune.queries.describe import description, shown

_log = logging.getLogger(__name__)


def fingerprint(model: nn.Module, example: Any, sources: list[Any], n: int, seed: int) -> str | None:
    """Digest of all that the queries depend on: names, shapes and values of the model's tensors, and the arguments.

    None if a source or an input of the example has no description that is the same in another process.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    leaves, tree = pytree.tree_flatten(example)
    for x in (*leaves, *sources):
        text = description(x)
        if text is None:
            _log.warning(
                "the queries are not cached: nothing tells whether %s is the same in another run. Write it as a plain "
                "function or a frozen dataclass",
                shown(x),
            )
            return None
        digest.update(text.encode())
    digest.update(repr((tree, n, seed)).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Cache:
    """The batches of one run in one file. key: fingerprint of the run. A file with another key is replaced."""

    path: Path
    key: str

    def read(self) -> dict[str, list[Tensor]]:
        """Finished batches by the name of their input. Empty if there are none of this run."""
        if not self.path.exists():
            return {}
        tree, about = storage.read(self.path)
        if "cache" not in about:
            raise InputError(f"{self.path} holds queries that were saved, not a cache. Choose another file.")
        return tree if about["cache"] == self.key else {}

    def keep(self, parts: dict[str, list[Tensor]]) -> None:
        """Write the finished batches of some inputs beside those of the others. The file is replaced in one step."""
        storage.write(self.path, {**self.read(), **parts}, {"cache": self.key})
