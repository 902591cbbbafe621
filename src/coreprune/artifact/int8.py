"""ONNX files with int8 weights: ONNX Runtime quantises them, and queries that it has not seen say what that changed."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from coreprune import _onnx
from coreprune._batch import BatchAxes
from coreprune._batch_trials import batch_axes
from coreprune._example import normalise_example
from coreprune._twin import quiet
from coreprune.artifact.exports import (
    Batch,
    Exported,
    Run,
    export_with,
    in_place,
    need_onnx,
    onnx_run,
    write_onnx,
)
from coreprune.artifact.quantiser import Mode, calm, feeds, filled, prepare, quantise
from coreprune.errors import ArtifactError, InputError, ModelError, first_line
from coreprune.pruning.calibration.padding import ends_on
from coreprune.pruning.reporting.comparison import Apart, apart
from coreprune.queries import Queries, make_queries

METADATA = "coreprune.int8"  # the key of what the file says about itself
_CALIBRATE, _MEASURE = 256, 1024  # queries at most


@dataclass(frozen=True)
class Int8:
    """An ONNX file with int8 weights that has been run and compared with the model.

    path: the file. mode: "static" or "dynamic", see `export_int8`. batch: "dynamic", or the only number of samples that
    the file accepts. calibrated, held_out: how many queries set the ranges, and how many others the model and the file
    were compared on. source: of the queries. agreement: the share of the held-out queries to which both give the same
    class, or the same next token; None if the model returns no such scores. error: the mean squared difference of the
    outputs on them, relative to their variance. bytes: the sizes of the float32 file and of this one. note: why the
    batch axis is not dynamic although you asked for that, or empty.
    """

    path: Path
    mode: Literal["static", "dynamic"]
    batch: int | Literal["dynamic"]
    calibrated: int
    held_out: int
    source: str
    agreement: float | None
    error: float
    bytes: tuple[int, int]
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "path": str(self.path), "bytes": list(self.bytes)}

    def __str__(self) -> str:
        """Two lines, followed by the note if there is one."""
        size = "any batch size" if self.batch == "dynamic" else f"batch size {self.batch} alone"
        before, after = (f"{n / 1e6:.2f} MB" for n in self.bytes)
        same = "" if self.agreement is None else f"the same answer for {self.agreement:.1%}, "
        far = f"{same}squared error {self.error:.2%} of the variance"
        ranges = f" (ranges from {self.calibrated} queries)" if self.calibrated else ""
        lines = [
            f"{self.path}: {self.mode} int8{ranges}, {size}, {before} → {after}",
            f"on {self.held_out} held-out queries ({self.source}): {far}",
        ]
        return "\n".join([*lines, self.note] if self.note else lines)


def export_int8(
    model: nn.Module,
    example: Any,
    path: str | Path,
    queries: Any = "auto",
    *,
    mode: Mode = "auto",
    tolerance: float = 0.1,
    batch: Batch = "dynamic",
    seed: int = 0,
    batch_axis: Any = "auto",
) -> Int8:
    """Write an ONNX file with int8 weights, compare it with the model on held-out queries, and keep it if it is close.

    The model is exported as by `export_onnx` and quantised by ONNX Runtime: signed weights, one scale per output
    channel, 7 of the 8 bits, because x86 processors without VNNI overflow with 8. What was measured is also in the
    file's metadata, as JSON under "coreprune.int8".

    model, example, batch, batch_axis: as for `export_onnx`. All weights must be float32.
    path: the file. It is written to a temporary place and then moved, so a failure leaves an older file untouched.
    queries: as for `coreprune.make_queries`: samples, the path of an .npz file, `Result.queries`, or a source. By
        default they are made. Equal ones count once. A random half sets the ranges (in mode "static", at most 256); at
        most 1,024 of the others are held out for the comparison, in batches of 32.
    mode: "static" gives activations fixed ranges, those of the queries, which convolutions need to be fast. "dynamic"
        finds the range of every batch as it comes, and quantises only matrix products and embeddings. "auto" is
        "static" if the file has more convolutions than matrix products with fixed weights, else "dynamic".
    tolerance: the largest accepted share of held-out queries to which the file gives another answer. If the model
        returns no scores of classes and is no causal language model: the largest accepted error (`Int8.error`).
    seed: of made queries, and of the choice of the held-out ones.

    Raises ArtifactError if a package is missing (`pip install 'coreprune[onnx]'`), the disk refuses or the file is
    further from the model than the tolerance, ModelError if the model cannot be exported or has nothing to quantise,
    and InputError for wrong arguments and for queries that do not fit.
    """
    need_onnx()
    _check(model, mode, tolerance)
    path = Path(path)
    with in_place(path) as place, tempfile.TemporaryDirectory(dir=place.parent) as folder, calm():
        done, names = _float32(model, example, Path(folder) / "float32.onnx", batch, batch_axis)
        prepared = Path(folder) / "prepared.onnx"
        chosen, known = prepare(done.path, prepared, mode)
        calibration, held_out = _queries(model, example, queries, seed, batch_axis)
        axes = batch_axes(model, normalise_example(example), batch_axis)
        size = None if done.batch == "dynamic" else done.batch
        quantise(prepared, place, chosen, feeds(calibration, names, known, axes, size))
        file = _File(onnx_run(place, names), axes, size)
        found = _compared(model, file, held_out)
        result = Int8(
            path=path,
            mode=chosen,
            batch=done.batch,
            calibrated=len(calibration) if chosen == "static" else 0,
            held_out=len(held_out),
            source=held_out.source,
            agreement=found.agreement,
            error=found.error,
            bytes=(done.path.stat().st_size, place.stat().st_size),
            note=done.note,
        )
        _refuse_far(result, mode, tolerance)
        _describe(place, result)
        return replace(result, bytes=(result.bytes[0], place.stat().st_size))


def _check(model: nn.Module, mode: str, tolerance: float) -> None:
    if mode not in ("auto", "static", "dynamic"):
        raise InputError(f'mode must be "auto", "static" or "dynamic", not {mode!r}.')
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not tolerance >= 0:
        raise InputError(f"tolerance must be a number of at least 0, not {tolerance!r}.")
    for name, x in model.named_parameters():
        if x.is_floating_point() and x.dtype != torch.float32:
            raise InputError(f"an int8 export starts from float32, but {name} is {x.dtype}. Call model.float() first.")


def _float32(
    model: nn.Module, example: Any, path: Path, batch: Batch, batch_axis: Any
) -> tuple[Exported, tuple[str, ...]]:
    """The float32 file, and the names of its inputs for the leaves of the model's."""
    names: list[tuple[str, ...]] = []

    def write(program: ExportedProgram, axes: BatchAxes, place: Path) -> Run:
        names.append(_onnx.input_names(program))
        return write_onnx(program, axes, place)

    done = export_with(write, model, example, path, batch, 1e-4, batch_axis)
    if len(list(path.parent.iterdir())) > 1:
        raise ModelError("the weights take more than 2 GB, and ONNX Runtime quantises no such file here.")
    return done, names[-1]


