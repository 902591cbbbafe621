"""Operations alone, ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from coreprune import _onnx
from coreprune.pruning.timing.calls import Call, Lengths

Run = Callable[[], Any]


def prepared(cells: Sequence[tuple[Call, Lengths]], device: torch.device, runtime: str) -> list[Run]:
    """What runs each of these calls once, on tensors of random numbers.

    For "compile" that is the eager operation: alone, torch.compile makes of it a call of the same kernel.

    Raises what torch raises for shapes that do not fit (`fits` finds out).
    """
    if runtime == "onnx":
        return _sessions(cells, device)
    return [_eager(call, [o.tensor(lengths, device) for o in call.operands], lengths) for call, lengths in cells]


def fits(call: Call, lengths: Lengths) -> str:
    """In words, why a call does not work at these lengths; empty if it does. Nothing is computed for it."""
    try:
        result = _eager(call, [o.tensor(lengths, torch.device("meta")) for o in call.operands], lengths)()
    except Exception as error:  # torch may raise anything
        return f"{type(error).__name__}: {error}"
    return "" if isinstance(result, Tensor) else f"it returns a {type(result).__name__}"


def _eager(call: Call, tensors: Sequence[Tensor], lengths: Lengths) -> Run:
    args, kwargs = call.arguments(lengths, tensors)
    return torch.no_grad()(lambda: call.target(*args, **kwargs))


def _sessions(cells: Sequence[tuple[Call, Lengths]], device: torch.device) -> list[Run]:
    """Sessions of ONNX Runtime. All calls are the branches of one module, so that there is one export."""
    tensors = [[o.tensor(lengths, device) for o in call.operands] for call, lengths in cells]
    root, graph = nn.Module(), fx.Graph()
    places: list[list[Any]] = [
        [None if o.weight else graph.placeholder(f"x{c}_{i}") for i, o in enumerate(call.operands)]
        for c, (call, _) in enumerate(cells)
    ]
    results = []
    for c, (call, lengths) in enumerate(cells):
        for i, place in enumerate(places[c]):
            if place is None:
                root.register_buffer(f"weight{c}_{i}", tensors[c][i])
                places[c][i] = graph.get_attr(f"weight{c}_{i}")
        args, kwargs = call.arguments(lengths, places[c])
        results.append(graph.call_function(call.target, args, kwargs))
    graph.output(tuple(results))
    inputs = [
        [t for o, t in zip(call.operands, mine, strict=True) if not o.weight]
        for (call, _), mine in zip(cells, tensors, strict=True)
    ]
    given = tuple(t for mine in inputs for t in mine)
    with torch.no_grad():
        program = torch.export.export(fx.GraphModule(root, graph).eval(), given, strict=False)
    return _onnx.branches(program, inputs)
