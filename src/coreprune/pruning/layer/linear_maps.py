"""Linear maps in an exported graph: which nodes multiply features by a weight, and what those features are.

A convolution is a linear map of patches. So the same code for moments, least squares and refits serves all linear maps:
features X (g, rows, f), weight W (g, o, f), output Y = X Wᵀ (g, rows, o), with g > 1 for grouped convolutions only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from coreprune.graph import Captured
from coreprune.graph.ops import op_name, operation


@dataclass(frozen=True, eq=False)
class Operator:
    """A node that computes X Wᵀ + b from one activation, one weight and at most one bias.

    node, source: the node and the node of its activation. weight, bias: names of the parameters.
    out_dim, in_dim: the axes of the weight that belong to the outputs and to the inputs. groups: of a convolution.
    kernel, stride, padding, dilation: of a convolution; the kernel of a linear layer is ().
    """

    node: fx.Node
    source: fx.Node
    weight: str
    bias: str | None
    out_dim: int = 0
    in_dim: int = 1
    groups: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    @property
    def taps(self) -> int:
        """How many positions of the input one output depends on."""
        return math.prod(self.kernel)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as (g, o, f)."""
        if not self.kernel:
            return (weight if self.out_dim == 0 else weight.T)[None]
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def from_matrix(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`, in the shape, dtype and device of `like`."""
        if not self.kernel:
            return (matrix[0] if self.out_dim == 0 else matrix[0].T).to(like)
        return matrix.reshape(like.shape).to(like)

    def features(self, x: Tensor, rows: Tensor | None = None, alive: Tensor | None = None) -> Tensor:
        """The features that the operator multiplies by its weight: (g, rows, f), in the dtype of x.

        rows: which of the rows to return; all of them by default. alive: (g, left), which input channels of every group
        to read; all of them by default.
        """
        if alive is not None:
            x = self._alive(x, alive)
        if not self.kernel:
            flat = x.reshape(-1, x.shape[-1])
            return (flat if rows is None else flat[rows])[None]
        x = x if self.channel_axis else x[None]
        pads = [p for size in reversed(self.padding) for p in (size, size)]
        padded = (nn.functional.pad(x, pads) if any(pads) else x).contiguous()
        n, c, *space = padded.stride()
        first, taps = torch.arange(x.shape[1], device=x.device)[:, None] * c, [0]
        sizes = [x.shape[0]]
        for a, (k, s, d) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            taps = [t + i * d * space[a] for t in taps for i in range(k)]
            sizes.append((padded.shape[2 + a] - d * (k - 1) - 1) // s + 1)
        rows = torch.arange(math.prod(sizes), device=x.device) if rows is None else rows
        steps = [n, *(s * by for s, by in zip(self.stride, space, strict=True))]
        at = torch.unravel_index(rows, sizes)
        corner = torch.stack([i * step for i, step in zip(at, steps, strict=True)]).sum(dim=0)
        # Indexing is several times faster than copying an unfolded view, and it makes only the rows that are wanted.
        short = torch.int32 if padded.numel() < 2**31 else torch.int64  # half the memory, if int32 is enough
        entries = corner[:, None].to(short) + (first + torch.tensor(taps, device=x.device)).flatten().to(short)
        patches = padded.flatten().index_select(0, entries.flatten())
        return patches.reshape(len(rows), self.groups, -1).transpose(0, 1)

    def outputs(self, y: Tensor, rows: Tensor | None = None) -> Tensor:
        """Reshape a tensor of the shape of the node's output to (g, rows, o)."""
        if not self.kernel:
            flat = y.reshape(-1, y.shape[-1])
            return (flat if rows is None else flat[rows])[None]
        flat = y.movedim(self.channel_axis, -1)
        channels = flat.shape[-1]
        flat = flat.reshape(-1, channels) if rows is None else flat[torch.unravel_index(rows, flat.shape[:-1])]
        return flat.reshape(flat.shape[0], self.groups, -1).transpose(0, 1)

    def count(self, y: Tensor) -> int:
        """How many rows the node's output y has."""
        return y.numel() // y.shape[self.channel_axis]

    def _alive(self, x: Tensor, alive: Tensor) -> Tensor:
        """Only the given channels of every group, side by side."""
        width = x.shape[self.channel_axis] // self.groups
        every = alive.to(x.device) + width * torch.arange(self.groups, device=x.device)[:, None]
        return x.index_select(self.channel_axis % x.dim(), every.flatten())

    @property
    def channel_axis(self) -> int:
        """The axis of the input and of the output that holds the channels: 0 for one image without a batch axis."""
        return self.node.meta["val"].dim() - 1 - len(self.kernel) if self.kernel else -1


def operators(captured: Captured) -> dict[str, Operator]:
    """Every linear and convolution node whose weight and bias no other node reads, by name of the weight."""
    found: dict[str, Operator] = {}
    for node in captured.graph.graph.nodes:
        operator = _operator(node, captured.sources)
        if operator is not None:
            found[operator.weight] = operator
    alone = {o: [n for n in (o.weight, o.bias) if n is not None] for o in found.values()}
    return {o.weight: o for o, names in alone.items() if all(captured.readers[n] == 1 for n in names)}


def _operator(node: fx.Node, sources: Mapping[str, tuple[str, str]]) -> Operator | None:
    name, known = op_name(node), operation(node)
    a: list[Any] = list(node.args)
    if name == "linear":
        return _made(node, sources, a[0], a[1], a[2] if len(a) > 2 else None)
    if name == "addmm" and not node.kwargs:
        return _made(node, sources, a[1], a[2], a[0], out_dim=1, in_dim=0)
    if name == "mm":
        return _made(node, sources, a[0], a[1], None, out_dim=1, in_dim=0)
    if known.kind == "conv":
        dims = known.space
        defaults: list[Any] = [None, None, None, [1], [0], [1], 1]
        x, weight, bias, stride, padding, dilation, groups = a + defaults[len(a) :]
        if not isinstance(weight, fx.Node):
            return None
        if isinstance(padding, str):
            spans = [d * (k - 1) for k, d in zip(weight.meta["val"].shape[2:], _spread(dilation, dims), strict=True)]
            if padding == "same" and any(span % 2 for span in spans):
                return None  # this padding is larger on one side than on the other
            padding = [span // 2 if padding == "same" else 0 for span in spans]
        return _made(
            node,
            sources,
            x,
            weight,
            bias,
            groups=groups,
            kernel=tuple(weight.meta["val"].shape[2:]),
            stride=_spread(stride, dims),
            padding=_spread(padding, dims),
            dilation=_spread(dilation, dims),
        )
    return None


def _made(
    node: fx.Node, sources: Mapping[str, tuple[str, str]], x: Any, weight: Any, bias: Any, **rest: Any
) -> Operator | None:
    names = []
    for operand in (weight, bias):
        kind, name = sources.get(operand.name, ("", "")) if isinstance(operand, fx.Node) else ("none", "")
        if kind not in ("parameter", "none"):
            return None
        names.append(name)
    if not isinstance(x, fx.Node) or not names[0]:
        return None
    return Operator(node, x, names[0], names[1] or None, **rest)


def _spread(values: Any, dims: int) -> tuple[int, ...]:
    values = list(values) if isinstance(values, (list, tuple)) else [values]
    return tuple(values if len(values) == dims else values * dims)


def is_tensor_meta(node: Any) -> bool:
    """Whether a node stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def even_rows(available: int, most: int, device: torch.device) -> Tensor | None:
    """At most `most` of the `available` rows, sampled evenly, in ascending order; None means all of them.

    The rows are cut into equal stretches, and one row is taken from each. Its place in the stretch varies (fractional
    parts of multiples of the golden ratio). With a fixed place, the rows of an image would all lie in a few of its
    columns.
    """
    if available <= most:
        return None
    stretch = torch.arange(most, device=device, dtype=torch.float64)
    return ((stretch + stretch * 0.6180339887498949 % 1.0) * (available / most)).long().unique()
