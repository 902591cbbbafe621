"""list_groups(): what can be pruned in a model, what it costs, and what is locked and why."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from coreprune._progress import Progress, silent
from coreprune.pruning.stages import trace


@dataclass(frozen=True)
class GroupRow:
    """One group of channels that leave together.

    name: of the first layer that makes them. channels: how many. unit: channels that only leave as a whole (a head).
    sections: number of sections that all have to keep the same number of units. macs_share: share of the model's MACs
    that goes away when all but the last unit leave. flags: what else to know. locked_because: why it stays whole, or
    None.
    """

    name: str
    channels: int
    unit: int
    sections: int
    producers: int
    consumers: int
    macs_share: float
    flags: tuple[str, ...]
    locked_because: str | None


@dataclass(frozen=True)
class Inspection:
    """What `list_groups` found. macs: of one sample. free_macs_share: the share that free groups can give up."""

    model: str
    parameters: int
    macs: int
    bytes: int
    free_macs_share: float
    seconds: float
    groups: tuple[GroupRow, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The inspection as JSON text."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        """A plain-text table."""
        width = max((len(g.name) for g in self.groups), default=5)
        lines = [
            f"{self.model}: {self.parameters:,} parameters, {self.macs:,} MACs a sample, "
            f"{self.free_macs_share:.0%} of the MACs in free groups",
            f"{'group':<{width}}  channels  unit  sections   MACs  locked",
        ]
        for g in self.groups:
            numbers = f"{g.channels:>8}  {g.unit:>4}  {g.sections:>6}  {g.macs_share:>5.1%}"
            lines.append(f"{g.name:<{width}}  {numbers}  {g.locked_because or ''}".rstrip())
        return "\n".join(lines)


def list_groups(model: nn.Module, example_inputs: Any, *, progress: Progress = silent) -> Inspection:
    """List every group of channels of a model. The model is not changed.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
    Raises InputError for arguments and ModelError for models that cannot be traced.
    """
    traced = trace(model, example_inputs, progress)
    model_cost = traced.cost_model
    shares, total = model_cost.shares(), model_cost()
    rows = tuple(
        GroupRow(
            name=g.name,
            channels=g.size,
            unit=g.unit,
            sections=g.section_count,
            producers=len(g.producers),
            consumers=len(g.consumers),
            macs_share=shares[g.name],
            flags=tuple(sorted(g.flags)),
            locked_because=g.locked_because,
        )
        for g in traced.groups
    )
    return Inspection(
        model=type(model).__name__,
        parameters=total.params,
        macs=total.macs,
        bytes=total.bytes,
        free_macs_share=model_cost.free_share(),
        seconds=traced.captured.seconds,
        groups=rows,
    )
