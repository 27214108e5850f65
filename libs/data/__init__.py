"""Images, latents, the autoencoder, codecs, and the order in which training reads.

list_images, label_images      the images of a folder or zip file, and their classes
read_square                    an image's pixels, cropped
UnreadableImage                a damaged image
open_latents, LatentWriter     cached latents; makes them
load_autoencoder, Scaling      a KL autoencoder out of a file; of its latents
PixelCodec, make_latent_codec  a data set's items, or images <-> the network's z
LatentCodec, Autoencoder       their parts, around a network that is there
deal_keys                      the items of a rank's micro-batches
keyed_words                    random words for an item
"""

from libs.data.autoencoder import Autoencoder, Scaling, load_autoencoder
from libs.data.codec import LatentCodec, PixelCodec, make_latent_codec
from libs.data.images import UnreadableImage, label_images, list_images, read_square
from libs.data.latent_writer import LatentWriter
from libs.data.official_latents import open_latents
from libs.data.order import deal_keys, keyed_words
