"""DiM-H/2, class-conditional, on ImageNet 256x256 latents, by flow matching with an inner head.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_H_flow.py

Expected: 100,000 steps of batch 1024, 80 epochs, 21.6 hours of eight H200s by the measured 173
images a second each and 95% scaling. No FID of such a network is known; the run has not been made.
"""

from configs import imagenet256_L_flow


def get_config():
    config = imagenet256_L_flow.get_config()
    config.nnet.dim = 1536
    return config
