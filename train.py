"""Train the diffusion model of a config, on pixels or on latents.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 ./train.py \\
        --config=configs/cifar10_S_DiM.py
    python train.py --config=configs/digits_T_DiM.py --config.train.batch_size=32

The same command resumes an interrupted run.
"""

import utils
from libs.parts import make_parts
from libs.runtime import TRAINING, run_main
from libs.train import train

FLAGS = TRAINING


def main(args):
    directory = utils.run_directory(args.config_path, args.overrides, args.workdir)
    train(args.config, directory, **make_parts(args.config, data="training")._asdict())


if __name__ == "__main__":
    run_main(main, FLAGS)
