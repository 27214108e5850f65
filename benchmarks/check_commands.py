"""Runs the README's multi-process commands as they stand there on N GPUs, with random data in the
true formats, and compares them with one process at the same global batch:

    python benchmarks/check_commands.py --processes 8 --steps 50
    python benchmarks/check_commands.py --processes 2 --steps 20 --commands S,L    # parts of it
    python benchmarks/check_commands.py --processes 2 --steps 4 --tiny             # on a CPU

Training: losses and gradient norms of all steps are the same within rounding, since every draw is
keyed by its position in the global batch. On 8 GPUs the micro-batches are the README's; on fewer,
gradients are accumulated over micro-batches of that size, and one process makes the same ones in
turn. Evaluation: the pictures are the same within rounding. Changed are only paths, the number of
processes and of steps, and what pictures are made of; --tiny shrinks networks and batches too.
Prints a table, writes it to --out as json, and fails if anything is further apart than rounding.
"""

import argparse
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import utils  # noqa: E402, I001 - before torch
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bench_features import write_packed  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from configs import imagenet256_H_DiM, imagenet512_H_DiM_ft  # noqa: E402
from libs.data.autoencoder import to_ldm  # noqa: E402
from libs.model.build import build_model  # noqa: E402

# name: words that find the command in the README, its global batch, and the images a GPU of 8.
TRAININGS = {
    "S": (("train.py", "cifar10_S_DiM.py"), 128, 16),
    "L": (("train_ldm_discrete.py", "imagenet256_L_DiM.py"), 1024, 128),
    "H": (("train_ldm_discrete.py", "imagenet256_H_DiM.py"), 768, 96),
    "ft": (("train_ldm_discrete.py", "imagenet512_H_DiM_ft.py"), 240, 30),
}
EVALUATION = ("eval_ldm_discrete.py", "imagenet256_H_DiM.py")
COMMANDS = (*TRAININGS, "eval")
# Relative, of every step. A bf16 value has 8 bits, but the micro-batches are the same, so that only
# sums over processes are taken in another order.
ROUNDING = {"loss": 2e-3, "grad_norm": 1e-2}
PICTURE_ROUNDING = 2.0  # levels of 255, mean over a picture: other batches, other kernels
TINY = {"nnet.dim": 32, "nnet.depth": 5}
TINY_BATCH, TINY_MICRO_BATCH = 8, 4
LATENT_BYTES = 1 << 27


# ---------------------------------------------------------------------------------------------
# Data


def write_cifar10(folder, images=10_000):
    """Random images in the original files of CIFAR-10."""
    rng, path = np.random.default_rng(0), folder / "cifar-10-batches-py"
    path.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        pixels = rng.integers(256, size=(images, 3072), dtype=np.uint8)
        labels = rng.integers(10, size=images).tolist()
        (path / name).write_bytes(pickle.dumps({b"data": pixels, b"labels": labels}, protocol=2))


def write_autoencoder(path, tiny):
    """Random weights of Stable Diffusion's autoencoder in LDM's format; tiny: of a narrow one."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    channels, layers = ((32,) * 4, 1) if tiny else ((128, 256, 512, 512), 2)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels, layers_per_block=layers, latent_channels=4,
    )  # fmt: skip
    torch.save(to_ldm(network), path)


def write_weights(path, config, tiny):
    """Random weights of a config's network, the output layer's not zero."""
    if tiny:
        config.nnet.update({key.split(".")[1]: value for key, value in TINY.items()})
    model = build_model(config.nnet, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.02)
    save_file(model.state_dict(), path)


def data_of(name, folder, tiny):
    """--config values of a command for random data, which are written into the folder."""
    if name == "S":
        if not (folder / "cifar10").exists():
            write_cifar10(folder / "cifar10", images=100 if tiny else 10_000)
        return {"dataset.path": folder / "cifar10"}
    resolution = 512 if name == "ft" else 256
    latents = folder / f"latents{resolution}"
    if name == "eval":
        write_autoencoder(folder / "autoencoder.pth", tiny)
        return {"autoencoder.pretrained_path": folder / "autoencoder.pth"}
    if not latents.exists():
        write_packed(latents, resolution, name != "ft", LATENT_BYTES)
    values = {"dataset.name": f"imagenet{resolution}_features", "dataset.path": latents,
              "autoencoder.pretrained_path": ""}  # fmt: skip
    if name == "ft":
        values["nnet.pretrained_path"] = folder / "512.safetensors"
        write_weights(values["nnet.pretrained_path"], imagenet512_H_DiM_ft.get_config(), tiny)
    return values


# ---------------------------------------------------------------------------------------------
# Commands


def readme_command(script, config):
    """The words of the README's command that runs `script` with `config`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        if any(word.endswith(script) for word in words) and any(
            word.endswith(config) for word in words
        ):
            return words
    raise SystemExit(f"the README has no command with {script} and {config}")


def adapted(words, processes, values, **flags):
    """The command for another number of processes, with --config values and flags replaced."""
    options = {f"--config.{key}": value for key, value in values.items()}
    options |= {f"--{key}": value for key, value in flags.items()}
    words = [word for word in words if word.split("=")[0] not in options]
    words[words.index("--num_processes") + 1] = str(processes)
    if processes == 1:
        words.remove("--multi_gpu")
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--main_process_port", "0"] if processes > 1 else []
    return [*launch, *words[2:], *(f"{key}={value}" for key, value in options.items())]


