"""1024x1024 images from the 512 px DiM-H/2, without training: 2x upsampling guidance (arXiv
2404.01709) and skip tuning (arXiv 2402.15170), as in section 3.4 of DiM (arXiv 2405.14224).

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./eval_ldm_discrete.py --config=configs/imagenet512_H_DiM_upsample_test.py \\
        --nnet_path=assets/published/imagenet512_H_DiM_ft/nnet_ema.pth

Expected: 1,000 pictures in sample.path, in fewer hours than those of 1536 px; the paper gives no
FID.
"""

from configs import imagenet512_H_DiM_ft


def get_config():
    config = imagenet512_H_DiM_ft.get_config()
    config.z_shape = (4, 128, 128)
    config.ug_m = 2

    config.nnet.input_size = 128
    config.nnet.skip_tuning = (0.82, 1.0)

    config.sample.algorithm = "dpm_solver_upsample_g"
    config.sample.scale = 3.0
    config.sample.n_samples = 1000
    config.sample.mini_batch_size = 1
    config.sample.features = "none"  # of 1024x1024 images there are no statistics
    config.sample.path = "workdir/imagenet512_H_DiM_ft/test_tmp/all_class_1024"
    return config
