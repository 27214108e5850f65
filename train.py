"""Train a diffusion model on pixels.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 ./train.py \\
        --config=configs/cifar10_S_DiM.py
    python train.py --config=configs/digits_T_DiM.py --config.train.batch_size=32

The same command resumes an interrupted run.
"""

import utils
from datasets import dataset_of
from libs.data import PixelCodec
from libs.model import (
    build_model,
    check_data,
    check_kind,
    require_trained_labels,
    start_from,
)
from libs.runtime import TRAINING, run_main
from libs.train import train
from sde import VPSDE

FLAGS = TRAINING


def main(args):
    config = args.config
    check_kind(config, latent=False)
    require_trained_labels(config, utils.flatten(config), "the config")
    directory = utils.run_directory(args.config_path, args.overrides, args.workdir)
    dataset = dataset_of(config, augmented=True)
    model = build_model(config.nnet, seed=config.seed)
    codec = PixelCodec()
    check_data(model, dataset, codec.latent_shape(dataset.shape))
    utils.make_directory(directory)
    train(
        config, directory, model=model, process=VPSDE(), codec=codec, dataset=dataset,
        start_weights=lambda: start_from(model, config.nnet.pretrained_path),
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, FLAGS)
