"""Find the model that a SOURCE argument names, and an example input for it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune.errors import InputError

DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


def load(source: str, weights: Path | None, shapes: list[str]) -> tuple[nn.Module, Any]:
    """Return (model, example inputs).

    source: `package.module:factory`; the factory is called without arguments and returns a model or (model, example).
    weights: a .safetensors file to load into it. shapes: see `example`; empty means the factory's own example.
    Raises InputError with what to write instead.
    """
    module_name, colon, name = source.partition(":")
    if not colon or not module_name or not name:
        raise InputError(f"SOURCE must read package.module:factory, e.g. mypackage.models:resnet, not {source!r}.")
    if str(Path.cwd()) not in sys.path:  # `python -m` does the same: a model.py in the current folder is found
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        advice = "Run from the folder it lies in, or install it."
        raise InputError(f"cannot import {module_name!r}: {error}. {advice}") from error
    except AttributeError as error:
        raise InputError(f"module {module_name!r} has no {name!r}.") from error
    made = factory if isinstance(factory, nn.Module) else factory()
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{source} gave a {type(model).__name__}, not a torch.nn.Module.")
    if weights is not None:
        _load_weights(model, weights)
    found = example(shapes) if shapes else given
    if found is None:
        raise InputError("no example input: pass --shape 1,3,224,224, or let the factory return (model, example).")
    return model, found


def example(shapes: list[str]) -> Any:
    """Example inputs from texts such as "1,3,224,224" or "input_ids=1,16:int".

    Named ones become keyword arguments, the others positional ones. Dtypes: float (default), int, bool. All entries are
    zero, except floats, which are standard normal with seed 0.
    """
    positional: list[Tensor] = []
    named: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for text in shapes:
        name, equals, rest = text.rpartition("=")
        sizes, _, dtype = rest.partition(":")
        try:
            shape = [int(size) for size in sizes.split(",")]
            kind = DTYPES[dtype or "float"]
            if min(shape) < 1:
                raise ValueError("sizes start at 1")
        except (ValueError, KeyError) as error:
            raise InputError(
                f"--shape {text!r} is not a shape. Write 1,3,224,224 or input_ids=1,16:int (float, int or bool)."
            ) from error
        tensor = torch.randn(shape, generator=generator) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
        if equals:
            named[name] = tensor
        else:
            positional.append(tensor)
    if named and positional:
        raise InputError("--shape: name all inputs or none of them.")
    return named or tuple(positional)


def _load_weights(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path} as safetensors: {error}") from error
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} does not fit {type(model).__name__}: {reason}") from error
    if missing or unexpected:
        raise InputError(
            f"{path} does not fit {type(model).__name__}: it lacks {missing[:3]} and has {unexpected[:3]} too many."
        )
