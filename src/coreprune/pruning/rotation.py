"""Rotate the residual streams of a network to the principal axes of what flows in them (T20).

A norm without a mean (RMSNorm) commutes with rotations: RMS(Qᵀx) = RMS(x). If its scale is folded into the layers
that read it, the stream may be written in any orthogonal basis Q: the layers that write it write Qᵀy, and those that
read it have WQ in the place of W, as (WQ)(Qᵀx̂) = Wx̂. In the basis of the principal axes of x̂ most directions carry
little, and those can leave. A LayerNorm is an RMSNorm of a stream without mean, and the mean of what the layers write
can be taken out of their weights (Ashkboos et al., SliceGPT, ICLR 2024). One basis serves all blocks, so that no skip
connection needs a map.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from coreprune import _ranks
from coreprune._example import check_runs, normalise_example
from coreprune._recast import recast
from coreprune._seed import seed_apart
from coreprune._telling import Wanted
from coreprune._twin import duplicate, guarded, quiet
from coreprune.errors import InputError, ModelError
from coreprune.graph import Captured, Group, ParamSlice, capture, find_groups
from coreprune.graph.ops import op_name
from coreprune.pruning.layer.linear_maps import operators
from coreprune.pruning.validate import check_model
from coreprune.queries import Queries, make_queries

log = logging.getLogger(__name__)

_MADE, _MOST = 64, 256  # queries that the axes are taken from: made ones, and of those that were given
_BATCH = 32
_WHOLE = ("layer_norm", "rms_norm")  # norms that are one operation
_STEPS = 8  # nodes between a norm and its scale, at most
_ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-3}  # of the outputs; 0.1 in half. Norms may compute in float32
FLAG = "norm-statistics"


@dataclass(frozen=True)
class _Scale:
    """The scale of one norm: what is computed from a parameter and multiplied by each channel.

    param: its name, or None for a norm without. plus: what the forward adds to it. shift: the name of what is added
    after it, or None. readers: the weights that read the norm, and their axes. module: whose input is the output of the
    norm. axis: of the channels.
    """

    param: str | None
    plus: float
    shift: str | None
    readers: tuple[ParamSlice, ...] = ()
    module: str | None = None
    axis: int = -1


@dataclass(frozen=True, eq=False)
class Rotated:
    """A model whose residual streams lie in the basis of their principal axes.

    model: computes what the given one computes, up to rounding. names: what has another form in it (`recast`).
    shares: name of the stream's group -> the share of its power along each axis, (d,) float64, falling.
    """

    model: nn.Module
    names: tuple[str, ...]
    shares: dict[str, Tensor] = field(default_factory=dict)


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
        256 of those given are used.

    Raises ModelError if the model has no stream of this form, and InputError as `prune` does.
    """
    check_model(model, example_inputs)
    if queries is None:
        raise InputError("residual='rotate' takes the axes from queries, and there are to be none. Have them made.")
    with guarded(model):
        made = _ranks.from_first(
            "the queries of the rotation",
            lambda: _taken(
                make_queries(
                    model, example_inputs, queries, n=n_queries or (_MADE if isinstance(queries, str) else None),
                    seed=seed_apart(seed, 20), progress=progress, batch_axis=batch_axis, tokenizer=tokenizer,
                )
            ),
        )  # fmt: skip
        batches = list(made.batches(_BATCH))
        apart, means = _other_forms(model, _captured(model, example_inputs, batch_axis))
        new = duplicate(recast(model, apart), {})
        captured = _captured(new, example_inputs, batch_axis)
        tensors = dict([*new.named_parameters(), *new.named_buffers()])
        turned = {group.name: (group, _scales(captured, group)) for group in _streams(captured)}
        with torch.no_grad():
            for group, scales in turned.values():
                _fold_(tensors, captured, group, scales, mean=bool(means))
        new = recast(new, means)
        tensors = dict([*new.named_parameters(), *new.named_buffers()])
        bases = _ranks.from_first(
            "the axes of the streams",
            lambda: {name: _axes(new, batches, group, scales) for name, (group, scales) in turned.items()},
        )
        shares = {}
        for name, (group, scales) in turned.items():
            shares[name], axes = bases[name]
            with torch.no_grad():
                for piece in _written(group, scales) + [s for scale in scales for s in scale.readers]:
                    _turn_(tensors[piece.param], piece, axes)
        _check_same(new, _first(model, batches[0]), _first(new, batches[0]), list(turned))
    return Rotated(new, (*apart, *means), shares)


