"""eval.py by the name that users of U-ViT know for latents; the config says what is evaluated.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./eval_ldm_discrete.py --config=configs/imagenet256_H_DiM.py --nnet_path=CHECKPOINT
"""

from eval import FLAGS, main
from libs.runtime import run_main

if __name__ == "__main__":
    run_main(main, FLAGS)
