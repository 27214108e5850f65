"""Networks: DiM, the U-ViT baseline, and how a config builds and loads them."""

from libs.model.build import (
    build_model,
    load_into,
    start_from,
)
from libs.model.dim import PRESETS, DiM
from libs.model.uvit import UViT

__all__ = [
    "PRESETS",
    "DiM",
    "UViT",
    "build_model",
    "load_into",
    "start_from",
]
