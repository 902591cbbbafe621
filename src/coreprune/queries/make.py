"""make_queries(): a model and an example in, inputs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import batch_of, batch_size, check_runs, normalise_example
from coreprune.errors import InputError
from coreprune.queries.auto import choose
from coreprune.queries.cache import Cache, fingerprint
from coreprune.queries.queries import Queries
from coreprune.queries.samples import from_samples, is_samples
from coreprune.queries.sources.base import Progress, Source, Target, draw, has_batch, untouched, with_leaves
from coreprune.queries.sources.batch_norm_inversion import BatchNormInversion
from coreprune.queries.sources.class_impressions import ClassImpressions
from coreprune.queries.sources.dead_leaves import Leaves
from coreprune.queries.sources.mixture import Mixture
from coreprune.queries.sources.noise import Blobs, PinkNoise, WhiteNoise
from coreprune.queries.sources.propagated_moments import PropagatedMoments
from coreprune.queries.sources.strokes import Strokes
from coreprune.queries.sources.tokens import RandomTokens, SelfGenerated, ZipfTokens

QUERIES: Mapping[str, Callable[[], Source]] = {
    source.name: source
    for source in (
        BatchNormInversion,
        Leaves,
        PinkNoise,
        Blobs,
        Strokes,
        ClassImpressions,
        WhiteNoise,
        PropagatedMoments,
        RandomTokens,
        ZipfTokens,
        SelfGenerated,
    )
}

_KEPT = ("mask", "position", "type", "label", "index")  # keywords with one of these in them are never drawn
_MANY, _FEW = 4096, 256


def make_queries(
    model: nn.Module,
    example_inputs: Any,
    spec: Any = "auto",
    *,
    n: int | None = None,
    generator: torch.Generator,
    progress: Progress | None = None,
    cache: str | Path | None = None,
) -> Queries:
    """Inputs that stand in for the data that is not there.

    model: left exactly as it was: mode, buffers, hooks, gradients, global random state. Batch-norm statistics too.
    example_inputs: as for `prune`. Tensors without a batch axis, masks, positions and the like stay as they are there;
        the first image, vector or token input (and every other image or vector) is drawn.
    spec: "auto", the name of a source (`QUERIES`), a source object such as Strokes(low=0.0, high=1.0), or samples:
        a tensor, a tuple or dict of tensors shaped like the example inputs, a loader of batches (labels are dropped),
        the path of an .npz file, `Queries` made before or the path of their .safetensors file.
    n: how many. None: all samples; 4,096 vectors; 256 of anything else.
    generator: of all randomness. The same seed gives the same queries on the same machine.
    progress: called as progress("queries", done, total) after every step.
    cache: a file that is written after every finished batch. A later call with the same model, weights, example, spec,
        n and seed goes on from there; with anything else it is made anew. Samples are not cached.

    Raises InputError (arguments, samples that do not fit) and ModelError (the model does not run on the example).
    """
    args, kwargs = batch_of(*_checked_example(model, example_inputs))
    if n is not None and (not isinstance(n, int) or n < 1):
        raise InputError(f"n={n!r}: a whole number of queries, at least one, is needed.")
    spec = _resolve(spec)
    with untouched(model):
        if isinstance(spec, Queries):
            return _fitting(spec, args, kwargs, n)
        if is_samples(spec):
            return from_samples(spec, (args, kwargs), n, generator)
        return _drawn(model, args, kwargs, spec, n, generator, progress, cache)


def _drawn(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    spec: Source | None,
    n: int | None,
    generator: torch.Generator,
    progress: Progress | None,
    path: str | Path | None,
) -> Queries:
    targets = [Target(model, args, kwargs, leaf) for leaf in drawn_leaves(args, kwargs)]
    check_runs(model, args, kwargs)
    fit = [spec is not None and _tokens(spec) != t.example.is_floating_point() for t in targets]
    # A source of images says nothing about the tokens beside them, and the other way round.
    asked = [spec is not None and (ok or not any(fit)) for ok in fit]
    chosen = [(spec, "") if spec is not None and ok else choose(t) for t, ok in zip(targets, asked, strict=True)]
    n = n or (_MANY if len(targets[0].shape) == 1 and targets[0].example.is_floating_point() else _FEW)
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    store = Cache(Path(path), fingerprint(model, (args, kwargs), [c[0] for c in chosen], n, seed)) if path else None
    new: dict[int, Tensor] = {}
    for k, (target, (source, _)) in enumerate(zip(targets, chosen, strict=True)):

        def tell(done: int, total: int, before: int = k) -> None:
            if progress is not None:
                progress("queries", before * total + done, len(targets) * total)

        parts = tuple(part.to(target.example.device) for part in store.parts(k)) if store else ()
        finished = None if store is None else (lambda made, k=k: store.keep(k, made))
        new[target.leaf] = draw(
            source, target, n, torch.Generator().manual_seed(seed + k), tell, parts=parts, finished=finished
        )
    whole = with_leaves(args, kwargs, new, n)
    leaves, batch = pytree.tree_leaves((args, kwargs)), batch_size(args, kwargs)
    shared = frozenset(i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not has_batch(x, batch))
    names = list(dict.fromkeys(source.name for source, _ in chosen))
    why = list(dict.fromkeys(f"{source.name}: {reason}" if reason else repr(source) for source, reason in chosen))
    return Queries(*whole, " + ".join(names), f"{n} inputs without data; {'; '.join(why)}", shared)


def _tokens(source: Source) -> bool:
    """Whether a source makes integers."""
    if isinstance(source, Mixture):
        return any(_tokens(part) for part in source.sources)
    return isinstance(source, (RandomTokens, ZipfTokens, SelfGenerated))


def _resolve(spec: Any) -> Any:
    """None for "auto", a source, samples, or queries."""
    if isinstance(spec, str):
        if spec == "auto":
            return None
        if spec in QUERIES:
            return QUERIES[spec]()
        if spec.endswith(".safetensors"):
            return Queries.load(spec)
    if isinstance(spec, Path) and spec.suffix == ".safetensors":
        return Queries.load(spec)
    if isinstance(spec, type):
        raise InputError(f"queries is the class {spec.__name__}; pass an object of it: {spec.__name__}().")
    if isinstance(spec, Queries) or is_samples(spec) or isinstance(spec, Source):
        return spec
    raise InputError(
        f"unknown queries {spec!r}; known: auto, {', '.join(sorted(QUERIES))}. Pass one of these names, an object such "
        "as Strokes(low=0.0, high=1.0), samples (a tensor, a dict, a loader), or the path of an .npz file."
    )


def _checked_example(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = normalise_example(example_inputs)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not batch_size(args, kwargs):
        raise InputError("the example inputs hold no tensor with at least one row along a batch axis. Pass one input.")
    places = {t.device.type for t in model.parameters()}
    if len(places) == 1 and not {t.device.type for t in tensors} <= places:
        raise InputError(f"the example inputs are not on the model's device ({places.pop()}). Move them there.")
    return args, kwargs


def drawn_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """Positions, among the leaves of the example, of the tensors that a source makes; the others are kept.

    Every real tensor with a batch axis and something to draw, and one integer tensor (or all whose keyword ends in
    input_ids), but nothing whose keyword names a mask, positions, types or labels.

    Raises InputError where there is none.
    """
    batch = batch_size(args, kwargs)
    reals: list[int] = []
    integers: list[tuple[int, str]] = []
    for i, (path, leaf) in enumerate(pytree.tree_leaves_with_path((args, kwargs))):
        name = "".join(str(getattr(key, "key", "")) for key in path[1:])
        if not has_batch(leaf, batch) or leaf.dim() < 2 or any(word in name for word in _KEPT):
            continue
        if leaf.is_floating_point():
            reals.append(i)
        elif not leaf.is_complex() and leaf.dtype != torch.bool:
            integers.append((i, name))
    named = [i for i, name in integers if name.endswith("input_ids")]
    found = sorted(reals + (named or [i for i, _ in integers[:1]]))
    if not found:
        raise InputError("no input can be drawn: the example has no real or integer tensor (N, ...). Pass samples.")
    return found


def _fitting(queries: Queries, args: tuple[Any, ...], kwargs: dict[str, Any], n: int | None) -> Queries:
    """Queries made before, on the example's device, if their structure, shapes and dtypes are those of the example."""
    mine, other = (pytree.tree_flatten(x) for x in ((args, kwargs), (queries.args, queries.kwargs)))
    pairs = list(zip(mine[0], other[0], strict=False))
    if mine[1] != other[1] or any(_unlike(a, b, i in queries.shared) for i, (a, b) in enumerate(pairs)):
        raise InputError("these queries do not have the structure, shapes and dtypes of the example inputs.")
    device = next(x.device for x in mine[0] if isinstance(x, Tensor))
    return (queries if n is None else queries.take(n)).to(device)


def _unlike(a: Any, b: Any, shared: bool) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, Tensor) or isinstance(b, Tensor)
    axis = 0 if shared or a.dim() == 0 else 1
    return a.dtype != b.dtype or a.shape[axis:] != b.shape[axis:] or a.dim() != b.dim()
