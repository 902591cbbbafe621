"""A twin that is run for its outputs: linear layers in half precision compute in float32 where that is faster."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coreprune._single import answering

HALF = [torch.float16, torch.bfloat16]
MANY, FEW = 200, 3  # rows


def layer(dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 20).to(dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(MANY,), (4, 50)])
def test_sums_are_those_of_single_precision_and_rounded_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model = layer(dtype)
    assert model.bias is not None
    x = torch.randn(*shape, 48).to(dtype)
    with answering(model) as still:
        got = still(x)
    assert got.dtype == dtype
    assert torch.equal(got, nn.functional.linear(x.float(), model.weight.float(), model.bias.float()).to(dtype))
    exact = nn.functional.linear(x.double(), model.weight.double(), model.bias.double())
    assert (got.double() - exact).abs().max().item() <= exact.abs().max().item() * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", HALF)
def test_few_rows_are_computed_as_the_model_computes_them(dtype: torch.dtype) -> None:
    model, x = layer(dtype), torch.randn(FEW, 48).to(dtype)
    with answering(model) as still:
        assert torch.equal(still(x), model(x))


@pytest.mark.parametrize("dtype", HALF)
def test_a_twin_that_is_cast_computes_in_its_new_precision(dtype: torch.dtype) -> None:
    model, x = layer(dtype), torch.randn(MANY, 48, dtype=torch.float64)
    with answering(model) as still:
        got = still.double()(x)
    assert torch.equal(got, nn.functional.linear(x, model.weight.double(), model.bias.double()))


def test_what_the_model_refuses_is_refused() -> None:
    model = layer(torch.bfloat16)
    with pytest.raises(RuntimeError, match="dtype"), answering(model) as still:
        still(torch.randn(MANY, 48))


def test_layers_with_a_forward_of_their_own_and_other_precisions_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(48, 20).bfloat16(), nn.Linear(20, 4))
    with answering(model) as still:
        assert all("forward" not in vars(m) for m in still.modules())
        x = torch.randn(MANY, 48).bfloat16()
        assert torch.equal(still[0](x), model[0](x))
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_forward_that_was_put_on_one_layer_is_kept() -> None:
    model = nn.Sequential(layer(torch.bfloat16))
    model[0].forward = lambda x: x[..., :20] * 3
    x = torch.randn(MANY, 48).bfloat16()
    with answering(model) as still:
        assert torch.equal(still(x), 3 * x[:, :20])


def test_weights_of_another_kind_of_tensor_are_left_alone() -> None:
    """Such as those of quantised models, which say that they are half."""

    class Packed(torch.Tensor):
        pass

    model = layer(torch.bfloat16)
    model.weight = nn.Parameter(model.weight.detach().as_subclass(Packed))
    with answering(model) as still:
        assert "forward" not in vars(still)
