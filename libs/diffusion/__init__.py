"""From a trained network to pictures' latents: guidance, samplers and the images' noise."""

from libs.diffusion.guidance import GUIDANCE, make_guided
from libs.diffusion.noise import ImageNoise
from libs.diffusion.samplers import SAMPLERS, choose_sampler, count_calls, sample, sampler

__all__ = [
    "GUIDANCE",  # registry: name -> guidance
    "ImageNoise",  # noise of images by (seed, index)
    "SAMPLERS",  # registry: name -> sampler, filled by the decorator `sampler`
    "choose_sampler",  # refuses what cannot be sampled, before hours of training
    "count_calls",  # network calls an image, guidance included
    "make_guided",  # network -> output(x, t) under the config's guidance
    "sample",  # output(x, t), z_T -> z_0
    "sampler",  # decorator of a new sampler
]
