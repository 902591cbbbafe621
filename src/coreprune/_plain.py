"""Models with plain weights: a twin in which every weight that is computed from other tensors is a parameter.

Weight norm, spectral norm and other parametrizations compute a weight from tensors of other shapes. Layers that
standardise their weight compute it from sums over its inputs. Removing an input would change either, so the weight is
taken as it is in evaluation mode. Masks and other factors on single entries stay: they are cut with the weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm
from torch.overrides import TorchFunctionMode

from coreprune._alive import enlivened
from coreprune._twin import twin
from coreprune.errors import ModelError, first_line

log = logging.getLogger(__name__)

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PRODUCTS = {
    nn.functional.linear,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
}
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}  # of two runs of one layer, relative


def computed(model: Any) -> tuple[str, ...]:
    """The dotted names of the weights that a model computes, and that `plain` can make parameters.

    Of layers that compute their weight in the forward, those are meant in which entries of several channels meet. The
    model is not changed.
    """
    if not isinstance(model, nn.Module):
        return ()
    names = [*_parametrized(model)]
    odd = [path for path, layer in model.named_modules() if _base(layer) is not None]
    if odd:
        tried = twin(model)
        names += [_join(path, "weight") for path in odd if _standardised(tried.get_submodule(path))]
    return tuple(names)


def plain(model: nn.Module, weights: Collection[str], values: bool = True) -> nn.Module:
    """A twin in which the named weights are parameters, or the model itself if none are named.

    weights: names from `computed`. values: whether the parameters have the values that the model computes; without
        them, the model may be on the meta device.

    Raises ModelError if a weight cannot be computed.
    """
    if not weights:
        return model
    new, parametrized = twin(model), set(_parametrized(model))
    for name in weights:
        try:
            layer = new.get_submodule(name.rpartition(".")[0])
            base = _base(layer)
            if name in parametrized:
                _fold(new, name)
            elif not values:
                if base is not None:
                    _become(layer, base, layer.get_parameter("weight"), layer._parameters.get("bias"))
            elif base is None or not _standardised(layer):
                raise TypeError(f"{type(layer).__name__} does not compute it")
        except Exception as error:
            raise ModelError(f"{name} of {type(model).__name__} cannot be made plain: {first_line(error)}.") from error
    log.info("weights that the model computes are plain parameters in its copy: %s", ", ".join(weights))
    return new


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# --- parametrizations, and the hooks that were there before them ------------------------------------------------------
def _parametrized(model: nn.Module) -> Iterator[str]:
    """The dotted names of the tensors that are computed by parametrizations and by the hooks of older norms."""
    for path, module in model.named_modules():
        if "parametrizations" in path.split("."):
            continue
        inside = [*module.parametrizations] if parametrize.is_parametrized(module) else []  # pyright: ignore
        for name in [*inside, *(hook.name for hook in _hooks(module))]:
            yield _join(path, name)


def _hooks(module: nn.Module) -> list[WeightNorm | SpectralNorm]:
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, (WeightNorm, SpectralNorm))]


def _fold(model: nn.Module, weight: str) -> None:
    """Make a parametrized tensor plain, in place.

    torch's own `remove_parametrizations` changes the class of the module, which the user's model shares, and the
    content of the tensors behind it, which another layer may share.
    """
    path, _, name = weight.rpartition(".")
    module = model.get_submodule(path)
    hook = next((h for h in _hooks(module) if h.name == name), None)
    if hook is not None:
        behind = [p for key, p in module._parameters.items() if key.startswith(f"{name}_") and p is not None]
        trained = any(p.requires_grad for p in behind)
        with torch.no_grad():
            (remove_weight_norm if isinstance(hook, WeightNorm) else remove_spectral_norm)(module, name)
        module.get_parameter(name).requires_grad_(trained)
        _forget(module)
        return
    parts: Any = module.parametrizations[name]  # pyright: ignore
    parts.eval()  # a spectral norm changes its vectors in training
    behind = list(parts.parameters())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        value, again = (getattr(module, name).detach().clone() for _ in range(2))
    if not value.is_meta and not bool(((value == again) | value.isnan()).all()):
        raise ValueError("it is random in evaluation mode")
    if behind:
        value = nn.Parameter(value, any(p.requires_grad for p in behind))
    if len(module.parametrizations) == 1:  # pyright: ignore
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
    else:
        del module.parametrizations[name]  # pyright: ignore
    # While other tensors are parametrized, the class still has a property of this name.
    (module._parameters if behind else module._buffers)[name] = value  # pyright: ignore
    _forget(module)


def _forget(module: nn.Module) -> None:
    """Remove the hooks that read older state dicts of torch's norms. torch leaves them behind."""
    hooks = module._load_state_dict_pre_hooks
    for key, hook in list(hooks.items()):
        if getattr(getattr(hook, "hook", hook), "__module__", "").startswith("torch.nn.utils."):
            del hooks[key]


