"""Evaluate a pixel model: images from its averaged weights, and their FID to the real ones.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 ./eval.py \\
        --config=configs/cifar10_S_DiM.py --nnet_path=CHECKPOINT
    python eval.py --config=configs/digits_T_DiM.py --nnet_path=CHECKPOINT

The same command resumes an interrupted evaluation.
"""

from libs.data import PixelCodec
from libs.evaluate import images_to_measure, run_evaluation
from libs.model import (
    build_model,
    check_data,
    check_kind,
    load_into,
    require_same,
)
from libs.runtime import EVALUATION, make_accelerator, run_main
from sde import VPSDE

FLAGS = EVALUATION


def main(args):
    config, accelerator = args.config, make_accelerator()
    check_kind(config, latent=False)
    model, codec, dataset = build_model(config.nnet), PixelCodec(), images_to_measure(config)
    if dataset is not None:
        check_data(model, dataset, codec.latent_shape(dataset.shape))
    require_same(config, args.nnet_path)
    changes = load_into(model, args.nnet_path)
    run_evaluation(
        args, config, accelerator, model=model, process=VPSDE(), codec=codec, dataset=dataset,
        changes=changes,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, FLAGS)