def run(words):
    done = subprocess.run(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "NCCL_NVLS_ENABLE": "0"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, words))} failed:\n{done.stdout}")


def micro_batch(batch, processes, limit):
    """The largest that divides a process's share of the batch, at most `limit`."""
    own = batch // processes
    return max(size for size in range(1, min(limit, own) + 1) if own % size == 0)


def train(name, processes, arguments, folder, data):
    """Lines of metrics.jsonl of a training run."""
    command, batch, limit = TRAININGS[name]
    batch, limit = (TINY_BATCH, TINY_MICRO_BATCH) if arguments.tiny else (batch, limit)
    if batch % arguments.processes:
        raise SystemExit(f"the batch of {name}, {batch}, is not for {arguments.processes}")
    size = micro_batch(batch, arguments.processes, arguments.micro_batch or limit)
    values = {
        **data, "train.n_steps": arguments.steps, "train.log_interval": 1,
        "train.grid_samples": 0, "train.fid_samples": 0, "train.batch_size": batch,
        "gradient_accumulation_steps": batch // (processes * size),
        **(TINY | {"train.num_workers": 1} if arguments.tiny else {}),
    }  # fmt: skip
    workdir = folder / f"{name}-{processes}"
    run(adapted(readme_command(*command), processes, values, workdir=workdir))
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    shutil.rmtree(workdir)  # its checkpoint is as large as 16 bytes a parameter
    return [line for line in map(json.loads, lines) if "loss" in line]


def distance(several, one, key):
    """The largest relative difference of a figure of two runs; infinity for other steps, or where
    it is finite in only one.
    """
    if [line["step"] for line in several] != [line["step"] for line in one]:
        return float("inf")
    apart = 0.0
    for a, b in ((float(x[key]), float(y[key])) for x, y in zip(several, one, strict=True)):
        if a != b:  # infinite in both where fp16 overflows
            apart = max(apart, abs(a - b) / abs(b) if np.isfinite([a, b]).all() else float("inf"))
    return apart


def check_training(name, arguments, folder):
    """A row of the table."""
    data = data_of(name, folder, arguments.tiny)
    several, one = (train(name, n, arguments, folder, data) for n in (arguments.processes, 1))
    apart = {f"{key}_apart": distance(several, one, key) for key in ROUNDING}
    half = several[len(several) // 2 :]
    img_s = sorted(line["img_s"] for line in half)[len(half) // 2]
    return dict(
        command=name, steps=len(several), first_loss=float(several[0]["loss"]),
        last_loss=float(several[-1]["loss"]), **apart, img_s=img_s,
        good=all(apart[f"{key}_apart"] <= most for key, most in ROUNDING.items()),
    )  # fmt: skip


def draw(processes, arguments, folder, data, weights):
    """The pictures of an evaluation, by name."""
    pictures = folder / f"pictures-{processes}"
    values = {
        **data, "sample.features": "none", "sample.path": pictures,
        "sample.n_samples": 4 * arguments.processes, "sample.mini_batch_size": 2,
        "sample.sample_steps": 3 if arguments.tiny else 20, **(TINY if arguments.tiny else {}),
    }  # fmt: skip
    flags = dict(nnet_path=weights, workdir=folder / f"eval-{processes}")
    run(adapted(readme_command(*EVALUATION), processes, values, **flags))
    return {path.name: np.asarray(Image.open(path), float) for path in pictures.glob("*.png")}


def check_evaluation(arguments, folder):
    data, weights = data_of("eval", folder, arguments.tiny), folder / "256.safetensors"
    write_weights(weights, imagenet256_H_DiM.get_config(), arguments.tiny)
    several, one = (
        draw(n, arguments, folder, data, weights) for n in (arguments.processes, 1)
    )
    if several.keys() != one.keys() or not one:
        raise SystemExit(f"pictures {sorted(several)} are not {sorted(one)}")
    apart = max(np.abs(several[name] - one[name]).mean() for name in one)
    contrast = min(picture.std() for picture in one.values())
    return dict(
        command="eval", pictures=len(one), levels_apart=apart, contrast=contrast,
        good=bool(apart <= PICTURE_ROUNDING < contrast),
    )  # fmt: skip


def shown(row):
    figures = {key: value for key, value in row.items() if key not in ("command", "good")}
    text = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
    return f"{row['command']}: {'same' if row['good'] else 'DIFFERENT'} ({text})"


def parse_arguments(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--commands", default=",".join(COMMANDS), help="some of the default")
    parser.add_argument("--micro_batch", type=int, help="images at once, where fewer fit")
    parser.add_argument("--tiny", action="store_true", help="small networks and batches")
    parser.add_argument("--out", type=Path, help="json file of the table")
    arguments = parser.parse_args(words)
    arguments.commands = arguments.commands.split(",")
    if unknown := set(arguments.commands) - set(COMMANDS):
        parser.error(f"{unknown.pop()!r} is none of {', '.join(COMMANDS)}")
    return arguments


def main(arguments):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.commands:
            if name == "eval":
                rows.append(check_evaluation(arguments, Path(folder)))
            else:
                rows.append(check_training(name, arguments, Path(folder)))
            print(shown(rows[-1]), flush=True)
    if arguments.out:
        utils.write_json(utils.file_to_write(arguments.out, "--out"), rows)
    return all(row["good"] for row in rows)


if __name__ == "__main__":
    sys.exit(0 if main(parse_arguments()) else "further apart than rounding")
