"""Find the model that a SOURCE argument names, and an example input for it."""

from __future__ import annotations

import logging
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreprune._example import example_like
from coreprune._plugins import imported
from coreprune._weightless import UnfitError, weightless
from coreprune.cli.checkpoints import load_weights
from coreprune.cli.libraries import LIBRARIES, gguf, pretrained
from coreprune.errors import CoreprunError, InputError

log = logging.getLogger(__name__)

_MOST_ENTRIES = 1 << 28
_LAST = 3  # frames of a factory that raises
DTYPES = {"float": torch.float32, "int": torch.int64, "bool": torch.bool}


def load(
    source: str, weights: Path | None, shapes: list[str], example_file: Path | None = None, otherwise: Any = None
) -> tuple[nn.Module, Any]:
    """Return (model, example inputs).

    source: `package.module:factory`, `timm:NAME`, `torchvision:NAME`, the folder of a Hugging Face model, a .gguf file
        or a folder with one, or a .pt2 file that torch.export.save wrote. The factory is called without arguments and
        returns a model or (model, example). Models of timm and torchvision come without weights.
    weights: a file to load into the model (`load_weights`).
    shapes: see `example`. example_file: an .npz file. Without both, the example is the factory's own, or it is made
        from the Hugging Face configuration.
    otherwise: a plan's description of an example, used if there is no other.

    Raises InputError with what to write instead.
    """
    path = Path(source)
    if source.endswith(".pt2"):
        model, given = _exported(path)
    elif source.endswith(".gguf"):
        model, given = gguf(path)
    elif path.is_dir() or (path / "config.json").exists():
        files = [] if (path / "config.json").exists() else sorted(path.glob("*.gguf"))
        model, given = gguf(files[0]) if len(files) == 1 else pretrained(path)
    else:
        model, given = _made(source, mapped=weights is not None and weights.suffix == ".safetensors")
    if weights is not None:
        load_weights(model, weights)
    if shapes and example_file is not None:
        raise InputError("--shape and --example both say what the example input is. Give one of them.")
    found = example(shapes) if shapes else given if example_file is None else arrays(example_file)
    if found is None and otherwise is not None:
        found = example_like(otherwise)
    if found is None:
        raise InputError(
            "no example input: pass --shape 1,3,224,224, or --example FILE.npz, or let the factory return "
            "(model, example)."
        )
    return model, found


def _made(source: str, mapped: bool = False) -> tuple[nn.Module, Any]:
    """The model and example from the user's factory.

    mapped: whether its weights will be mapped from a file. Then it is made without memory for them, if it can be.
    """
    module_name, colon, name = source.partition(":")
    if not colon or not module_name or not name:
        raise InputError(
            f"SOURCE must read package.module:factory, e.g. mypackage.models:resnet, or timm:NAME or torchvision:NAME, "
            f"or be a folder that save_pretrained wrote, or a .pt2 file. {source!r} is none of these."
        )
    if module_name in LIBRARIES:
        return _lean(lambda: LIBRARIES[module_name](name), mapped)
    factory = users_own(source)
    if not callable(factory):  # a model is callable too
        raise InputError(f"{source} is a {type(factory).__name__}, neither a model nor a function that makes one.")
    made = factory if isinstance(factory, nn.Module) else _lean(lambda: _called(factory, source), mapped)
    model, given = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"{source} gave a {type(model).__name__}, not a torch.nn.Module.")
    return model, given


def _lean(make: Callable[[], Any], mapped: bool) -> Any:
    if mapped:
        try:
            return weightless(make)
        except UnfitError as error:
            log.info("the model is made whole, because it needs its own parameters: %s", error)
    return make()


def _called(factory: Callable[[], Any], source: str) -> Any:
    """What the user's factory returns. If it raises, its own last lines are shown, and none of ours."""
    try:
        with redirect_stdout(sys.stderr):
            return factory()
    except CoreprunError:
        raise
    except Exception as error:
        own = traceback.extract_tb(error.__traceback__)[1:]
        lines = "".join(traceback.format_list(own[-_LAST:])).rstrip()
        where = f" Its last lines:\n{lines}" if own else " It is called without arguments."
        raise InputError(f"{source} raised {type(error).__name__}: {error}.{where}") from error


def users_own(reference: str) -> Any:
    """Import the object that module:name stands for. The module may be in the current folder. Raises InputError."""
    if str(Path.cwd()) not in sys.path:  # as `python -m` does
        sys.path.insert(0, str(Path.cwd()))
    with redirect_stdout(sys.stderr):  # keep standard output clean for --json, whatever the user's code prints
        return imported(reference)


