"""make_queries(): from a model and an example to inputs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._batch import BatchAxes
from coreprune._batch_trials import batch_axes
from coreprune._example import check_runs, normalise_example
from coreprune._progress import Progress
from coreprune._seed import as_generator
from coreprune._single import single
from coreprune._telling import Wanted, telling
from coreprune._twin import guarded
from coreprune.errors import InputError
from coreprune.queries.auto import choose
from coreprune.queries.cache import Cache, fingerprint
from coreprune.queries.check import number_kind
from coreprune.queries.describe import shown
from coreprune.queries.leaves import drawn, shared, with_leaves
from coreprune.queries.queries import Queries
from coreprune.queries.samples import Example, from_samples, is_samples
from coreprune.queries.sources.base import Source, Target, draw, meant, untouched
from coreprune.queries.sources.function import FromFunction
from coreprune.queries.sources.tokens import padding_mask
from coreprune.queries.sources.work import work
from coreprune.queries.spec import resolve

_MANY, _FEW, _FEWEST = 4096, 256, 128
# `work` of one input: of more, 128 images instead of 256; of more, 256 vectors instead of 4,096.
_COSTLY, _COSTLY_VECTOR = 6e9, 5e7


def make_queries(
    model: nn.Module,
    example_inputs: Any,
    spec: Any = "auto",
    *,
    n: int | None = None,
    seed: int | torch.Generator = 0,
    progress: Wanted = None,
    cache: str | Path | None = None,
    batch_axis: Any = "auto",
    tokenizer: Any = None,
) -> Queries:
    """Make inputs that stand in for missing data, or take samples.

    Nothing of the model changes: no mode, buffer, hook, gradient or batch-norm statistic. Neither does the global
    random state.

    model: the network whose inputs are needed.
    example_inputs: as for `prune`. All images and vectors, and the first input of tokens, are made anew. Masks,
        positions, labels and tensors without a batch axis stay as they are in the example.
    spec: one of the following. "auto". The name of a source (`QUERIES`), or a source such as Strokes(low=0.0,
        high=1.0). A function (n, generator) that returns n inputs, or "module:function". Samples: a tensor, a tuple or
        dict of tensors shaped like the example inputs, a loader of batches or a Dataset of single samples (labels are
        dropped), or the path of an .npz file. `Queries` made before, or the path of their .safetensors file. Samples
        lie along the same axis as in the example. For a model without a batch they are whole examples: a list or loader
        of them, or tensors in which they are stacked.
    n: how many inputs. By default all samples, 4,096 vectors, or 256 inputs of any other kind; 256 vectors if the
        model takes one at a time, or needs over 5·10⁷ operations for one; 128 images if it is on the CPU and as costly
        as a ResNet-50 at 224×224.
    seed: of all randomness; a number, or a generator to draw from. The same seed gives the same queries on the same
        machine.
    progress: as for `prune`. A function is called as progress("queries", done, total) after every step.
    cache: a file, written after every finished batch. A later call with the same model, weights, example, spec, n and
        seed goes on from there. With any other, the file is made anew. Functions are recognised by their code and by
        the values that they close over. A source that cannot be recognised is not cached, and a warning is logged.
        Samples are not cached.
    batch_axis: which axis of the inputs holds the samples, as for `prune`.
    tokenizer: of a model that reads text, as for `prune`.

    Raises InputError for bad arguments, for samples that do not fit the example, and for a source that returns inputs
    that do not fit. Raises ModelError if the model does not run on the example.
    """
    inputs = _checked_example(model, example_inputs)
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise InputError(f"n={n!r}: a whole number of queries, at least one, is needed.")
    generator, asked, spec = as_generator(seed), spec, resolve(spec)
    with guarded(model):
        found = single(model, inputs)
    if found is not None:
        more = {"n": n, "seed": generator, "progress": progress, "cache": cache}
        more |= {"batch_axis": batch_axis, "tokenizer": tokenizer}
        return make_queries(found.model, found.up(example_inputs), asked, **more).changed(found.as_given)
    with telling(progress) as tell, guarded(model), untouched(model) as still:
        axes = batch_axes(model, inputs, batch_axis)
        args, kwargs = axes.cut(inputs)
        if isinstance(spec, Queries):
            return _reused(spec, args, kwargs, axes, n)
        if is_samples(spec):
            return from_samples(spec, Example(args, kwargs, axes), n, generator)
        targets = tuple(Target(still, args, kwargs, leaf, axes, tokenizer) for leaf in drawn(args, kwargs, axes))
        check_runs(still, args, kwargs)
        first = int(torch.randint(2**62, (), generator=generator, device=generator.device))
        run = _Run(targets, n or _enough(targets[0]), first, tell, Path(cache) if cache else None)
        return run.by_function(spec) if isinstance(spec, FromFunction) else run.by_source(spec)


@dataclass(frozen=True)
class _Run:
    """One call that draws inputs.

    targets: the inputs of the model that are drawn. n: how many of each. seed: of the first target; the others count
    on from it. progress: called after every step. path: of the cache, or None.
    """

    targets: tuple[Target, ...]
    n: int
    seed: int
    progress: Progress
    path: Path | None

    def by_source(self, source: Source | None) -> Queries:
        """The source makes the inputs that it is meant for. "auto" makes the others: all when there is no source."""
        own = [] if source is None else meant(source.kind, self.targets)
        chosen = [(source, "") if source is not None and t in own else choose(t) for t in self.targets]
        cache = self._cache([s for s, _ in chosen])
        new = {t.leaf: self._draw(k, s, cache) for k, (t, (s, _)) in enumerate(zip(self.targets, chosen, strict=True))}
        pairs = [(s, t, new[t.leaf]) for t, (s, _) in zip(self.targets, chosen, strict=True)]
        for pair in pairs:
            new |= _also(*pair)
        remarks = [_remark(*pair) for pair in pairs]
        return self._queries(new, chosen, remarks, "inputs without data")

    def by_function(self, function: FromFunction) -> Queries:
        """What the function returns decides which inputs it makes. "auto" makes the others."""
        cache = self._cache([function])
        new = self._called(function, cache)
        chosen: list[tuple[Source, str]] = [(function, "")]
        remarks: list[str] = []
        for k, target in enumerate(self.targets):
            if target.leaf not in new:
                chosen.append(choose(target))
                new[target.leaf] = self._draw(k, chosen[-1][0], cache)
                new = {**_also(chosen[-1][0], target, new[target.leaf]), **new}
                remarks.append(_remark(chosen[-1][0], target, new[target.leaf]))
        self.progress("queries", 1, 1)
        return self._queries(new, chosen, remarks, "inputs")

    def _called(self, function: FromFunction, cache: Cache | None) -> dict[int, Tensor]:
        device, mark = self.targets[0].example.device, "function "
        stored = {} if cache is None else cache.read()
        found = {int(key.removeprefix(mark)): x[0].to(device) for key, x in stored.items() if key.startswith(mark)}
        if found:
            return found
        # A seed of its own: the other inputs, which "auto" makes, have the ones before it.
        generator = torch.Generator().manual_seed(self.seed + len(self.targets))
        found = function.fill(self.targets, self.n, generator)
        if cache is not None:
            cache.keep({f"{mark}{leaf}": [x] for leaf, x in found.items()})
        return found

    def _draw(self, k: int, source: Source, cache: Cache | None) -> Tensor:
        """All inputs of target k."""
        target, key = self.targets[k], str(k)

        def tell(done: int, total: int) -> None:
            self.progress("queries", k * total + done, len(self.targets) * total)

        parts = () if cache is None else tuple(x.to(target.example.device) for x in cache.read().get(key, ()))
        finished = None if cache is None else (lambda made: cache.keep({key: made}))
        generator = torch.Generator().manual_seed(self.seed + k)
        return draw(source, target, self.n, generator, tell, parts=parts, finished=finished)

    def _cache(self, sources: list[Source]) -> Cache | None:
        if self.path is None:
            return None
        first = self.targets[0]
        example = (first.args, first.kwargs)
        if not first.axes.first:
            example = (*example, first.axes.inputs)
        if first.kind == "tokens" and first.tokens is not None:
            example = (*example, first.tokens.key)
        key = fingerprint(first.model, example, sources, self.n, self.seed)
        return None if key is None else Cache(self.path, key)

    def _queries(
        self, new: dict[int, Tensor], chosen: list[tuple[Source, str]], remarks: list[str], what: str
    ) -> Queries:
        args, kwargs, axes = self.targets[0].args, self.targets[0].kwargs, self.targets[0].axes
        names = dict.fromkeys(source.name for source, _ in chosen)
        why = dict.fromkeys(f"{source.name}: {reason}" if reason else shown(source) for source, reason in chosen)
        note = f"{self.n} {what}; {'; '.join(filter(None, (*why, *remarks)))}"
        whole = with_leaves(args, kwargs, axes, new, self.n)
        jointly = any(getattr(source, "jointly", False) for source, _ in chosen)
        return Queries(*whole, " + ".join(names), note, shared(args, kwargs, axes, new), axes, jointly)


def _enough(target: Target) -> int:
    """How many inputs are made by default."""
    if target.kind == "vectors" and not target.axes.whole:  # one that convolutions read is a signal
        return _MANY if work(target) <= _COSTLY_VECTOR else _FEW
    costly = target.kind == "pixels" and target.example.device.type == "cpu" and work(target) > _COSTLY
    return _FEWEST if costly else _FEW


def _remark(source: Source, target: Target, x: Tensor) -> str:
    """What the source has to say about the inputs that it made, for the report. Most say nothing."""
    remark = getattr(source, "remark", None)
    return str(remark(target, x)) if callable(remark) else ""


def _also(source: Source, target: Target, x: Tensor) -> dict[int, Tensor]:
    """Further inputs that go with those that the source made, by their positions: by default the mask of the padding of
    tokens, because that of the example is about the example."""
    also: Any = getattr(source, "also", padding_mask if target.kind == "tokens" else None)
    return {} if also is None else dict(also(target, x))


def _checked_example(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = normalise_example(example_inputs)
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if not next((len(x) for x in tensors if x.dim()), 0):
        raise InputError("the example inputs hold no tensor with at least one row along a batch axis. Pass one input.")
    places = {t.device.type for t in model.parameters()}
    if len(places) == 1 and not {t.device.type for t in tensors} <= places:
        raise InputError(f"the example inputs are not on the model's device ({places.pop()}). Move them there.")
    return args, kwargs


def _reused(queries: Queries, args: tuple[Any, ...], kwargs: dict[str, Any], axes: BatchAxes, n: int | None) -> Queries:
    """Queries made before, on the example's device. InputError if they are no inputs like the example."""
    mine, other = (pytree.tree_flatten(x) for x in ((args, kwargs), (queries.args, queries.kwargs)))
    alike = mine[1] == other[1] and (queries.axes is None or queries.axes.inputs == axes.inputs)
    like = [axes.stored(i, x) if _varies(i, x, queries) else x for i, x in enumerate(mine[0])]
    if not alike or any(
        _unlike(a, b, i in queries.shared) for i, (a, b) in enumerate(zip(like, other[0], strict=True))
    ):
        raise InputError(
            "these queries do not have the structure, shapes and dtypes of the example inputs. Make them anew for this "
            "model, or pass the example that they were made for."
        )
    device = next(x.device for x in mine[0] if isinstance(x, Tensor))
    taken = (queries if n is None else queries.take(n)).to(device)
    return replace(taken.changed(lambda i, x: x.to(mine[0][i].dtype) if isinstance(x, Tensor) else x), axes=axes)


def _varies(i: int, leaf: Any, queries: Queries) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and i not in queries.shared


def _unlike(a: Any, b: Any, shared: bool) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return isinstance(a, Tensor) or isinstance(b, Tensor)
    axis = 0 if shared or a.dim() == 0 else 1
    return number_kind(a.dtype) != number_kind(b.dtype) or a.shape[axis:] != b.shape[axis:] or a.dim() != b.dim()
