"""Ways to run a model: eager, compiled by torch.compile, or exported to ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from coreprune import _onnx
from coreprune._batch import Inputs
from coreprune.errors import CoreprunError, InputError, ModelError, first_line

Runtime = Literal["eager", "compile", "onnx"]
RUNTIMES: tuple[str, ...] = get_args(Runtime)


def runner(runtime: str, model: nn.Module, inputs: Inputs) -> Callable[[], Any]:
    """What runs a model on inputs, without gradients. The model must not change as long as it is used.

    Raises InputError if a package is missing, and ModelError if the model cannot be compiled or exported.
    """
    args, kwargs = inputs
    if runtime == "eager":
        return torch.no_grad()(lambda: model(*args, **kwargs))
    try:
        # Every program has code of its own: torch.compile makes no more than a few variants of one function.
        program = torch.export.export(model, args, kwargs, strict=False)
        if runtime == "onnx":
            return _session(program, inputs)
        compiled = torch.compile(program.module(), dynamic=False)
        with torch.no_grad():
            compiled(*args, **kwargs)  # which compiles it
    except CoreprunError:
        raise
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__} does not run with runtime={runtime!r}: {first_line(error)}. Try runtime='eager'."
        ) from error
    return torch.no_grad()(lambda: compiled(*args, **kwargs))


def check_runtime(runtime: str, device: torch.device) -> None:
    """Raise InputError if a runtime does not work here."""
    if runtime != "onnx":
        return
    if missing := _onnx.missing():
        raise InputError(
            f"runtime='onnx' needs {', '.join(missing)}, which cannot be found here. Run: pip install 'coreprune[onnx]'"
        )
    if device.type != "cpu":
        raise InputError(f"runtime='onnx' is timed on the CPU, but the model is on {device}. Move it to the CPU.")


def versions_of(runtime: str) -> dict[str, str]:
    """The versions of what a runtime consists of."""
    return {name: version(name) for name in ("torch", *(("onnxruntime",) if runtime == "onnx" else ()))}


def _session(program: torch.export.ExportedProgram, inputs: Inputs) -> Callable[[], Any]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place = Path(folder) / "model.onnx"
        _onnx.write(program, place)
        return _onnx.opened(place, _onnx.input_names(program))(inputs)
