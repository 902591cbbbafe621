"""Hugging Face models: folders that stock transformers loads, if its configuration can express the pruned shapes.

The content of a folder is not trusted: only code of transformers runs, nothing is fetched, nothing is unpickled.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from coreprune._example import device_of
from coreprune._mapped import is_mapped
from coreprune.artifact.opening import mapped_from
from coreprune.errors import InputError
from coreprune.pruning.configured import is_pretrained, outputs, same
from coreprune.pruning.fewer_layers import with_fewer_layers
from coreprune.pruning.stock import on_meta, stock_config

__all__ = ["config_of", "is_pretrained", "read_stock", "rebuild", "stock_config", "with_fewer_layers", "write_stock"]

_ONE_FILE = "1000000GB"  # transformers splits weights above 50 GB into several files
_CLASS = re.compile(r"[A-Z][A-Za-z0-9_]*")
_COUNTS = re.compile(r"(layers?|depths?|blocks?|stages?|experts)$")
_MOST_LAYERS, _MOST_VALUES, _DEEPEST = 10_000, 1_000_000, 16
_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")  # those that need only torch
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def config_of(model: nn.Module, config: Any = None) -> dict[str, Any]:
    """The dense model's configuration as plain values for JSON, from which `rebuild` makes the dense model.

    model: a PreTrainedModel. config: the configuration that it had before pruning; by default the one that it has.

    Raises InputError where transformers alone could not make the model again: for the user's own code, quantised
    weights and adapters.
    """
    problem = _foreign(model)
    if problem:
        raise InputError(problem)
    config = model.config if config is None else config
    values = json.loads(config.to_json_string(use_diff=False))
    values.pop("quantization_config", None)  # of weights that are plain by now, see `_foreign`
    values["dtype"] = str(model.dtype).removeprefix("torch.")
    return {**values, **_implementations(config)}


def rebuild(class_name: str, config: dict[str, Any], meta: bool = True, most_layers: int = _MOST_LAYERS) -> nn.Module:
    """Make the dense model in evaluation mode, from the result of `config_of`.

    class_name: a model class of transformers, e.g. "BertForSequenceClassification".
    meta: make it on the meta device. False makes it on the CPU with random weights, which gives the values that are not
        in a state dict.
    most_layers: how many layers the configuration may ask for.

    Raises InputError for a class that transformers does not have, and for a configuration that does not belong to the
    class, or that would run or fetch anything else.
    """
    cls = _class_named(class_name)
    made = _config_for(cls, config, most_layers)
    try:
        if meta:
            return on_meta(cls, made).eval()
        with torch.random.fork_rng(devices=[]):
            return cls(made).eval()
    except Exception as error:
        raise InputError(f"transformers cannot make a {class_name} of this configuration: {_line(error)}.") from error


def write_stock(small: nn.Module, config: Any, directory: Path, example_inputs: Any) -> str:
    """Write config.json and model.safetensors for `from_pretrained`, read them back, and compare the outputs.

    small: the pruned model, which is left as it was. config: from `stock_config`. directory: an existing folder. Files
    of the same names are replaced. example_inputs: as in `prune`.

    Returns "" if stock transformers gives the same outputs. Otherwise nothing is left in the directory, and the
    returned text says why. Raises OSError where the disk refuses.
    """
    problem = _foreign(small)
    if problem:
        return problem
    inside = Path(tempfile.mkdtemp(dir=directory, prefix=".stock."))
    try:
        _save(small, config, inside)
        problem = _differs(small, inside, example_inputs)
        if not problem:
            for file in inside.iterdir():
                file.replace(directory / file.name)
    except OSError:
        raise
    except Exception as error:  # transformers validates while saving and loading, and raises all kinds of errors
        problem = f"transformers does not save or load it: {_line(error)}"
    finally:
        shutil.rmtree(inside, ignore_errors=True)
    return problem


def read_stock(class_name: str, directory: Path) -> nn.Module:
    """Load the model that `write_stock` wrote with the stock class, in evaluation mode on the CPU.

    Raises InputError for a folder that transformers cannot load, or whose configuration would run or fetch anything.
    """
    cls = _class_named(class_name)
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{directory / 'config.json'} cannot be read: {_line(error)}.") from error
    _config_for(cls, values)
    if (directory / "adapter_config.json").exists():
        raise InputError(f"{directory} holds adapters (adapter_config.json), which would be loaded from elsewhere.")
    try:
        model, problem = _load(cls, directory)
    except Exception as error:
        raise InputError(f"transformers cannot load {directory} as {class_name}: {_line(error)}.") from error
    if problem:
        raise InputError(f"{directory / 'model.safetensors'} does not fit {class_name}: {problem}.")
    return model


def _save(small: Any, config: Any, inside: Path) -> None:
    """Call save_pretrained with another configuration. The model has it only during the call."""
    was, quantizer = small.config, getattr(small, "hf_quantizer", None)
    small.config = copy.deepcopy(config)  # save_pretrained writes the dtype and the class into it
    if quantizer is not None:
        small.hf_quantizer = None
        vars(small.config).pop("quantization_config", None)
    try:
        with _silent():
            # The class's own, because the instance's may refuse. The names stay those of the model: the manifest has
            # them, and `from_pretrained` reads them as well as those of older releases.
            names = {"save_original_format": False}
            type(small).save_pretrained(small, inside, max_shard_size=_ONE_FILE, **names)
    finally:
        small.config = was
        if quantizer is not None:
            small.hf_quantizer = quantizer


def _differs(small: Any, inside: Path, example_inputs: Any) -> str:
    """Why the files are not the pruned model, or "". Weights must agree bit for bit, outputs up to rounding."""
    way = _implementations(small.config)
    if any(map(is_mapped, small.parameters())):  # the whole model need not fit into memory
        loaded, problem = mapped_from(type(small), inside, **way)
    else:
        loaded, problem = _load(type(small), inside, **way)
    if problem:
        return f"what transformers saves does not fit its own class: {problem}"
    theirs = loaded.state_dict()
    for name, tensor in small.state_dict().items():
        if name not in theirs or theirs[name].dtype != tensor.dtype or not torch.equal(theirs[name], tensor.cpu()):
            return f"transformers loads another {name} than was saved"
    if not same(outputs(loaded.to(device_of(small)), example_inputs), outputs(small, example_inputs)):
        return "with the same weights, the stock class gives other outputs than the pruned model"
    return ""


def _implementations(config: Any) -> dict[str, dict[str, str]]:
    """Which implementations of attention and experts the model runs; configuration files do not say that.

    Those of nested configurations are listed by their names.
    """
    scopes = {"": config, **{key: getattr(config, key, None) for key in config.sub_configs}}
    out = {}
    for key in ("attn_implementation", "experts_implementation"):
        found = {name: getattr(scope, f"_{key}", None) for name, scope in scopes.items()}
        known = {name: way for name, way in found.items() if way in _IMPLEMENTATIONS}
        if known:
            out[key] = known
    return out


def _load(cls: Any, directory: Path, **more: Any) -> tuple[Any, str]:
    """The model, and which weights do not fit it, or "". Raises what transformers raises."""
    asked = {"local_files_only": True, "use_safetensors": True, "ignore_mismatched_sizes": True, **more}
    with _silent(), torch.random.fork_rng(devices=[]):
        model, info = cls.from_pretrained(directory, output_loading_info=True, **asked)
    wrong = [f"{kind} {', '.join(sorted(map(str, found))[:3])}" for kind, found in info.items() if found]
    return model, "; ".join(wrong)


@contextmanager
def _silent() -> Iterator[None]:
    """Turn off progress bars and warnings of transformers. Our own messages say what goes wrong."""
    from transformers.utils import logging as hf

    bars, level = hf.is_progress_bar_enabled(), hf.get_verbosity()
    hf.disable_progress_bar()
    hf.set_verbosity_error()
    try:
        yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()


def _foreign(model: Any) -> str:
    """Why transformers alone cannot make a model of this kind, or "" if it can."""
    import transformers

    cls = type(model)
    if getattr(transformers, cls.__name__, None) is not cls:
        return (
            f"{cls.__name__} from {cls.__module__} is not a class of transformers; the folder needs its code: pass a "
            "factory when loading."
        )
    plain = all(str(t.dtype).removeprefix("torch.") in _DTYPES for t in model.parameters())
    if getattr(model, "hf_quantizer", None) is not None and not plain:  # GGUF files are made plain on loading
        return f"this {cls.__name__} is quantised, and its weights cannot be saved as they are."
    if getattr(model, "_hf_peft_config_loaded", False):
        return f"this {cls.__name__} has adapters. Merge them into the model first."
    return ""


def _class_named(name: str) -> Any:
    """The model class of transformers with this name. Raises InputError."""
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"{name!r} is a Hugging Face model. Install it: pip install transformers.") from error
    cls = getattr(transformers, name, None) if isinstance(name, str) and _CLASS.fullmatch(name) else None
    base = transformers.PreTrainedModel
    if not (isinstance(cls, type) and issubclass(cls, base) and cls.__module__.startswith("transformers.models.")):
        raise InputError(
            f"transformers {transformers.__version__} has no model class {name!r}. Install the version that the model "
            "was saved with, or pass a factory."
        )
    return cls


def _config_for(cls: Any, values: Any, most_layers: int = _MOST_LAYERS) -> Any:
    """A configuration for `cls`. Raises InputError for values that are not one or do more than describe a model."""
    if not isinstance(values, dict) or values.get("model_type") != cls.config_class.model_type:
        found = values.get("model_type") if isinstance(values, dict) else type(values).__name__
        raise InputError(
            f"{cls.__name__} has a configuration with model_type {cls.config_class.model_type!r}, not {found!r}."
        )
    for count, (key, value) in enumerate(_values(values)):
        problem = _unwanted(key, value, most_layers)
        if problem or count > _MOST_VALUES:
            raise InputError(
                f"the configuration of {cls.__name__} has {key}={str(value)[:60]!r}: "
                f"{problem or 'it is too large'}. Pass a factory that makes the model."
            )
    try:
        return cls.config_class.from_dict(json.loads(json.dumps(values)))
    except Exception as error:
        raise InputError(f"this is no configuration for {cls.__name__}: {_line(error)}.") from error


def _values(values: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every value of a nested configuration with its name. Raises InputError for types that JSON does not have."""
    if depth > _DEEPEST or not (values is None or isinstance(values, (bool, int, float, str, list, dict))):
        raise InputError(f"a configuration holds plain values up to {_DEEPEST} levels deep; {key!r} is none.")
    yield key, values
    for name, value in (
        values.items() if isinstance(values, dict) else ((key, v) for v in values) if isinstance(values, list) else ()
    ):
        yield from _values(value, str(name), depth + 1)


def _unwanted(key: str, value: Any, most_layers: int) -> str:
    """Why a value has no place in the configuration of a saved model, or "" for the usual values."""
    if value in (None, False):
        return ""
    if key in ("auto_map", "quantization_config", "transformers_weights"):
        return "such models are not loaded"
    if key in ("backbone", "use_pretrained_backbone"):
        return "its backbone would be fetched from elsewhere"
    if key.endswith("_implementation") and any(
        way not in _IMPLEMENTATIONS for way in (value.values() if isinstance(value, dict) else [value])
    ):
        return f"only {', '.join(_IMPLEMENTATIONS)} are known"
    if key in ("dtype", "torch_dtype") and value not in _DTYPES:
        return f"only {', '.join(_DTYPES)} are known"
    counts = [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, (int, float))]
    if _COUNTS.search(key) and sum(max(n, 0) for n in counts) > most_layers:
        return f"more than {most_layers:,} are not built"
    return ""


def _line(error: BaseException) -> str:
    """The last line of an error, which is where transformers says what is wrong."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}".rstrip(". ")
