"""Weights from a file, as people keep them: a state dict, alone or inside of a checkpoint, whatever wraps its names."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._mapped import mapped_file
from coreprune._weightless import COUNTER, fill_
from coreprune.errors import ArtifactError, InputError, first_line

log = logging.getLogger(__name__)

State = Mapping[str, Tensor]
_COMPILED = "_orig_mod."  # what torch.compile puts into names


def load_weights(model: nn.Module, file: Path) -> None:
    """Fill a model with the weights of a file: .safetensors, or what torch.save wrote of tensors (.pt, .pth, .ckpt).

    A model from `weightless` gets parameters that are mapped from a .safetensors file.

    Of a checkpoint with several state dicts, an average of the weights (EMA) is taken if there is one, because that is
    what training scripts evaluate. Names may have a prefix, such as those of data parallel and compiled models.

    file: or FILE::KEY, for the state dict that is under KEY in a checkpoint with several.

    Raises InputError if the file cannot be read without running its code, or does not fit.
    """
    name, _, key = str(file).partition("::")
    path = Path(name)
    place, state = _chosen(_read(path), path, key)
    state = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    wanted = {name for name in model.state_dict() if not name.endswith(COUNTER)}
    prefix = _prefix(state, wanted)
    inside = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    log.info(
        "weights from %s%s%s", path, f", {place}" if place else "", f", names that start with {prefix}" * bool(prefix)
    )
    if any(p.is_meta for p in model.parameters()):
        fill_(model, inside, str(path))
        return
    try:
        missing, unexpected = model.load_state_dict(inside, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"{path} does not fit {type(model).__name__}: {reason}") from error
    missing = [name for name in missing if not name.endswith(COUNTER)]
    if missing or unexpected:
        raise InputError(
            f"{path} does not fit {type(model).__name__}: it lacks {missing[:3]} and has {unexpected[:3]} too many."
        )


def _read(path: Path) -> Any:
    """What the file holds, as long as it is tensors in dicts and lists."""
    if path.suffix == ".safetensors":
        try:
            return mapped_file(path)
        except ArtifactError as error:
            raise InputError(str(error)) from error
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, such as a whole pickled module. Reading it would run code from the file. "
            "If you trust it, write its weights alone, once, where its classes can be imported:\n"
            f"    import torch\n"
            f"    found = torch.load({str(path)!r}, weights_only=False)\n"
            f"    torch.save(found.state_dict(), 'weights.pt')  # of a checkpoint: found['model'].state_dict()"
        ) from error
    except Exception as error:
        raise InputError(f"cannot read {path} as weights: {first_line(error)}.") from error


def _chosen(found: Any, path: Path, key: str) -> tuple[str, State]:
    """The state dict to load, and where in the checkpoint it is."""
    states = dict(_states(found))
    if not states:
        raise InputError(f"{path} holds no state dict: no names with tensors.")
    if key:
        if key not in states:
            raise InputError(f"{path} has no state dict called {key!r}. It has {', '.join(map(repr, states))}.")
        return key, states[key]
    chosen = max(states, key=lambda name: ("ema" in name.lower(), sum(t.numel() for t in states[name].values())))
    if others := [name for name in states if name != chosen]:
        log.warning(
            "of the state dicts in %s, %r is loaded. For another, write %s.",
            path,
            chosen,
            " or ".join(f"--weights {path}::{other}" for other in others),
        )
    return chosen, states[chosen]


def _states(found: Any, place: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """The state dicts inside of a checkpoint, by where they are. Those of optimisers have numbers for names."""
    if not isinstance(found, Mapping) or depth > 2:
        return
    names = {key: value for key, value in found.items() if isinstance(key, str)}
    tensors = {key: value for key, value in names.items() if isinstance(value, Tensor)}
    if tensors and (len(tensors) == len(found) or any("." in key for key in tensors)):
        yield place, tensors
        return
    for key, value in names.items():
        yield from _states(value, f"{place}.{key}" if place else key, depth + 1)


def _prefix(state: State, wanted: set[str]) -> str:
    """What stands before the names of the model's tensors in a state dict, so that most of them are found."""
    last = {name.rpartition(".")[2] for name in wanted}
    prefixes = {""}
    for name in state:
        if name.rpartition(".")[2] in last:
            parts = name.split(".")
            prefixes |= {".".join(parts[:i]) + "." for i in range(1, min(len(parts), 4))}
    return max(prefixes, key=lambda p: (sum(p + name in state for name in wanted), "ema" in p.lower(), -len(p)))
