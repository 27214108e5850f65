"""Trains the same network in different ways, from one seed on the same images, and compares the
losses: `python benchmarks/compare_training.py --images DIR --variants fused,reference`.

Variants: `fused` (blocks as one operator, as shipped), `composed` (layer by layer on our kernels),
`reference` (layer by layer on the operators' definition in plain PyTorch), `fp8` (fused, with the
matrix products of libs/ops/cuda/fp8.py). All under bf16 autocast, or in float32 without TF32, with
AdamW, in the order of one seeded permutation an epoch, with the same times, noise and labels. Also
prints each variant's relative error of one forward pass after training, against float32.

Writes benchmarks/results/compare_<variants>[_fp32]_<gpu>.json (every loss) and .md (means over
windows).
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from bench_ops import current_commit  # noqa: E402

from datasets import get_dataset  # noqa: E402
from libs.model.dim import PRESETS, DiM  # noqa: E402
from sde import VPSDE, denoising_loss  # noqa: E402

ENVIRONMENT = {  # variant -> variables of libs.ops
    "fused": {},
    "fp8": {},
    "composed": {"DIM_FUSED": "0"},
    "reference": {"DIM_FUSED": "0", "DIM_BACKEND": "reference"},
}
RATE, WARMUP = 2e-4, 100


def load_images(directory):
    """(images (N, 3, 32, 32) in [-1, 1], labels (N,), classes), all on the GPU."""
    dataset = get_dataset("folder", path=directory, resolution=32)
    items = [dataset[0, index] for index in range(len(dataset))]
    x, y = (torch.stack([torch.as_tensor(v) for v in part]) for part in zip(*items, strict=True))
    return x.cuda(), y.cuda(), dataset.num_classes


def use(variant):
    """Set the environment of a variant."""
    for name in ("DIM_FUSED", "DIM_BACKEND"):
        os.environ.pop(name, None)
    os.environ.update(ENVIRONMENT[variant])


def batches(x, y, batch_size, steps, seed):
    """The batches of a run: (x0, y, t, eps), the same for every variant."""
    generator = torch.Generator("cuda").manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64, device="cuda")
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(x), generator=generator, device="cuda")])
        chosen, order = order[:batch_size], order[batch_size:]
        t = torch.rand(batch_size, generator=generator, device="cuda")
        eps = torch.randn(batch_size, *x.shape[1:], generator=generator, device="cuda")
        yield x[chosen], y[chosen], t, eps


def make_model(size, classes, variant, seed):
    torch.manual_seed(seed)
    model = DiM(input_size=32, in_channels=3, num_classes=classes, **PRESETS[size]).cuda()
    if variant == "fp8":
        model.use_fp8("cuda")
    return model


def autocast(args):
    """Matrix products in bf16, or everything in float32."""
    return torch.autocast(
        "cuda", torch.bfloat16, enabled=args.precision == "bf16", cache_enabled=False
    )


def captured_step(model, example, args):
    """(graph, batch, loss): replaying the graph makes the gradients of the loss of what `batch`,
    (x0, y, t, eps), then holds. The definition launches 100,000 kernels a step.
    """
    process, batch = VPSDE(), [v.clone() for v in example]

    def forward_backward():
        x0, y, t, eps = batch
        with autocast(args):
            loss = denoising_loss(
                model, process, x0, y, pred="noise_pred", t=process.time_from_uniform(t), eps=eps
            ).mean()
        loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        forward_backward()
        model.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = forward_backward()
    return graph, batch, loss


def train(model, variant, data, args):
    """Losses of every step, and seconds."""
    use(variant)
    everything = list(batches(*data, args.batch_size, args.steps, args.seed))
    graph, batch, loss = captured_step(model, everything[0], args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.03, fused=True)
    losses, began = [], time.monotonic()
    for step, example in enumerate(everything):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP)
        for held, value in zip(batch, example, strict=True):
            held.copy_(value)
        graph.replay()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.clone())
        if step % 100 == 0:
            print(f"{variant}: step {step}, loss {loss.item():.4f}", flush=True)
    return torch.stack(losses).tolist(), time.monotonic() - began


@torch.no_grad()
def forward_error(model, variants, data, args):
    """variant -> relative error (Frobenius norm) of a forward pass against float32."""
    x0, y, t, eps = next(batches(*data, args.batch_size, 1, args.seed + 1))
    process = VPSDE()
    _, _, x_t = process.sample(x0, t=process.time_from_uniform(t), eps=eps)
    inputs = x_t, process.model_time(process.time_from_uniform(t)), y
    use("fused")
    for block in model.blocks:
        block.in_fp8 = False
    exact, errors = model.eval()(*inputs), {}
    for variant in variants:
        use(variant)
        for block in model.blocks:
            block.in_fp8 = variant == "fp8"
        with autocast(args):
            out = model(*inputs).float()
        errors[variant] = ((out - exact).norm() / exact.norm()).item()
    return errors


def table(records, windows=10):
    """Markdown: mean losses over windows of steps, and how far each variant is from the first."""
    names = list(records)
    first = records[names[0]]["losses"]
    size = -(-len(first) // windows)
    lines = [
        "| steps | " + " | ".join(names) + " | largest difference |",
        "|---" * (len(names) + 2) + "|",
    ]
    for start in range(0, len(first), size):
        means = [
            sum(records[n]["losses"][start : start + size])
            / len(records[n]["losses"][start : start + size])
            for n in names
        ]
        apart = max(abs(m / means[0] - 1) for m in means)
        end = min(start + size, len(first))
        lines.append(
            f"| {start} - {end - 1} | " + " | ".join(f"{m:.5f}" for m in means)
            + f" | {100 * apart:.2f}% |"
        )  # fmt: skip
    return lines


def single_steps(records):
    """Largest relative difference of one step's loss to the first variant's, over all steps."""
    first, *others = (record["losses"] for record in records.values())
    return max(abs(b / a - 1) for other in others for a, b in zip(first, other, strict=True))


def report(records, errors, args):
    gpu, torch_version = torch.cuda.get_device_name(), torch.__version__
    lines = [
        f"`compare_training.py`: DiM-{args.model}, {args.count} images of 32x32, batch "
        f"{args.batch_size}, {args.steps} steps, {args.precision}, seed {args.seed}; {gpu}, torch "
        f"{torch_version}, commit {args.commit}.", "", *table(records), "",
        f"Largest difference of a single step's loss: {100 * single_steps(records):.2f}%. Seconds: "
        + ", ".join(f"{name} {record['seconds']:.0f}" for name, record in records.items())
        + ". Relative error of a forward pass against float32, after training: "
        + ", ".join(f"{name} {error:.2g}" for name, error in errors.items()) + ".",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, help="a folder of classes")
    parser.add_argument("--variants", default="fused,reference")
    parser.add_argument("--model", choices=list(PRESETS), default="S")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--commit", default=None, help="what was measured; default: git's HEAD")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    args.commit = args.commit or current_commit()

    x, y, classes = load_images(args.images)
    args.count = len(x)
    records = {}
    for variant in args.variants.split(","):
        model = make_model(args.model, classes, variant, args.seed)
        losses, seconds = train(model, variant, (x, y), args)
        records[variant] = {"losses": losses, "seconds": seconds}
        torch.cuda.empty_cache()
    errors = forward_error(model, records, (x, y), args)
    gpu = re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name().lower()).strip("_")
    names = [*records, *(["fp32"] if args.precision == "fp32" else [])]
    path = args.out / f"compare_{'_'.join(names)}_{gpu}"
    args.out.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(records) + "\n")
    path.with_suffix(".md").write_text(report(records, errors, args))
    print(report(records, errors, args))


if __name__ == "__main__":
    main()
