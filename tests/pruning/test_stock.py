"""stock_config(): the numbers that give the pruned shapes, and the message where there are none."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest

from artifact.hf_cases import BERT, GPT2, GQA, IMAGE, LLAMA, PHI3, Case, hf, made, pruned
from coreprune import apply_plan
from coreprune.pruning.stock import stock_config
from graph.zoo import ZOO


@pytest.mark.parametrize(
    ("case", "exclude"),
    [
        pytest.param(BERT, "exclude=('*attention*', 'bert.pooler.dense',)", id="bert"),
        pytest.param(GPT2, "exclude=('*attn*',)", id="gpt2"),
    ],
)
def test_fewer_heads_that_the_configuration_cannot_say(case: Case, exclude: str) -> None:
    result = pruned(case)
    config, why = stock_config(result.model, result.plan.groups)
    assert config is None
    assert "cannot say fewer heads of the same size" in why
    assert exclude in why
    advice = tuple(re.findall(r"'([^']+)'", why))
    assert stock_config(pruned(case, exclude=advice).model)[1] == ""
    assert exclude.partition(",")[0] in stock_config(result.model)[1]


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("bert", {"intermediate_size": 7}),
        ("distilbert", {"hidden_dim": 5}),
        ("gpt2", {"n_inner": 9}),
        ("llama-gqa", {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 9}),
        ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 5}),
        ("mixtral", {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 6}),
        ("t5", {"num_heads": 3, "d_ff": 5}),
        ("whisper", {"encoder_ffn_dim": 5, "decoder_ffn_dim": 7}),
        ("clip", {"text_config.intermediate_size": 5, "vision_config.intermediate_size": 7}),
        ("swin", {"mlp_ratio": 2.5}),
        ("vit", {"num_attention_heads": 2, "intermediate_size": 5}),
        ("phi3", {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 9}),
    ],
)
def test_numbers_are_found_from_shapes_alone(case: str, changes: dict[str, Any]) -> None:
    """Also where one matrix holds queries, keys and values, and where several numbers had one value."""
    model = made(PHI3) if case == "phi3" else ZOO[case].build()
    config = copy.deepcopy(model.config)
    if case in ("llama-gqa", "phi3", "vit"):
        config.head_dim = 4
    for path, value in changes.items():
        *scopes, name = path.split(".")
        owner = config
        for scope in scopes:
            owner = getattr(owner, scope)
        setattr(owner, name, value)
    small = type(model)(config)
    small.config = model.config
    found, why = stock_config(small)
    assert why == ""
    assert {k: tuple(v.shape) for k, v in type(model)(found).state_dict().items()} == {
        k: tuple(v.shape) for k, v in small.state_dict().items()
    }


def uneven(case: Case, group: str) -> Any:
    """Half of one group and three quarters of the others like it."""
    result = pruned(case)
    model = made(case)
    entry = result.plan.groups[group]
    kept = tuple(range(3 * entry.size // 4))
    groups = {**result.plan.groups, group: dataclasses.replace(entry, kept=kept, factors=None)}
    return apply_plan(model, dataclasses.replace(result.plan, groups=groups), case[2])


@pytest.mark.slow
def test_different_widths_name_the_layers() -> None:
    names = [name for name in pruned(GQA).plan.groups if "mlp" in name]
    assert len(names) == 2
    config, why = stock_config(uneven(GQA, names[1]))
    assert config is None
    assert "layers have different widths: model.layers.0.mlp" in why
    assert "(24 → 12)" in why
    assert "(24 → 18)" in why
    assert "one intermediate_size" in why
    assert "(Budget(uniform=True), --uniform)" in why


def test_heads_that_the_configuration_refuses() -> None:
    """Llama's configuration wants a hidden size that the number of heads divides."""
    case = ("LlamaForCausalLM", hf.LlamaConfig(**{**LLAMA, "num_key_value_heads": 4}), GQA[2])
    config, why = stock_config(pruned(case, keep=0.75).model)
    assert config is None
    assert "LlamaConfig refuses" in why
    assert "num_attention_heads=3" in why


@pytest.mark.slow
def test_a_model_without_a_number_for_its_widths() -> None:
    """MobileNet's widths are multiples of one number; filters of single layers cannot be said."""
    case = ("MobileNetV1Model", hf.MobileNetV1Config(depth_multiplier=0.25), {"pixel_values": IMAGE})
    config, why = stock_config(pruned(case).model)
    assert config is None
    assert "has no number for the size of" in why
    assert "cannot say a pruned model" in why
