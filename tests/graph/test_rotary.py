"""Rotary embeddings in every spelling: whole heads leave, and nothing but zeros is missing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreprune.graph import Traced, capture, find_groups, probe, remove
from graph.oracle import assert_same, outputs, random_halves, zeroed_original
from graph.zoo import gen, randomise


def strided(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return t * c + torch.stack([-t[..., 1::2], t[..., ::2]], -1).flatten(-2) * s


def halves(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = t.chunk(2, -1)
    return t * c + torch.cat([-b, a], -1) * s


def unbound(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = t.view(*t.shape[:-1], t.shape[-1] // 2, 2).unbind(-1)
    c, s = c[..., ::2], s[..., ::2]
    return torch.stack([a * c - b * s, b * c + a * s], -1).view(t.shape)


def paired(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    a, b = t.unflatten(-1, (-1, 2)).chunk(2, -1)
    return t * c + torch.cat([-b, a], -1).flatten(-2) * s


def rotated(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    z = torch.view_as_complex(t.reshape(*t.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(z * torch.complex(c[..., ::2], s[..., ::2])).flatten(-2)


def polar(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    turn = torch.polar(torch.ones_like(s[..., ::2]), torch.atan2(s[..., ::2], c[..., ::2]))
    return torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(3)


def complex_parts(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    z = torch.complex(t[..., ::2], t[..., 1::2]) * torch.complex(c[..., ::2], s[..., ::2])
    return torch.stack([z.real, z.imag], -1).flatten(-2)


def one_part(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    turned, rest = t[..., :4], t[..., 4:]
    return torch.cat([strided(turned, c[..., :4], s[..., :4]), rest], -1)


def written(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    out = torch.empty_like(t)
    out[..., :4] = strided(t[..., :4], c[..., :4], s[..., :4])
    out[..., 4:] = t[..., 4:]
    return out


def picked(t: Tensor, c: Tensor, s: Tensor) -> Tensor:
    return t * c + t[..., torch.arange(t.shape[-1]) ^ 1] * s


SPELLINGS = (strided, halves, unbound, paired, rotated, polar, complex_parts, one_part, written, picked)


class Attention(nn.Module):
    def __init__(self, rotate, d: int = 32, heads: int = 4, shared: bool = False, sdpa: bool = True) -> None:
        super().__init__()
        self.num_heads, self.rotate, self.shared, self.sdpa = heads, rotate, shared, sdpa
        self.e, self.q, self.k = nn.Linear(8, d), nn.Linear(d, d), nn.Linear(d, d // heads if shared else d)
        self.v, self.o, self.f = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.e(x)
        q, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.v))
        k = self.k(x).unflatten(-1, (1 if self.shared else self.num_heads, -1)).transpose(1, 2)
        step = torch.linspace(1, 2, q.shape[-1] // 2, dtype=x.dtype)
        angle = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), step).repeat_interleave(2, -1)
        q, k = (self.rotate(t, angle.cos(), angle.sin()) for t in (q, k))
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k.expand(q.shape), v)
        else:
            y = torch.einsum("...qk,...kd->...qd", torch.einsum("...qd,...kd->...qk", q, k).softmax(-1), v)
        return self.f(self.o(y.transpose(1, 2).flatten(2)))


def check(model: nn.Module, example, inputs, free: str) -> None:
    captured = capture(model, **example)
    traced = probe(Traced(model, captured, find_groups(captured)))
    group = next(g for g in traced.groups if g.name == free)
    assert group.locked_because is None
    assert "heads" in group.flags
    result = remove(traced, random_halves(list(traced.groups), gen(1)))
    assert free in result.kept
    zeros = zeroed_original(model, list(traced.groups), result.kept)
    with torch.no_grad():
        for batch in inputs:
            assert_same(outputs(result.model, batch), outputs(zeros, batch), 1e-5 if "input_ids" in batch else 1e-8)


@pytest.mark.parametrize("sdpa", [True, False], ids=["fused", "einsum"])
@pytest.mark.parametrize("rotate", SPELLINGS, ids=lambda f: f.__name__)
def test_whole_heads_leave(rotate, sdpa) -> None:
    """A fixed step inside a head locked all heads."""
    model = randomise(Attention(rotate, sdpa=sdpa))
    x, y = (torch.randn(n, t, 8, generator=gen(0), dtype=torch.float64) for n, t in ((1, 6), (3, 9)))
    check(model, {"args": x}, [{"x": x}, {"x": y}], "q")


@pytest.mark.parametrize("rotate", [strided, rotated, picked], ids=lambda f: f.__name__)
def test_one_key_for_all_heads(rotate) -> None:
    model = randomise(Attention(rotate, shared=True))
    x, y = (torch.randn(n, t, 8, generator=gen(0), dtype=torch.float64) for n, t in ((1, 6), (3, 9)))
    check(model, {"args": x}, [{"x": x}, {"x": y}], "q")


def test_a_step_over_channels_that_leave_one_by_one_takes_whole_steps() -> None:
    """Pairs leave, so that every second channel is still every second one."""

    class Steps(nn.Module):
        def __init__(self, step: int) -> None:
            super().__init__()
            self.a, self.b, self.step = nn.Linear(4, 24), nn.Linear(24 // step, 2), step

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x))[:, self.step - 1 :: self.step])

    for step in (2, 3, 4):
        model, x = randomise(Steps(step)), torch.randn(3, 4, generator=gen(0), dtype=torch.float64)
        groups = find_groups(capture(model, x))
        (group,) = [g for g in groups if g.name == "a"]
        assert (group.unit, group.locked_because) == (1, None) or group.unit == step
        result = remove(Traced(model, capture(model, x), groups), random_halves(groups, gen(1)))
        assert "a" in result.kept
        assert_same([result.model(x)], [zeroed_original(model, groups, result.kept)(x)])


def test_a_step_that_does_not_divide_the_channels_keeps_them() -> None:
    model = nn.Sequential(nn.Linear(4, 8), Sliced(slice(0, 7, 3)), nn.Linear(3, 2))
    (group,) = [g for g in find_groups(capture(model, torch.zeros(1, 4))) if g.name == "0"]
    assert "fixed step along the channels" in (group.locked_because or "")


class Sliced(nn.Module):
    def __init__(self, part: slice) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.part]


BASE = {
    **{"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    },
}
GPT = {
    **{"vocab_size": 64, "n_layer": 1, "rotary_dim": 4, "n_inner": 48, "n_positions": 64},
    **{"eos_token_id": 1, "bos_token_id": 1},
}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "v_head_dim": 8},
    **{"qk_nope_head_dim": 8, "first_k_dense_replace": 1},
}
LLAMA4 = {"intermediate_size_mlp": 48, "num_local_experts": 2, "interleave_moe_layer_step": 2}

# name of the class -> (options, the first layer of the heads)
MODELS = {
    "GPTJ": ({**GPT, "n_embd": 32, "n_head": 4}, "h.0.attn.k_proj"),
    "CodeGen": ({**GPT, "n_embd": 128, "n_head": 16}, "h.0.attn.qkv_proj"),
    "Glm": ({**BASE, "head_dim": 8}, "layers.0.self_attn.q_proj"),
    "Glm4": ({**BASE, "head_dim": 8}, "layers.0.self_attn.q_proj"),
    "Cohere": (BASE, "layers.0.self_attn.q_proj"),
    "Cohere2": ({**BASE, "head_dim": 8}, "layers.0.self_attn.q_proj"),
    "Helium": ({**BASE, "head_dim": 8}, "layers.0.self_attn.q_proj"),
    "Ernie4_5": ({**BASE, "head_dim": 8}, "layers.0.self_attn.q_proj"),
    "DeepseekV2": ({**BASE, **LATENT}, "layers.0.self_attn.q_b_proj"),
    "DeepseekV3": ({**BASE, **LATENT}, "layers.0.self_attn.q_b_proj"),
    "Llama4Text": ({**BASE, **LLAMA4, "head_dim": 8}, "layers.0.self_attn.q_proj"),
    "RoFormer": ({**BASE, "embedding_size": 32}, "encoder.layer.0.attention.self.query"),
}
QUICK = ("GPTJ", "DeepseekV2", "Cohere")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_heads_of_real_models_leave(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    options, heads = MODELS[name]
    config, build = getattr(transformers, f"{name}Config", None), getattr(transformers, f"{name}Model", None)
    if config is None or build is None:
        pytest.skip(f"this release of transformers has no {name}")
    model = build(config(**{k: v for k, v in options.items() if name != "RoFormer" or "key_value" not in k}))
    model = randomise(model)
    ids = [torch.randint(2, 60, shape, generator=gen(0)) for shape in ((1, 7), (3, 9))]
    check(model, {"kwargs": {"input_ids": ids[0], "use_cache": False}}, [{"input_ids": x} for x in ids], heads)
