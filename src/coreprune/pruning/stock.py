"""Which numbers of a Hugging Face configuration give the shapes of a pruned model, if any do.

The sizes of a model are affine in each number of its configuration, such as the number of heads (times the size of a
head) or the units of the feed-forward layer. To measure how every size depends on a number, the model is made on the
meta device with another value. The numbers that give the pruned sizes then solve a small linear system. So no table of
architectures is needed.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import nn

Path = tuple[str, ...]  # names of attributes, from the configuration down into nested ones
Shapes = dict[str, tuple[int, ...]]
Measure = Callable[[Mapping[Path, Any]], "np.ndarray | None"]

# Numbers that pruning may have changed. The sizes of heads are not among them.
HEADS = re.compile(r"heads?$")
WIDTHS = re.compile(r"intermediate|inner|ffn|feed_?forward|mlp_(dim|size|ratio)|^(d_ff|ff_dim|hidden_dim)$")
STREAM = re.compile(r"^(hidden_size|d_model|n_embd|embed_dim|dim)$")
HEAD_SIZE = re.compile(r"head_dim$|^d_kv$")

_FEW, _MANY = 64, 128  # values tried for a number that is None, for which the model has its own default


def stock_config(small: nn.Module, groups: Iterable[str] = (), config: Any = None) -> tuple[Any, str]:
    """Find the configuration with which the stock class has the shapes of `small`.

    small: a pruned `transformers.PreTrainedModel`. config: the configuration of the dense model; by default the one
        that `small` has. Neither is changed.
    groups: names of the groups of channels that were pruned, for advice on which to keep whole.

    Returns (configuration, ""), or (None, why there is none). Only the shapes are compared; `write_stock` compares the
    outputs.
    """
    cls, config = type(small), small.config if config is None else config
    own = type(config).__name__
    target = shapes_of(small)
    measure = _measured(cls, config, target)
    dense = measure({})
    if dense is None:
        return None, f"{own} of this model does not make a {cls.__name__} with its parameters: it was changed by hand."
    wanted, places = _flat(target), _places(target)
    labels = [f"{n} ({d:.0f} → {w:.0f})" for (n, _), d, w in zip(places, dense, wanted, strict=True)]
    explicit = _head_sizes(config, measure, dense)
    gone, problem = wanted - dense, ""
    for stream in (False, True):  # the width of the stream only if that has changed: it may decide that of heads, too
        found = {path: _response(measure, explicit, path, value, dense) for path, value in _numbers(config, stream)}
        numbers = {path: answer for path, answer in found.items() if answer is not None}
        slopes = np.stack([s for _, s in numbers.values()], 1) if numbers else np.zeros((len(dense), 0))
        why = _unexplained(config, slopes, gone, labels, groups) or _at_odds(own, slopes, gone, labels, numbers)
        if not why:
            break
        problem = problem or why
    else:
        return None, problem
    steps = np.linalg.lstsq(slopes, gone, rcond=None)[0]
    changes: dict[Path, Any] = {}
    for (path, (value, _)), step in zip(numbers.items(), steps, strict=True):
        if abs(step) > 1e-6:
            changes[path] = value + float(step) if isinstance(value, float) else round(value + float(step))
    if any(HEADS.search(path[-1]) or STREAM.search(path[-1]) for path in changes):
        changes = {**explicit, **changes}  # otherwise the remaining heads would grow
    return _checked(cls, config, changes, target)


def said(model: nn.Module) -> frozenset[tuple[str, int]]:
    """The sizes that numbers of the configuration decide, and that pruning may change: (tensor, axis).

    model: a dense `transformers.PreTrainedModel`, which is not changed.
    """
    target, config = shapes_of(model), model.config
    measure = _measured(type(model), config, target)
    dense = measure({})
    if dense is None:
        return frozenset()
    explicit = _head_sizes(config, measure, dense)
    answers = [_response(measure, explicit, path, value, dense) for path, value in _numbers(config)]
    slopes = [answer[1] for answer in answers if answer is not None]
    return frozenset(place for i, place in enumerate(_places(target)) if any(s[i] for s in slopes))


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of all saved tensors by name."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}


def stock_shapes(cls: type[nn.Module], config: Any) -> Shapes:
    """The shapes of `cls(config)`, made on the meta device. Raises what the class raises."""
    return shapes_of(on_meta(cls, copy.deepcopy(config)))


def on_meta(cls: type[nn.Module], config: Any) -> nn.Module:
    """`cls(config)` in the configuration's dtype, without memory for its parameters. Raises what the class raises."""
    dtype, was = getattr(config, "dtype", None), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype if isinstance(dtype, torch.dtype) else was)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return cls(config)
    finally:
        torch.set_default_dtype(was)


