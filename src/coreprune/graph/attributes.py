"""Numbers that modules store about their weights: in_features, groups, num_heads …

In layers of torch these numbers are set from the shapes of the weights. In other modules they are recognised by name
and value: a number of heads or an inner width that was right before the surgery is scaled with the units that stayed. A
wrong guess does no harm, because the pruned model is compared with the original afterwards (`verify.py`).
"""

from __future__ import annotations

import re
from enum import Enum

from torch import nn

HEADS = re.compile(
    r"^_?(num|n)_?(attention|attn|key_value|kv|query|q|decoder|encoder)?_?(attention|attn)?_?heads?$|^n?heads$"
)
WIDTHS = re.compile(
    r"^_?(all_head_size|inner_dim|inner_width|split_size|embed_dim|hidden_size|hidden_dim|dim|d_model|attn_dim|"
    r"attention_dim|qkv_dim|kv_dim|key_dim|value_dim|q_size|kv_size|inner_size|num_channels|channels|width|intermediate_size|intermediate_dim|"
    r"mlp_dim|d_ff|ffn_dim|hidden_channels|hidden_features)$"
)


class Numbers(Enum):
    """Which stored numbers are scaled with a group."""

    ALL = "numbers of heads and widths"
    HEADS = "numbers of heads"
    NONE = "none"


def follow_weights(module: nn.Module) -> None:
    """Set the size attributes of a torch layer from the shape of its weight."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return
    n = list(weight.shape)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = n[0], n[1]
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = n[0], n[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.out_channels, module.in_channels = n[0], n[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = n[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(n)
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = n[0]  # for the number of groups see `follow_sections`
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = n[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = n[0]
    elif len(n) == 2 and isinstance(getattr(module, "nf", None), int) and isinstance(getattr(module, "nx", None), int):
        module.nx, module.nf = n[0], n[1]  # GPT-2's Conv1D keeps its weight as [in, out]


def follow_depthwise(module: nn.Module, before: int) -> None:
    """Set the sizes of a depthwise convolution (as many groups as inputs). before: its former number of outputs."""
    if isinstance(module, nn.modules.conv._ConvNd):
        n = module.weight.shape[0]
        multiplier = before // module.groups
        module.groups = n // multiplier
        module.in_channels, module.out_channels = module.groups, n


def follow_sections(module: nn.Module, sections: tuple[int, int], channels: int) -> None:
    """Set how many sections of channels a norm has. sections: (before, after). channels: how many stay.

    In a module that is no GroupNorm the number is recognised by its value, and by its name if several have the value.
    """
    before, after = sections
    if isinstance(module, nn.GroupNorm):
        module.num_groups, module.num_channels = after, channels
        return
    same = [name for name, value in vars(module).items() if type(value) is int and value == before]
    for name in [name for name in same if "group" in name.lower()] or same:
        setattr(module, name, after)


def scale_numbers(
    module: nn.Module, widths: dict[int, int], kept: int, total: int | None
) -> dict[str, tuple[int, int]]:
    """Scale the numbers of heads (kept of total units stayed) and the widths (old -> new) that a module stores.

    Args:
        module: changed in place.
        widths: old width -> new width.
        kept: units that stay.
        total: units before, or None if the units are not heads.

    Returns:
        attribute -> (old, new), for what was changed.
    """
    done: dict[str, tuple[int, int]] = {}
    for name, value in list(vars(module).items()):
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        new = value
        if total and HEADS.match(name) and value % total == 0:
            new = value // total * kept
        elif WIDTHS.match(name) and value in widths:
            new = widths[value]
        if new != value:
            setattr(module, name, new)
            done[name] = (value, new)
    return done
