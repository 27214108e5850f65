"""Trains a recipe for some seconds and measures it, by train.py and eval.py themselves:

    python benchmarks/recipes.py --recipe=flow,internal --seconds=270 --internal_scale 0.5 0.7

The config is fashion32_S_flow with the plain loss and what the names of the recipe change. The
combinations of --sampler, --steps, --scale, --internal_scale and --average are evaluations of one
training. Seconds: steps times the median step of train.py after its first 50, without compilation,
evaluation and saving; 150 steps before (--probe: these alone) set n_steps, so that a cosine ends at
the end. --step_ms, a median measured before, stands for both where the GPU has other work. Records
are added to benchmarks/results/recipes_<gpu>.json, the table beside them; recorded evaluations are
not made again. `--draw=JSON` draws docs/recipes.png and docs/sampling.png (the evaluations of the
longest training) and fills the tables of docs/training.md and docs/performance.md, without a GPU.
"""

import copy
import functools
import itertools
import json
import operator
import subprocess
import sys
from pathlib import Path
from statistics import median

import harness
import torch

from configs import cifar10_S_DiM, cifar10_uvit_small, fashion32_S_flow
from configs.common import d
from libs.files import hash_file
from utils import derive_seed, read_json, write_json

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VP = {"process": d(name="vpsde"), "pred": "noise_pred", "sample.algorithm": "dpm_solver"}
UVIT = cifar10_uvit_small.get_config().nnet
OPTIMIZER = ("optimizer", "lr_scheduler", "max_grad_norm")
RECIPES = {  # name -> {key of the config: value}
    "official": {**VP, **{key: cifar10_S_DiM.get_config()[key] for key in OPTIMIZER}},
    "official_flow_optimizer": VP, "flow": {}, "direction": {"loss.direction": 0.5},
    "internal": {"loss.internal": d(weight=0.5)},  # their blocks: a third of the network's depth
    "repa": {"loss.repa": d(weight=0.5, kind="repa", features="classifier", path="")},
    "muon": {"optimizer.name": "muon"}, "unpadded": {"nnet.num_pad_tokens": 0},
    "uvit": {"nnet": UVIT}, "lower_rate": {"optimizer.lr": 3e-4},
    "uvit_no_conv": {"nnet": d(**{**UVIT, "final_conv": False})},  # nearly singular on one channel
    "attention": {"nnet.mixer": d(name="attention", heads=8)}, "routing": {"nnet.routing.first": 4},
}  # fmt: skip
# Flags and their defaults: of a training, of an evaluation, of the machine.
RUN = {"recipe": "flow", "set": "", "seed": 0, "seconds": 90.0, "n": 10_000}
SAMPLING = {"sampler": "", "steps": 50, "scale": 0.4, "internal_scale": 0.0, "average": ""}
PLACES = {
    "data": "assets/datasets/fashion_mnist", "workdir": "workdir/recipes", "stats": "",
    "features": str(harness.ROOT / "benchmarks" / "fashion_cnn.npz"),  # judge; repa's features:
    "teacher": "assets/fashion_mnist_classifier.safetensors", "step_ms": 0.0, "draw": "",
}  # fmt: skip
KEYS = ("recipe", "set", "seed", "seconds_asked", "n", "sampler", "steps_sampled", "guidance",
        "internal_guidance", "average")  # fmt: skip
FIGURES = ("features", "precision", "img_s", "network_calls", "class_agreement", "frechet_distance")
COLUMNS = ("seconds", *KEYS[:3], *KEYS[4:], *FIGURES[3:])
GUIDANCE = "guidance", "internal_guidance"
SHOWN = ("seconds", "recipe", "seed", *GUIDANCE, *FIGURES[3:])  # in docs/training.md
OF_SAMPLING = ("steps_sampled", *GUIDANCE, "set", *FIGURES[1:])  # in docs/performance.md
COLORS = "tab:gray", "tab:green"
LABELS = "guidance, internal guidance", "internal guidance alone"
DOCS, MARK = harness.ROOT / "docs", "<!-- from benchmarks/recipes.py -->\n"


