"""Draw pictures from a checkpoint; needs neither data set nor statistics.

    python sample.py --nnet_path=workdir/digits_T_flow/default/ckpts/1000.ckpt \\
        --classes=3,7 --seed=0 --n=4 --out=grid.png
"""

import utils
from libs.evaluate import ImageSampler
from libs.parts import load_weights, make_parts
from libs.runtime import (
    EVALUATION,
    REQUIRED,
    check_values,
    file_path,
    int_list,
    make_accelerator,
    run_main,
)

FLAGS = {
    "nnet_path": (file_path, REQUIRED, "a <step>.ckpt directory, or weights with --config"),
    "config": EVALUATION["config"],
    "classes": (int_list, None, "such as 3,7; else up to ten, evenly chosen"),
    "n": (int, 4, "images of each class"),
    "seed": (int, 0, "the same seed gives the same pictures"),
    "scale": (float, None, "guidance: cond + scale (cond - uncond); else the config's"),
    "algorithm": (str, None, "sampling algorithm; else the config's, for latents not dpm_solver"),
    "steps": (int, None, "sampling steps; else the config's, or 25 of dpm_solver_pp_2m"),
    "out": (file_path, "samples.png", "the picture: a row for each class"),
}


def set_sampling(config, args):
    """Put the flags into config.sample. On latents dpm_solver_pp_2m stands in for a dpm_solver that
    nobody asked for: half the steps.
    """
    given = {"scale": args.scale, "algorithm": args.algorithm, "sample_steps": args.steps}
    given = {key: value for key, value in given.items() if value is not None}
    asked = {f"sample.{key}" for key in given} | set(args.overrides)
    official = config.z_shape is not None and config.sample.algorithm == "dpm_solver"
    if official and not asked & {"sample.algorithm", "sample.sample_steps"}:
        given |= {"algorithm": "dpm_solver_pp_2m", "sample_steps": 25}
    config.sample.update({"cfg": config.sample.cfg or args.scale is not None, **given})
    check_values(config)


def open_sampler(args):
    """The ImageSampler that the flags ask for."""
    config = args.config
    set_sampling(config, args)
    device = make_accelerator().device
    process, codec, _, model = make_parts(config)
    for change in load_weights(config, model, args.nnet_path):
        print(change)
    model, codec = model.to(device).eval(), codec.to(device)
    return ImageSampler(config, model, process, codec, seed=args.seed)


def main(args):
    utils.file_to_write(args.out, "--out")
    with open_sampler(args) as image_sampler:
        chosen = args.config.sample
        print(f"drawing with {chosen.algorithm} in {chosen.sample_steps} steps")
        images = image_sampler.draw_rows(args.classes, args.n)
    utils.save_grid(args.out, images, args.n)
    print(f"wrote {args.out}: {len(images)} images, {args.n} a row")


if __name__ == "__main__":
    run_main(main, FLAGS)
