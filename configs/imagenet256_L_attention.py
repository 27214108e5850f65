"""DiM-L/2 with attention in place of Mamba, class-conditional, on ImageNet 256x256 latents: 265M
parameters.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_L_attention.py

What the mixer is worth: everything but the mixer is as in imagenet256_L_DiM, whose FID is 2.64 in
the paper (arXiv 2405.14224). The run has not been made, nor its speed measured.
"""

from configs import imagenet256_L_DiM


def get_config():
    config = imagenet256_L_DiM.get_config()
    config.nnet.mixer.name = "attention"
    config.nnet.mixer.heads = 16
    return config
