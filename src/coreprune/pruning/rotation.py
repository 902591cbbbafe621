"""Rotate the residual streams of a network to the principal axes of what flows in them (T20).

A norm without a mean (RMSNorm) commutes with rotations: RMS(Qᵀx) = RMS(x). If its scale is folded into the layers
that read it, the stream may be written in any orthogonal basis Q: the layers that write it write Qᵀy, and those that
read it have WQ in the place of W, as (WQ)(Qᵀx̂) = Wx̂. In the basis of the principal axes of x̂ most directions carry
little, and those can leave. A LayerNorm is an RMSNorm of a stream without mean, and the mean of what the layers write
can be taken out of their weights (Ashkboos et al., SliceGPT, ICLR 2024). One basis serves all blocks, so that no skip
connection needs a map.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune import _ranks
from coreprune._recast import recast
from coreprune._seed import seed_apart
from coreprune._shown import brief
from coreprune._telling import Wanted
from coreprune._twin import duplicate, guarded, quiet
from coreprune.errors import InputError, ModelError
from coreprune.graph import Captured, Group, ParamSlice
from coreprune.pruning.calibration.wider import accompanied
from coreprune.pruning.layer.linear_maps import Operator, operators
from coreprune.pruning.streams import Stream, like, other_forms, stream_of, streams
from coreprune.pruning.tracing import captured_of
from coreprune.pruning.validate import check_model
from coreprune.queries import Queries, make_queries
from coreprune.queries.spec import is_source

log = logging.getLogger(__name__)

_MADE, _MOST = 64, 256  # queries that the axes are taken from: made ones, and of those that were given
_BATCH = 32
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the outputs; 0.1 in half. Norms may compute in float32
Batch = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Rotated:
    """A model whose residual streams lie in the basis of their principal axes.

    model: computes what the given one computes, up to rounding. names: what has another form in it (`recast`).
    shares: name of the stream's group -> the share of its power along each axis, (d,) float64, falling.
    """

    model: nn.Module
    names: tuple[str, ...]
    shares: dict[str, Tensor] = field(default_factory=dict)
    __repr__ = brief


def rotate_residual(
    model: nn.Module,
    example_inputs: Any,
    *,
    queries: Any = "auto",
    n_queries: int | None = None,
    seed: int = 0,
    batch_axis: Any = "auto",
    tokenizer: Any = None,
    progress: Wanted = None,
) -> Rotated:
    """T20: write the residual streams in the basis of their principal axes, in a copy that computes the same function.

    Statement: let a stream x ∈ R^d be a sum of outputs of linear maps and embeddings, and read through norms
    x ↦ γ ⊙ x/√(‖x‖²/d + ε) + β, followed by linear maps. For every orthogonal Q the network with written parts Qᵀy,
    readers W diag(γ) Q and b + Wβ, and norms with γ = 1, β = 0, computes the same function. A LayerNorm is such a norm
    of x with its mean over the channels taken out, which is taken out of what is written. Proof: docs/theory.md. That a
    network has this form is not believed of its graph alone: both are compared on queries.

    Scales are folded, tied weights get values of their own, LayerNorms become RMSNorms, and a layer may get a bias. The
    axes are the eigenvectors of the sum of x̂x̂ᵀ over the queries and all norms, x̂ what a norm gives before its scale.

    queries, n_queries, seed, batch_axis, tokenizer, progress: as for `prune`. By default 64 made queries or the first
        256 of those given are used, these with the queries that go with them in a repair.

    Raises ModelError if the model has no stream of this form, and InputError as `prune` does.
    """
    check_model(model, example_inputs)
    if queries is None:
        raise InputError("residual='rotate' takes the axes from queries, and there are to be none. Have them made.")
    with guarded(model):
        asked: dict[str, Any] = {"progress": progress, "batch_axis": batch_axis, "tokenizer": tokenizer}
        made = _ranks.from_first(
            "the queries of the rotation", lambda: _queries(model, example_inputs, queries, n_queries, seed, asked)
        )
        batches = list(made.batches(_BATCH))
        wanted = _first(model, batches[0])
        found, problems = Rotated(model, ()), []
        for group in streams(captured_of(model, example_inputs, batch_axis)):
            try:
                one = _with_one(found, group, example_inputs, batch_axis, batches)
                _check_same(group.name, wanted, _first(one.model, batches[0]), model)
                found = one
            except ModelError as error:
                problems.append(error)
        if not found.shares:
            raise problems[0]
    log.info("the residual streams lie on their principal axes: %s", ", ".join(found.shares))
    return found


def _with_one(before: Rotated, group: Group, example: Any, batch_axis: Any, batches: Sequence[Batch]) -> Rotated:
    """With one more stream rotated. Raises ModelError if it has not the form of T20."""
    captured = captured_of(before.model, example, batch_axis)
    apart, means = other_forms(before.model, stream_of(captured, like(captured, group)))
    new = duplicate(recast(before.model, apart), {})
    captured = captured_of(new, example, batch_axis)  # with other names, where weights were tied
    stream = stream_of(captured, like(captured, group))
    tensors = dict([*new.named_parameters(), *new.named_buffers()])
    with torch.no_grad():
        _fold_(tensors, captured, stream)
        for piece in stream.written if means else ():
            tensor = tensors[piece.param]
            tensor.copy_(tensor.double() - tensor.double().mean(piece.dim, keepdim=True))
    new = recast(new, means)
    share, axes = _ranks.from_first("the axes of a stream", lambda: _axes(new, batches, stream))
    tensors = dict([*new.named_parameters(), *new.named_buffers()])
    with torch.no_grad():
        for piece in (*stream.written, *(s for scale in stream.scales for s in scale.readers)):
            _turn_(tensors[piece.param], piece, axes)
    return Rotated(new, (*before.names, *apart, *means), {**before.shares, stream.group.name: share})


def _queries(model: nn.Module, example: Any, spec: Any, n: int | None, seed: int, asked: dict[str, Any]) -> Queries:
    """What the axes are taken from: made queries, or samples with the queries that go with them in a repair, too.

    asked: further arguments of `make_queries`.
    """
    made = is_source(spec)
    count = n or (_MADE if made else None)
    found = make_queries(model, example, spec, n=count, seed=seed_apart(seed, 20), **asked).take(_MOST)
    if made:
        return found
    generator = torch.Generator().manual_seed(seed_apart(seed, 120))
    make = functools.partial(make_queries, model, example, n=_MADE, seed=generator, **asked)
    captured = captured_of(model, example, asked["batch_axis"])
    kinds = accompanied(
        model, captured, example, found, n, asked["tokenizer"], generator, make if found.source == "samples" else None
    )
    return sum(kinds[1:], kinds[0])


# --- what is done to the weights --------------------------------------------------------------------------------------
def _fold_(tensors: dict[str, Tensor], captured: Captured, stream: Stream) -> None:
    """Fold scales and shifts of norms into the readers, and scales of branches into what makes them; in place."""
    group, maps = stream.group, operators(captured)
    place = {s.param: s.index for s in group.others}
    for piece, operator in stream.branches:
        _fold_back_(tensors, group, piece, operator)
    for scale in stream.scales:
        if scale.param is None:
            continue
        own = tensors[scale.param]
        factors = _by_channel(own.double() + scale.plus, place[scale.param])
        shift = None if scale.shift is None else _by_channel(tensors[scale.shift].double(), place[scale.shift])
        for piece in scale.readers:
            weight = tensors[piece.param]
            index = piece.index.to(weight.device)
            rows = weight.double().movedim(piece.dim, -1)
            if shift is not None:
                added = rows @ shift[index]
                bias = maps[piece.param].bias if piece.param in maps else None
                if bias is None:
                    raise ModelError(
                        f"the stream {group.name} cannot be rotated: {piece.param} has no bias of its own."
                    )
                tensors[bias].add_(added.flatten(1).sum(1) if added.ndim > 1 else added)
            weight.copy_((rows * factors[index]).movedim(-1, piece.dim))
        own.fill_(1 - scale.plus)
        if scale.shift is not None and scale.shift in tensors:
            tensors[scale.shift].zero_()


def _fold_back_(tensors: dict[str, Tensor], group: Group, scale: ParamSlice, operator: Operator) -> None:
    """Fold the scale of a branch into the layer that makes the branch, in place."""
    factors = _by_channel(tensors[scale.param].double().reshape(-1), scale.index)
    place = {(s.param, s.dim): s.index for s in group.producers}
    for name, dim in ((operator.weight, operator.out_dim), (operator.bias, 0)):
        if name is not None:
            own = factors[place[name, dim].to(factors.device)]
            tensors[name].copy_((tensors[name].double().movedim(dim, -1) * own).movedim(-1, dim))
    tensors[scale.param].fill_(1.0)


def _by_channel(values: Tensor, index: Tensor) -> Tensor:
    """What lies at the positions, in the order of the channels."""
    return values[index.to(values.device).argsort()]


def _axes(model: nn.Module, batches: Sequence[Batch], stream: Stream) -> tuple[Tensor, Tensor]:
    """The share of the stream's power along each axis, (d,) falling, and the axes, (d, d) with one in every column."""
    group = stream.group
    seen = {s.module: (s.readers[0], s.axis) for s in stream.scales if s.module is not None}
    if not seen:
        raise ModelError(f"the stream {group.name} cannot be rotated: no module reads it by itself.")
    device = next(model.parameters()).device
    total = torch.zeros(group.size, group.size, dtype=torch.float64, device=device)

    def keep(piece: ParamSlice, axis: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            rows = args[0].detach().movedim(axis, -1).flatten(0, -2)[:, piece.index.argsort().to(device)].double()
            total.addmm_(rows.mT, rows)

        return hook

    with quiet(model) as still, torch.no_grad():
        for module, (piece, axis) in seen.items():
            still.get_submodule(module).register_forward_pre_hook(keep(piece, axis))
        for args, kwargs in batches:
            still(*args, **kwargs)
    if not bool(torch.isfinite(total).all()):
        raise InputError(
            f"what flows in the stream {group.name} is not finite on the queries, so it has no axes. Check the weights "
            "and the queries (their range, their normalisation)."
        )
    values, vectors = torch.linalg.eigh(total)
    return (values.flip(0).clamp_min(0) / values.sum()).cpu(), vectors.flip(1)


def _turn_(tensor: Tensor, piece: ParamSlice, axes: Tensor) -> None:
    """Write one axis of a tensor in the basis of the columns of `axes`, in place."""
    index = piece.index.to(tensor.device)
    own = axes.to(tensor.device)[index][:, index]
    tensor.copy_((tensor.double().movedim(piece.dim, -1) @ own).movedim(-1, piece.dim))


# --- whether it is the same function ----------------------------------------------------------------------------------
def _first(model: nn.Module, batch: Batch) -> list[Tensor]:
    with quiet(model) as still, torch.no_grad():
        found = still(*batch[0], **batch[1])
    return [x.double() for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]


def _check_same(name: str, wanted: list[Tensor], found: list[Tensor], model: nn.Module) -> None:
    """Raise ModelError if the rotated model computes something else."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if not any(bool(x.any()) for x in wanted):
        raise ModelError(
            f"the residual stream of {name} cannot be rotated: the model returns no real numbers but zeros on the "
            "queries, so the rotated copy cannot be compared with it. Leave residual out."
        )
    for x, y in zip(wanted, found, strict=True):
        error = float((x - y).norm() / x.norm().clamp_min(1e-30))
        if not error <= _ROUNDING.get(dtype, 0.1):
            raise ModelError(
                f"the residual stream of {name} cannot be rotated: the outputs would change by {error:.2g} of their "
                "size. Something on the way works on single channels, such as a norm whose output stays in the stream. "
                "Leave residual out."
            )
