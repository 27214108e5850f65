"""Evaluate a model: images from its averaged weights, and their FID to the real ones.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 ./eval.py \\
        --config=configs/cifar10_S_DiM.py --nnet_path=CHECKPOINT
    python eval.py --config=configs/digits_T_DiM.py --nnet_path=CHECKPOINT
    python eval.py --images=FOLDER_OR_NPZ --config.dataset.fid_stats=STATISTICS.npz

The same command resumes an interrupted evaluation.
"""

from libs.evaluate import run_evaluation
from libs.parts import load_weights, make_parts
from libs.runtime import EVALUATION, make_accelerator, run_main

FLAGS = EVALUATION


def main(args):
    config, accelerator = args.config, make_accelerator()
    if args.images:
        return run_evaluation(args, config, accelerator)
    parts = make_parts(config, data="real")
    changes = load_weights(config, parts.model, args.nnet_path)
    run_evaluation(args, config, accelerator, **parts._asdict(), changes=changes)


if __name__ == "__main__":
    run_main(main, FLAGS)
