"""Train a diffusion model on the latents of an autoencoder, in Stable Diffusion's 1,000 steps.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \\
        ./train_ldm_discrete.py --config=configs/imagenet256_H_DiM.py

The same command resumes an interrupted run.
"""

import utils
from datasets import dataset_of
from libs.data import latent_codec
from libs.model import (
    build_model,
    check_codec,
    check_data,
    check_kind,
    require_trained_labels,
    start_from,
)
from libs.runtime import TRAINING, run_main
from libs.train import train
from sde import DiscreteSchedule

FLAGS = TRAINING


def main(args):
    config = args.config
    check_kind(config, latent=True)
    require_trained_labels(config, utils.flatten(config), "the config")
    directory = utils.run_directory(args.config_path, args.overrides, args.workdir)
    dataset = dataset_of(config, augmented=True)
    model = build_model(config.nnet, seed=config.seed)
    pictures = bool(config.train.grid_samples or config.train.fid_samples)
    codec = latent_codec(config, dataset, decoding=pictures)
    check_codec(model, codec, config)
    check_data(model, dataset, codec.latent_shape(dataset.shape))
    utils.make_directory(directory)
    train(
        config, directory, model=model, process=DiscreteSchedule(), codec=codec, dataset=dataset,
        start_weights=lambda: start_from(model, config.nnet.pretrained_path),
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, FLAGS)
