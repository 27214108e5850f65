"""DiM-H/2 on ImageNet 256x256 latents, by flow matching from the published weights.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_H_flow_from_vp.py

Expected: 4.2 hours of eight H200s by the measured 180.1 images a second each and 95% scaling,
with cached latents and without the head; at first the published weights' pictures
(sde.FlowFromDiscrete): sample.py draws them with this config and that file. The run has not been
made.
"""

from configs import imagenet256_H_flow


def get_config():
    config = imagenet256_H_flow.get_config()
    config.process.name, config.pred = "flow_from_discrete", "noise_pred"
    config.nnet.pretrained_path = "assets/published/imagenet256_H_DiM/nnet_ema.pth"
    config.optimizer.lr, config.lr_scheduler.warmup_steps = 0.0001, 1000
    config.train.n_steps = 20_000
    return config