def make_config(args, n_steps):
    """The config of args.recipe, to be trained for n_steps."""
    config, never = fashion32_S_flow.get_config(), 10**9
    changes = {"loss": d(mse=1.0), "nnet.num_pad_tokens": 3}  # of all records but `unpadded`
    for name in args.recipe.split(","):
        changes |= RECIPES[name]
    changes |= {
        "seed": args.seed, "dataset.path": args.data, "nnet.in_channels": 1, "nnet.num_classes": 10,
        "train.n_steps": n_steps, "train.eval_interval": never, "train.save_interval": never,
        "train.mixed_precision": "bf16" if DEVICE == "cuda" else "no", "sample.n_samples": args.n,
        "sample.mini_batch_size": min(args.n, 1000), "sample.fid_weights_path": args.features,
        "sample.sample_steps": args.steps, "sample.scale": args.scale,
        "sample.internal_scale": args.internal_scale,
    }  # fmt: skip
    changes |= {"sample.algorithm": args.sampler} if args.sampler else {}
    changes |= {"loss.repa.path": args.teacher} if "loss.repa" in changes else {}
    depth = changes.get("nnet", config.nnet).depth
    changes |= {f"{k}.block": depth // 3 for k in ("loss.internal", "loss.repa") if k in changes}
    words = (change.split("=", 1) for change in args.set.split())
    for path, value in [*changes.items(), *((key, json.loads(text)) for key, text in words)]:
        *sections, key = path.split(".")
        functools.reduce(operator.getitem, sections, config)[key] = copy.deepcopy(value)
    return config


def launch(script, config, path, *words):
    """Run a script of the project on the config, which stays in the file `path`."""
    write_json(path, config.to_dict())
    words = (str(harness.ROOT / script), f"--config={path}", *words)
    subprocess.run([sys.executable, *words], check=True)


def find_step_ms(rates, n_steps, config):
    """Median ms of a step after the first 50, of {step: images a second}; of steps that route and
    steps that do not the mean of both medians, by their shares.
    """
    routed = config.nnet.name == "dim" and config.nnet.routing.first
    share, ms = config.train.routed_share if routed else 1.0, 0.0
    for part, low, high in (share, 50, share), (1 - share, share * n_steps + 10, 1):
        found = [rate for step, rate in rates.items() if low < step <= high * n_steps]
        ms += part * 1e3 * config.train.batch_size / median(found or rates.values())
    return ms


def train(args, n_steps):
    """Train, unless that is done; (folder, median ms of a step)."""
    config = make_config(args, n_steps)
    changes = [change for change in args.set.split() if not change.startswith("sample.")]
    name = "-".join(map(str, [args.recipe, *changes, args.seed, n_steps]))
    folder = Path(args.workdir, name.replace("/", "_"))
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "ckpts" / f"{n_steps}.ckpt").is_dir():
        launch("train.py", config, folder / "recipe.json", f"--workdir={folder}")
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    rates = {line["step"]: line["img_s"] for line in lines if "img_s" in line}
    return folder, find_step_ms(rates, n_steps, config)


def measure(args, keys):
    """The record with these keys, of a run that is made where it is not there."""
    steps = round(1e3 * args.seconds / (args.step_ms or train(args, 150)[1]))
    (folder, found_ms), config = train(args, steps), make_config(args, steps)
    ms = args.step_ms or found_ms
    config.dataset.update(name="fashion_mnist_test", fid_stats=args.stats or None)
    weights = folder / "ckpts" / f"{steps}.ckpt" / args.average
    path = folder / f"evaluation-{derive_seed(*map(str, keys))}.json"
    words = f"--nnet_path={weights}", f"--output_path={path}"
    launch("eval.py", config, folder / "recipe_evaluation.json", *words)
    found, model = read_json(path), {"dim": "DiM-S", "uvit": "U-ViT-S"}[config.nnet.name]
    return {
        **dict(zip(KEYS, keys, strict=True)), "model": model, "steps": steps,
        "seconds": round(steps * ms / 1e3, 1), "step_ms": round(ms, 2),
        **{name: found[name] for name in FIGURES}, "features_sha256": hash_file(args.features),
        **harness.describe_setting(DEVICE, args.commit),
    }  # fmt: skip


def make_table(records, columns=COLUMNS):
    """Markdown, by seconds asked for, images and distance."""
    order = ("seconds_asked", "n", "frechet_distance")
    ordered = sorted(records, key=lambda r: [r[key] for key in order])
    rows = ([f"{r[k]:.4g}" if type(r[k]) is float else r[k] for k in columns] for r in ordered)
    return harness.make_table(columns, rows)


def fill(name, picture, block):
    """Between the MARKs of docs/`name`: the picture and the Markdown `block`."""
    before, _, after = (DOCS / name).read_text().split(MARK)
    (DOCS / name).write_text(f"{before}{MARK}![{picture[0]}]({picture[1]})\n{block}{MARK}{after}")


