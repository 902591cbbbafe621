"""Models for other runtimes: ONNX files and torch.export programs. Each is run and compared before it is kept."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.utils import _pytree as pytree

from coreprune import _onnx
from coreprune._batch import BatchAxes
from coreprune._batch_trials import batch_axes
from coreprune._chatter import without_graphs
from coreprune._example import normalise_example
from coreprune._files import flush, refused
from coreprune._twin import quiet
from coreprune.errors import ArtifactError, InputError, ModelError, first_line

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[Inputs], list[Tensor]]  # the tensors among the outputs, in the order of the tree
Write = Callable[[ExportedProgram, BatchAxes, Path], Run]  # writes the file, and returns what runs it
Batch = Literal["dynamic", "static"]


@dataclass(frozen=True)
class Exported:
    """An exported file that has been run and compared with the model.

    path: the file. batch: "dynamic", or the only number of samples that the file accepts. difference: the largest
    difference between its outputs and the model's, relative to the largest output, over all batch sizes that were
    tried. note: why the batch axis is not dynamic although you asked for that, or empty.
    """

    path: Path
    batch: int | Literal["dynamic"]
    difference: float
    note: str = ""

    def __str__(self) -> str:
        """One line, followed by the note if there is one."""
        size = "any batch size" if self.batch == "dynamic" else f"batch size {self.batch} alone"
        line = f"{self.path}: {size}, outputs within {self.difference:.1e} of the model's"
        return f"{line}\n{self.note}" if self.note else line


def export_onnx(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    batch: Batch = "dynamic",
    tolerance: float = 1e-4,
    batch_axis: Any = "auto",
) -> Exported:
    """Write an ONNX file, run it with onnxruntime on the CPU, and keep it if it gives the model's outputs.

    model: the model to export, in evaluation mode. It is left as it was. If it returns a mapping, the outputs are named
        after its keys.
    example: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
    path: the file. It is written to a temporary place and then moved, so a failure leaves an older file untouched.
        Weights that are too large for one file (2 GB) are written beside it, to a file of that name with ".data" added.
    batch: "dynamic" leaves the batch axis free if the model has one and allows that. This is tried at several sizes. If
        it fails, the size is fixed, and the note says why. "static" keeps the example's batch size.
    tolerance: the largest accepted difference between outputs, relative to the largest output.
    batch_axis: which axis of the inputs holds the samples, as for `coreprune.prune`.

    Raises ArtifactError if a package is missing (`pip install 'coreprune[onnx]'`), the disk refuses or the outputs
    differ, ModelError if the model does not run or cannot be exported, and InputError for wrong arguments.
    """
    need_onnx()
    return export_with(write_onnx, model, example, Path(path), batch, tolerance, batch_axis)


def export_program(
    model: nn.Module,
    example: Any,
    path: str | Path,
    *,
    batch: Batch = "dynamic",
    tolerance: float = 1e-5,
    batch_axis: Any = "auto",
) -> Exported:
    """Write a torch.export program (.pt2), load it back, and keep it if it gives the model's outputs.

    `torch.export.load(path).module()` runs it without the model's code. Arguments and errors are as in `export_onnx`.
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise InputError(
            f"a torch.export program ends in .pt2, but the path is {path}. Use {path.with_suffix('.pt2')}."
        )
    return export_with(_write_program, model, example, path, batch, tolerance, batch_axis)


def need_onnx() -> None:
    """Raise ArtifactError if a package is missing that ONNX files are written, quantised or run with."""
    if missing := _onnx.missing():
        raise ArtifactError(
            f"an ONNX export needs {', '.join(missing)}, which cannot be found here. Run: pip install 'coreprune[onnx]'"
        )


def export_with(
    write: Write,
    model: nn.Module,
    example: Any,
    path: Path,
    batch: Batch,
    tolerance: float,
    batch_axis: Any,
) -> Exported:
    """Trace, write, run and compare. If asked to, try it with a free batch axis first."""
    inputs = normalise_example(example)
    if batch not in ("dynamic", "static"):
        raise InputError(f'batch must be "dynamic" or "static", not {batch!r}.')
    if batch == "dynamic" and not any(x.dim() and len(x) for x in _tensors(inputs)):
        raise InputError('the example holds no samples along axis 0 of a tensor. Use batch="static".')
    axes = batch_axes(model, inputs, batch_axis)
    own = axes.size(inputs)
    note = "The model has no batch axis: the shapes are those of the example." if axes.whole else ""
    with quiet(model) as still, quiet(model, own_inputs=False) as traced, in_place(path) as place:
        _outputs(still, inputs)
        job = _Job(still, traced, inputs, axes, tolerance, write, place)
        if batch == "dynamic" and not axes.whole:
            sizes = sorted({1, 2, 3, own})  # 1 and 2, because torch.export treats 0 and 1 specially
            try:
                difference = _attempt(job, sizes, traced=max(own, 2))
                return Exported(path, "dynamic", difference)
            except (ModelError, ArtifactError) as error:
                note = f"The batch axis is fixed: with a free one, {error}"
        difference = _attempt(job, [own], traced=None)
    return Exported(path, own, difference, note)


