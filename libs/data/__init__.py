"""Images, latents, the autoencoder, and the codecs between them and a network."""

from libs.data.autoencoder import load_autoencoder
from libs.data.codec import LatentCodec, PixelCodec, make_latent_codec
from libs.data.images import (
    center_crop,
    class_names,
    labels_from_directories,
    list_images,
    random_crop,
    read_image,
    refuse_system_error,
    unreadable_reason,
)
from libs.data.latent_writer import Packing, ShardWriter, make_settings
from libs.data.latents import Features, empty, num_shards
from libs.data.official_latents import open_features

__all__ = [
    "Features",
    "LatentCodec",
    "Packing",
    "PixelCodec",
    "ShardWriter",
    "center_crop",
    "class_names",
    "empty",
    "labels_from_directories",
    "list_images",
    "load_autoencoder",
    "make_latent_codec",
    "make_settings",
    "num_shards",
    "open_features",
    "random_crop",
    "read_image",
    "refuse_system_error",
    "unreadable_reason",
]
