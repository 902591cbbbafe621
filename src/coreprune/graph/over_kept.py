"""Norms in a pruned model that is run in the original's shapes, with zeros where channels have left.

Zeros do not change a sum, but a mean: the smaller model takes it over fewer channels. So the operations that take
statistics over channels are computed on the channels that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from coreprune.graph.captured import Captured
from coreprune.graph.kept import positions
from coreprune.graph.ops import operation

_NORMS, _REDUCTIONS = ("layer norm", "group norm"), ("mean", "spread")


def over_kept(captured: Captured, masks: Mapping[tuple[str, int], Tensor]) -> dict[fx.Node, Callable[..., Any]]:
    """What computes the nodes whose statistics are over channels of which some leave, from values in full shapes.

    masks: (parameter, axis) -> which positions stay (`Removed.masks`).
    """
    kinds = {n: operation(n).kind for n in captured.graph.graph.nodes if n.op == "call_function"}
    read = {n: n.args[0] for n, kind in kinds.items() if kind in (*_NORMS, *_REDUCTIONS)}
    inputs = [x for x in read.values() if isinstance(x, fx.Node)]
    boxes = positions(captured, inputs, masks) if inputs else {}
    found: dict[fx.Node, Callable[..., Any]] = {}
    for node, x in read.items():
        for axis, kept in boxes.get(x) or () if isinstance(x, fx.Node) else ():
            make = _norm if kinds[node] in _NORMS else _reduction
            found[node] = make(found.get(node, node.target), axis, kept)
    return found


def _reduction(function: Any, axis: int, kept: Tensor) -> Callable[..., Any]:
    def reduce(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dims = next((a for a in (*args[:1], kwargs.get("dim")) if isinstance(a, (int, list, tuple))), None)
        over = range(x.dim()) if not dims and dims != 0 else [dims] if isinstance(dims, int) else dims
        if axis not in [d % x.dim() for d in over]:
            return function(x, *args, **kwargs)
        return function(x.index_select(axis, kept.to(x.device)), *args, **kwargs)

    return reduce


def _norm(function: Any, axis: int, kept: Tensor) -> Callable[..., Any]:
    def norm(x: Tensor, size: Any, *args: Any, **kwargs: Any) -> Any:
        at = kept.to(x.device)
        over = x.dim() - len(size) if isinstance(size, (list, tuple)) else 1  # the first axis of scale and shift

        def part(value: Any) -> Any:
            scales = isinstance(value, Tensor) and value.dim() > axis - over >= 0
            return value.index_select(axis - over, at) if scales else value

        if isinstance(size, (list, tuple)):
            if axis < over:
                return function(x, size, *args, **kwargs)
            size = [len(at) if d + over == axis else n for d, n in enumerate(size)]
        elif size != 1 or axis != 1:  # sections of a group norm leave whole, and the others do not notice
            return function(x, size, *args, **kwargs)
        found = function(
            x.index_select(axis, at), size, *map(part, args), **{key: part(value) for key, value in kwargs.items()}
        )
        first = found[0] if isinstance(found, (list, tuple)) else found
        whole = first.new_zeros(x.shape).index_copy(axis, at, first)
        return [whole, *found[1:]] if isinstance(found, (list, tuple)) else whole

    return norm
