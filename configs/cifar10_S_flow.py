"""DiM-S, unconditional, on CIFAR-10, by flow matching: cifar10_S_DiM with another recipe.

    accelerate launch ./train.py --config=configs/cifar10_S_flow.py

Expected: 200,000 steps, 4.9 hours of one H200 by the measured 1,450 images a second; batch 128 does
not fill eight. No FID is known; the run has not been made.
"""

from configs import cifar10_S_DiM, common


def get_config():
    config = cifar10_S_DiM.get_config()
    config.pred = "velocity_pred"
    config.max_grad_norm = 1.0

    config.process.update(name="flow", times="logit_normal")
    config.loss.direction = 0.5
    config.loss.internal = common.d(weight=0.5, block=8)

    config.optimizer.update(lr=0.001, betas=(0.9, 0.95), weight_decay=0.0)
    config.lr_scheduler.name = "cosine"

    config.train.n_steps = 200_000
    config.train.mixed_precision = "bf16"
    config.train.ema_rate = 0.9995

    config.sample.algorithm = "adams_bashforth"
    config.sample.sample_steps = 50
    return config
