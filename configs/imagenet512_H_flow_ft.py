"""DiM-H/2 fine-tuned from imagenet256_H_flow on ImageNet 512x512 latents, by flow matching.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet512_H_flow_ft.py

Expected: 15,000 steps of batch 1024, the images of imagenet512_H_DiM_ft, 11.1 hours of eight H200s
by the measured 50.6 images a second each and 95% scaling. No FID is known; the run has not been
made.
"""

from configs import imagenet256_H_flow, imagenet512_H_DiM_ft


def get_config():
    config = imagenet256_H_flow.get_config()
    parent = imagenet512_H_DiM_ft.get_config()
    config.z_shape = parent.z_shape

    config.dataset = parent.dataset
    config.dataset.p_uncond = 0.1

    config.process.shift = 2.0  # the root of C H W / 4096: of 64x64 latents
    config.nnet.pretrained_path = "workdir/imagenet256_H_flow/default/ckpts/100000.ckpt"
    config.nnet.input_size = 64
    config.nnet.pad_layout = "rho_pad"

    config.lr_scheduler.warmup_steps = 1000

    config.train.n_steps = 15_000
    config.train.eval_interval = 1000
    config.train.save_interval = 5000
    return config
