"""Trace a model once with torch.export, with one sample, without changing it."""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from coreprune._batch import BatchAxes
from coreprune._batch_trials import batch_axes
from coreprune._chatter import without_graphs
from coreprune._example import ANY_BATCH, normalise_example
from coreprune._single import stored_dtype
from coreprune._twin import quiet
from coreprune.errors import ModelError, first_line
from coreprune.graph.caches import Place, caches, drop
from coreprune.graph.flat import flatten

if TYPE_CHECKING:
    from coreprune.graph.tracer import Tracer

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Captured:
    """One traced model.

    Attributes:
        graph: the exported ATen graph, in which operations without a rule are written as their parts.
        sources: placeholder name -> (kind, dotted name); kind is "parameter", "buffer", "constant" or "input".
        tensors: canonical dotted name -> (shape, dtype) of every parameter and buffer.
        aliases: dotted name -> canonical dotted name (tied parameters share one canonical name).
        parameters: canonical names that are parameters (the others are buffers).
        module_types: dotted module name -> class name.
        constants: placeholder name -> tensor that is a literal in the forward.
        args, kwargs: the example that was traced: one sample.
        readers: canonical name of a parameter or buffer -> how many nodes read it, under any of its names.
        axes: which axes of the example hold its samples.
        caches: where the model keeps tensors that its forward makes anew when they are gone. They were, in the trace.
        seconds: how long tracing took.
        training: whether it was traced in training mode.
        more: traces of the same model on other examples and in training mode, whose channels are followed, too.
    """

    graph: torch.fx.GraphModule
    sources: dict[str, tuple[str, str]]
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]]
    aliases: dict[str, str]
    parameters: frozenset[str]
    module_types: dict[str, str]
    constants: dict[str, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    readers: Counter[str]
    axes: BatchAxes
    caches: tuple[Place, ...] = ()
    seconds: float = 0.0
    training: bool = False
    more: tuple[Captured, ...] = ()

    @property
    def unread(self) -> tuple[str, ...]:
        """The parameters that no node reads, in none of the traces."""
        return tuple(
            n for n in self.tensors if n in self.parameters and not any(c.readers[n] for c in (self, *self.more))
        )

    @cached_property
    def channel_ids(self) -> Tracer:
        """The result of running the graph on channel ids."""
        from coreprune.graph.interpret import trace  # the rules import this module

        return trace(self)


def capture(
    model: nn.Module,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    batch: int = 1,
    training: bool = False,
    batch_axis: Any = "auto",
) -> Captured:
    """Trace `model(*args, **kwargs)` into a graph of ATen operations, with one sample by default.

    A copy of the model that shares its weights is traced, in evaluation mode by default (`quiet`).

    Args:
        model: any module that torch.export (non-strict) can trace.
        args: positional arguments: a tuple, or one tensor. A dict is taken as keyword arguments.
        kwargs: keyword arguments.
        batch: how many samples of the example are traced. To find channel groups, use 1.
        training: trace the training mode.
        batch_axis: which axis of the inputs holds the samples (`batch_axes`). An example without any is traced whole.

    Raises:
        ModelError: the model does not run on the example, or cannot be exported. The message names the line.
    """
    args, more = normalise_example(args)
    kwargs = {**more, **(kwargs or {})}
    axes = batch_axes(model, (args, kwargs), batch_axis)
    args, kwargs = axes.cut((args, kwargs), batch)
    start = time.perf_counter()
    stale = caches(model, args, kwargs)
    with quiet(model, own_inputs=False) as still:
        drop(still, stale)
        try:
            with without_graphs(), warnings.catch_warnings():  # the twin may keep what it likes
                warnings.filterwarnings("ignore", "The tensor attribute")
                program = torch.export.export(still.train(training), args, kwargs, strict=False)
        except Exception as error:
            raise ModelError(_explain(model, error)) from error
    from coreprune.graph.decompose import decompose  # these import this module
    from coreprune.graph.writes import join_writes

    graph = flatten(program.graph_module)
    join_writes(graph)
    decompose(graph)
    names = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    canonical: dict[int, str] = {}
    aliases = {name: canonical.setdefault(id(t), name) for name, t in names}
    tensors = {n: (tuple(t.shape), stored_dtype(t)) for n, t in names if aliases[n] == n}
    parameters = frozenset(n for n, _ in model.named_parameters(remove_duplicate=False) if aliases[n] == n)
    sources: dict[str, tuple[str, str]] = {}
    constants: dict[str, Any] = {}
    for spec in program.graph_signature.input_specs:
        name = getattr(spec.arg, "name", "")
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in aliases:
            kind = "parameter" if spec.kind is InputKind.PARAMETER else "buffer"
            sources[name] = (kind, aliases[spec.target])
        elif spec.kind is InputKind.USER_INPUT:
            sources[name] = ("input", name)
        else:
            sources[name] = ("constant", str(spec.target))
            constants[name] = program.constants.get(str(spec.target))
    readers: Counter[str] = Counter()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            readers[sources.get(node.name, ("", node.name))[1]] += len(node.users)
    seconds = time.perf_counter() - start
    log.debug("captured %s: %d nodes in %.2f s", type(model).__name__, len(graph.graph.nodes), seconds)
    return Captured(
        graph=graph,
        sources=sources,
        tensors=tensors,
        aliases=aliases,
        parameters=parameters,
        module_types={n: type(m).__name__ for n, m in model.named_modules()},
        constants=constants,
        args=args,
        kwargs=kwargs,
        readers=readers,
        axes=axes,
        caches=stale,
        seconds=seconds,
        training=training,
    )


def _explain(model: nn.Module, error: Exception) -> str:
    """A message that says what failed, at which line, and what to try."""
    where = ""
    tb = error.__traceback__
    while tb is not None:  # the innermost frame in the user's own code is the line that the user can change
        code = tb.tb_frame.f_code
        if "/torch/" not in code.co_filename.replace("\\", "/") and "coreprune/graph" not in code.co_filename:
            where = f" at {code.co_filename}:{tb.tb_lineno} in {code.co_name}"
        tb = tb.tb_next
    advice = "check that the example inputs are what the model's forward expects"
    text = str(error).lower()
    if "data-dependent" in text or "guardondatadependent" in type(error).__name__.lower():
        advice = (
            "the forward branches on values; make that branch a configuration choice, wrap it in torch.cond, ask "
            "for an implementation without it (experts_implementation='grouped_mm' for transformers' experts), or "
            "prune a part of the model that has no such branch, such as the backbone of a detector: "
            "prune(model, example_inputs, part='backbone')"
        )
    elif "guard failed" in text or "expected input at" in text:  # as newer and older releases of torch say it
        advice = f"if the model is a program that was exported for another size of its inputs, {ANY_BATCH}"
    elif "cache" in text:
        advice = "ask the model not to return a cache (use_cache=False)"
    return (
        f"cannot capture {type(model).__name__}{where}: {first_line(error)}. Try this: {advice}; "
        "torch.export.export(model, args, kwargs, strict=False) has to work on its own."
    )
