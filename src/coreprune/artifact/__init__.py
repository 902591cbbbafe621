"""Artifacts: write a pruned model as a folder without pickle, and read it back. Also ONNX and torch.export files."""

from __future__ import annotations

from coreprune.artifact.exports import Exported, export_onnx, export_program
from coreprune.artifact.int8 import Int8, export_int8
from coreprune.artifact.loading import load, read_plan
from coreprune.artifact.manifest import Manifest, read_manifest
from coreprune.artifact.opening import open_model
from coreprune.artifact.saving import save

__all__ = [
    "Exported",
    "Int8",
    "Manifest",
    "export_int8",
    "export_onnx",
    "export_program",
    "load",
    "open_model",
    "read_manifest",
    "read_plan",
    "save",
]
