"""train.py by the name that users of U-ViT know for latents; the config says what is trained.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_H_DiM.py
"""

from libs.runtime import run_main
from train import FLAGS, main

if __name__ == "__main__":
    run_main(main, FLAGS)
