"""Check that a pruned model equals the original with the removed channels at zero. This finds every wrong rule."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from coreprune._twin import quiet
from coreprune.graph.captured import Captured
from coreprune.graph.groups import Group
from coreprune.graph.replay import replay

# Largest difference that rounding explains, relative to the largest output.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-3}


def difference(
    model: nn.Module, small: nn.Module, captured: Captured, chosen: list[tuple[Group, Tensor]]
) -> str | None:
    """None if `small` runs on the example and equals the original with the removed channels read as zeros.

    Otherwise the result says what is wrong.
    If the removed channels enter the statistics of a norm, the model is only run and not compared: it cannot be equal.
    """
    try:
        with quiet(small) as still:
            torch.manual_seed(0)  # so that both models draw the same numbers
            got = still(*captured.args, **captured.kwargs)
    except Exception as error:
        text = str(error).strip().splitlines()
        return f"the pruned model does not run: {type(error).__name__}: {text[0] if text else ''}"
    masks = zero_masks(captured, chosen)
    with quiet(model) as still:
        torch.manual_seed(0)
        weights = zeroed(still, chosen)
        if masks:
            want = replay(captured, still, weights, masks)
            got = [x for x in pytree.tree_leaves(got) if isinstance(x, Tensor)][: len(want)]
        else:
            want = functional_call(still, weights, captured.args, captured.kwargs)
    exact = not any("norm-statistics" in g.flags for g, _ in chosen)
    return compare(got, want, exact)


def zeroed(model: nn.Module, chosen: list[tuple[Group, Tensor]]) -> dict[str, Tensor]:
    """The weights of the consumers by name, with zeros where they read removed channels."""
    named = dict(model.named_parameters())
    out: dict[str, Tensor] = {}
    for group, keep in chosen:
        gone = torch.ones(group.size + 1, dtype=torch.bool)
        gone[keep] = False
        gone[-1] = False
        for consumer in group.consumers:
            for s in consumer.slices:
                weight = out[s.param] if s.param in out else named[s.param].detach().clone()
                out[s.param] = weight
                mask = gone[s.index].to(weight.device)
                if mask.dim() == 2:
                    for section, m in zip(weight.chunk(mask.shape[0], 0), mask, strict=True):
                        section.movedim(s.dim, 0)[m] = 0
                else:
                    weight.movedim(s.dim, 0)[mask] = 0
    return out


def zero_masks(captured: Captured, chosen: list[tuple[Group, Tensor]]) -> dict[str, list[tuple[str, Tensor]]]:
    """Factors 0 and 1 for the inputs of nodes that read removed channels without a parameter."""
    nodes = {n.name: n for n in captured.graph.graph.nodes}
    masks: dict[str, list[tuple[str, Tensor]]] = {}
    for group, keep in chosen:
        stays = torch.zeros(group.size + 1, dtype=torch.bool)
        stays[keep] = True
        stays[-1] = True
        for c in group.consumers:
            if not c.slices and c.source in nodes:
                shape = [1] * nodes[c.source].meta["val"].dim()
                shape[c.axis] = -1
                masks.setdefault(c.node, []).append((c.source, stays[c.index].reshape(shape)))
    return masks


def compare(got: object, want: object, exact: bool = True) -> str | None:
    """None if two outputs agree, otherwise how they differ.

    They agree if they have tensors of the same shapes, finite at the same entries, and with close values.
    """
    a = [x for x in pytree.tree_leaves(got) if isinstance(x, Tensor)]
    b = [x for x in pytree.tree_leaves(want) if isinstance(x, Tensor)]
    if [x.shape for x in a] != [x.shape for x in b]:
        return f"the output changes shape: {[tuple(x.shape) for x in b]} -> {[tuple(x.shape) for x in a]}"
    for x, y in zip(a, b, strict=True):
        if not y.is_floating_point() or not y.numel():
            continue
        if not torch.equal(torch.isfinite(x), torch.isfinite(y)):
            return "the output is not finite where the original is"
        real = torch.isfinite(y)
        if not exact or not bool(real.any()):
            continue
        error = float((x[real].double() - y[real].double()).abs().max())
        scale = float(y[real].double().abs().max())
        if error > TOLERANCE.get(y.dtype, 5e-2) * max(scale, 1e-6):
            return f"the output differs from the original with these channels at zero (by {error:.1e} of {scale:.1e})"
    return None
