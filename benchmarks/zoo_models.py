"""The models of the zoo benchmark: our own small ones, and those of the packages that are installed. Random weights."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

TORCHVISION = """
    alexnet vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 googlenet inception_v3
    squeezenet1_1 mobilenet_v2 mobilenet_v3_small shufflenet_v2_x1_0 mnasnet0_5 efficientnet_b0 efficientnet_v2_s
    regnet_y_400mf convnext_tiny vit_b_32 swin_t swin_v2_t maxvit_t
"""
ASKED = {"halonet26t": 256, "bat_resnext26ts": 256}  # sizes that the blocks of these divide
SEGMENTATION = "deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large fcn_resnet50"
DETECTION = """
    fasterrcnn_mobilenet_v3_large_320_fpn ssdlite320_mobilenet_v3_large retinanet_resnet50_fpn fcos_resnet50_fpn
    maskrcnn_resnet50_fpn keypointrcnn_resnet50_fpn
"""
VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d"
TIMM = """
    resnet18 resnet50d resnext50_32x4d res2net50_26w_4s resnest14d ecaresnet50t skresnet18 seresnet18 resnetv2_50
    densenet121 dpn68 inception_v4 xception41 vgg11_bn dla34 selecsls42 cspresnet50 cspdarknet53 darknet53
    ese_vovnet19b_dw hrnet_w18_small hgnet_tiny hgnetv2_b0 gernet_s repvgg_a0 mobileone_s0 rexnet_100 nf_regnet_b0
    eca_nfnet_l0 nf_resnet50 mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small_050 mnasnet_small fbnetc_100
    spnasnet_100 efficientnet_lite0 efficientnet_b0 tf_efficientnetv2_b0 mixnet_s ghostnet_100 ghostnetv2_100
    repghostnet_050 lcnet_050 tinynet_e regnetx_002 regnety_002 regnetz_005 repvit_m0_9 fastvit_t8 convnext_atto
    convnextv2_atto inception_next_atto edgenext_xx_small fasternet_t0 starnet_s1 rdnet_tiny mambaout_femto
    botnet26t_256 halonet26t lambda_resnet26t gcresnet33ts bat_resnext26ts vit_tiny_patch16_224
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 cait_xxs24_224 xcit_nano_12_p16_224 convit_tiny
    crossvit_tiny_240 levit_128s efficientformer_l1 efficientformerv2_s0 mobilevit_xxs mobilevitv2_050
    maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224 nest_tiny_jx tnt_s_patch16_224 visformer_tiny volo_d1_224
    poolformer_s12 caformer_s18 mixer_s32_224 gmlp_ti16_224 resmlp_12_224 gcvit_xxtiny focalnet_tiny_srf davit_tiny
    efficientvit_b0 efficientvit_m0 tiny_vit_5m_224 eva02_tiny_patch14_224 hiera_tiny_224 mvitv2_tiny sequencer2d_s
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 twins_pcpvt_small twins_svt_small pvt_v2_b0 coat_tiny
    swiftformer_xs shvit_s1 nextvit_small
"""
ULTRALYTICS = """
    yolov3-tiny yolov5n yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov9t yolov10n yolo11n
    yolo11n-seg yolo11n-pose yolo11n-obb yolo12n yolo26n yolo26n-seg rtdetr-resnet50
"""
SMP = "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer"


@dataclass(frozen=True)
class Model:
    """A model of the zoo. inputs: the example, and then inputs of other batch and spatial sizes."""

    package: str
    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], list[Inputs]]

    @property
    def key(self) -> str:
        return f"{self.package}/{self.name}"


def models() -> Iterator[Model]:
    """All models of the packages that are installed."""
    for package, found in (
        ("coreprune", _own),
        ("torchvision", _torchvision),
        ("timm", _timm),
        ("ultralytics", _ultralytics),
        ("segmentation_models_pytorch", _smp),
    ):
        if importlib.util.find_spec(package):
            yield from found()


def pictures(batch: int, size: int, frames: int = 0) -> Tensor:
    """Random images, or videos."""
    shape = (batch, 3, *((frames,) if frames else ()), size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch + size), dtype=torch.float64)


def _sizes(size: int, other: int, frames: int = 0) -> Callable[[], list[Inputs]]:
    """Two images, and then one, and three of another size."""
    at = ((2, size), (1, size), (3, other))
    return lambda: [((pictures(batch, n, frames),), {}) for batch, n in at]


def _own() -> Iterator[Model]:
    from graph.zoo import ZOO

    def inputs(entry: Any) -> list[Inputs]:
        given = [entry.inputs(batch) for batch in (2, 1, 3)]
        return [((x["x"],), {}) if set(x) == {"x"} else ((), x) for x in given]

    for entry in ZOO.values():
        yield Model("coreprune", entry.name, entry.build, lambda entry=entry: inputs(entry))


def _torchvision() -> Iterator[Model]:
    from torchvision.models import get_model

    def build(name: str, **more: Any) -> nn.Module:
        return get_model(name, weights=None, **more)

    more = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}
    fixed = {"vit_b_32": 224, "maxvit_t": 224, "swin_t": 224, "swin_v2_t": 256}
    for name in TORCHVISION.split():
        size = fixed.get(name, 128)
        other = size if name in fixed else 160
        yield Model("torchvision", name, lambda n=name: build(n, **more.get(n, {})), _sizes(size, other))
    for name in SEGMENTATION.split():
        yield Model("torchvision", name, lambda n=name: build(n, weights_backbone=None), _sizes(96, 128))
    for name in DETECTION.split():  # what follows chooses boxes by their scores, which no trace can; see prune(part=)
        build_backbone = lambda n=name: build(n, weights_backbone=None).backbone  # noqa: E731
        yield Model("torchvision", f"{name}.backbone", build_backbone, _sizes(128, 160))
    for name in VIDEO.split():
        size, other, frames = (224, 256, 16) if name == "s3d" else (64, 96, 4)
        yield Model("torchvision", name, lambda n=name: build(n), _sizes(size, other, frames))


def _timm() -> Iterator[Model]:
    import timm

    known = set(timm.list_models())
    for name in TIMM.split():
        if name not in known:
            continue
        cfg = timm.get_pretrained_cfg(name)
        size = (cfg.test_input_size or cfg.input_size)[-1] if cfg and cfg.fixed_input_size else ASKED.get(name, 0)
        yield Model("timm", name, lambda n=name: timm.create_model(n), _sizes(size or 128, size or 160))


def _ultralytics() -> Iterator[Model]:
    def build(name: str) -> nn.Module:
        from ultralytics import RTDETR, YOLO

        return (RTDETR if name.startswith("rtdetr") else YOLO)(f"{name}.yaml").model

    for name in ULTRALYTICS.split():
        yield Model("ultralytics", name, lambda n=name: build(n), _sizes(96, 128))


def _smp() -> Iterator[Model]:
    import segmentation_models_pytorch as smp

    for name in SMP.split():
        if hasattr(smp, name):
            build = lambda n=name: getattr(smp, n)("resnet18", encoder_weights=None)  # noqa: E731
            sizes = _sizes(128, 160) if name == "PAN" else _sizes(64, 96)
            yield Model("segmentation_models_pytorch", name, build, sizes)
