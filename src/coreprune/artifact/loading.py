"""load(): rebuild the pruned model from its folder and the code of the dense model. Everything is checked first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from coreprune._example import device_of
from coreprune._plain import plain
from coreprune._recast import recast
from coreprune.artifact import huggingface
from coreprune.artifact.manifest import DTYPES, PLAN, WEIGHTS, Manifest, TensorEntry, check_file, json_of, read_manifest
from coreprune.errors import ArtifactError, CoreprunError, InputError, ModelError, first_line
from coreprune.graph import all_names, named_tensors, rebuilt, shallow
from coreprune.pruning import Plan
from coreprune.pruning.configured import configure_, held_by, put_refusal
from coreprune.pruning.plans.plan import fingerprint

log = logging.getLogger(__name__)

_MOST_TIMES, _FREE = 100, 1 << 28  # a dense model may have 100 times the bytes of the pruned one plus 256 MiB
_MANY = 512  # layers or experts that every configuration may ask for


def load(
    folder: str | Path,
    dense: nn.Module | Callable[[], nn.Module] | None = None,
    *,
    device: torch.device | str | None = None,
) -> nn.Module:
    """Load the pruned model that `save` wrote.

    The schema, file sizes and hashes, the fingerprint of the architecture, and every name, shape and dtype are checked
    before any weight is read. No pickle is read, and no code but the caller's factory is run.

    dense: a function that makes the dense model, or the dense model itself, which is not changed. The function is
        called on the meta device where that is enough. Not needed for models of the transformers package.
    device: where to put the weights. By default this is the device of the given model, else the CPU.

    Returns the model in evaluation mode. Raises ArtifactError for a folder that is damaged, incomplete or not an
    artifact, and InputError or ModelError for a dense model that is not the one that was pruned.
    """
    where = _device(device)
    place = Path(folder)
    manifest = read_manifest(place)
    plan = read_plan(place, manifest)
    _check_recipe(manifest)
    path = check_file(place, WEIGHTS, _entry(manifest, WEIGHTS))
    _check_header(path, manifest.tensors)
    model = _dense(place, manifest, dense)
    _check_model(model, manifest)
    where = where or (device_of(model) if isinstance(dense, nn.Module) else torch.device("cpu"))
    held = [one for one in held_by(model) if one.name == ""]
    small = rebuilt(model, manifest.recipe, _weights(path, manifest, where))
    if held and manifest.loads_with == "transformers":
        configure_(small, held[0], plan.groups, dropped=manifest.recipe.dropped)
    elif held:
        put_refusal(small, manifest.why)
    return small.eval()


def _device(device: torch.device | str | None) -> torch.device | None:
    """The device. Raises InputError for one that this machine does not have."""
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was not built for the device
        raise InputError(f"device={device!r} cannot be used here ({first_line(error)}). Take 'cpu'.") from error


def read_plan(folder: Path, manifest: Manifest | None = None) -> Plan:
    """Read the plan of an artifact. Raises ArtifactError or InputError if it is damaged."""
    manifest = manifest or read_manifest(folder)
    path = check_file(folder, PLAN, _entry(manifest, PLAN))
    json_of(path)  # refuses a file that is too large, before reading it
    plan = Plan.from_json(path.read_text(encoding="utf-8"))
    if plan.fingerprint != manifest.fingerprint:
        raise ArtifactError(f"{path} was made for another architecture than the manifest beside it.")
    return plan


def _entry(manifest: Manifest, name: str) -> Any:
    if name not in manifest.files:
        raise ArtifactError(f"the manifest does not list {name}, so it is not an artifact that can be loaded.")
    return manifest.files[name]


def _check_recipe(manifest: Manifest) -> None:
    for name, (_, after) in manifest.recipe.shapes.items():
        entry = manifest.tensors.get(manifest.aliases.get(name, name))
        if entry is None or entry.shape != after:
            raise ArtifactError(f"the manifest contradicts itself: {name} was cut to {after}, which it does not hold.")


def _check_header(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    """Check that names, shapes and dtypes in the file are those of the manifest. Only the header is read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if names != set(tensors):
                odd = sorted(names ^ set(tensors))[:3]
                raise ArtifactError(f"{path} and the manifest name different tensors: {', '.join(odd)}.")
            for name, entry in tensors.items():
                part = file.get_slice(name)
                found = TensorEntry(tuple(part.get_shape()), DTYPES.get(str(part.get_dtype()), "unknown"))
                if found != entry:
                    raise ArtifactError(f"{path}: {name} is {found}, the manifest says {entry}.")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a safetensors file that can be read ({first_line(error)}).") from error


