"""A pruned model in full shapes, with zeros where channels left, computes what the smaller model computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, prune
from coreprune.graph import capture
from coreprune.graph.execution import Execution
from coreprune.graph.over_kept import over_kept
from coreprune.pruning.tracing import trace
from graph.zoo import gen, randomise

D = 12


def by_hand(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-3).sqrt()


def spread(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-3)


NORMS = {
    "layer": lambda: nn.LayerNorm(D),
    "layer without scales": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "root mean square": lambda: nn.RMSNorm(D),
    "by hand": lambda: by_hand,
    "spread": lambda: spread,
}


class Network(nn.Module):
    def __init__(self, norm: object) -> None:
        super().__init__()
        self.stem, self.norm, self.mid, self.head = nn.Linear(5, D), norm, nn.Linear(D, 7), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.norm(x)) + self.mid(self.norm(2 * x)).sum(-1, keepdim=True)


class Pictures(nn.Module):
    """A group norm of one group over channels and places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(2, D, 3), nn.GroupNorm(1, D), nn.Conv2d(D, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stem(x)))


@pytest.mark.parametrize("name", [*NORMS, "group"])
def test_statistics_are_over_the_channels_that_stay(name):
    model = randomise(Pictures() if name == "group" else Network(NORMS[name]()), 2)
    shape = (4, 2, 6, 6) if name == "group" else (4, 5)
    x = torch.randn(*shape, generator=gen(1), dtype=torch.float64)
    whole = () if name == "group" else "mid"
    result = prune(model, x, Budget(keep=0.5), "l2", queries=None, exclude=whole, norm_statistics=True)
    assert len(result.plan.groups["stem"].kept) == D // 2

    traced = trace(model, x, lambda *_: None, norm_statistics=True)
    kept = torch.tensor(result.plan.groups["stem"].kept)
    group = next(g for g in traced.groups if g.name == "stem")
    masks, tensors = {}, {n: t.detach().clone() for n, t in model.state_dict().items()}
    for piece in group.slices:
        masks[piece.param, piece.dim] = torch.isin(piece.index, kept)
        tensors[piece.param] = tensors[piece.param].index_fill(
            piece.dim, (~masks[piece.param, piece.dim]).nonzero()[:, 0], 0.0
        )
    captured = capture(model, x, batch=4)
    outputs = []
    for instead in (over_kept(captured, masks), None):
        run = Execution(captured, tensors, [((x,), {})], instead=instead)
        for node in captured.graph.graph.nodes:
            value = run.run(node)
        outputs.append(value[0][0])  # of the output node: a tuple of one tensor
    with torch.no_grad():
        wanted = result.model(x)
    assert torch.allclose(outputs[0], wanted, atol=1e-12)
    assert not torch.allclose(outputs[1], wanted, atol=1e-3)  # what zeros give without that
