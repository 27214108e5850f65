"""DiM-L/2, class-conditional, on ImageNet 256x256 latents, by flow matching.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_L_flow.py

Expected: 80 epochs in 12.0 hours of eight H200s by the measured 313 images a second each and 95%
scaling, with cached latents and without the head. The run has not been made. REPA (arXiv
2410.06940) is one line more:
config.loss.repa = common.d(weight=0.5, block=16, features="dinov2", path="<timm's file>").
"""

from configs import common, imagenet256_L_DiM


def get_config():
    config = common.use_flow(imagenet256_L_DiM.get_config(), block=16)
    config.dataset.p_uncond = 0.1
    config.loss.direction = 0.5
    config.train.update(n_steps=100_000, ema_rate=0.9995)
    return config
