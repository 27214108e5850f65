"""U-ViT-S/2, the transformer baseline, unconditional on CIFAR-10 (44M; arXiv 2209.12152).

    accelerate launch --multi_gpu --num_processes 4 --mixed_precision fp16 ./train.py \\
        --config=configs/cifar10_uvit_small.py

Expected: FID 3.11 over 50,000 samples of the 1000-step Euler-Maruyama sampler, after 500,000 steps;
the run has not been made.
"""

from configs import cifar10_S_DiM, common


def get_config():
    config = cifar10_S_DiM.get_config()
    config.nnet = common.uvit_nnet(input_size=32, in_channels=3, dim=512, depth=12, heads=8)
    return config
