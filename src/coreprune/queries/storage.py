"""Nested arguments in one safetensors file. The structure is JSON in the metadata."""

from __future__ import annotations

import json
import reprlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coreprune._files import whole_file
from coreprune._tree import decode, encode
from coreprune.errors import InputError, first_line

_KEY = "coreprune.queries"
_VERSION = 1


def write(path: Path, tree: Any, about: dict[str, Any]) -> None:
    """Write the file completely or not at all.

    tree: nested arguments. about: what else to remember, for JSON.
    """
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
    """What `write` was given. Raises InputError if the file is missing, damaged, or of another kind."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise InputError(f"{path} holds tensors, but no queries: it was not written by Queries.save.")
            content = json.loads(text)
            if content["version"] != _VERSION:
                found = reprlib.repr(content["version"])
                raise InputError(f"{path} has format {found}, this coreprune reads {_VERSION}. Make the queries anew.")
            names = set(file.keys())

            def once(name: Any) -> Tensor:  # a name that came again and again would fill the memory
                names.remove(name)
                return file.get_tensor(name)

            tree, about = decode(content["tree"], once), content["about"]
            if not isinstance(about, dict):
                raise TypeError("nothing is said about them")
            return tree, about
    except InputError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as queries ({first_line(error)}). Make them anew.") from error
