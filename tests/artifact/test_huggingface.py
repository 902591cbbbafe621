"""Hugging Face models: what stock transformers loads, and what is refused on the way in."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, InputError, apply, prune
from coreprune._example import quiet
from coreprune.artifact.huggingface import config_of, is_pretrained, read_stock, rebuild, stock_config, write_stock
from coreprune.graph import named_tensors, rebuilt, recipe_of
from graph.zoo import ZOO

hf: Any = pytest.importorskip("transformers")

D: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
LM: dict[str, Any] = {**D, "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA: dict[str, Any] = {**LM, "num_key_value_heads": 2}
IDS = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))

BERT = ("BertForSequenceClassification", hf.BertConfig(**LM), {"input_ids": IDS})
BERT_EAGER = ("BertModel", hf.BertConfig(**LM, attn_implementation="eager"), {"input_ids": IDS})
VIT = ("ViTForImageClassification", hf.ViTConfig(**D, image_size=16, patch_size=4), {"pixel_values": IMAGE})
GQA = ("LlamaForCausalLM", hf.LlamaConfig(**LLAMA), {"input_ids": IDS})
TIED = ("LlamaForCausalLM", hf.LlamaConfig(**LLAMA, tie_word_embeddings=True), {"input_ids": IDS})
QWEN2 = ("Qwen2ForCausalLM", hf.Qwen2Config(**LLAMA), {"input_ids": IDS})
GPT2 = (
    "GPT2LMHeadModel",
    hf.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2),
    {"input_ids": IDS},
)
T5 = (
    "T5ForConditionalGeneration",
    hf.T5Config(
        vocab_size=20, d_model=16, d_ff=24, d_kv=4, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0, pad_token_id=0,
    ),
    {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
)  # fmt: skip
CLIP = (
    "CLIPModel",
    hf.CLIPConfig(
        text_config={**LM, "max_position_embeddings": 16},
        vision_config={**D, "intermediate_size": 32, "image_size": 16, "patch_size": 4},
        projection_dim=8,
    ),
    {"input_ids": IDS, "pixel_values": IMAGE},
)
PHI3 = ("Phi3ForCausalLM", hf.Phi3Config(**LLAMA), {"input_ids": IDS})  # one matrix for q, k and v
Case = tuple[str, Any, dict[str, Tensor]]


def made(case: Case) -> Any:
    """A small random model of a class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(hf, case[0])(type(case[1]).from_dict(case[1].to_dict())).eval()


def pruned(case: Case, exclude: tuple[str, ...] = (), **budget: Any) -> Any:
    return prune(made(case), case[2], Budget(**(budget or {"keep": 0.5})), "magnitude", queries=None, exclude=exclude)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with quiet(model):
        result = model(**inputs)
    return [x for x in result.to_tuple() if isinstance(x, Tensor)]


def equal(a: nn.Module, b: nn.Module, inputs: dict[str, Tensor]) -> None:
    first, second = outputs(a, inputs), outputs(b, inputs)
    assert len(first) == len(second) > 0
    assert all(map(torch.equal, first, second))


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
        pytest.param(T5, "AutoModelForSeq2SeqLM", (), {"d_ff": 12, "num_heads": 2, "d_kv": 4}, id="t5"),
        pytest.param(
            CLIP,
            "AutoModel",
            ("*attn*",),
            {"text_config.intermediate_size": 12, "vision_config.intermediate_size": 16},
            id="clip",
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
    how = small.config._attn_implementation
    stock = getattr(hf, auto).from_pretrained(tmp_path, local_files_only=True, attn_implementation=how)
    assert type(stock) is type(small)
    equal(small, stock, case[2])
    equal(small, read_stock(case[0], tmp_path), case[2]) if how == "sdpa" else None


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
    return apply(model, dataclasses.replace(result.plan, groups=groups), case[2])


def test_different_widths_name_the_layers() -> None:
    names = [name for name in pruned(GQA).plan.groups if "mlp" in name]
    assert len(names) == 2
    config, why = stock_config(uneven(GQA, names[1]))
    assert config is None
    assert "layers have different widths: model.layers.0.mlp" in why
    assert "(24 → 12)" in why
    assert "(24 → 18)" in why
    assert "one intermediate_size" in why
    assert "Budget(uniform=True)" in why


def test_heads_that_the_configuration_refuses() -> None:
    """Llama's configuration wants a hidden size that the number of heads divides."""
    case = ("LlamaForCausalLM", hf.LlamaConfig(**{**LLAMA, "num_key_value_heads": 4}), GQA[2])
    config, why = stock_config(pruned(case, keep=0.75).model)
    assert config is None
    assert "LlamaConfig refuses" in why
    assert "num_attention_heads=3" in why


def test_a_model_without_a_number_for_its_widths() -> None:
    """MobileNet's widths are multiples of one number; filters of single layers cannot be said."""
    case = ("MobileNetV1Model", hf.MobileNetV1Config(depth_multiplier=0.25), {"pixel_values": IMAGE})
    config, why = stock_config(pruned(case).model)
    assert config is None
    assert "has no number for the size of" in why


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
    assert small.config.intermediate_size == 24


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


@pytest.mark.parametrize("case", [BERT, BERT_EAGER, VIT, GQA, GPT2, T5, CLIP], ids=lambda c: c[0] + str(c[1])[:0])
def test_any_pruned_model_is_built_from_its_own_configuration(case: Case) -> None:
    """Also with widths that no stock configuration has."""
    dense = made(case)
    small = prune(dense, case[2], Budget(keep=0.5), "magnitude", queries=None).model
    values = json.loads(json.dumps(config_of(small)))
    frame = rebuild(case[0], values)
    assert all(p.is_meta for p in frame.parameters())
    again = rebuilt(frame, recipe_of(dense, small), dict(named_tensors(small)))
    assert not again.training
    equal(small, again, case[2])


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
