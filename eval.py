"""Evaluate a pixel model: images from its averaged weights, and their FID to the real ones.

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision fp16 ./eval.py \\
        --config=configs/cifar10_S_DiM.py --nnet_path=CHECKPOINT
    python eval.py --config=configs/digits_T_DiM.py --nnet_path=CHECKPOINT
"""

from pathlib import Path

import utils
from datasets import get_dataset
from libs import evaluation, flags, metrics
from libs.codec import PixelCodec
from libs.launch import Precision, make_accelerator
from libs.models import build_model, check_data, load_into
from libs.run import environment
from sde import VPSDE

FLAGS = {
    "config": (
        flags.config_file, flags.REQUIRED, "config file; --config.<key>=<value> changes one value",
    ),
    "nnet_path": (
        str, flags.REQUIRED, "a <step>.ckpt directory, a file in it, or an official nnet_ema.pth",
    ),
    "output_path": (
        str, None, "json file of the result; otherwise evaluation.json in the run directory",
    ),
    "workdir": (str, None, "run directory; otherwise workdir/<config>/<changed values>"),
}  # fmt: skip


def main(args):
    config = args.config
    run_directory = utils.run_directory(args.config_path, args.overrides, args.workdir)
    output_path = Path(args.output_path or run_directory / "evaluation.json")
    if output_path.is_dir():
        raise utils.UserError(f"{output_path} is a directory: --output_path is the file to write")
    folder = Path(config.sample.path) if config.sample.path else None
    accelerator = make_accelerator()
    dataset = get_dataset(
        config.dataset.name,
        path=config.dataset.path,
        resolution=config.dataset.resolution,
        labels=config.train.mode == "cond",
        seed=config.seed,
    )
    evaluation.require_statistics(config, dataset)
    features = metrics.make_features(
        config.sample.features, config.sample.fid_weights_path, accelerator.device
    )
    model = build_model(config.nnet)
    check_data(model, dataset, PixelCodec().latent_shape(dataset.shape))
    load_into(model, args.nnet_path)
    generator = evaluation.ImageGenerator(
        model.to(accelerator.device).eval(), VPSDE(), PixelCodec(), config,
        image_shape=dataset.shape,
        precision=Precision(config.train.mixed_precision, accelerator.device), seed=config.seed,
    )  # fmt: skip
    for path in (output_path.parent, folder):
        if path and accelerator.is_main_process:
            utils.make_directory(path)
    accelerator.wait_for_everyone()
    result = evaluation.evaluate(
        generator, features, dataset, config, accelerator, n=config.sample.n_samples, folder=folder
    )
    if accelerator.is_main_process:
        recipe = {
            "nnet_path": args.nnet_path,
            "config": config.to_dict(),
            "environment": environment(),
        }
        utils.write_json(output_path, {**result, **recipe})
        print("\n".join([*evaluation.describe(result), f"the whole recipe is in {output_path}"]))


if __name__ == "__main__":
    flags.run_main(main, FLAGS)
