"""The zoo: every architecture that the graph layer is tested on, small, random, built from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import graph.architectures as own

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Attributes:
        build: makes the model.
        inputs: batch size -> keyword inputs, or {"x": tensor} for a single positional one.
        free: how many groups have to be free after probing, at least.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    free: int = 1
    norm_statistics: bool = False
    expect: dict[str, Any] = field(default_factory=dict)


ZOO: dict[str, Entry] = {}


def add(name: str, build: Callable[[], nn.Module], inputs: Callable[[int], Inputs], **more: Any) -> None:
    ZOO[name] = Entry(name, build, inputs, **more)


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(size: int = 16, channels: int = 3, name: str = "x") -> Callable[[int], Inputs]:
    return lambda b: {name: torch.randn(b, channels, size, size, generator=gen(b), dtype=torch.float64)}


def vector(*shape: int) -> Callable[[int], Inputs]:
    return lambda b: {"x": torch.randn(b, *shape, generator=gen(b), dtype=torch.float64)}


def tokens(n: int = 7, vocab: int = 20, *names: str) -> Callable[[int], Inputs]:
    return lambda b: {
        name: torch.randint(3, vocab, (b, n), generator=gen(b + i)) for i, name in enumerate(names or ("input_ids",))
    }


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, and numbers at which no term can hide: norms that do something, signals that neither die nor explode."""
    g = gen(seed)
    model = model.double().eval()
    seen = set()
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if id(p) in seen or not p.is_floating_point() or "inv_freq" in name:
            continue
        seen.add(id(p))
        noise = torch.randn(p.shape, generator=g, dtype=torch.float64)
        with torch.no_grad():
            if name.endswith("running_var"):
                p.copy_(1 + 0.5 * noise.abs())
            elif p.dim() >= 2:
                p.copy_(noise * (1.5 / max(1, p[0].numel())) ** 0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.3 * noise)
            elif isinstance(p, nn.Parameter) or name.endswith("running_mean"):
                p.copy_(0.3 * noise)
    return model


add(
    "mlp",
    lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 3)),
    vector(6),
    free=2,
)
add("cifar-resnet56-a", own.CifarResNet, image(16), free=28)
add("vgg", own.vgg, image(), free=5)
add("densenet", own.densenet, image(), free=8)
add("shufflenet-v2", own.shufflenet, image(), free=6)
add("inception", own.inception, image(), free=13)
add("unet", own.UNet, image(), free=6)
add("resnet-bottleneck", own.bottleneck_net, image(), free=8)
add("se-resnet", lambda: own.bottleneck_net(se=True), image(), free=10)
add("resnext", lambda: own.bottleneck_net(groups=4), image(), free=7)
add("mlp-mixer", own.Mixer, image(), free=4)
add("lstm", own.LSTMClassifier, lambda b: {"ids": torch.randint(0, 20, (b, 6), generator=gen(b))}, free=1)
add(
    "gru", lambda: own.LSTMClassifier(nn.GRU), lambda b: {"ids": torch.randint(0, 20, (b, 6), generator=gen(b))}, free=1
)
add("timm-style-vit", own.TimmViT, image(), free=4)
add("torch-encoder", own.TorchEncoder, lambda b: {"ids": torch.randint(0, 20, (b, 6), generator=gen(b))}, free=2)
add("pixel-shuffle", own.SuperResolution, image(8), free=2)
add("conv1d-glu", own.Conv1dNet, vector(4, 10), free=2)
add("conv3d", own.conv3d, lambda b: {"x": torch.randn(b, 2, 4, 4, 4, generator=gen(b), dtype=torch.float64)}, free=2)
add("autoencoder", own.AutoEncoder, image(), free=3)
add("einsum-attention", own.EinsumNet, vector(4, 12), free=3)
add("rms-norm-by-hand", own.RMSNet, vector(6), free=1)
add("group-norm", own.GroupNormNet, image(8), free=1)
add("literal-sizes", own.LiteralSizes, vector(6), free=1)
add("shared-and-tied", own.SharedTwice, vector(6), free=2)

try:
    import transformers as hf
except ImportError:  # pragma: no cover - the own definitions still run
    hf = None

