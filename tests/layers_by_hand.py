"""Layers for the tests of selectors: built by hand, read from models, and with features collected by hooks."""

from __future__ import annotations

import dataclasses
import functools

import torch

from coreprune import prune
from coreprune.graph import capture, find_groups, normalise_example
from coreprune.pruning.layer.activations import activation
from coreprune.pruning.layer.read import read_layer, tensors_of
from coreprune.pruning.layer.weights import LayerWeights, Reader

# What the selector decides and nothing else: no queries, no repair.
cut = functools.partial(prune, queries=None)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def layer(n: int = 12, d: int = 5, outputs: int = 4, seed: int = 0, act: str = "relu", **more) -> LayerWeights:
    return LayerWeights(normal(n, d + 1, seed=seed), normal(outputs, n, seed=seed + 1), activation(act), **more)


def reader(weight: torch.Tensor, samples: torch.Tensor) -> Reader:
    """A reader with moments of its samples."""
    centred = samples - samples.mean(dim=0)
    return Reader(weight, samples.mean(dim=0), centred.T @ centred / len(samples), weight.T @ weight, samples)


def layers_of(model, inputs) -> dict:
    """Every free group of a model with its layer, by name."""
    example = inputs["x"] if set(inputs) == {"x"} else inputs
    captured = capture(model, *normalise_example(example))
    found = [g for g in find_groups(captured) if g.locked_because is None]
    return {g.name: (g, read_layer(tensors_of(model), captured, g)) for g in found}


def with_readers(model, inputs, group, layer: LayerWeights, most: int = 6) -> LayerWeights:
    """At most `most` rows of the features that the group's consumers see, collected by hooks on their modules."""
    modules, seen = dict(model.named_modules()), []
    consumers = [c for c in group.consumers if c.hookable]
    handles = [
        modules[c.module].register_forward_pre_hook(lambda m, args, c=c: seen.append((c, args[0]))) for c in consumers
    ]
    with torch.no_grad():
        model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs)
    for handle in handles:
        handle.remove()
    parameters, readers = dict(model.named_parameters()), []
    for consumer, x in seen:
        rows = x.movedim(consumer.axis, -1).reshape(-1, x.shape[consumer.axis])
        (piece,) = consumer.slices
        weight = parameters[piece.param].detach().movedim(piece.dim, -1).reshape(-1, x.shape[consumer.axis])
        live = [i for i, c in enumerate(consumer.index.tolist()) if c >= 0]
        at = sorted(live, key=lambda i: int(consumer.index[i]) // group.unit)  # unit by unit
        readers.append(reader(weight[:most, at], rows[:most, at]))
    return dataclasses.replace(layer, readers=tuple(readers))
