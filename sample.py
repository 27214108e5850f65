"""Draw pictures from a checkpoint; needs neither data set nor statistics.

    python sample.py --nnet_path=workdir/digits_T_DiM/default/ckpts/2800.ckpt \\
        --classes=3,7 --seed=0 --n=4 --out=grid.png
"""

import utils
from libs.data import PixelCodec, latent_codec
from libs.evaluate import draw_in_batches, make_grid_labels, make_image_sampler
from libs.model import (
    build_model,
    check_codec,
    config_beside,
    load_into,
    require_same,
)
from libs.runtime import (
    RANGES,
    REQUIRED,
    Precision,
    check_numbers,
    config_file,
    file_path,
    int_list,
    make_accelerator,
    run_main,
)
from sde import VPSDE, DiscreteSchedule

FLAGS = {
    "nnet_path": (
        file_path, REQUIRED,
        "a <step>.ckpt directory, a file in it, or (with --config) an official nnet_ema.pth",
    ),
    "config": (config_file, None, "needed where no config.json is beside the weights"),
    "classes": (
        int_list, None,
        "classes, for example 3,7; otherwise all, or none in an unconditional model",
    ),
    "n": (int, 4, "images of each class"),
    "seed": (int, 0, "the same seed gives the same pictures"),
    "scale": (float, None, "guidance: cond + scale (cond - uncond); otherwise the config's"),
    "algorithm": (str, None, "sampling algorithm; else the config's, for latents not dpm_solver"),
    "steps": (int, None, "sampling steps; otherwise the config's, or 25 of dpm_solver_pp_2m"),
    "out": (file_path, "samples.png", "the picture: a row for each class"),
}  # fmt: skip
RANGES = {"scale": RANGES["sample.scale"], "steps": RANGES["sample.sample_steps"]}


def config_of(args):
    """The config of --config, or the one beside the weights; flags that were given win. On latents
    dpm_solver_pp_2m takes the place of a dpm_solver that nobody asked for: half the steps."""
    config = args.config if args.config is not None else config_beside(args.nnet_path)
    given = dict(scale=args.scale, algorithm=args.algorithm, sample_steps=args.steps)
    asked = {f"sample.{key}" for key, value in given.items() if value is not None}
    asked |= set(args.overrides or {})
    official = config.get("z_shape") and config.sample.algorithm == "dpm_solver"
    if official and not asked & {"sample.algorithm", "sample.sample_steps"}:
        given |= dict(algorithm="dpm_solver_pp_2m", sample_steps=25)
    with config.unlocked():
        config.sample.update({key: value for key, value in given.items() if value is not None})
        config.sample.cfg = config.sample.cfg or args.scale is not None
    return config


def main(args):
    check_numbers(args, {"n": (1, 10**6), **RANGES})
    utils.require_place(args.out)
    config = config_of(args)
    device = make_accelerator().device
    model = build_model(config.nnet)
    require_same(config, args.nnet_path)
    for change in load_into(model, args.nnet_path):
        print(change)
    conditional = config.train.mode == "cond"
    labels = make_grid_labels(
        args.classes, args.n, model.num_classes, conditional=conditional, scale=args.scale
    )
    latent = config.get("z_shape") is not None
    process = DiscreteSchedule() if latent else VPSDE()
    codec = latent_codec(config).to(device) if latent else PixelCodec()
    check_codec(model, codec, config)
    precision = Precision(config.train.mixed_precision, device)
    model = model.to(device).eval()
    image_sampler = make_image_sampler(
        config, model, process, codec, precision=precision, seed=args.seed
    )
    images = draw_in_batches(image_sampler, labels, args.n)
    utils.save_grid(args.out, images, args.n)
    rows = ", a row for each class" if conditional else ""
    print(f"wrote {args.out}: {len(images)} images{rows}")


if __name__ == "__main__":
    run_main(main, FLAGS)
