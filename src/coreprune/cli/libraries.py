"""Models as other libraries name or store them: timm, torchvision, folders of Hugging Face, .gguf files."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune.artifact import open_model
from coreprune.cli.checkpoints import load_weights
from coreprune.errors import InputError, first_line
from coreprune.queries.tokenizer import LONGEST, beside

_READ, _UNREAD = 64, 16  # tokens of an example, of a model with a tokenizer and without


def by_timm(name: str, **settings: Any) -> tuple[nn.Module, Any]:
    """A model of timm without weights, and an image of the size that it is made for."""
    try:
        import timm  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("timm:NAME needs timm: pip install timm.") from error
    try:
        model = timm.create_model(name, pretrained=False, **settings)
    except Exception as error:
        raise InputError(f"timm cannot make {name!r}: {first_line(error)}. timm.list_models() lists them.") from error
    size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))
    return model, _image(*size)


def by_torchvision(name: str) -> tuple[nn.Module, Any]:
    """A model of torchvision without weights, and an image of the size that it is made for, if it takes one image."""
    try:
        from torchvision import models  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError("torchvision:NAME needs torchvision: pip install torchvision.") from error
    settings = {"weights_backbone": None} if name in models.list_models(models.detection) else {}
    try:
        model = models.get_model(name, weights=None, **settings)
        preparing = next(iter(models.get_model_weights(name))).transforms()
    except Exception as error:
        raise InputError(
            f"torchvision cannot make {name!r}: {first_line(error)}. torchvision.models.list_models() lists them."
        ) from error
    size = getattr(preparing, "crop_size", None)
    return model, _image(3, size[0], size[0]) if isinstance(size, (list, tuple)) and len(size) == 1 else None


def _image(*shape: int) -> Tensor:
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))


def pretrained(folder: Path) -> tuple[nn.Module, Any]:
    """The model from a folder that save_pretrained wrote, and an example that fits it. Nothing is downloaded.

    Its weights stay in their files (`open_model`).
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and "architectures" not in config and isinstance(config.get("architecture"), str):
            return _timm_folder(folder, config)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a Hugging Face model: its config.json cannot be read ({error}).") from error
    _transformers(folder)
    model = open_model(folder)
    return model, _from_config(model)


def _timm_folder(folder: Path, config: dict[str, Any]) -> tuple[nn.Module, Any]:
    """The model from a folder of the hub that timm wrote."""
    settings = {k: config[k] for k in ("num_classes", "global_pool") if k in config} | dict(
        config.get("model_args") or {}
    )
    model, given = by_timm(config["architecture"], **settings)
    found = [p for name in ("model.safetensors", "pytorch_model.bin") if (p := folder / name).is_file()]
    if not found:
        raise InputError(f"{folder} has neither model.safetensors nor pytorch_model.bin.")
    load_weights(model, found[0])
    return model, given


def gguf(file: Path) -> tuple[nn.Module, Any]:
    """A language model from a .gguf file, whose weights transformers makes plain, and an example that fits it."""
    if not file.is_file():
        raise InputError(f"there is no file {file}.")
    transformers = _transformers(file)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(f"transformers cannot load {file}: {first_line(error)}") from error
    return model, _from_config(model)


def tokenizer(asked: Path | None, source: str) -> Any:
    """What `prune` takes as tokenizer: what was asked for, or the one in a .gguf file; None to look beside the model.

    asked: a folder, or "none" for no tokenizer.

    Raises InputError for a folder without a tokenizer.
    """
    from coreprune.queries.tokenizer import tokens_of

    if str(asked) == "none":
        return False
    if asked is not None:
        tokens_of(asked)
        return str(asked)
    path = Path(source)
    files = [path] if path.suffix == ".gguf" else sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) != 1 or (path / "config.json").exists():
        return None
    try:
        with redirect_stdout(sys.stderr):
            return _transformers(path).AutoTokenizer.from_pretrained(files[0].parent, gguf_file=files[0].name)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError):
        return None


def _transformers(place: Path) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"{place} is a Hugging Face model. Install transformers: pip install transformers.") from error
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _from_config(model: Any) -> dict[str, Tensor] | None:
    """Example keyword arguments: random tokens, or an image of the configured size. Else None.

    With a tokenizer beside the model there are 64 tokens, with a mask for encoders, whose texts are padded; without
    one there are 16.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    vocabulary = getattr(config, "vocab_size", None)
    if model.main_input_name != "input_ids" or not isinstance(vocabulary, int):
        return None
    reads = beside(model) is not None or getattr(model, "hf_quantizer", None) is not None
    longest = [n for n in (getattr(config, name, None) for name in LONGEST) if type(n) is int and n > 0]
    length = min([_READ if reads else _UNREAD, *longest])
    found = {"input_ids": torch.randint(0, vocabulary, (1, length), generator=generator)}
    if reads and not model.can_generate():
        found["attention_mask"] = torch.ones(1, length, dtype=torch.int64)
    if getattr(config, "is_encoder_decoder", False):
        found["decoder_input_ids"] = torch.randint(0, vocabulary, (1, 8), generator=generator)
    return found


LIBRARIES = {"timm": by_timm, "torchvision": by_torchvision}
