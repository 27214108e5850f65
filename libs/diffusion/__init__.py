"""From a trained network to pictures' latents: guidance, samplers and the images' noise.

make_guided, GUIDANCE   network -> output(x, t) under the config's guidance; name -> guidance
sample, count_calls     output(x, t), z_T -> z_0; network calls an image, guidance included
SAMPLERS, sampler       name -> sampler; decorator of a new one
choose_sampler          refuses what cannot be sampled, before hours of training
reuse_inner             a network whose inner blocks run in every n-th call alone
ImageNoise              noise of images by (seed, index)
image_generators        its generators
"""

from libs.diffusion.guidance import GUIDANCE, make_guided
from libs.diffusion.noise import ImageNoise, image_generators
from libs.diffusion.reuse import reuse_inner
from libs.diffusion.samplers import SAMPLERS, choose_sampler, count_calls, sample, sampler