def make_axes(records, **options):
    """(figure, its axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(ylabel="Frechet distance", **options)
    axes.set_title(f"{records[-1]['gpu']}, torch {records[-1]['torch']}")
    return figure, axes


def draw_recipes(records):
    """Of each recipe as it stands here, seed and length the best evaluation of most images."""
    records = [r for r in records if not r["set"]]
    records.sort(key=lambda r: (r["n"], -r["frechet_distance"]))
    best = list({repr([r[key] for key in KEYS[:4]]): r for r in records}.values())
    figure, axes = make_axes(best, xlabel="seconds of training", yscale="log")
    free, first = {}, {}  # seconds asked for -> where the next name has room, from above; points
    for r in sorted(best, key=lambda r: (r["seed"], -r["frechet_distance"])):
        point, color = (r["seconds"], r["frechet_distance"]), COLORS[r["n"] >= 10_000]
        start = first.setdefault((r["recipe"], r["seconds_asked"], r["n"]), point)
        if start is not point:  # another seed of what has its name already
            axes.plot(*zip(start, point, strict=True), color=color, marker="x", markevery=[1], lw=1)
            continue
        axes.scatter(*point, color=color)
        height = free[r["seconds_asked"]] = min(point[1], free.get(r["seconds_asked"], 1e9) / 1.17)
        line = dict(arrowstyle="-", color=color, lw=0.5, relpos=(0, 0.5))
        place = dict(xytext=(r["seconds"] + 9, height), va="center", fontsize=8)
        axes.annotate(r["recipe"], point, **place, color=color, arrowprops=line)
    axes.set(xlim=(0, 1.3 * max(r["seconds"] for r in best)), ylim=(0.03, None))
    for n, color in zip(("fewer than 10,000 images", "10,000 images"), COLORS, strict=True):
        axes.scatter([], [], color=color, label=n)
    axes.plot([], color="black", marker="x", lw=1, label="a second seed")
    axes.legend(loc="center right")
    figure.savefig(DOCS / "recipes.png", dpi=120)
    block = ""
    for n in sorted({r["n"] for r in best}):
        block += f"\n{n:,} images:\n\n{make_table([r for r in best if r['n'] == n], SHOWN)}"
    fill("training.md", ("distance against seconds", "recipes.png"), block)


def draw_sampling(records):
    """The evaluations of fewest images of the longest training."""
    longest = max(r["seconds_asked"] for r in records)
    records = [r for r in records if r["seconds_asked"] == longest]
    records = [r for r in records if r["n"] == min(r["n"] for r in records)]
    figure, axes = make_axes(records, xlabel="pictures a second")
    for r in records:
        point, alone = (r["img_s"], r["frechet_distance"]), not r["guidance"]
        axes.scatter(*point, color=COLORS[alone])
        scales = f"{r['guidance']:g}, {r['internal_guidance']:g}"
        text = f"{r['network_calls']} calls; {scales} {r['set']}"
        place = dict(xytext=(8, 0), textcoords="offset points", va="center", fontsize=8)
        axes.annotate(text, point, **place)
    for color, label in zip(COLORS, LABELS, strict=True):
        axes.scatter([], [], color=color, label=label)
    axes.set(xlim=(0, 1.3 * max(r["img_s"] for r in records)), ylim=(0, None))
    axes.legend(loc="lower left")
    figure.savefig(DOCS / "sampling.png", dpi=120)
    picture = "distance against pictures a second", "sampling.png"
    fill("performance.md", picture, "\n" + make_table(records, OF_SAMPLING))


def main(argv=None):
    parser = harness.make_parser(__doc__)
    for flag, default in {**RUN, **SAMPLING, **PLACES}.items():
        many = dict(nargs="+", default=[default]) if flag in SAMPLING else dict(default=default)
        parser.add_argument(f"--{flag}", type=type(default), **many)
    parser.add_argument("--probe", action="store_true")
    args = parser.parse_args(argv)
    if args.draw:
        draw_recipes(read_json(args.draw))
        return draw_sampling(read_json(args.draw))
    path = harness.result_path(args.out, "recipes", DEVICE)
    for values in itertools.product(*(getattr(args, flag) for flag in SAMPLING)):
        vars(args).update(zip(SAMPLING, values, strict=True))
        args.sampler = make_config(args, 1).sample.algorithm  # the recipe's, where none is given
        if args.probe:
            return print(f"{args.recipe}: {train(args, 150)[1]:.2f} ms a step")
        keys = [getattr(args, flag) for flag in (*RUN, *SAMPLING)]
        if keys not in ([r[key] for key in KEYS] for r in harness.load(path)):
            record = measure(args, keys)
            records = harness.merge(harness.load(path), [record], KEYS)
            harness.write(path, records, make_table(records))


if __name__ == "__main__":
    sys.exit(main())
