"""Times the latent half on a GPU, with random weights: `python benchmarks/bench_latent.py`.

Encoding 256 px images by Stable Diffusion's autoencoder, as in extraction; a forward pass of
DiM-H/2 at batch 2; making 256 px images with it, 50 solver steps with guidance, decoded, as in
evaluation; one 1536 px image by 3x upsampling, its peak memory. All but the first with and without
CUDA graphs and half matrices (`fast`). Writes benchmarks/results/latent_<gpu>.json and prints it.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from bench_ops import current_commit  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from model_report import result_path  # noqa: E402

from configs import imagenet256_H_DiM, imagenet512_H_DiM_upsample_3x_test  # noqa: E402
from libs.data.autoencoder import Autoencoder  # noqa: E402
from libs.data.codec import LatentCodec  # noqa: E402
from libs.diffusion import guidance  # noqa: E402
from libs.diffusion.samplers import sample  # noqa: E402
from libs.model.build import build_model  # noqa: E402
from libs.runtime.cuda_graphs import SamplingNetwork  # noqa: E402
from sde import DiscreteSchedule, eps_from_model  # noqa: E402

RECORDS = []


def stable_diffusion_autoencoder(device="cuda"):
    """Its network at full size, with random weights."""
    with torch.device(device):
        network = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        )  # fmt: skip
    return Autoencoder(network)


def timed(call):
    """(seconds, peak GiB) of a call, which was warmed up before; reserved ones, as a graph's memory
    is allocated once, in its capture.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_reserved() / 2**30


def record(**values):
    RECORDS.append(values)
    print(json.dumps(values), flush=True)


def encoding(autoencoder, batch=64, repeats=8):
    x = torch.rand(batch, 3, 256, 256, device="cuda") * 2 - 1
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):

        def encode(dtype=dtype):
            with torch.autocast("cuda", dtype or torch.float16, enabled=dtype is not None):
                return autoencoder.moments(x)

        encode()
        seconds, gib = timed(lambda encode=encode: [encode() for _ in range(repeats)])
        record(task="encode", pixels=256, batch=batch, precision=name,
               img_s=round(batch * repeats / seconds, 1), gib=round(gib, 2))  # fmt: skip


@contextlib.contextmanager
def network_for_sampling(model, fast):
    """The network as sampling calls it, under bf16; without `fast`, eager from float32 weights."""
    with torch.autocast("cuda", torch.bfloat16):
        if not fast:
            yield model
            return
        with SamplingNetwork(model, torch.bfloat16, graphs=True).ready() as network:
            yield network


def forward(model, z_shape, batch=2, repeats=100):
    """One evaluation of the network after another, as a sampler makes them."""
    x, t = torch.randn(batch, *z_shape, device="cuda"), torch.rand(batch, device="cuda") * 999
    y = torch.randint(1000, (batch,), device="cuda")
    for fast in (False, True):
        with network_for_sampling(model, fast) as network:
            for _ in range(3):
                network(x, t, y)
            seconds, gib = timed(lambda network=network: [network(x, t, y) for _ in range(repeats)])
        record(task="forward", pixels=z_shape[-1] * 8, batch=batch, precision="bf16", fast=fast,
               ms=round(seconds / repeats * 1e3, 2), gib=round(gib, 2))  # fmt: skip


def images(model, config, codec, n, steps, task, fast):
    """n images of random classes, in one batch, from noise to pixels."""
    process = DiscreteSchedule()
    y = torch.randint(1000, (n,), device="cuda")
    z = torch.randn(n, *config.z_shape, device="cuda")

    def draw(network, steps):
        predict = eps_from_model(network, process, config.pred)
        eps_fn = guidance.guided_by(config, predict, process, y, model.num_classes)
        algorithm = config.sample.algorithm
        return codec.decode(sample(eps_fn, process, z, algorithm=algorithm, steps=steps))

    with network_for_sampling(model, fast) as network:
        draw(network, 8)  # both of upsampling's sizes, at least twice
        seconds, gib = timed(lambda: draw(network, steps))
    record(task=task, pixels=config.z_shape[-1] * 8, batch=n, steps=steps, precision="bf16",
           algorithm=config.sample.algorithm, guidance=config.sample.scale, fast=fast,
           img_s=round(n / seconds, 3), seconds=round(seconds, 2), gib=round(gib, 2))  # fmt: skip


@torch.no_grad()
def sampling(config, codec, n, steps, task):
    with torch.device("cuda"):
        model = build_model(config.nnet).eval().requires_grad_(False)
    if task == "evaluate":
        forward(model, config.z_shape)
    for fast in (False, True):
        images(model, config, codec, n, steps, task, fast)
        torch.cuda.empty_cache()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", default=None, help="what was measured; default: git's HEAD")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    autoencoder = stable_diffusion_autoencoder()
    encoding(autoencoder)
    codec = LatentCodec(autoencoder, scale_factor=autoencoder.scale_factor)
    sampling(imagenet256_H_DiM.get_config(), codec, n=64, steps=50, task="evaluate")
    torch.cuda.empty_cache()
    sampling(imagenet512_H_DiM_upsample_3x_test.get_config(), codec, n=1, steps=50, task="upsample")
    gpu = torch.cuda.get_device_name()
    about = {"gpu": gpu, "torch": torch.__version__, "commit": args.commit or current_commit()}
    path = args.out / result_path(args.out, gpu).name.replace("model_", "latent_")
    results = [{**values, **about} for values in RECORDS]
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
