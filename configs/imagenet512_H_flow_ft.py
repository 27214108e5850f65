"""DiM-H/2 fine-tuned from imagenet256_H_flow on ImageNet 512x512 latents, by flow matching.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet512_H_flow_ft.py

Expected: 10.6 hours of eight H200s by the measured 53.0 images a second each and 95% scaling,
without the head. The run has not been made.
"""

from configs import common, imagenet512_H_DiM_ft


def get_config():
    config = common.use_flow(imagenet512_H_DiM_ft.get_config(), block=16)
    config.dataset.p_uncond = 0.1
    config.process.shift = 2.0  # of 64x64 latents: the root of C H W / 4096
    config.nnet.pretrained_path = "workdir/imagenet256_H_flow/default/ckpts/100000.ckpt"
    config.loss.direction = 0.5
    config.optimizer.lr = 0.0002
    config.train.update(n_steps=15_000, batch_size=1024, ema_rate=0.9995)
    return config
