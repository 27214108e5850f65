"""Draw pictures from a checkpoint; needs neither data set nor statistics.

python sample.py --nnet_path=workdir/digits_T_DiM/default/ckpts/3000.ckpt --classes=3,7 --seed=0
--n=4 --out=grid.png
"""

from pathlib import Path

import torch
from ml_collections import ConfigDict
from tqdm import tqdm

import utils
from libs import evaluation, flags
from libs.codec import PixelCodec
from libs.launch import Precision, make_accelerator
from libs.models import build_model, load_into
from sde import VPSDE
from utils import UserError

FLAGS = {
    "nnet_path": (
        str,
        flags.REQUIRED,
        "a <step>.ckpt directory, a file in it, or (with --config) an official nnet_ema.pth",
    ),
    "config": (
        flags.config_file,
        None,
        "config file, needed where no config.json lies beside the weights",
    ),
    "classes": (
        flags.int_list,
        None,
        "classes, for example 3,7; otherwise all, or none in an unconditional model",
    ),
    "n": (int, 4, "images of each class"),
    "seed": (int, 0, "the same seed gives the same pictures"),
    "scale": (float, None, "guidance: cond + scale (cond - uncond); otherwise the config's"),
    "algorithm": (str, None, "sampling algorithm; otherwise the config's"),
    "steps": (int, None, "sampling steps; otherwise the config's"),
    "out": (str, "samples.png", "the picture: a row for each class"),
}


def config_of(args):
    """The config of --config, or the one beside the weights; flags that were given win."""
    if args.config is not None:
        config = args.config
    else:
        path = Path(args.nnet_path)
        beside = (path if path.is_dir() else path.parent) / "config.json"
        if not beside.is_file():
            raise UserError(
                f"there is no {beside}: give --config=<config file> of the model that {path} holds"
            )
        config = ConfigDict(utils.read_json(beside))
    with config.unlocked():
        for flag, key in (
            ("scale", "scale"),
            ("algorithm", "algorithm"),
            ("steps", "sample_steps"),
        ):
            if getattr(args, flag) is not None:
                config.sample[key] = getattr(args, flag)
        config.sample.cfg = config.sample.cfg or args.scale is not None
    return config


def main(args):
    config = config_of(args)
    device = make_accelerator().device
    model = build_model(config.nnet)
    load_into(model, args.nnet_path)
    classes = evaluation.choose_classes(
        args.classes, model.num_classes, conditional=config.train.mode == "cond"
    )
    labels = None if classes is None else torch.tensor(classes).repeat_interleave(args.n)
    indices = list(range(args.n if labels is None else len(labels)))
    size = config.nnet.input_size
    generator = evaluation.ImageGenerator(
        model.to(device).eval(), VPSDE(), PixelCodec(), config,
        image_shape=(config.nnet.in_channels, size, size),
        precision=Precision(config.train.mixed_precision, device), seed=args.seed,
    )  # fmt: skip
    with tqdm(total=len(indices), unit="img") as bar:
        images = []
        for rows in torch.tensor(indices).split(config.sample.mini_batch_size):
            images.append(generator(rows.tolist(), None if labels is None else labels[rows]).cpu())
            bar.update(len(rows))
    utils.save_grid(args.out, torch.cat(images), args.n)
    print(
        f"wrote {args.out}: {len(indices)} images"
        + (f", a row for each of the classes {classes}" if classes else "")
    )


if __name__ == "__main__":
    flags.run_main(main, FLAGS)
