"""Weights that a model computes become plain parameters in a twin, and the model does not notice."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from coreprune._plain import computed, plain
from coreprune.errors import ModelError
from layers_that_compute_weights import MAKE, Centred, Masked, Noisy, Padded, Scaled, with_parametrization


def net(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), MAKE[name]()).double()


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_the_twin_computes_the_same_with_plain_weights(name: str, train: bool) -> None:
    model = net(name).train(train)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    weights = computed(model)
    new = plain(model, weights)
    assert {"2.weight"} <= set(weights)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()), "the model is not touched"
    assert new.training == train
    assert type(new[2]) in (nn.Conv2d, nn.ConvTranspose2d)
    assert set(new[2].state_dict()) <= {"weight", "bias"}
    assert not computed(new)
    model.eval()
    new.eval()
    assert torch.allclose(new(image()), model(image()), rtol=0, atol=1e-12)
    assert model.load_state_dict(state)
    again = pickle.loads(pickle.dumps(new))
    assert again.load_state_dict(new.state_dict())
    assert torch.equal(again(image(1)), new(image(1)))


@pytest.mark.parametrize("name", MAKE)
def test_another_model_gets_the_same_names_without_values(name: str) -> None:
    model = net(name)
    weights = computed(model)
    new, frame = plain(model, weights), plain(net(name), weights, values=False)
    assert list(frame.state_dict()) == list(new.state_dict())
    frame.load_state_dict(new.state_dict())
    assert torch.equal(frame.eval()(image()), new.eval()(image()))


def test_only_what_is_named_becomes_plain() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), Centred(5, 3))
    assert computed(model) == ("0.weight", "1.weight")
    new = plain(model, ["1.weight"])
    assert computed(new) == ("0.weight",)
    assert plain(model, ()) is model


def test_frozen_weights_stay_frozen() -> None:
    model = nn.Sequential(*(make() for name, make in MAKE.items() if name != "old spectral norm")).requires_grad_(False)
    new = plain(model, computed(model))
    assert not any(p.requires_grad for p in new.parameters())
    model.requires_grad_(True)
    assert all(p.requires_grad for p in plain(model, computed(model)).parameters())


def test_a_tensor_that_another_layer_shares_keeps_its_content() -> None:
    """torch's own remove_parametrizations writes the computed weight into the tensor behind it."""
    a, b = nn.Linear(6, 6), nn.Linear(6, 6)
    b.weight = a.weight
    parametrizations.spectral_norm(b)
    model = nn.Sequential(a, b).double().eval()
    x = torch.randn(3, 6, dtype=torch.float64)
    new = plain(model, computed(model))
    assert torch.allclose(new(x), model(x), rtol=0, atol=1e-12)
    assert torch.equal(new[0].weight, a.weight)


def test_the_class_of_the_users_layer_keeps_its_property() -> None:
    """A parametrized layer and its copies share a class that is made for them."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)))
    plain(model, computed(model))
    assert isinstance(model[0].weight, Tensor)
    assert type(model[0]).__name__ == "ParametrizedLinear"


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3),
        Masked(6, 4),
        prune.random_unstructured(nn.Linear(6, 4), "weight", 0.5),
        Padded(3, 4, 3),
        nn.MultiheadAttention(4, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_layers_are_left_alone(layer: nn.Module) -> None:
    assert computed(nn.Sequential(layer)) == ()


def test_layers_that_cannot_be_tried_are_left_alone() -> None:
    class TwoInputs(Scaled):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return super().forward(x + y)

    class Steered(nn.Linear):
        """The weight depends on the input."""

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.weight - self.weight.mean() * x.mean())

    assert computed(nn.Sequential(TwoInputs(3, 4, 3), Steered(3, 4))) == ()


def test_a_random_weight_is_refused() -> None:
    model = nn.Sequential(with_parametrization(nn.Linear(4, 5), Noisy()))
    with pytest.raises(ModelError, match=r"0\.weight of Sequential cannot be made plain: .*random"):
        plain(model, computed(model))
    with pytest.raises(ModelError, match="does not compute it"):
        plain(model, ["0.bias"])