@dataclass(frozen=True, eq=False)
class _Job:
    """What to export, how and where to, and how far the outputs may be from the model's."""

    model: nn.Module
    traced: nn.Module  # the same, without copies of its inputs
    inputs: Inputs
    axes: BatchAxes
    tolerance: float
    write: Write
    place: Path


def _attempt(job: _Job, sizes: Sequence[int], traced: int | None) -> float:
    """Write one file, and return the largest difference from the model at these batch sizes.

    traced: the number of samples to trace with, for a free batch axis. None traces the inputs themselves, for a fixed
    batch axis.
    """
    model, inputs, tolerance, free = job.model, job.inputs, job.tolerance, traced is not None
    program = _trace(job.traced, inputs if traced is None else job.axes.repeated(inputs, traced), job.axes, free)
    try:
        run = job.write(program, job.axes, job.place)
    except OSError:
        raise
    except Exception as error:
        raise ModelError(f"{type(model).__name__} cannot be exported: {first_line(error)}.") from error
    worst = 0.0
    for size in sizes:
        samples = job.axes.repeated(inputs, size) if free else inputs
        wanted = _tensors(_outputs(model, samples))
        try:
            found = run(samples)
        except Exception as error:
            raise ArtifactError(f"the exported file does not run with {size} samples: {first_line(error)}.") from error
        worst = max(worst, _difference(found, wanted))
        if not worst <= tolerance:
            raise ArtifactError(
                f"with {size} samples the exported file's outputs are {worst:.1e} away from the model's, more than "
                f"tolerance={tolerance:g}, so it is not kept."
            )
    return worst


def _trace(model: nn.Module, example: Inputs, axes: BatchAxes, free: bool) -> ExportedProgram:
    args, kwargs = example
    shapes = ShapesCollection()
    for x, axis in zip(pytree.tree_leaves(example), axes.inputs, strict=True):
        if free and axis is not None:
            shapes[x] = {axis: Dim("batch", min=1)}
    try:
        dynamic: Any = shapes.dynamic_shapes(model, args, kwargs) if free else None
        with without_graphs():
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:
        raise ModelError(f"torch.export cannot trace {type(model).__name__}: {first_line(error)}.") from error


def _write_program(program: ExportedProgram, axes: BatchAxes, place: Path) -> Run:  # noqa: ARG001
    content = io.BytesIO()
    torch.export.save(program, content)  # into memory, because torch ends the whole process if the disk is full
    place.write_bytes(content.getbuffer())
    module = torch.export.load(place).module()
    return lambda inputs: _tensors(module(*inputs[0], **inputs[1]))


def write_onnx(program: ExportedProgram, axes: BatchAxes, place: Path) -> Run:
    """Write the program as an ONNX file, and return what runs it."""
    _onnx.write(program, place, axes)
    return onnx_run(place, _onnx.input_names(program))


def onnx_run(place: Path, names: Sequence[str]) -> Run:
    """What runs an ONNX file. names: of the file's inputs, for the leaves of a model's inputs in their order."""
    given = _onnx.opened(place, names)
    return lambda inputs: [torch.as_tensor(x) for x in given(inputs)()]


def _outputs(model: nn.Module, inputs: Inputs) -> Any:
    try:
        return model(*inputs[0], **inputs[1])
    except Exception as error:
        raise ModelError(f"{type(model).__name__} does not run on the example: {first_line(error)}.") from error


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _difference(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The largest difference, relative to the largest finite entry. Infinite where non-finite entries differ.

    Raises ArtifactError where the shapes differ.
    """
    shapes = [tuple(x.shape) for x in found]
    if shapes != [tuple(x.shape) for x in wanted]:
        raise ArtifactError(f"the exported file returns shapes {shapes}, the model {[tuple(x.shape) for x in wanted]}.")
    worst = 0.0
    for x, y in zip(found, wanted, strict=True):
        a, b = x.detach().cpu().double(), y.detach().cpu().double()
        finite = b.isfinite()
        if not torch.equal(finite, a.isfinite()) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
            return float("inf")
        if bool(finite.any()):
            scale = max(float(b[finite].abs().max()), torch.finfo(torch.float32).tiny)
            worst = max(worst, float((a - b)[finite].abs().max()) / scale)
    return worst


@contextmanager
def in_place(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a temporary folder beside it. In the end, move all files there into place.

    The file itself is moved last. An error leaves no trace. Raises ArtifactError where the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp") as folder:
            place = Path(folder) / path.name
            yield place
            for file in sorted(Path(folder).iterdir(), key=lambda f: f == place):
                flush(file)
                file.replace(path.with_name(file.name))
            flush(path.parent)
    except OSError as error:
        raise refused(path, error) from error
