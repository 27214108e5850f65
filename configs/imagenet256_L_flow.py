"""DiM-L/2, class-conditional, on ImageNet 256x256 latents, by flow matching with an inner head.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_L_flow.py

Expected: 100,000 steps of batch 1024, 80 epochs, 12.5 hours of eight H200s by the measured 299
images a second each and 95% scaling, inner head and direction loss not counted. No FID of such a
network is known; SiT-XL/2 after 80 epochs has 17.2, with internal guidance 5.31 (arXiv 2512.24176).
The run has not been made.

The optimizer and the times are those of LightningDiT (arXiv 2501.01423). REPA (arXiv 2410.06940):
--config.loss.repa is a section, common.d(weight=0.5, block=8, features="dinov2", path="...").
"""

from configs import common, imagenet256_L_DiM


def get_config():
    config = imagenet256_L_DiM.get_config()
    config.pred = "velocity_pred"
    config.dataset.p_uncond = 0.1

    config.process.update(name="flow", times="logit_normal")
    config.loss.direction = 0.5
    config.loss.internal = common.d(weight=0.5, block=16)  # a third of the 49 blocks

    config.optimizer.update(lr=0.0002, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8)

    config.train.n_steps = 100_000
    config.train.ema_rate = 0.9995

    config.sample.algorithm = "adams_bashforth"
    return config