def _exported(path: Path) -> tuple[nn.Module, Any]:
    """The model from a .pt2 file, and the example that it was exported with."""
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read as an exported program: {type(error).__name__} {error}") from error
    args, kwargs = program.example_inputs or ((), {})
    module = program.module()
    for name in ("train", "eval"):  # an exported program refuses both, and nothing reads its mode
        vars(module).pop(name, None)
    return module, (kwargs or args) or None


def further(texts: Sequence[str] | None) -> list[Any]:
    """The examples of --also, each from a text with one shape or several. Raises InputError."""
    return [example(text.split(), "--also") for text in texts or ()]


def example(shapes: list[str], option: str = "--shape") -> Any:
    """Example inputs from texts such as "1,3,224,224" or "input_ids=1,16:int".

    Named inputs become keyword arguments, the others positional ones. Dtypes are float (default), int and bool. Floats
    are standard normal with seed 0; all other entries are zero.
    """
    positional: list[Tensor] = []
    named: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for text in shapes:
        name, equals, rest = text.rpartition("=")
        sizes, _, dtype = rest.partition(":")
        try:
            shape = [int(size) for size in sizes.split(",")]
            kind = DTYPES[dtype or "float"]
            if min(shape) < 1 or math.prod(shape) > _MOST_ENTRIES:
                raise ValueError(f"sizes start at 1, and an example has at most {_MOST_ENTRIES:,} entries")
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{option} {text!r} is not a shape. Write 1,3,224,224 or input_ids=1,16:int (float, int or bool)."
            ) from error
        tensor = torch.randn(shape, generator=generator) if kind.is_floating_point else torch.zeros(shape, dtype=kind)
        if equals:
            named[name] = tensor
        else:
            positional.append(tensor)
    if named and positional:
        raise InputError(f"{option}: name all inputs or none of them.")
    return named or tuple(positional)


def arrays(path: Path) -> Any:
    """The arrays of an .npz file: positional arguments if there is one or they are called arr_0 …, else keywords."""
    from coreprune.queries.check import as_tensor
    from coreprune.queries.samples import read_arrays

    found = {name: as_tensor(array, str(path)) for name, array in read_arrays(path).items()}
    if not found:
        raise InputError(f"{path} holds no array.")
    if len(found) == 1 or all(name.startswith("arr_") for name in found):
        return tuple(found.values())
    return found


def queries(
    specs: list[str],
    model: nn.Module,
    given: Any,
    seed: int,
    cache: Path,
    tell: Any,
    batch_axis: Any = "auto",
    tokenizer: Any = None,
) -> Any:
    """What `prune` takes as queries: a single spec unchanged, or the combined inputs of several specs."""
    from coreprune.queries import make_queries

    if "none" in specs:
        if len(specs) > 1:
            raise InputError("--queries none goes alone.")
        return None
    if len(specs) == 1:
        return specs[0]
    parts = {}
    for i in sorted(range(len(specs)), key=lambda i: "." not in specs[i]):  # files first: errors come early
        place = cache.with_name(f"queries-{i}.safetensors")
        parts[i] = make_queries(
            model, given, specs[i], seed=seed, cache=place, progress=tell, batch_axis=batch_axis, tokenizer=tokenizer
        )
    return sum((parts[i] for i in range(1, len(specs))), start=parts[0])


def labelled(path: Path, model: nn.Module, given: Any, batch_axis: Any = "auto") -> tuple[Any, Tensor]:
    """(inputs as queries, labels) from an .npz file with the inputs and an array of whole numbers called labels."""
    from coreprune.queries import make_queries

    found = arrays(path)
    if not isinstance(found, dict) or "labels" not in found:
        raise InputError(
            f"{path} needs an array called labels beside the inputs: numpy.savez(path, inputs=…, labels=…)."
        )
    labels = found.pop("labels")
    if labels.dim() != 1 or labels.is_floating_point():
        raise InputError(f"labels in {path} must be (N,) whole numbers, not {tuple(labels.shape)} {labels.dtype}.")
    if any(len(x) != len(labels) for x in found.values()):
        counts = ", ".join(f"{len(x)} {name}" for name, x in found.items())
        raise InputError(f"{path} has {len(labels)} labels for {counts}. Every input needs one label.")
    inputs = next(iter(found.values())) if len(found) == 1 else found
    try:
        return make_queries(model, given, inputs, batch_axis=batch_axis), labels.long()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
