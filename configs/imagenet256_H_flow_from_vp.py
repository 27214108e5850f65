"""DiM-H/2 on ImageNet 256x256 latents, by flow matching from the published weights, which predict
the noise of a variance-preserving process (sde.FlowFromDiscrete): the cheapest way to the recipe.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_H_flow_from_vp.py

Expected: 20,000 steps of batch 1024, 4.3 hours of eight H200s by the measured 173 images a second
each and 95% scaling; before the first step, the pictures of the published weights. No FID is known;
the run has not been made.
"""

from configs import imagenet256_H_flow


def get_config():
    config = imagenet256_H_flow.get_config()
    config.pred = "noise_pred"
    config.process.name = "flow_from_discrete"
    config.nnet.pretrained_path = "workdir/imagenet256_H_DiM/default/ckpts/425000.ckpt/nnet_ema.pth"
    config.optimizer.lr = 0.0001
    config.lr_scheduler.warmup_steps = 1000
    config.train.n_steps = 20_000
    config.train.save_interval = 5000
    return config