def _queries(model: nn.Module, example: Any, spec: Any, seed: int, batch_axis: Any) -> tuple[Queries, Queries]:
    """Some to calibrate with, and others to measure on."""
    found = make_queries(model, example, spec, seed=seed, batch_axis=batch_axis)
    for x in pytree.tree_leaves((found.args, found.kwargs)):
        if isinstance(x, Tensor) and x.is_floating_point() and not x.isfinite().all():
            raise InputError("the queries hold NaN or infinite numbers. Remove them.")
    found = found.distinct()
    if len(found) < 2:
        raise InputError(
            "an int8 export needs at least two different queries: one to set ranges, one held out. Pass more."
        )
    return found.sample(_CALIBRATE + _MEASURE, seed).split(min(len(found) // 2, _CALIBRATE), seed)


class _File(nn.Module):
    """An ONNX file in a model's place.

    size: the only number of samples that the file takes, or None. It is then run on one sample, repeated.
    """

    def __init__(self, run: Run, axes: BatchAxes, size: int | None) -> None:
        super().__init__()
        self.run, self.axes, self.size = run, axes, size

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        inputs = args, kwargs
        samples = self.axes.size(inputs)
        if self.size is not None and samples > 1:  # `apart` then passes one at a time
            raise InputError(f"the file takes {self.size} samples, not {samples}.")
        device = next(x.device for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor))
        found = [x.to(device) for x in self.run(filled(inputs, self.axes, self.size))]
        if self.size is None or self.axes.whole:
            return tuple(found)
        places = self.axes.outputs if len(self.axes.outputs) == len(found) else (0,) * len(found)
        return tuple(x if place is None else x.narrow(place, 0, 1) for x, place in zip(found, places, strict=True))


def _compared(model: nn.Module, file: _File, held_out: Queries) -> Apart:
    """The file beside the model: first whether it runs at several batch sizes, then how close it is."""
    inputs = next(held_out.batches(1))
    with quiet(model) as still:
        for size in (1, 2, 3) if file.size is None else (1,):
            samples = file.axes.repeated(inputs, size)
            try:
                wanted = [tuple(x.shape) for x in pytree.tree_leaves(still(*samples[0], **samples[1])) if _is_tensor(x)]
            except Exception as error:
                raise ModelError(
                    f"{type(model).__name__} does not run with {_count(size)} ({first_line(error)}), so that its int8 "
                    "file cannot be compared with it on single queries. Export it without int8."
                ) from error
            try:
                found = [tuple(x.shape) for x in file(*samples[0], **samples[1])]
            except Exception as error:
                raise ArtifactError(f"the int8 file does not run with {_count(size)}: {first_line(error)}.") from error
            if found != wanted:
                raise ArtifactError(f"with {_count(size)} the int8 file returns shapes {found}, the model {wanted}.")
        ends = ends_on(still, held_out)
    result = apart(model, file, held_out, ends=ends)
    if result is None:
        raise ModelError(
            "the model returns no real numbers for each sample, so that its int8 file cannot be compared with it. "
            "Export it without int8."
        )
    return result


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def _count(samples: int) -> str:
    return f"{samples} sample{'s' if samples > 1 else ''}"


def _refuse_far(result: Int8, mode: Mode, tolerance: float) -> None:
    """Raise ArtifactError for a file that is further from the model than the tolerance."""
    far = result.error if result.agreement is None else 1 - result.agreement
    if far <= tolerance:
        return
    other = "static" if result.mode == "dynamic" else "dynamic"
    what = (
        f"its squared error is {result.error:.1%} of the outputs' variance"
        if result.agreement is None
        else f"it gives another answer to {far:.1%} of them"
    )
    advice = "Pass samples of your data as queries" if result.source != "samples" else "Pass more samples"
    raise ArtifactError(
        f"the {result.mode} int8 file is far from the model on {result.held_out} held-out queries ({result.source}): "
        f"{what}, more than tolerance={tolerance:g}, so it is not kept. {advice}, try mode={other!r}"
        f"{'' if mode == 'auto' else ' or mode=' + repr('auto')}, or export without int8. A network that was not "
        "trained has answers that anything changes; then pass a larger tolerance."
    )


def _describe(place: Path, result: Int8) -> None:
    """Write into the file what was measured of it."""
    import onnx
    import onnxruntime

    measured = {k: v for k, v in result.as_dict().items() if k not in ("path", "bytes", "note")}
    content = onnx.load(place)
    entry = content.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps({**measured, "onnxruntime": onnxruntime.__version__})
    onnx.save(content, place)
