"""Plan: which channels of every group stay, and how their outgoing weights are scaled. Frozen; can become JSON."""

from __future__ import annotations

import hashlib
import json
import reprlib
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from coreprune._single import stored_dtype
from coreprune.errors import InputError, first_line

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True)
class GroupPlan:
    """The plan of one group.

    size: how many channels the group has. kept: ids of the channels that stay, ascending. factors: of the kept
    channels' outgoing weights (V' = factor · V); None means 1. negative_factors: the same where V < 0, after a
    sign-split sample; None means "as factors".

    The other fields are for removed channels that are merged into kept ones. targets, scales and gains have one entry
    for each of the `size` channels. targets: the kept channel that a channel goes into: itself for a kept channel, −1
    for a dropped one. scales: the factor of a removed channel's outgoing weights, which are added to those of its
    target; None means 1. mean: whether the rows that make a kept channel, and its numbers in norms, become the means
    over the channels that go into it. gains: by name of a parameter, factors of its entries before that mean.
    """

    size: int
    kept: tuple[int, ...]
    factors: tuple[float, ...] | None = None
    negative_factors: tuple[float, ...] | None = None
    targets: tuple[int, ...] | None = None
    scales: tuple[float, ...] | None = None
    mean: bool = False
    gains: Mapping[str, tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Plan:
    """What `apply_plan` carries out. Making a plan changes no weight. A plan fits every checkpoint of the architecture.

    groups: by name; a group that is absent stays whole. fingerprint: of the architecture that the plan was made for.
    method, seed, budget: how it was made. example: structure, shapes and dtypes of the example input that the model was
    traced with (`describe_example`), so that `apply_plan` needs no example input; None if it cannot be written as JSON.
    part: the name of the module that the groups are in, if only that was pruned. Their names are those inside of it.
    dropped: the elements of module lists that leave whole, by the names that they have in the dense model.
    rotated: whether it is a plan of a copy whose residual streams were rotated, which fits no other model.
    """

    groups: Mapping[str, GroupPlan]
    fingerprint: str
    method: str
    seed: int
    budget: Mapping[str, Any]
    example: Any = None
    part: str = ""
    dropped: tuple[str, ...] = ()
    rotated: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        """Return the plan as JSON text; `Plan.from_json` reads it back."""
        return json.dumps(self.as_dict(), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan. Raises InputError if the text is not a plan."""
        try:
            raw = json.loads(text)
            if type(raw["schema"]) is not int or raw["schema"] != SCHEMA:
                raise InputError(
                    f"the plan has schema {reprlib.repr(raw['schema'])}; this version of coreprune reads {SCHEMA}."
                )
            groups = {name: group_from(name, entry) for name, entry in raw["groups"].items()}
            return Plan(
                groups,
                _of_type(raw, "fingerprint", str),
                _of_type(raw, "method", str),
                _of_type(raw, "seed", int),
                _of_type(raw, "budget", dict),
                raw.get("example"),
                _of_type({"part": "", **raw}, "part", str),
                _names(raw.get("dropped", [])),
                _of_type({"rotated": False, **raw}, "rotated", bool),
            )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
            raise InputError(f"this is not a plan that coreprune wrote ({first_line(error)}).") from error


def _of_type(raw: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = raw[key]
    if type(value) is not kind:
        raise InputError(f"{key} of the plan is {reprlib.repr(value)}, not a {kind.__name__}.")
    return value


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values) or len(set(values)) < len(values):
        raise InputError("dropped of the plan must list names of modules, each once.")
    return tuple(values)


def group_from(name: str, entry: Mapping[str, Any]) -> GroupPlan:
    """The inverse of `asdict`. Raises InputError for values that do not fit each other."""
    size, kept = entry["size"], tuple(entry["kept"])
    name = name[:200]  # for the messages
    if type(size) is not int or not kept or any(type(i) is not int for i in kept):
        raise InputError(f"group {name!r} of the plan must list the whole numbers of the channels it keeps.")
    if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise InputError(
            f"group {name!r} of the plan keeps channels that are not distinct, ascending and below {size}."
        )
    factors = _numbers(name, "factors", entry["factors"], len(kept))
    negative = _numbers(name, "negative_factors", entry["negative_factors"], len(kept))
    targets = _targets(name, entry.get("targets"), size, set(kept))
    scales = _numbers(name, "scales", entry.get("scales"), size)
    mean, gains = entry.get("mean", False), entry.get("gains")
    if not isinstance(mean, bool):
        raise InputError(f"group {name!r} of the plan has mean={reprlib.repr(mean)}; it is true or false.")
    if targets is None and (scales is not None or mean):
        raise InputError(f"group {name!r} of the plan merges channels, but has no targets.")
    if gains is not None and not mean:
        raise InputError(f"group {name!r} of the plan has gains, but takes no mean.")
    if scales is not None and any(scales[i] != 1 for i in kept):
        raise InputError(f"group {name!r} of the plan scales a kept channel onto itself; its scale is 1.")
    if gains is not None:
        gains = {str(key): _numbers(name, "gains", values, size) or () for key, values in gains.items()}
        if not all(values and min(values) >= 0 for values in gains.values()):
            raise InputError(f"group {name!r} of the plan has gains below 0.")
    return GroupPlan(size, kept, factors, negative, targets, scales, mean, gains)


def _numbers(name: str, key: str, values: Any, length: int) -> tuple[float, ...] | None:
    """Finite numbers, `length` of them, or None."""
    if values is None:
        return None
    if not isinstance(values, list) or not all(_is_finite(v) for v in values):
        raise InputError(f"group {name!r} of the plan has {key} that are not finite numbers.")
    if len(values) != length:
        raise InputError(f"group {name!r} of the plan has {len(values)} {key} for {length} channels.")
    return tuple(float(v) for v in values)


def _is_finite(value: Any) -> bool:
    # math.isfinite raises for a whole number that is larger than any float.
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _targets(name: str, values: Any, size: int, kept: set[int]) -> tuple[int, ...] | None:
    """For every channel a kept channel or −1; or None."""
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != size or any(type(v) is not int for v in values):
        raise InputError(
            f"group {name!r} of the plan must have one whole number in targets for each of {size} channels."
        )
    if any(v != -1 and v not in kept for v in values) or any(values[k] != k for k in kept):
        raise InputError(f"group {name!r} of the plan merges channels into ones that it does not keep.")
    return tuple(values)


def fingerprint(model: nn.Module, shapes: Mapping[str, tuple[int, ...]] | None = None) -> str:
    """A hash of the names, shapes and dtypes of the parameters and buffers: the architecture without its weights.

    shapes: by name, shapes to use in place of the model's own. With them the fingerprint of the dense architecture can
        be taken from a pruned model.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            shape = (shapes or {}).get(name, tuple(tensor.shape))
            digest.update(f"{name}:{shape}:{stored_dtype(tensor)};".encode())
    return digest.hexdigest()[:16]
