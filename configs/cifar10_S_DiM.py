"""DiM-S, unconditional, on CIFAR-10: 50.6M parameters (DiM, arXiv 2405.14224).

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 ./train.py \\
        --config=configs/cifar10_S_DiM.py

Expected: 500,000 steps, 11 hours of an H200 in bf16 by the measured speed, then FID over 50,000
samples of the 1000-step Euler-Maruyama sampler, of which U-ViT-S/2 reports 3.11; the run has not
been made.
"""

from configs import common


def get_config():
    config = common.get_config()

    config.dataset.name = "cifar10"
    config.dataset.path = "assets/datasets/cifar10"
    config.dataset.random_flip = True
    config.dataset.fid_stats = "assets/fid_stats/cifar10.npz"

    config.nnet = common.dim_nnet(input_size=32, in_channels=3, dim=512, depth=25, num_classes=10)
    config.train.cuda_graphs = True

    config.sample.algorithm = "euler_maruyama_sde"
    config.sample.sample_steps = 1000
    return config