if hf is not None:
    D: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    LM: dict[str, Any] = {**D, "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    VIT: dict[str, Any] = {**D, "image_size": 16, "patch_size": 4}
    pixels = image(16, name="pixel_values")

    add("bert", lambda: hf.BertForSequenceClassification(hf.BertConfig(**LM)), tokens(), free=4)
    add(
        "distilbert",
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=20, dim=16, n_layers=2, n_heads=4, hidden_dim=24)
        ),
        tokens(),
        free=4,
    )
    add(
        "gpt2",
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=16, bos_token_id=1, eos_token_id=2)
        ),
        tokens(),
        free=4,
    )
    add("llama-gqa", lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LM, num_key_value_heads=2)), tokens(), free=4)
    add("qwen3", lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LM, num_key_value_heads=2, head_dim=4)), tokens(), free=4)
    add(
        "mixtral",
        lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**LM, num_key_value_heads=2, num_local_experts=4, experts_implementation="batched_mm")
        ),
        tokens(),
        free=2,
    )
    add(
        "t5",
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=20,
                d_model=16,
                d_ff=24,
                d_kv=4,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
                pad_token_id=0,
            )
        ),
        tokens(7, 20, "input_ids", "decoder_input_ids"),
        free=4,
    )
    add(
        "whisper",
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(
                vocab_size=20,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                num_mel_bins=8,
                max_source_positions=10,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        lambda b: {
            "input_features": torch.randn(b, 8, 20, generator=gen(b), dtype=torch.float64),
            "decoder_input_ids": torch.randint(3, 20, (b, 5), generator=gen(b)),
        },
        free=8,
    )
    add(
        "clip",
        lambda: hf.CLIPModel(
            hf.CLIPConfig(text_config={**LM, "max_position_embeddings": 16}, vision_config=VIT, projection_dim=8)
        ),
        lambda b: {**tokens()(b), **pixels(b)},
        free=8,
    )
    add("vit", lambda: hf.ViTForImageClassification(hf.ViTConfig(**VIT)), pixels, free=4)
    add("deit", lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT)), pixels, free=4)
    add(
        "swin",
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4)
        ),
        pixels,
        free=8,
    )
    add(
        "convnext",
        lambda: hf.ConvNextForImageClassification(
            hf.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=2)
        ),
        pixels,
        free=2,
    )
    add(
        "hf-resnet",
        lambda: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], num_labels=3)
        ),
        image(32, name="pixel_values"),
        free=6,
    )
    add(
        "regnet",
        lambda: hf.RegNetForImageClassification(
            hf.RegNetConfig(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], groups_width=8)
        ),
        image(32, name="pixel_values"),
        free=6,
    )
    add(
        "mobilenet-v1",
        lambda: hf.MobileNetV1ForImageClassification(hf.MobileNetV1Config(depth_multiplier=0.25)),
        image(32, name="pixel_values"),
        free=13,
    )
    add(
        "mobilenet-v2",
        lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.25)),
        image(32, name="pixel_values"),
        free=13,
    )
    add(
        "efficientnet",
        lambda: hf.EfficientNetForImageClassification(
            hf.EfficientNetConfig(width_coefficient=0.25, depth_coefficient=0.3, hidden_dim=320)
        ),
        image(32, name="pixel_values"),
        free=8,
    )
    add(
        "segformer",
        lambda: hf.SegformerForSemanticSegmentation(
            hf.SegformerConfig(
                hidden_sizes=[8, 12, 16, 20],
                depths=[1, 1, 1, 1],
                num_attention_heads=[1, 2, 2, 4],
                decoder_hidden_size=16,
            )
        ),
        image(32, name="pixel_values"),
        free=4,
    )
    add(
        "detr",
        lambda: hf.DetrForObjectDetection(
            hf.DetrConfig(
                use_timm_backbone=False,
                use_pretrained_backbone=False,
                backbone=None,
                backbone_config=hf.ResNetConfig(
                    embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], out_features=["stage2"]
                ),
                d_model=16,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=24,
                decoder_ffn_dim=24,
                num_queries=5,
            )
        ),
        image(32, name="pixel_values"),
        free=6,
    )
