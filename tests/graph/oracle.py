"""What a pruned model has to be: the original in which consumers read zeros for the removed channels.

This is written against torch alone. It uses no code of coreprune beyond the description of the groups, and says zero in
two ways: in the columns of the consumers' weights, and in the inputs of the modules that read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from coreprune._twin import quiet
from coreprune.graph import Captured, Group


def random_halves(groups: list[Group], g: torch.Generator) -> dict[str, Tensor]:
    """Half of the units of every free group, per block, at random."""
    keep = {}
    for group in groups:
        if group.locked_because is not None:
            continue
        units = group.units()
        blocks = torch.zeros(len(units), dtype=torch.int64) if group.sections is None else group.sections
        stay = []
        for b in blocks.unique():
            where = (blocks == b).nonzero()[:, 0]
            stay.append(where[torch.randperm(len(where), generator=g)[: max(1, len(where) // 2)]])
        keep[group.name] = units[torch.cat(stay)].reshape(-1).sort().values
        assert group.legal(keep[group.name]) is None
    return keep


def zeroed_original(model: nn.Module, groups: list[Group], kept: dict[str, Tensor]) -> nn.Module:
    """A copy of the original with zero weights where consumers read removed channels."""
    original = copy.deepcopy(model)
    params = dict(original.named_parameters(remove_duplicate=False))
    for group in groups:
        if group.name not in kept:
            continue
        stays = set(kept[group.name].tolist())
        assert group.consumers, f"{group.name} is pruned, but nothing reads it"
        for consumer in group.consumers:
            assert consumer.slices, f"{group.name} is read without a weight at {consumer.node}"
            for s in consumer.slices:
                weight = params[s.param].data
                index = s.index if s.index.dim() == 2 else s.index[None]
                rows = weight.shape[0] // index.shape[0]
                for block, row in enumerate(index.tolist()):
                    for position, channel in enumerate(row):
                        if channel >= 0 and channel not in stays:
                            part = weight[block * rows : (block + 1) * rows] if len(index) > 1 else weight
                            part.select(s.dim, position).zero_()
    return original


@contextmanager
def masked_activations(model: nn.Module, groups: list[Group], kept: dict[str, Tensor]) -> Iterator[None]:
    """Zero the removed channels in the inputs of the modules that read them, by hooks on the original model."""
    modules = dict(model.named_modules())
    handles = []
    for group in groups:
        if group.name not in kept:
            continue
        stays = torch.zeros(group.size + 1, dtype=torch.float64)
        stays[kept[group.name]] = 1
        stays[-1] = 1  # index -1: not a channel of the group
        for point in group.activation_points:
            module = modules[point.module]

            def zero(module: nn.Module, inputs: tuple[Tensor, ...], mask=stays[point.index], axis=point.axis):
                shape = [1] * inputs[0].dim()
                shape[axis] = -1
                return (inputs[0] * mask.reshape(shape), *inputs[1:])

            handles.append(module.register_forward_pre_hook(zero))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Every floating-point tensor that a model returns in evaluation mode."""
    config = getattr(model, "config", None)
    more = {"use_cache": False} if getattr(config, "use_cache", None) is not None and "input_ids" in inputs else {}
    result = model(inputs["x"]) if set(inputs) == {"x"} else model(**inputs, **more)
    return [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor) and x.is_floating_point()]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-8) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        scale = max(1e-3, float(b.detach().abs().max()))
        assert float((a - b).detach().abs().max()) <= tolerance * scale


def measured_macs(model: nn.Module, captured: Captured) -> int:
    """What torch counts. The math kernel is asked for because the fused one on CPU is not counted."""
    with (
        FlopCounterMode(display=False) as counter,
        quiet(model) as m,
        sdpa_kernel(SDPBackend.MATH),
        torch.enable_grad(),
    ):
        m(*captured.args, **captured.kwargs)
    return counter.get_total_flops() // 2
