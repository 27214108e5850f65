"""DiM-H/2, class-conditional, on ImageNet 256x256 latents: 862M parameters (DiM, arXiv 2405.14224).

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_H_DiM.py

Expected: FID 2.40 of the published weights after 425,000 steps of batch 768, 2.21 after 625,000,
with guidance 0.4 and 50 solver steps; this config goes on to 750,000, 888 hours of an H200 by the
measured speed with cached latents. The run has not been made.
"""

from configs import imagenet256_L_DiM


def get_config():
    config = imagenet256_L_DiM.get_config()
    config.dataset.p_uncond = 0.1
    config.nnet.dim = 1536
    config.train.n_steps = 750_000
    config.train.batch_size = 768
    return config
