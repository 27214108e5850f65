"""Guidance and samplers."""

from libs.diffusion.guidance import guided_by
from libs.diffusion.samplers import ImageNoise, sample

__all__ = [
    "ImageNoise",
    "guided_by",
    "sample",
]
