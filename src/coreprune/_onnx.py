"""ONNX files: written from a torch.export program, and run with ONNX Runtime on the CPU."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from coreprune._batch import BatchAxes, Inputs
from coreprune.errors import ModelError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def missing() -> list[str]:
    """The packages that are needed and absent."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def write(program: ExportedProgram, place: Path, axes: BatchAxes | None = None) -> None:
    """Write an ONNX file. axes: which axes are free in the program, to give them a name."""
    _written(program, axes).save(place)


def _written(program: ExportedProgram, axes: BatchAxes | None) -> Any:
    args, kwargs = program.example_inputs or ((), {})
    leaves = pytree.tree_leaves((args, kwargs))
    free = (None,) * len(leaves) if axes is None else axes.inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and onnxscript warn about their own deprecations
        written = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            output_names=_names(program.module()(*args, **kwargs)),
            dynamic_shapes=tuple(
                {} if axis is None else {axis: "batch"}
                for x, axis in zip(leaves, free, strict=True)
                if isinstance(x, Tensor)
            ),
        )
    if written is None:
        raise ModelError("torch.onnx.export returned nothing")
    return written


def input_names(program: ExportedProgram) -> tuple[str, ...]:
    """Names for the leaves of a model's inputs, in their order. Only tensors are inputs of an ONNX file."""
    return tuple(map(str, program.graph_signature.user_inputs))


def feed(names: Sequence[str], known: Collection[str], inputs: Inputs) -> dict[str, np.ndarray]:
    """Inputs of a model as ONNX Runtime takes them. known: the inputs that the file has; others are left out."""
    leaves = zip(names, pytree.tree_leaves(inputs), strict=True)
    return {name: x.detach().cpu().numpy() for name, x in leaves if name in known}


def opened(place: Path, names: Sequence[str]) -> Callable[[Inputs], Callable[[], Any]]:
    """Load a file, with as many threads as torch has. Returns a function: inputs -> what runs the file on them.

    names: of the file's inputs, for the leaves of a model's inputs in their order.
    """
    session = _session(place)
    known = {value.name for value in session.get_inputs()}

    def given(inputs: Inputs) -> Callable[[], Any]:
        arrays = feed(names, known, inputs)
        return lambda: session.run(None, arrays)

    return given


def branches(program: ExportedProgram, inputs: Sequence[Sequence[Tensor]]) -> list[Callable[[], Any]]:
    """What runs every branch of a program alone. One export for all of them takes little longer than for one.

    program: its output i is computed from inputs[i] alone; the inputs of all branches are its own, in this order.
    """
    from onnx.utils import Extractor

    whole = Extractor(_written(program, None).model_proto)
    names = iter(input_names(program))
    runs = []
    for i, mine in enumerate(inputs):
        given = {next(names): x.detach().cpu().numpy() for x in mine}
        output = "output" if len(inputs) == 1 else f"output_{i}"
        session = _session(whole.extract_model(list(given), [output]).SerializeToString())
        runs.append(partial(session.run, None, given))
    return runs


def _session(model: Path | bytes) -> Any:
    """A session on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _names(outputs: Any) -> list[str]:
    """A name for every tensor among the outputs: its key if they are a mapping, else its number."""
    if isinstance(outputs, Mapping) and all(isinstance(x, Tensor) for x in outputs.values()):
        return [str(key) for key in outputs]
    count = sum(isinstance(x, Tensor) for x in pytree.tree_leaves(outputs))
    return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
