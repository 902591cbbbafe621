"""save(): write a pruned model as a folder without pickle, either completely or not at all."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from coreprune._example import device_of, example_like
from coreprune._files import whole_folder
from coreprune._mapped import is_mapped
from coreprune._plain import plain
from coreprune._recast import recast
from coreprune.artifact import huggingface
from coreprune.artifact.manifest import (
    DTYPES,
    MANIFEST,
    PAGE,
    PLAN,
    QUERIES,
    REPORT,
    TOKENIZER,
    WEIGHTS,
    FileEntry,
    Manifest,
    TensorEntry,
    sha256,
)
from coreprune.errors import InputError, first_line
from coreprune.graph import Recipe, all_names
from coreprune.pruning import Result
from coreprune.pruning.plans.plan import fingerprint
from coreprune.pruning.reporting.report import versions
from coreprune.queries.tokenizer import beside

_log = logging.getLogger(__name__)


def save(
    result: Result,
    folder: str | Path,
    *,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    source: Mapping[str, Any] | None = None,
) -> Path:
    """Write model.safetensors, plan.json, manifest.json, report.json, report.html and queries.safetensors.

    report.html needs `pip install 'coreprune[report]'`. Without it, the page is left out, and a warning is logged. You
    can make it later with `coreprune report FOLDER --html page.html`.

    The folder appears complete and flushed to the disk, or not at all. Nothing in it is pickled. `load` reads it back.
    If stock transformers can express the widths of a pruned Hugging Face model, config.json is written too, so that
    `from_pretrained` can read the folder, and the tokenizer of the folder that the model came from is copied. This is
    tried before the folder appears, and the manifest and the report say whether it works.

    result: from `prune`. folder: must be absent or empty, unless `overwrite`.
    extra: further entries of report.json, e.g. {"latency": ..., "accuracy": ...}.
    source: how the command line can find the dense model again.

    Returns the folder. Raises InputError for a model that has changed since pruning (for example in a dtype or a
    shape), and ArtifactError where the disk refuses. Then nothing has changed.
    """
    if not isinstance(result, Result):
        raise InputError(f"save takes what prune() returned, not a {type(result).__name__}.")
    place = Path(folder)
    model = result.model
    _check_model(model, result)
    _check_json(extra=extra, source=source)
    with whole_folder(place, overwrite) as temporary:
        (temporary / PLAN).write_text(result.plan.to_json(), encoding="utf-8")
        config, why = _stock(result, temporary)
        if (temporary / "config.json").exists():
            _copy_tokenizer(model, temporary)
        written = temporary / WEIGHTS
        tensors, aliases = _tensors(model, _names_in(written) if written.exists() else frozenset())
        if not written.exists():
            # Only one key, because the order of several differs between runs.
            save_file(tensors, written, {"format": "pt"})
        manifest = Manifest(
            fingerprint=result.plan.fingerprint,
            tensors={name: TensorEntry(tuple(t.shape), _dtype(t)) for name, t in tensors.items()},
            aliases=aliases,
            recipe=result.recipe,
            files={},
            model_class=type(model).__name__,
            loads_with="transformers" if (temporary / "config.json").exists() else "coreprune",
            why=why,
            config=config,
            source=dict(source or {}),
            versions=versions(),
        )
        _write_report(result, temporary, manifest, dict(extra or {}))
        if result.queries is not None:
            result.queries.to("cpu").save(temporary / QUERIES)
        names = [f.name for f in sorted(temporary.iterdir())]
        files = {n: FileEntry((temporary / n).stat().st_size, sha256(temporary / n)) for n in names}
        (temporary / MANIFEST).write_text(replace(manifest, files=files).to_json(), encoding="utf-8")
    return place


def _write_report(result: Result, folder: Path, manifest: Manifest, extra: dict[str, Any]) -> None:
    from coreprune.report import html

    how = (
        f"{manifest.model_class}.from_pretrained(folder), or coreprune.load(folder)"
        if manifest.loads_with == "transformers"
        else "coreprune.load(folder)"
        if manifest.config is not None
        else f"coreprune.load(folder, factory), where factory makes the dense {manifest.model_class}"
    )
    artifact = {"loads_with": how, "why": manifest.why}
    data = {**result.report.as_dict(), "model": manifest.model_class, "artifact": artifact, **extra}
    (folder / REPORT).write_text(json.dumps(data, indent=1), encoding="utf-8")
    if absent := html.missing():
        _log.warning("%s was not written, because it needs %s. Run: %s", PAGE, ", ".join(absent), html.INSTALL)
        return
    images = None if result.queries is None else first_images(result.queries.args)
    html.write(data, folder / PAGE, images)


def first_images(args: tuple[Any, ...]) -> Tensor | None:
    """The first floating-point input with a batch axis, for the gallery, or None."""
    return next((x for x in args if isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2), None)


def _stock(result: Result, folder: Path) -> tuple[dict[str, Any] | None, str]:
    """For Hugging Face models: the dense configuration, and why stock transformers cannot read the folder, or "".

    If it can, config.json and model.safetensors are written to the folder.
    """
    model = result.model
    if not huggingface.is_pretrained(model):
        return None, ""
    try:
        dense = huggingface.config_of(model, result.config)
    except InputError as error:
        return None, str(error)
    computed = result.recipe.plain
    rebuilt = plain(huggingface.rebuild(type(model).__name__, dense), computed, values=False)
    rebuilt = recast(rebuilt, result.recipe.recast)
    if fingerprint(rebuilt) != result.plan.fingerprint:  # of the dense model, with all of its blocks
        return None, "the configuration does not describe the dense model: pass a factory when loading."
    if computed:
        return dense, f"stock transformers computes weights that are plain parameters here, such as {computed[0]}."
    if result.plan.part:
        return dense, f"only {result.plan.part} was pruned, and configurations are written for whole models."
    config, why = huggingface.with_fewer_layers(type(model), result.config or model.config, result.plan.dropped)
    if config is None:
        return dense, why
    config, why = huggingface.stock_config(model, result.plan.groups, config)
    if config is None:
        return dense, why
    if result.plan.example is None:
        return dense, "the example input cannot be written down, so the folder could not be tried."
    example = example_like(result.plan.example, device_of(model))
    return dense, huggingface.write_stock(model, config, folder, example)


def _copy_tokenizer(model: nn.Module, folder: Path) -> None:
    """Copy the tokenizer beside the model, so that stock transformers finds it in the new folder, too."""
    found = beside(model)
    if found is None:
        return
    for file in (found.parent / name for name in TOKENIZER):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)


def _tensors(model: nn.Module, preferred: frozenset[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors for model.safetensors, each once, and the other names of tied tensors.

    Buffers that a state dict leaves out are left out here too, because the model's own code makes them.

    preferred: the names to use where there are several.
    """
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in all_names(model):
        if name in state:
            names.setdefault(id(tensor), []).append(name)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for ties in names.values():
        chosen = next((n for n in ties if n in preferred), ties[0])
        t = state[chosen].detach()
        # A separate copy on the CPU, because safetensors refuses tensors that share memory. Mapped ones share none.
        apart = is_mapped(t) and t.is_contiguous()
        tensors[chosen] = t if apart else torch.empty(t.shape, dtype=t.dtype).copy_(t)
        aliases |= {name: chosen for name in ties if name != chosen}
    return tensors, aliases


