"""Models in a form that leaves more freedom: tied weights apart, norms that take no mean, biases that were absent."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from coreprune._plain import LAYERS
from coreprune._twin import twin
from coreprune.errors import ModelError


def recast(model: nn.Module, names: Collection[str]) -> nn.Module:
    """A twin in which the named things have another form, or the model itself if none are named.

    names: of parameters, which get values of their own if other names share them; of `nn.LayerNorm`s, which become
        `nn.RMSNorm`s with the same scale; and of biases that a layer does not have, which become zeros. What has its
        form already keeps it. Works on the meta device, too.

    Raises ModelError for another name.
    """
    if not names:
        return model
    new = twin(model)
    for name in names:
        path, _, key = name.rpartition(".")
        modules = dict(new.named_modules())
        module = modules.get(name)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            if isinstance(module, nn.LayerNorm):
                _set(new, path, key, _without_mean(module))
        elif path in modules and isinstance(own := modules[path]._parameters.get(key), nn.Parameter):
            modules[path]._parameters[key] = nn.Parameter(own.detach().clone(), own.requires_grad)
        elif key == "bias" and isinstance(layer := modules.get(path), LAYERS):
            rows = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
            layer.bias = nn.Parameter(layer.weight.detach().new_zeros(rows), layer.weight.requires_grad)
        else:
            raise ModelError(f"{type(model).__name__} has no {name} of its own that could take another form.")
    for holder in new.modules():  # of transformers, which would tie the weights again
        config = getattr(holder, "config", None)
        if getattr(config, "tie_word_embeddings", None) is True and not repeated(new):
            config.tie_word_embeddings = False  # pyright: ignore[reportOptionalMemberAccess]
    return new


def repeated(model: nn.Module) -> int:
    """How many parameters would be added if no two weights were the same tensor: those of tied weights."""
    every, once = (sum(p.numel() for _, p in model.named_parameters(remove_duplicate=r)) for r in (False, True))
    return every - once


def _without_mean(norm: nn.LayerNorm) -> nn.RMSNorm:
    scale = norm._parameters.get("weight")
    new = nn.RMSNorm(list(norm.normalized_shape), norm.eps, scale is not None, device="meta").train(norm.training)
    if scale is not None:
        new.weight = nn.Parameter(scale.detach().clone(), scale.requires_grad)
    return new


def _set(model: nn.Module, path: str, key: str, module: nn.Module) -> None:
    model.get_submodule(path)._modules[key] = module
