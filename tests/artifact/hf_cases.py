"""Small random Hugging Face models, and what is done with them in several tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coreprune import Budget, prune
from coreprune._twin import quiet

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
GEMMA2 = ("Gemma2ForCausalLM", hf.Gemma2Config(**LLAMA, head_dim=4, query_pre_attn_scalar=4), {"input_ids": IDS})
PHI = ("PhiForCausalLM", hf.PhiConfig(**LM), {"input_ids": IDS})
ROBERTA = ("RobertaModel", hf.RobertaConfig(**LM, max_position_embeddings=32), {"input_ids": IDS})
Case = tuple[str, Any, dict[str, Tensor]]


def made(case: Case) -> Any:
    """A small random model of a class."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(hf, case[0])(type(case[1]).from_dict(case[1].to_dict())).eval()


def pruned(case: Case, exclude: tuple[str, ...] = (), **budget: Any) -> Any:
    return prune(made(case), case[2], Budget(**(budget or {"keep": 0.5})), "magnitude", queries=None, exclude=exclude)


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with quiet(model) as still:
        result = still(**inputs)
    return [x for x in result.to_tuple() if isinstance(x, Tensor)]


def equal(a: nn.Module, b: nn.Module, inputs: dict[str, Tensor]) -> None:
    first, second = outputs(a, inputs), outputs(b, inputs)
    assert len(first) == len(second) > 0
    assert all(map(torch.equal, first, second))
