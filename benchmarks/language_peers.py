"""Pruners of language models to compare with, written from their papers, for decoders of Llama's form.

FLAP (An et al., AAAI 2024): channels before `o_proj` (whole key/value groups) and `down_proj` are scored by the
variance of the channel times the squared norm of its outgoing weights, standardised in every layer; the lowest scores
of the whole model leave, and their mean goes into a bias. SliceGPT (Ashkboos et al., ICLR 2024): before attention and
before the MLP, the stream is projected to the principal components of what flows there, one basis for each place.

Both are emulated: a channel that leaves is zero, and a sliced stream is a projected one. The function is that of the
smaller model; what its weights would count is told by the budget.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_BATCH = 16


def flap(model: Any, windows: Tensor, remove: int) -> nn.Module:
    """A copy without at least `remove` of the weights in its blocks. windows: (n, length) token ids."""
    small = copy.deepcopy(model)
    config = small.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads * head
    layers = [(layer.self_attn.o_proj, queries, 2 * head) for layer in small.model.layers]
    layers += [(layer.mlp.down_proj, 1, 0) for layer in small.model.layers]
    moments = _moments(small, [linear for linear, _, _ in layers], windows)
    scores, costs, owners = [], [], []
    for i, (linear, unit, more) in enumerate(layers):
        _, variance = moments[i]
        score = (variance * linear.weight.double().square().sum(0)).view(-1, unit).sum(1)
        scores.append((score - score.mean()) / score.std())
        # Rows that make a unit and columns that read it: q, k, v and o, or gate, up and down.
        cost = (2 * unit + more) * config.hidden_size if more else 3 * config.hidden_size
        costs.append(torch.full_like(score, cost))
        owners.append(torch.stack([torch.full_like(score, i), torch.arange(len(score))], 1).long())
    order = torch.cat(scores).argsort()
    gone = order[: int((torch.cat(costs)[order].cumsum(0) < remove).sum()) + 1]
    for i, (linear, unit, _) in enumerate(layers):
        units = torch.cat(owners)[gone]
        channels = (units[units[:, 0] == i, 1, None] * unit + torch.arange(unit)).flatten()
        mean = moments[i][0][channels].to(linear.weight)
        with torch.no_grad():
            shift = linear.weight[:, channels] @ mean
            linear.bias = nn.Parameter(shift if linear.bias is None else linear.bias + shift)
            linear.weight[:, channels] = 0
    return small


def _moments(model: nn.Module, layers: list[nn.Module], windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of the inputs of some layers, float64."""
    sums = [torch.zeros(2, layer.in_features, dtype=torch.float64) for layer in layers]  # type: ignore[misc]

    def keep(total: Tensor) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0].flatten(0, -2).double()
            total[0] += rows.sum(0)
            total[1] += rows.square().sum(0)

        return hook

    hooks = [layer.register_forward_pre_hook(keep(total)) for layer, total in zip(layers, sums, strict=True)]
    with torch.no_grad():
        for part in windows.split(_BATCH):
            model(input_ids=part, use_cache=False)
    for hook in hooks:
        hook.remove()
    n = windows.numel()
    return [(s[0] / n, (s[1] / n - (s[0] / n) ** 2).clamp_min(0)) for s in sums]


def slicegpt(model: Any, windows: Tensor, share: float) -> nn.Module:
    """A copy whose blocks have this share of their weights, with the maps between the bases of two places counted."""
    small, config = copy.deepcopy(model), model.config
    blocks, d = sum(p.numel() for p in small.model.layers.parameters()), config.hidden_size
    places = 2 * len(small.model.layers)
    width = max(k for k in range(1, d + 1) if blocks * k / d + places * k * k <= share * blocks)
    for layer in small.model.layers:
        layer.projections = nn.ParameterList([torch.eye(d), torch.eye(d)])
        layer.forward = types.MethodType(_sliced, layer)
    for layer in small.model.layers:
        for place, norm in enumerate((layer.input_layernorm, layer.post_attention_layernorm)):
            seen = _stream(small, norm, windows)
            values = torch.linalg.eigh(seen).eigenvectors[:, -width:]
            layer.projections[place] = (values @ values.mT).float()
    return small


def _stream(model: nn.Module, norm: nn.Module, windows: Tensor) -> Tensor:
    """The second moments of what enters a norm, each row at unit length, (d, d) float64."""
    total = torch.zeros(1, dtype=torch.float64)

    class Reached(Exception):
        pass

    def hook(_: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal total
        rows = nn.functional.normalize(args[0].flatten(0, -2).double(), dim=1)
        total = total + rows.mT @ rows
        raise Reached

    handle = norm.register_forward_pre_hook(hook)
    with torch.no_grad():
        for part in windows.split(_BATCH):
            try:
                model(input_ids=part, use_cache=False)
            except Reached:
                continue
    handle.remove()
    return total


def _sliced(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """The forward of a decoder layer, with the stream projected before attention and before the MLP."""
    x = hidden_states @ self.projections[0]
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(x), **kwargs)
    x = (x + attended) @ self.projections[1]
    return x + self.mlp(self.post_attention_layernorm(x))
