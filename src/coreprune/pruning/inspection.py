"""list_groups(): what can be pruned in a model, what it costs, and which groups cannot shrink and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from torch import nn

from coreprune._shown import html_table
from coreprune._telling import Wanted, telling
from coreprune._twin import guarded
from coreprune.pruning.offloaded import of_offloaded
from coreprune.pruning.part import of_a_part
from coreprune.pruning.tracing import trace
from coreprune.pruning.validate import check_also


@dataclass(frozen=True)
class GroupRow:
    """One group: channels that several layers share, so that all of these layers lose a channel together.

    name: the name of the first layer that makes the channels. channels: how many there are. unit: how many channels
    can only be removed together, such as those of an attention head. sections: into how many sections the group is
    divided; all of them have to keep the same number of units. producers, consumers: how many parameter axes make the
    channels (weights and biases), and in how many places they are read. macs_share: the share of the model's MACs that
    is saved if only one unit is left. flags: what else is special about the group. locked_because: why the group stays
    whole, or None if it may shrink.
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
    """What `list_groups` found.

    model: the name of its class. macs: of one sample; of one whole example, if the model has no batch.
    free_macs_share: the share of the MACs that the free groups can save. seconds: how long the tracing took.
    unread: the parameters that nothing reads on the examples.
    """

    model: str
    parameters: int
    macs: int
    bytes: int
    free_macs_share: float
    seconds: float
    groups: tuple[GroupRow, ...]
    unread: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_json(self) -> str:
        """The inspection as JSON text."""
        return json.dumps(self.as_dict(), indent=1)

    def __str__(self) -> str:
        """The groups as a plain-text table."""
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

    def __repr__(self) -> str:
        """One line."""
        free = sum(g.locked_because is None for g in self.groups)
        return f"Inspection({self.model}: {len(self.groups)} groups, {free} free; see .groups, or print it)"

    def _repr_html_(self) -> str:
        """The groups as a table, for a notebook."""
        rows = [
            (g.name, f"{g.channels:,}", f"{g.unit}", f"{g.macs_share:.1%}", g.locked_because or "") for g in self.groups
        ]
        head, *_ = str(self).splitlines()
        table = html_table(("group", "channels", "unit", "MACs", "locked"), rows, "groups of channels", (0, 4))
        return f"<div><p>{escape(head)}</p>{table}</div>"


@of_offloaded
@of_a_part
def list_groups(
    model: nn.Module,
    example_inputs: Any,
    *,
    also: Sequence[Any] = (),
    progress: Wanted = None,
    batch_axis: Any = "auto",
    part: str | nn.Module | None = None,
    norm_statistics: bool = False,
) -> Inspection:
    """List every group of channels of a model. The model is not changed.

    example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, on the model's device.
    also: further examples, as in `prune`.
    progress, batch_axis: as for `prune`.
    part: list the groups of this module alone, as in `prune`.
    norm_statistics: whether channels may leave that enter the statistics of a norm, as for `prune`.

    Raises InputError for wrong arguments, and ModelError for a model that cannot be traced.
    """
    del part  # `of_a_part` has done what it asks for
    with telling(progress) as tell, guarded(model):
        others = check_also(also)
        traced = trace(model, example_inputs, tell, also=others, batch_axis=batch_axis, norm_statistics=norm_statistics)
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
        unread=traced.captured.unread,
    )
