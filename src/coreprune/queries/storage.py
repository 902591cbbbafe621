"""Nested arguments in one safetensors file: tensors as tensors, the structure as JSON in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coreprune._files import whole_file
from coreprune._tree import decode, encode
from coreprune.errors import InputError

_KEY = "coreprune.queries"
_VERSION = 1


def write(path: Path, tree: Any, about: dict[str, Any]) -> None:
    """Write atomically: a temporary file beside it, flushed to the disk, then renamed."""
    tensors: dict[str, Tensor] = {}

    def name(x: Tensor) -> str:
        key = f"t{len(tensors)}"
        # A copy of its own: safetensors refuses tensors that share memory, as repeated rows do.
        tensors[key] = torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())
        return key

    structure = encode(tree, name)
    text = json.dumps({"version": _VERSION, "tree": structure, "about": about})
    with whole_file(path) as temporary:
        save_file(tensors, temporary, {_KEY: text})


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The tree and what was said about it. Raises InputError where the file is missing, damaged, or of another kind."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise InputError(f"{path} holds tensors, but no queries: it was not written by Queries.save.")
            content = json.loads(text)
            if content["version"] != _VERSION:
                raise InputError(
                    f"{path} has format {content['version']}, this coreprune reads {_VERSION}. Make the queries anew."
                )
            return decode(content["tree"], file.get_tensor), content["about"]
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as queries ({error}). Make them anew.") from error