def _dense(folder: Path, manifest: Manifest, dense: nn.Module | Callable[[], nn.Module] | None) -> nn.Module:
    """The dense architecture, on the meta device if only the tensors in the file are needed."""
    if isinstance(dense, nn.Module):
        return _plain(dense, manifest)
    if dense is None:
        if manifest.config is None:
            raise InputError(
                f"{folder} holds a pruned {manifest.model_class}, whose code only you have. Pass a function that makes "
                f"the dense model: coreprune.load({str(folder)!r}, make_model)."
            )
        most = max(_MANY, len(manifest.tensors))  # a layer has at least one tensor
        model = _plain(huggingface.rebuild(manifest.model_class, dict(manifest.config), most_layers=most), manifest)
        if _needs_values(model, manifest):
            _check_model(model, manifest)
            _affordable(model, _entry(manifest, WEIGHTS).bytes)
            model = huggingface.rebuild(manifest.model_class, dict(manifest.config), meta=False, most_layers=most)
            model = _plain(model, manifest)
        return model
    if not callable(dense):
        raise InputError(f"dense must be a model or a function that makes one, not a {type(dense).__name__}.")
    try:
        with torch.device("meta"):
            model = dense()
        if isinstance(model, nn.Module):
            model = _without(_in_form(model, manifest), manifest)
            if not _needs_values(model, manifest):
                return model
    except ModelError as error:  # a parametrization that reads values
        log.debug("%s", error)
    except CoreprunError:
        raise
    except Exception as error:  # a factory that reads values cannot run on the meta device
        log.debug("the factory does not run on the meta device: %s", error)
    model = dense()
    if not isinstance(model, nn.Module):
        raise InputError(f"the factory gave a {type(model).__name__}, not a torch.nn.Module.")
    return _plain(model, manifest)


def _plain(model: nn.Module, manifest: Manifest) -> nn.Module:
    """The dense model with parameters in place of the weights that it computes, and without elements that left.

    Raises InputError for another model.
    """
    try:
        return _without(_in_form(model, manifest), manifest)
    except ModelError as error:
        raise _another(error) from error


def _in_form(model: nn.Module, manifest: Manifest) -> nn.Module:
    return recast(plain(model, manifest.recipe.plain, values=False), manifest.recipe.recast)


def _without(model: nn.Module, manifest: Manifest) -> nn.Module:
    """The model without the elements that have left. Raises InputError if it has no such elements."""
    if not manifest.recipe.dropped:
        return model
    try:
        return shallow(model, manifest.recipe.dropped)
    except InputError as error:
        raise _another(error) from error


def _another(error: CoreprunError) -> InputError:
    return InputError(
        f"this dense model is not the one that was pruned: {error} Load with the code and the settings that it was "
        "made with."
    )


def _affordable(model: nn.Module, pruned: int) -> None:
    """Refuse a dense model that is far too large for the pruned one, which a forged configuration may ask for.

    pruned: bytes of the pruned weights. Raises ArtifactError.
    """
    dense = sum(t.numel() * t.element_size() for _, t in named_tensors(model))
    if dense > _MOST_TIMES * pruned + _FREE:
        raise ArtifactError(
            f"the configuration in the manifest makes a {type(model).__name__} of {dense:,} bytes, and {WEIGHTS} has "
            f"{pruned:,}. If it is what you saved, pass a function that makes the dense model."
        )


def _needs_values(model: nn.Module, manifest: Manifest) -> bool:
    """Whether a tensor on the meta device is not in the file: a buffer outside the state dict, or an attribute."""
    held = {id(t) for name, t in all_names(model) if name in manifest.tensors}
    own = {id(t) for _, t in named_tensors(model)}
    if own - held:
        return True
    ours = ("_parameters", "_buffers", "_modules")
    return any(
        isinstance(value, Tensor) and value.is_meta and id(value) not in own
        for module in model.modules()
        for value in pytree.tree_leaves({key: value for key, value in vars(module).items() if key not in ours})
    )


def _check_model(model: nn.Module, manifest: Manifest) -> None:
    """Check that the dense model is the one that was pruned, as far as names, shapes, dtypes and ties can tell."""
    found = dict(all_names(model))
    before = {name: entry.shape for name, entry in manifest.tensors.items()}
    for name, (shape, _) in manifest.recipe.shapes.items():
        before[manifest.aliases.get(name, name)] = shape
    settings = "Load with the code and the settings that it was made with."
    for name, entry in manifest.tensors.items():
        if name not in found:
            raise InputError(f"the dense model has no {name}, which the one that was pruned had. {settings}")
        shape, dtype = tuple(found[name].shape), str(found[name].dtype).removeprefix("torch.")
        if (shape, dtype) != (before[name], entry.dtype):
            raise InputError(
                f"{name} is {dtype} {shape} in this dense model and was {entry.dtype} {before[name]} in the one that "
                f"was pruned. {settings}"
            )
    for alias, name in manifest.aliases.items():
        if alias not in found or found[alias] is not found[name]:
            raise InputError(f"{alias} and {name} were one tensor in the model that was pruned. {settings}")
    if fingerprint(model) != (manifest.recipe.rest or manifest.fingerprint):
        raise InputError(
            f"this dense model is another architecture than the one that was pruned (fingerprint "
            f"{manifest.fingerprint}): it has further tensors. {settings}"
        )


def _weights(path: Path, manifest: Manifest, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors, in memory of their own.

    On the CPU, those of safetensors lie in the file's pages, at any multiple of 8 bytes or less: kernels then may round
    in another order than on torch's own memory, and what is written over the file is written into the model.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            found = {name: file.get_tensor(name) for name in manifest.tensors}
            return {name: t.clone() if t.device.type == "cpu" else t for name, t in found.items()}
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {first_line(error)}.") from error
