"""Evaluate a latent model: images from its averaged weights, decoded, and their FID.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./eval_ldm_discrete.py --config=configs/imagenet256_H_DiM.py --nnet_path=CHECKPOINT

The same command resumes an interrupted evaluation.
"""

from libs.data import latent_codec
from libs.evaluate import images_to_measure, run_evaluation
from libs.model import (
    build_model,
    check_codec,
    check_kind,
    load_into,
    require_same,
)
from libs.runtime import EVALUATION, make_accelerator, run_main
from sde import DiscreteSchedule

FLAGS = EVALUATION


def main(args):
    config, accelerator = args.config, make_accelerator()
    check_kind(config, latent=True)
    model = build_model(config.nnet)
    codec = latent_codec(config)
    check_codec(model, codec, config)
    require_same(config, args.nnet_path)
    changes = load_into(model, args.nnet_path)
    run_evaluation(
        args, config, accelerator, model=model, process=DiscreteSchedule(), codec=codec,
        dataset=images_to_measure(config), changes=changes,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, FLAGS)
