"""1536x1536 images from the 512 px DiM-H/2, without training; see imagenet512_H_DiM_upsample_test.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./eval_ldm_discrete.py --config=configs/imagenet512_H_DiM_upsample_3x_test.py \\
        --nnet_path=assets/published/imagenet512_H_DiM_ft/nnet_ema.pth

Expected: 1,000 pictures in sample.path, 1.4 hours of an H200 by the measured 5.2 s each; the paper
gives no FID.
"""

from configs import imagenet512_H_DiM_upsample_test


def get_config():
    config = imagenet512_H_DiM_upsample_test.get_config()
    config.z_shape = (4, 192, 192)
    config.ug_m = 3
    config.nnet.input_size = 192
    config.sample.path = "workdir/imagenet512_H_DiM_ft/test_tmp/all_class_1536"
    return config