def _checked(cls: type[nn.Module], config: Any, changes: Mapping[Path, Any], target: Shapes) -> tuple[Any, str]:
    """The changed configuration, if it can be written and read back and gives the shapes. Else None, and why."""
    own = type(config).__name__
    said = ", ".join(f"{'.'.join(path)}={value}" for path, value in changes.items()) or "its own numbers"
    new = _changed(config, changes)
    try:
        again = type(config).from_dict(json.loads(new.to_json_string(use_diff=False)))
        again._attn_implementation = config._attn_implementation
        shapes = stock_shapes(cls, again)
    except Exception as error:
        last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        return None, f"{own} refuses {said}: {last[0].strip()} Choose another budget, or keep those layers whole."
    if shapes != target:
        name = next(n for n in target if shapes.get(n) != target[n])
        return None, f"{own} with {said} gives {name} the shape {shapes.get(name)}, not {target[name]}."
    return new, ""


def _unexplained(config: Any, slopes: np.ndarray, gone: np.ndarray, labels: list[str], groups: Iterable[str]) -> str:
    """A message about changed sizes that depend on no number, or "" if there are none."""
    own = type(config).__name__
    stuck = [labels[i] for i in np.flatnonzero((gone != 0) & ~slopes.any(1))]
    counts_heads = any(HEADS.search(key) for _, scope in scopes(config) for key in vars(scope))
    heads = [label for label in stuck if counts_heads and _attention(label)]
    others = [label for label in stuck if label not in heads]
    said = [
        f"{what} {some[0]}{f' and {len(some) - 1} more' if len(some) > 1 else ''}"
        for what, some in (
            (f"{own} cannot say fewer heads of the same size:", heads),
            (f"{own} has no number for the size of", others),
        )
        if some
    ]
    at_fault = [name for name in groups if any(label.startswith(f"{name}.") for label in others)]
    patterns = [f"*{_attention(label)}*" for label in heads] + [re.sub(r"\.\d+(?=\.|$)", ".*", n) for n in at_fault]
    listed = ", ".join(map(repr, dict.fromkeys(patterns))) or "name"
    if not slopes.any():
        return f"{said[0]}. None of its numbers is an inner width, so it cannot say a pruned model." if said else ""
    return f"{'; '.join(said)}. Keep them whole with exclude=({listed},)." if said else ""


def _attention(name: str) -> str | None:
    """The part of a dotted name that stands for attention, if any."""
    return next((part for part in name.split(".") if "att" in part.lower()), None)


def _at_odds(
    own: str, slopes: np.ndarray, gone: np.ndarray, labels: list[str], numbers: Mapping[Path, tuple[Any, np.ndarray]]
) -> str:
    """A message about sizes that depend on the same numbers but need different values, or "" if there are none."""
    first: dict[bytes, int] = {}
    names = [".".join(path) for path in numbers]
    for i in np.flatnonzero(slopes.any(1)):
        j = first.setdefault(slopes[i].tobytes(), int(i))
        if gone[i] != gone[j]:
            one = " and ".join(names[k] for k in np.flatnonzero(slopes[i]))
            return (
                f"layers have different widths: {labels[j]}, but {labels[i]}, and {own} has one {one} for both. Ask "
                "for equal widths (Budget(uniform=True), --uniform), or keep=."
            )
    rest = gone - slopes @ np.linalg.lstsq(slopes, gone, rcond=None)[0] if names else gone
    worst = int(np.abs(rest).argmax()) if len(rest) else 0
    if len(rest) and abs(rest[worst]) > 1e-6:
        return (
            f"no values of {', '.join(names)} in {own} give {labels[worst]}. Ask for equal widths "
            "(Budget(uniform=True), --uniform), or keep=."
        )
    return ""


