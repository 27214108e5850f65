"""Codecs: between images in [-1, 1] and what the network sees."""


class PixelCodec:
    """The network sees the pixels themselves."""

    def latent_shape(self, image_shape):
        """(C, H, W) of an image -> (C, H, W) of z."""
        return tuple(image_shape)

    def encode(self, x):
        """x (B, C, H, W) in [-1, 1] -> z of the same shape."""
        return x

    def decode(self, z):
        """z (B, C, H, W) -> images (B, C, H, W) float32 in [0, 1]."""
        return (z.float() * 0.5 + 0.5).clamp(0, 1)
