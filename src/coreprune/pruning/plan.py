"""Plan: which channels of which group stay, and how their outgoing weights are scaled. Frozen and JSON-able."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from coreprune.errors import InputError

SCHEMA = 1


@dataclass(frozen=True)
class GroupPlan:
    """One group. kept: channel ids, ascending. factors: of the kept channels' outgoing weights (V' = factor · V);
    negative_factors: where V < 0, after a sign-split sample; None means 1 (factors) or "as factors"."""

    size: int
    kept: tuple[int, ...]
    factors: tuple[float, ...] | None = None
    negative_factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """What `apply` does. Making a plan touches no weight; the same plan fits every checkpoint of the architecture.

    groups: by name; a group that is absent stays whole. fingerprint: of the architecture the plan was made for.
    method, seed, budget: how it was made.
    """

    groups: Mapping[str, GroupPlan]
    fingerprint: str
    method: str
    seed: int
    budget: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        """Return the plan as JSON text; `Plan.from_json` reads it back."""
        return json.dumps(self.as_dict(), indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan. Raises InputError for anything that is not one."""
        try:
            raw = json.loads(text)
            if raw["schema"] != SCHEMA:
                raise InputError(f"the plan has schema {raw['schema']!r}; this version of coreprune reads {SCHEMA}.")
            groups = {name: _group_from(name, entry) for name, entry in raw["groups"].items()}
            return Plan(groups, str(raw["fingerprint"]), str(raw["method"]), int(raw["seed"]), dict(raw["budget"]))
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise InputError(f"this is not a plan that coreprune wrote: {type(error).__name__} {error}") from error


def _group_from(name: str, entry: Mapping[str, Any]) -> GroupPlan:
    size, kept = entry["size"], tuple(entry["kept"])
    if type(size) is not int or not kept or any(type(i) is not int for i in kept):
        raise InputError(f"group {name!r} of the plan must list the whole numbers of the channels it keeps.")
    if list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= size:
        raise InputError(
            f"group {name!r} of the plan keeps channels that are not distinct, ascending and below {size}."
        )
    scales = []
    for key in ("factors", "negative_factors"):
        values = entry[key]
        if values is not None:
            values = tuple(float(v) for v in values)
            if len(values) != len(kept):
                raise InputError(f"group {name!r} of the plan has {len(values)} {key} for {len(kept)} channels.")
        scales.append(values)
    return GroupPlan(size, kept, *scales)


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and dtypes of the parameters and buffers: the architecture without its weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
    return digest.hexdigest()[:16]
