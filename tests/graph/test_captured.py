"""Tracing leaves no mark, and failures say where and what to do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coreprune.errors import InputError, ModelError
from coreprune.graph import capture, normalise_example
from graph.zoo import ZOO, gen


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


class Caches(nn.Module):
    """Returns something that is not a tensor unless its configuration says otherwise, like a language model."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.a, self.config, self.broken = nn.Linear(4, 4), type("C", (), {"use_cache": True})(), broken

    def forward(self, x: Tensor) -> object:
        if self.broken:
            raise RuntimeError("boom")
        return (self.a(x), object()) if self.config.use_cache else self.a(x)


def test_examples_come_in_three_forms() -> None:
    x = torch.zeros(2, 3)
    assert normalise_example(x)[0][0] is x
    assert normalise_example((x, 1)) == ((x, 1), {})
    assert normalise_example({"a": x}) == ((), {"a": x})
    with pytest.raises(InputError, match="tuple of positional"):
        normalise_example("x")


def test_the_batch_is_cut_to_one() -> None:
    captured = capture(nn.Linear(4, 3), torch.zeros(5, 4))
    assert captured.args[0].shape == (1, 4)


def test_mode_and_configuration_are_restored() -> None:
    model = Caches()
    model.train()
    model.a.eval()
    capture(model, torch.zeros(2, 4))
    assert model.training
    assert not model.a.training
    assert model.config.use_cache is True


def test_mode_and_configuration_are_restored_after_a_failure() -> None:
    model = Caches(broken=True)
    model.train()
    with pytest.raises(ModelError, match="boom"):
        capture(model, torch.zeros(2, 4))
    assert model.training
    assert model.config.use_cache is True


def test_a_branch_on_values_is_named_with_its_line() -> None:
    with pytest.raises(ModelError, match=r"test_captured\.py:\d+ in forward") as caught:
        capture(Branches(), torch.zeros(1, 4))
    assert "torch.cond" in str(caught.value)


def test_wrong_inputs_are_explained() -> None:
    with pytest.raises(ModelError, match="example inputs"):
        capture(nn.Linear(4, 3), torch.zeros(2, 5))


def test_tied_parameters_have_one_name() -> None:
    model = ZOO["shared-and-tied"].build()
    captured = capture(model, torch.randn(2, 6, generator=gen(0)))
    assert captured.aliases["right.weight"] == "left.weight"
    assert "right.weight" not in captured.tensors


@pytest.mark.skipif("t5" not in ZOO, reason="transformers is not installed")
def test_hugging_face_configurations_are_restored() -> None:
    model = ZOO["t5"].build()
    capture(model, kwargs={"input_ids": torch.ones(2, 5).long(), "decoder_input_ids": torch.ones(2, 5).long()})
    assert model.config.use_cache
    assert model.decoder.config.use_cache