def _captured(model: nn.Module, example_inputs: Any, batch_axis: Any) -> Captured:
    captured = capture(model, *normalise_example(example_inputs), batch_axis=batch_axis)
    check_runs(model, captured.args, captured.kwargs)
    return captured


def _taken(queries: Queries) -> Queries:
    return queries.take(min(len(queries), _MOST))


# --- the form of a stream ---------------------------------------------------------------------------------------------
def _streams(captured: Captured) -> list[Group]:
    """The groups that enter a norm and that a basis can be given to. Raises ModelError if there is none."""
    entered = [g for g in find_groups(captured, norm_statistics=True) if FLAG in g.flags]
    found = [g for g in entered if g.unit == 1 and g.sections is None and g.locked_because is None and _whole(g)]
    if not found:
        which = [f"{g.name} ({g.locked_because or 'single channels of it are used'})" for g in entered[:3]]
        raise ModelError(
            f"there is no residual stream to rotate: {', '.join(which) or 'no channels'} cannot be written in another "
            "basis. Leave residual out."
        )
    return found


def _whole(group: Group) -> bool:
    """Whether each of its axes holds each channel once, and every reader is a weight."""
    every = torch.arange(group.size)
    return all(s.index.ndim == 1 and torch.equal(s.index.sort().values, every) for s in group.slices) and all(
        consumer.slices for consumer in group.consumers
    )


def _scales(captured: Captured, group: Group) -> list[_Scale]:
    """The norms that the readers of a stream read, each with its readers. Raises ModelError for a reader without."""
    nodes = {node.name: node for node in captured.graph.graph.nodes}
    own = {s.param for s in group.others}
    found: dict[str, _Scale] = {}
    for consumer in group.consumers:
        norm = _behind(nodes[consumer.source], captured, own)
        if norm is None:
            raise ModelError(
                f"the residual stream of {group.name} cannot be rotated: {consumer.module or consumer.node} reads it "
                "without a norm. Leave residual out."
            )
        key, scale = norm
        before = found.get(key, scale)
        readers = {(s.param, s.dim): s for s in (*before.readers, *consumer.slices)}
        module = before.module or (consumer.module if consumer.hookable else None)
        found[key] = replace(scale, readers=tuple(readers.values()), module=module, axis=consumer.axis)
    return list(found.values())


def _behind(node: fx.Node, captured: Captured, own: set[str]) -> tuple[str, _Scale] | None:
    """The nearest norm behind a node: what tells it from others, and its scale, without readers."""
    level: list[tuple[fx.Node, ...]] = [(node,)]  # each a way back
    shift = None
    for _ in range(_STEPS):
        ready = (w for w in level if op_name(w[-1]) in _WHOLE or any(_name(captured, n) in own for n in _read(w[-1])))
        way = next(ready, None)
        if way is None:
            level = [(*w, n) for w in level for n in _read(w[-1]) if n.op == "call_function"]
            continue
        params = [name for n in _read(way[-1]) if (name := _name(captured, n)) in own]
        if op_name(way[-1]) in _WHOLE:
            scale, behind = [*params, None, None][:2]
            return scale or way[-1].name, _Scale(scale, 0.0, behind)
        sums = [n for n in way if op_name(n) == "add"]
        numbers = [a for n in sums for a in n.args if isinstance(a, (int, float))]
        others = [n for n in _read(way[-1]) if not _name(captured, n)]
        if sums and not numbers and others:  # a shift, which is added behind the scale
            shift, level = params[0], [(others[0],)]
            continue
        return params[0], _Scale(params[0], float(sum(numbers)), shift)
    return None


def _read(node: fx.Node) -> list[fx.Node]:
    return node.all_input_nodes if node.op == "call_function" else []


def _name(captured: Captured, node: fx.Node) -> str:
    kind, name = captured.sources.get(node.name, ("", ""))
    return name if node.op == "placeholder" and kind in ("parameter", "buffer") else ""


