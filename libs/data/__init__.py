"""Images, latents, the autoencoder, codecs, and the order in which training reads."""

from libs.data.autoencoder import Scaling, load_autoencoder
from libs.data.codec import PixelCodec, make_latent_codec
from libs.data.images import UnreadableImage, label_images, list_images, read_square
from libs.data.latent_writer import LatentWriter
from libs.data.official_latents import open_latents
from libs.data.order import GlobalBatchSampler, keyed_words

__all__ = [
    "GlobalBatchSampler",  # the item at each place of the stream
    "LatentWriter",  # makes cached latents
    "PixelCodec",  # a data set's items, or images <-> the network's z
    "Scaling",  # of an autoencoder's latents
    "UnreadableImage",  # a damaged image
    "keyed_words",  # random words for an item
    "label_images",  # the classes of images
    "list_images",  # the images of a folder or zip file
    "load_autoencoder",  # a KL autoencoder out of a file
    "make_latent_codec",  # as PixelCodec, of latents
    "open_latents",  # cached latents
    "read_square",  # an image's pixels, cropped
]
