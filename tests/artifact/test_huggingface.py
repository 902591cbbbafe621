"""Hugging Face models: what stock transformers loads, and what is refused on the way in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_cases import (
    BERT,
    BERT_EAGER,
    CLIP,
    GEMMA2,
    GPT2,
    GQA,
    LM,
    PHI,
    QWEN2,
    ROBERTA,
    T5,
    TIED,
    VIT,
    Case,
    equal,
    hf,
    made,
    pruned,
)
from safetensors import safe_open
from torch import nn

from coreprune import Budget, InputError, load, prune, save
from coreprune.artifact import read_manifest
from coreprune.artifact.huggingface import config_of, is_pretrained, read_stock, rebuild, stock_config, write_stock
from coreprune.graph import named_tensors, rebuilt
from coreprune.pruning.plans.plan import fingerprint
from graph.zoo import ZOO


@pytest.mark.parametrize(
    ("case", "auto", "exclude", "changes"),
    [
        pytest.param(
            BERT,
            "AutoModelForSequenceClassification",
            ("*attention*", "*pooler*"),
            {"intermediate_size": 12},
            id="bert",
        ),
        pytest.param(BERT_EAGER, "AutoModel", ("*attention*",), {"intermediate_size": 12}, id="bert-eager"),
        pytest.param(
            VIT,
            "AutoModelForImageClassification",
            (),
            {"intermediate_size": 12, "num_attention_heads": 2, "head_dim": 4},
            id="vit",
        ),
        pytest.param(
            GQA,
            "AutoModelForCausalLM",
            (),
            {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
            id="llama-gqa",
        ),
        pytest.param(
            QWEN2,
            "AutoModelForCausalLM",
            (),
            {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
            id="qwen2",
        ),
        pytest.param(
            TIED,
            "AutoModelForCausalLM",
            ("*self_attn*",),
            {"intermediate_size": 12, "num_attention_heads": 4, "num_key_value_heads": 2},
            id="llama-tied-mlp",
        ),
        pytest.param(GPT2, "AutoModelForCausalLM", ("*attn*",), {"n_inner": 32}, id="gpt2"),
        pytest.param(
            GEMMA2,
            "AutoModelForCausalLM",
            (),
            {"intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1},
            id="gemma2",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            PHI,
            "AutoModelForCausalLM",
            (),
            {"intermediate_size": 12, "num_attention_heads": 2},
            id="phi",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ROBERTA,
            "AutoModel",
            ("*attention*",),
            {"intermediate_size": 12},
            id="roberta",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            T5, "AutoModelForSeq2SeqLM", (), {"d_ff": 12, "num_heads": 2, "d_kv": 4}, id="t5", marks=pytest.mark.slow
        ),
        pytest.param(
            CLIP,
            "AutoModel",
            ("*attn*",),
            {"text_config.intermediate_size": 12, "vision_config.intermediate_size": 16},
            id="clip",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_stock_transformers_gives_the_same_outputs(
    tmp_path: Path, case: Case, auto: str, exclude: tuple[str, ...], changes: dict[str, int]
) -> None:
    small = pruned(case, exclude).model
    before = small.config.to_dict()
    config, why = stock_config(small)
    assert why == ""
    for path, value in changes.items():
        owner = config
        for name in path.split("."):
            owner = getattr(owner, name)
        assert owner == value
    assert write_stock(small, config, tmp_path, case[2]) == ""
    assert small.config.to_dict() == before
    files = {p.name for p in tmp_path.iterdir()}
    assert files - {"generation_config.json"} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # the artifact's manifest has the model's own names
        assert set(file.keys()) <= set(small.state_dict())
    how = small.config._attn_implementation
    stock = getattr(hf, auto).from_pretrained(tmp_path, local_files_only=True, attn_implementation=how)
    assert type(stock) is type(small)
    equal(small, stock, case[2])
    if how == "sdpa":
        equal(small, read_stock(case[0], tmp_path), case[2])


@pytest.mark.parametrize("case", [BERT, VIT], ids=lambda case: case[0])
def test_an_artifact_that_transformers_can_read_is_read_by_us_too(tmp_path: Path, case: Case) -> None:
    """Regression: transformers wrote a ViT under the names of older releases, and `load` missed those of the model."""
    result = prune(made(case), case[2], Budget(params=0.9), "l2", queries=None, stock=True)
    save(result, tmp_path / "small")
    assert read_manifest(tmp_path / "small").loads_with == "transformers"
    equal(result.model, load(tmp_path / "small"), case[2])


def test_weights_that_were_made_plain_on_loading_are_saved(tmp_path: Path) -> None:
    """Regression: a model that transformers read from a GGUF file was refused as quantised."""
    small = pruned(GQA).model
    small.hf_quantizer, small.config.quantization_config = object(), {"quant_method": "gguf"}
    assert "quantization_config" not in config_of(small)
    config, why = stock_config(small)
    assert why == ""
    assert write_stock(small, config, tmp_path, GQA[2]) == ""
    assert small.hf_quantizer is not None
    assert small.config.quantization_config == {"quant_method": "gguf"}
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    small.register_parameter("packed", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    with pytest.raises(InputError, match="quantised"):
        config_of(small)


def test_a_model_that_lost_nothing(tmp_path: Path) -> None:
    model = made(BERT)
    config, why = stock_config(model)
    assert (config.to_dict(), why) == (model.config.to_dict(), "")
    assert write_stock(model, config, tmp_path, BERT[2]) == ""


def test_half_precision(tmp_path: Path) -> None:
    small = pruned(GQA).model.to(torch.bfloat16)
    config, _ = stock_config(small)
    assert write_stock(small, config, tmp_path, GQA[2]) == ""
    stock = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stock.dtype == torch.bfloat16
    equal(small, stock, GQA[2])


def test_outputs_that_differ_leave_no_files(tmp_path: Path) -> None:
    """The shapes are right, but a number that no shape shows is not: only the outputs tell."""
    small = pruned(GQA, exclude=("*self_attn*",)).model
    config, _ = stock_config(small)
    config.rms_norm_eps = 0.5
    assert "other outputs" in write_stock(small, config, tmp_path, GQA[2])
    assert not list(tmp_path.iterdir())
    config.intermediate_size = 13
    assert write_stock(small, config, tmp_path, GQA[2])
    assert not list(tmp_path.iterdir())
    assert small.config.intermediate_size == 12


class Own(hf.BertModel):
    """Code that stock transformers does not have."""


def test_a_class_of_the_user(tmp_path: Path) -> None:
    model = Own(hf.BertConfig(**LM)).eval()
    assert "not a class of transformers" in write_stock(model, model.config, tmp_path, BERT[2])
    with pytest.raises(InputError, match="not a class of transformers"):
        config_of(model)


def test_is_pretrained() -> None:
    assert is_pretrained(made(BERT))
    assert not is_pretrained(nn.Linear(2, 2))
    assert not is_pretrained("bert")


@pytest.mark.parametrize("case", [BERT, BERT_EAGER, VIT, GQA, GPT2, T5, CLIP], ids=lambda case: case[0])
def test_any_pruned_model_is_built_from_its_own_configuration(case: Case) -> None:
    """Also with widths that no stock configuration has."""
    dense = made(case)
    result = prune(dense, case[2], Budget(keep=0.5), "magnitude", queries=None)
    small = result.model
    values = json.loads(json.dumps(config_of(small, result.config)))
    frame = rebuild(case[0], values)
    assert all(p.is_meta for p in frame.parameters())
    again = rebuilt(frame, result.recipe, dict(named_tensors(small)))
    assert not again.training
    equal(small, again, case[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama-gqa", "whisper", "detr"])
def test_the_frame_has_the_names_shapes_and_dtypes_of_the_dense_model(name: str, dtype: torch.dtype) -> None:
    """DETR holds a backbone that knows no sdpa: every nested model is asked for what it had."""
    model = ZOO[name].build().to(dtype)
    before = torch.get_default_dtype()
    assert fingerprint(rebuild(type(model).__name__, config_of(model))) == fingerprint(model)
    assert torch.get_default_dtype() == before


def test_wrong_classes_are_refused() -> None:
    values = config_of(made(BERT))
    for name in ("BertConfig", "NoSuchModel", "PreTrainedModel", "AutoModel", "pipeline", "models.bert", "__doc__", 3):
        with pytest.raises(InputError, match="has no model class"):
            rebuild(name, values)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="model_type 'llama', not 'bert'"):
        rebuild("LlamaModel", values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"auto_map": {"AutoModel": "evil--model.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation='somebody/kernel'"),
        ({"_attn_implementation": "somebody/kernel"}, "are known"),
        ({"attn_implementation": {"": "sdpa", "text_config": "somebody/kernel"}}, "are known"),
        ({"nested": {"deeper": [{"experts_implementation": "x"}]}}, "are known"),
        ({"use_pretrained_backbone": True}, "fetched"),
        ({"backbone": "resnet50"}, "fetched"),
        ({"transformers_weights": "/etc/passwd"}, "transformers_weights"),
        ({"num_hidden_layers": 10**9}, "more than 10,000"),
        ({"dtype": "load"}, "dtype"),
        ({"intermediate_size": "many"}, "no configuration for BertModel|cannot make"),
        ({"hidden_size": -3}, "cannot make"),
        ({"num_attention_heads": 3}, "cannot make|no configuration"),
        ({"hidden_act": "no such"}, "cannot make"),
        ({"x": object()}, "plain values"),
    ],
)
def test_wrong_configurations_are_refused(tmp_path: Path, change: dict[str, Any], match: str) -> None:
    values = {**config_of(made(BERT_EAGER)), **change}
    with pytest.raises(InputError, match=match):
        rebuild("BertModel", values)
    if "x" not in change:
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(InputError):
            read_stock("BertModel", tmp_path)


def test_configurations_that_are_none() -> None:
    for values in (None, [], {}, "bert", {"model_type": None}):
        with pytest.raises(InputError, match="model_type"):
            rebuild("BertModel", values)  # type: ignore[arg-type]
    deep: dict[str, Any] = config_of(made(BERT_EAGER))
    deep["x"] = inner = {}
    for _ in range(5000):
        inner["x"] = inner = {}
    with pytest.raises(InputError, match="levels deep"):
        rebuild("BertModel", deep)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        read_stock("BertModel", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        read_stock("BertModel", tmp_path)
    small = pruned(BERT_EAGER, exclude=("*attention*",)).model
    config, _ = stock_config(small)
    assert write_stock(small, config, tmp_path, BERT[2]) == ""
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(InputError, match="cannot load"):
        read_stock("BertModel", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(small.state_dict(), tmp_path / "pytorch_model.bin")  # a pickle is never read
    with pytest.raises(InputError, match="cannot load"):
        read_stock("BertModel", tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert read_stock("BertModel", tmp_path).config.intermediate_size == 12
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "intermediate_size": 13}))
    with pytest.raises(InputError, match="intermediate"):
        read_stock("BertModel", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"missing_keys .*layer\.2"):
        read_stock("BertModel", tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="adapters"):
        read_stock("BertModel", tmp_path)