def _names_in(path: Path) -> frozenset[str]:
    with safe_open(path, framework="pt") as file:
        return frozenset(file.keys())


def _check_model(model: nn.Module, result: Result) -> None:
    """Check that the model can be loaded later: only parameters and buffers, of known dtypes, as `prune` left them."""
    state = model.state_dict(keep_vars=True)
    own = dict(all_names(model))
    for name, value in state.items():
        if name not in own:
            raise InputError(
                f"the state dict has {name}, which is neither a parameter nor a buffer. An artifact holds these alone; "
                "make it a buffer."
            )
        if _dtype(value) not in DTYPES.values():
            raise InputError(
                f"{name} has dtype {_dtype(value)}, which an artifact cannot hold. It can hold "
                f"{', '.join(DTYPES.values())}."
            )
    if lost := [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in state]:
        raise InputError(f"the state dict lacks the parameter {lost[0]}, so it would be lost. Keep it in there.")
    if fingerprint(model, _dense_shapes(own, result.recipe)) != (result.recipe.rest or result.plan.fingerprint):
        raise InputError(
            f"this {type(model).__name__} is not as prune() left it: a shape, a dtype or a name has changed, and it "
            "could not be loaded. Save it first, and change it after loading."
        )


def _dense_shapes(own: Mapping[str, Tensor], recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """The shapes before pruning of all tensors that still have the shape that pruning gave them, by every name."""
    cut = {
        id(own[name]): before
        for name, (before, after) in recipe.shapes.items()
        if name in own and tuple(own[name].shape) == after
    }
    return {name: cut[id(tensor)] for name, tensor in own.items() if id(tensor) in cut}


def _check_json(**given: Mapping[str, Any] | None) -> None:
    for name, values in given.items():
        try:
            json.dumps(dict(values or {}))
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{name} must hold plain values for JSON ({first_line(error)}).") from error


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
