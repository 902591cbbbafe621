"""Numbers that layers of torch store about their weights: in_features, groups … They are set from the shapes."""

from __future__ import annotations

from torch import nn


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
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
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
