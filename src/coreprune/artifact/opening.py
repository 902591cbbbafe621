"""open_model(): a model whose weights stay in their files, and are read piece by piece when they are used."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._mapped import mapped_file
from coreprune._weightless import UnfitError, fill_, weightless
from coreprune.errors import ArtifactError, InputError, first_line

log = logging.getLogger(__name__)

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def open_model(source: str | Path, factory: Callable[[], nn.Module] | None = None) -> nn.Module:
    """A model whose parameters are mapped from safetensors files. `prune` and the like then read them from there.

    The operating system reads what is used, and drops it again when memory is short, so that the model need not fit
    into memory. Nothing is ever written into the files. They must not be changed while the model is in use.

    source: a folder with a config.json of transformers and model.safetensors, in one file or in several with an index;
        or a .safetensors file. factory: makes the model of such a file; its own weights are not used. A folder needs
        none.

    Returns the model in evaluation mode, if it comes from a folder, else in the mode that the factory leaves it in. A
    model that transformers has to convert while it loads is read whole, and a warning says so.

    Raises ArtifactError for a file that is missing, damaged or cut off, and InputError if it does not fit the model.
    """
    path = Path(source)
    if path.is_dir():
        if factory is not None:
            raise InputError(f"{path} is a folder, whose config.json says which model it is. Leave the factory out.")
        return _pretrained(path)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is neither a folder nor a .safetensors file, and other files cannot be mapped.")
    tensors = mapped_file(path)
    if factory is None:
        raise InputError(f"{path} holds weights alone. Pass a factory of their model: open_model(file, factory).")
    try:
        model = weightless(factory)
    except UnfitError as error:
        log.warning("the model is made whole in memory, because its factory needs its parameters: %s", error)
        model = factory()
    if not isinstance(model, nn.Module):
        raise InputError(f"the factory gave a {type(model).__name__}, not a torch.nn.Module.")
    fill_(model, tensors, str(path))
    return model


def shards(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder with model.safetensors, or with several files and an index, mapped.

    Raises ArtifactError for an index that cannot be read, and for a file or tensor that it names and that is missing.
    """
    index = folder / _INDEX
    if not index.exists():
        return mapped_file(folder / _ONE)
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {name: str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{index} cannot be read as an index of weights: {first_line(error)}.") from error
    if odd := [file for file in names.values() if Path(file).name != file]:
        raise ArtifactError(f"{index} names {odd[0]}, which does not lie in its folder.")
    files = {file: mapped_file(folder / file) for file in sorted(set(names.values()))}
    for name, file in names.items():
        if name not in files[file]:
            raise ArtifactError(f"{index} says that {name} is in {file}, but that file does not hold it.")
    return {name: files[file][name] for name, file in names.items()}


def _pretrained(folder: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            f"{folder} is a Hugging Face model, which needs transformers: pip install transformers."
        ) from error
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"{folder} is not a Hugging Face model: it needs a config.json that names its architectures ({error})."
        ) from error
    cls = getattr(transformers, str(architecture), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise InputError(f"{folder} names the architecture {architecture!r}, which transformers does not have.")
    why = "it has no model.safetensors"
    if (folder / _INDEX).exists() or (folder / _ONE).exists():
        model, why = mapped_from(cls, folder)
        if model is not None:
            return model
    log.warning("%s is read into memory as a whole, because %s", folder, why)
    try:
        return cls.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"transformers cannot load {folder}: {first_line(error)}") from error


def mapped_from(cls: Any, folder: Path, **way: Any) -> tuple[Any, str]:
    """The model from a folder, or None and why transformers has to load it.

    cls: its class. way: what `from_pretrained` takes beside the folder, such as attn_implementation.

    Raises ArtifactError for files that cannot be read, and InputError if shapes differ.
    """
    from transformers import GenerationConfig

    tensors = shards(folder)
    try:
        config = cls.config_class.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"transformers cannot read {folder / 'config.json'}: {first_line(error)}") from error
    config.name_or_path = str(folder)
    if getattr(config, "quantization_config", None) is not None:
        return None, "it is quantised"
    dtype = getattr(config, "dtype", None)
    if not isinstance(dtype, torch.dtype):  # as transformers: that of the weights
        dtype = next((x.dtype for x in tensors.values() if x.is_floating_point()), torch.float32)
    single = [getattr(cls, key, None) for key in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    if dtype != torch.float32 and any(single):
        return None, f"parts of a {cls.__name__} stay in float32"
    try:
        with torch.random.fork_rng(devices=[]):
            model = weightless(lambda: cls._from_config(config, dtype=dtype, **way), fixed=True)
    except UnfitError as error:
        return None, f"a {cls.__name__} needs its parameters when it is made ({error})"
    named = _named(model, tensors)
    if named is None:
        return None, f"transformers gives its weights other names in a {cls.__name__}"
    fill_(model, named, str(folder))
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval(), ""


def _named(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors by their names in the model, with or without its prefix; None if these do not fit."""
    state = model.state_dict(keep_vars=True)
    prefix = f"{model.base_model_prefix}."
    for rename in (str, prefix.__add__, lambda name: name.removeprefix(prefix)):
        found = {rename(name): x for name, x in tensors.items()}
        held = {id(x) for name, x in state.items() if name in found}
        if all(id(x) in held for x in state.values()) and found.keys() <= state.keys():
            return found
    return None
