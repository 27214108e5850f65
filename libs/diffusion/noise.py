"""The noise of sampled images: each image has its own, keyed by (seed, index)."""

import torch

_MASK_64 = (1 << 64) - 1


def _splitmix64(state):
    """One output of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64 bits."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def image_seed(seed, index):
    """Generator seed of image `index` < 2**32: MurmurHash3's finalizer, a bijection of 32 bits, of
    (splitmix64(seed) + index) mod 2**32. torch's generator on the CPU keeps 32 bits of its seed:
    with 64 mixed bits two of 50,000 images would share their noise in one run of four.
    """
    z = (_splitmix64(seed & _MASK_64) + index) & 0xFFFFFFFF
    z = ((z ^ (z >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    z = ((z ^ (z >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return z ^ (z >> 16)


def image_generators(seed, images):
    """A generator for each of `images`: their numbers, or how many there are, from 0 on."""
    images = range(images) if isinstance(images, int) else images
    return [torch.Generator().manual_seed(image_seed(seed, int(index))) for index in images]


class ImageNoise:
    """Gaussian noise of the images `indices`, each of shape (C, H, W): the same bits for any batch,
    device and number of processes. The first draw is for z_T. `generators`: one for each image,
    `image_generators` by default.
    """

    def __init__(self, seed, indices, shape, generators=None):
        self.shape = tuple(shape)
        self.generators = generators or image_generators(seed, indices)

    def draw(self):
        """The images' next numbers: (B, C, H, W) float32 on the CPU."""
        draws = [torch.randn(self.shape, generator=g, device="cpu") for g in self.generators]
        return torch.stack(draws)