# --- layers that compute their weight in the forward ------------------------------------------------------------------
def _base(layer: nn.Module) -> type[nn.Module] | None:
    """The layer of torch that a layer with a forward of its own is made from, or None."""
    base = next((b for b in LAYERS if isinstance(layer, b)), None)
    own = base is not None and type(layer).forward is not base.forward and "forward" not in vars(layer)
    simple = not layer._modules and isinstance(layer._parameters.get("weight"), nn.Parameter)
    return base if own and simple and not parametrize.is_parametrized(layer) else None


class _Watch(TorchFunctionMode):
    """The products that a forward computes: (input, weight, bias, result)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[Any, Any, Any, Any]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
            self.found.append((given["input"], given["weight"], given.get("bias"), result))
        return result


def _standardised(layer: nn.Module) -> bool:
    """Make a layer plain, in place, if it multiplies its input by a weight in which entries of several channels meet.

    The layer is tried on random inputs. It is left alone if it does anything else with them.
    """
    base: Any = _base(layer)
    kind, parameters, buffers, training = type(layer), dict(layer._parameters), dict(layer._buffers), layer.training
    layer.training = done = False
    shared = [(p, p.data) for p in parameters.values() if p is not None]
    for p, data in shared:
        p.data = data.clone()  # the forward may write into it
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            used, inputs = _used(layer), _inputs(layer)
            if used is not None and _mixes(layer):
                before = [layer(x) for x in inputs]
                _become(layer, base, *used)
                done = all(_close(layer(x), y) for x, y in zip(inputs, before, strict=True))
    except Exception as error:  # a layer that cannot be tried is left alone
        log.debug("%s is not tried: %s", type(layer).__name__, first_line(error))
    layer.training = training
    for p, data in shared:
        p.data = data
    if not done:
        layer.__class__ = kind
        layer._parameters, layer._buffers = parameters, buffers
    return done


def _become(layer: nn.Module, base: type[nn.Module], weight: Tensor, bias: Tensor | None) -> None:
    """Turn a layer into the layer of torch that it is made from, in place."""
    trained = any(p.requires_grad for p in layer.parameters())
    layer.__class__ = base
    layer._parameters.clear()
    layer._buffers.clear()
    for name, value in (("weight", weight), ("bias", bias)):
        new = None if value is None else nn.Parameter(value.detach().clone(), trained)
        layer._parameters[name] = new


def _inputs(layer: Any) -> list[Tensor]:
    """Two random inputs."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        size = [layer.in_features]
    else:
        size = [layer.in_channels, *(d * (k - 1) + 3 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))]
    weight = layer.weight
    return [torch.randn(2, *size, generator=generator).to(weight.device, weight.dtype) for _ in range(2)]


def _used(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight and bias that a layer multiplies any input by, or None if it does not."""
    found = []
    for x in _inputs(layer):
        with _Watch() as watch:
            result = layer(x)
        if len(watch.found) != 1 or watch.found[0][0] is not x or watch.found[0][3] is not result:
            return None
        found.append(watch.found[0][1:3])
    (weight, bias), (again, _) = found
    same = weight.shape == layer.get_parameter("weight").shape and torch.equal(weight, again)
    return (weight.clone(), bias) if same else None


def _mixes(layer: nn.Module) -> bool:
    """Whether the weight that is used at some channels depends on the parameter's entries at other channels."""
    kept = [(p, p.data) for p in layer.parameters()]
    for name, value in enlivened(layer).items():  # behind a gain of zero nothing would be seen
        layer.get_parameter(name).data = value
    try:
        return any(_mixes_along(layer, dim) for dim in (0, 1))
    finally:
        for p, data in kept:
            p.data = data


def _mixes_along(layer: nn.Module, dim: int) -> bool:
    own, usual = layer.get_parameter("weight"), _used(layer)
    half = own.shape[dim] // 2
    if not half or usual is None:
        return False
    before = own.data
    own.data = before.clone()
    own.data.narrow(dim, 0, half).zero_()
    changed = _used(layer)
    own.data = before
    rest = [used[0].narrow(dim, half, own.shape[dim] - half) for used in (usual, changed or usual)]
    return not _close(*rest)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return bool((a - b).abs().amax() <= _TOLERANCE.get(a.dtype, 1e-2) * b.abs().amax().clamp(min=1e-6))