def _written(group: Group, scales: Sequence[_Scale]) -> list[ParamSlice]:
    """What is written into the stream: weights, their biases, embeddings, tokens that are added."""
    norms = {name for scale in scales for name in (scale.param, scale.shift)}
    return [*group.producers, *(s for s in group.others if s.param not in norms)]


def _other_forms(model: nn.Module, captured: Captured) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What has to take another form, by the names that `recast` knows: at first, and after scales are folded."""
    names: dict[str, None] = {}
    means: dict[str, None] = {}
    modules = dict(model.named_modules())
    for group in _streams(captured):
        scales = _scales(captured, group)
        written = {s.param for s in _written(group, scales)}
        shifted = {s.param for scale in scales if scale.shift for s in scale.readers}
        for consumer in group.consumers:
            for piece in consumer.slices:
                layer = modules.get(consumer.module or "")
                if piece.param in written:
                    names[f"{consumer.module}.weight"] = None
                if piece.param in shifted and layer is not None and layer._parameters.get("bias") is None:
                    names[f"{consumer.module}.bias"] = None
        for name, module in modules.items():
            scaled = any(scale.param == f"{name}.weight" for scale in scales)
            if isinstance(module, nn.LayerNorm) and (scaled or _bare(module, group)):
                means[name] = None
    return tuple(names), tuple(means)


def _bare(norm: nn.LayerNorm, group: Group) -> bool:
    return not norm.elementwise_affine and tuple(norm.normalized_shape) == (group.size,)


# --- what is done to the weights --------------------------------------------------------------------------------------
def _fold_(tensors: dict[str, Tensor], captured: Captured, group: Group, scales: Sequence[_Scale], mean: bool) -> None:
    """Fold scales and shifts into the readers, and, if asked, take the mean out of what is written; in place."""
    maps = operators(captured)
    place = {s.param: s.index for s in group.others}
    for scale in scales:
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
    for piece in _written(group, scales) if mean else ():
        tensor = tensors[piece.param]
        tensor.copy_(tensor.double() - tensor.double().mean(piece.dim, keepdim=True))


def _by_channel(values: Tensor, index: Tensor) -> Tensor:
    """What lies at the positions, in the order of the channels."""
    return values[index.to(values.device).argsort()]


def _axes(
    model: nn.Module, batches: Sequence[tuple[Any, Any]], group: Group, scales: Sequence[_Scale]
) -> tuple[Tensor, Tensor]:
    """The share of the stream's power along each axis, (d,) falling, and the axes, (d, d) with one in every column."""
    seen = {s.module: (s.readers[0], s.axis) for s in scales if s.module is not None}
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
    values, vectors = torch.linalg.eigh(total)
    return (values.flip(0).clamp_min(0) / values.sum()).cpu(), vectors.flip(1)


def _turn_(tensor: Tensor, piece: ParamSlice, axes: Tensor) -> None:
    """Write one axis of a tensor in the basis of the columns of `axes`, in place."""
    index = piece.index.to(tensor.device)
    own = axes.to(tensor.device)[index][:, index]
    tensor.copy_((tensor.double().movedim(piece.dim, -1) @ own).movedim(-1, piece.dim))


# --- whether it is the same function ----------------------------------------------------------------------------------
def _first(model: nn.Module, batch: tuple[Any, Any]) -> list[Tensor]:
    with quiet(model) as still, torch.no_grad():
        found = still(*batch[0], **batch[1])
    return [x.double() for x in pytree.tree_leaves(found) if isinstance(x, Tensor) and x.is_floating_point()]


def _check_same(model: nn.Module, wanted: list[Tensor], found: list[Tensor], names: list[str]) -> None:
    """Raise ModelError if the rotated model computes something else."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for x, y in zip(wanted, found, strict=True):
        error = float((x - y).norm() / x.norm().clamp_min(1e-30))
        if not error <= _ROUNDING.get(dtype, 0.1):
            raise ModelError(
                f"the residual stream of {', '.join(names)} cannot be rotated: the outputs would change by {error:.2g} "
                "of their size. Something on the way works on single channels, such as a norm whose output stays in "
                "the stream or a scale of every branch. Leave residual out."
            )
    log.info("the residual streams lie on their principal axes: %s", ", ".join(names))