def _head_sizes(config: Any, measure: Measure, dense: np.ndarray) -> dict[Path, Any]:
    """The sizes of heads that the model computes from the number of heads, unless they are given, with their values."""
    out: dict[Path, Any] = {}
    for at, scope in scopes(config):
        if not any(HEADS.search(key) and type(value) is int for key, value in vars(scope).items()):
            continue
        unsaid = [key for key, value in vars(scope).items() if HEAD_SIZE.search(key) and value is None]
        if not hasattr(scope, "head_dim"):
            unsaid.append("head_dim")  # many models read it although their configuration does not declare it
        for key in unsaid:
            answer = _response(measure, out, (*at, key), None, dense)
            if answer is not None:
                out[*at, key] = answer[0]
    return out


def _numbers(config: Any, stream: bool = False) -> Iterator[tuple[Path, int | float | None]]:
    """The numbers that pruning may have changed, with their values. None stands for a default of the model's own.

    stream: whether the width of the residual stream is among them.
    """
    for at, scope in scopes(config):
        for key, value in vars(scope).items():
            width = WIDTHS.search(key) or (stream and STREAM.search(key))
            counts = type(value) is int and value > 0 and (HEADS.search(key) or width)
            ratio = type(value) is float and value > 0 and key == "mlp_ratio"
            if counts or ratio or (value is None and WIDTHS.search(key)):
                yield (*at, key), value


def _response(
    measure: Measure, base: Mapping[Path, Any], path: Path, value: int | float | None, dense: np.ndarray
) -> tuple[int | float, np.ndarray] | None:
    """The number's value, and the slope of every size in it. None if no size depends on the number."""
    if value is None:
        few, many = measure({**base, path: _FEW}), measure({**base, path: _MANY})
        if few is None or many is None:
            return None
        slopes = (many - few) / (_MANY - _FEW)
        moved = slopes != 0
        values = np.unique(_FEW + (dense - few)[moved] / slopes[moved])
        return (int(values[0]), slopes) if len(values) == 1 and values[0] % 1 == 0 else None
    for trial in (2 * value, 3 * value, value + 1, value // 2):
        sizes = measure({**base, path: trial}) if trial > 0 else None
        if sizes is not None:
            slopes = (sizes - dense) / (trial - value)
            return (value, slopes) if slopes.any() else None
    return None


def scopes(config: Any, at: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The configuration, and those nested in it."""
    from transformers import PreTrainedConfig

    yield at, config
    for key, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            yield from scopes(value, (*at, key))


def _measured(cls: type[nn.Module], config: Any, target: Shapes) -> Measure:
    """All sizes of `cls` when numbers of its configuration change, or None if it refuses them."""

    def measure(changes: Mapping[Path, Any]) -> np.ndarray | None:
        try:
            shapes = stock_shapes(cls, _changed(config, changes))
        except Exception:  # models raise all kinds of errors for numbers that contradict each other
            return None
        return _flat(shapes) if _ranks(shapes) == _ranks(target) else None

    return measure


def _places(shapes: Shapes) -> list[tuple[str, int]]:
    return [(name, axis) for name, shape in shapes.items() for axis in range(len(shape))]


def _changed(config: Any, changes: Mapping[Path, Any]) -> Any:
    new = copy.deepcopy(config)
    for path, value in changes.items():
        setattr(reduce(getattr, path[:-1], new), path[-1], value)
    return new


def _flat(shapes: Shapes) -> np.ndarray:
    return np.array([n for shape in shapes.values() for n in shape], dtype=np.float64)


def _ranks(shapes: Shapes) -> list[tuple[str, int]]:
    return [(name, len(shape)) for name, shape in shapes.items()]
