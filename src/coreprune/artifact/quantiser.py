"""ONNX Runtime's quantiser: what it asks for, and how it is called."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from coreprune._batch import BatchAxes, Inputs
from coreprune._onnx import feed
from coreprune.errors import ModelError, first_line
from coreprune.queries import Queries

Mode = Literal["auto", "static", "dynamic"]

_TOGETHER = 32  # queries that are run together
_CONVOLUTIONS, _PRODUCTS = ("Conv", "ConvTranspose"), ("MatMul", "Gemm")
_TABLES = "Gather"  # embeddings: they only need less memory


def prepare(source: Path, target: Path, mode: Mode) -> tuple[Literal["static", "dynamic"], frozenset[str]]:
    """Fold constants and infer shapes, as ONNX Runtime asks for before it quantises.

    Returns the mode for the file, and the names of its inputs.

    Raises ModelError if the file has nothing to quantise.
    """
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(source, target, skip_symbolic_shape=True)
    graph = onnx.load(target).graph
    fixed = {x.name for x in graph.initializer}
    kinds = [node.op_type for node in graph.node if fixed.intersection(node.input[:2])]
    convolutions, products = (sum(kind in wanted for kind in kinds) for wanted in (_CONVOLUTIONS, _PRODUCTS))
    if not convolutions + products:
        raise ModelError(
            "there is nothing to quantise: the exported model has no convolution and no matrix product with fixed "
            "weights. Export it without int8."
        )
    if mode == "dynamic" and not products:
        raise ModelError('mode="dynamic" quantises matrix products, and the model has none. Use mode="static".')
    chosen = mode if mode != "auto" else "static" if convolutions > products else "dynamic"
    return chosen, frozenset(x.name for x in graph.input)


def feeds(
    queries: Queries, names: Sequence[str], known: Collection[str], axes: BatchAxes, size: int | None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches as ONNX Runtime takes them. size: the only number of samples that the file takes, or None."""
    for inputs in queries.batches(_TOGETHER if size is None else 1):
        yield feed(names, known, filled(inputs, axes, size))


@dataclass(frozen=True)
class _Reader:
    """Batches in the form in which ONNX Runtime asks for them."""

    left: Iterator[dict[str, np.ndarray]]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None."""
        return next(self.left, None)


def filled(inputs: Inputs, axes: BatchAxes, size: int | None) -> Inputs:
    """The same inputs again and again, up to the number that a file takes."""
    return inputs if size is None else axes.repeated(inputs, size)


def quantise(source: Path, target: Path, mode: str, feeds: Iterator[dict[str, np.ndarray]]) -> None:
    """feeds: batches that set the ranges of activations, in mode "static"."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_dynamic, quantize_static

    weights: Any = {"per_channel": True, "reduce_range": True, "weight_type": QuantType.QInt8}
    try:
        if mode == "dynamic":
            quantize_dynamic(source, target, op_types_to_quantize=[*_PRODUCTS, _TABLES], **weights)
        else:
            reader: Any = _Reader(feeds)
            quantize_static(
                source,
                target,
                reader,
                quant_format=QuantFormat.QDQ,  # which other runtimes read, too
                activation_type=QuantType.QUInt8,
                calibrate_method=CalibrationMethod.MinMax,
                **weights,
            )
    except OSError:
        raise
    except Exception as error:
        raise ModelError(f"ONNX Runtime cannot quantise the exported model: {first_line(error)}.") from error


@contextmanager
def calm() -> Iterator[None]:
    """ONNX Runtime's quantiser logs through the root logger, which would set up the caller's logging."""
    root, silent = logging.getLogger(), logging.NullHandler()
    root.addHandler(silent)
    try:
        yield
    finally:
        root.removeHandler(silent)
