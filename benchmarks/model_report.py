"""The records of bench_model.py: merged into one file a GPU, as a Markdown table, as a summary, as
a picture.
"""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
WHAT = ("model", "task", "pixels", "batch", "precision", "compiled", "graph")
TRANSFORMERS = ("U-ViT-H", "DiT-XL/2")


def result_path(folder, gpu):
    """model_<gpu>.json in `folder`, for the name that CUDA gives the GPU."""
    return Path(folder) / f"model_{re.sub(r'[^a-z0-9]+', '_', gpu.lower()).strip('_')}.json"


def load(path):
    """The records at `path`; else those that the repository has of the same GPU; else none."""
    for candidate in (path, RESULTS / path.name):
        if candidate.exists():
            return json.loads(candidate.read_text(encoding="utf-8"))
    return []


def merged(old, new):
    """`old` and `new` records, a new one in place of an old one of the same case and commit."""
    keys = (*WHAT, "gpu", "commit")
    replaced = {tuple(r[k] for k in keys) for r in new}
    return [r for r in old if tuple(r[k] for k in keys) not in replaced] + new


def latest(records):
    """One record a case: the one that was measured last."""
    return list({tuple(r[k] for k in WHAT): r for r in records}.values())


def write(path, records):
    """`path` and the table beside it; a file is replaced whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: json.dumps(records, indent=1) + "\n", path.with_suffix(".md"): table(records)}
    for target, text in texts.items():
        temporary = target.with_name(target.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)


def how(record):
    """'eager', 'graph', 'compile' or 'compile, graph'."""
    words = [word for word in ("compiled", "graph") if record[word]]
    return ", ".join(words).replace("compiled", "compile") or "eager"


def table(records):
    """Markdown, the latest record of each case, by task, resolution and batch."""
    rows = latest(records)
    tasks = ("train", "forward", "sample")
    rows.sort(key=lambda r: (tasks.index(r["task"]), r["pixels"], -r["batch"], r["model"], how(r)))
    peaks = sorted({r["peak_tflops"] for r in rows})
    lines = [
        f"`bench_model.py`: {rows[0]['gpu']}, torch {', '.join(sorted({r['torch'] for r in rows}))}"
        f", bf16 products of 8192 x 8192 matrices {peaks[0]:.0f} to {peaks[-1]:.0f} TFLOP/s. "
        "Median of steps that follow one another without the host waiting, timed by events. "
        "MFU: FLOPs of all matrix products, attention included, times 3 in training, over time and "
        "that peak (fp8 too); limit: what they would take at the peak, its ratio the time over it. "
        "sample: ms of one solver step on `batch` images, guidance in one batch, and images of 50 "
        "steps a second. GiB: max_memory_allocated. compile: in brackets the first call, with "
        "torch.compile's work.", "",
        "| model | task | px | batch | precision | how | median ms | 10-90% | img/s | GiB | MFU | "
        "limit ms | ratio | commit |",
        "|---" * 14 + "|",
    ]  # fmt: skip
    lines += ["| " + " | ".join(cells(r)) + " |" for r in rows]
    return "\n".join(lines) + "\n"


def cells(r):
    names = [str(r[k]) for k in ("model", "task", "pixels", "batch", "precision")]
    low, high = r["spread"]
    memory = "-" if r["gib"] is None else f"{r['gib']:.1f}"
    figures = [f"{r['ms']:.2f}", f"{low:.2f} - {high:.2f}", f"{r['img_s']:.4g}", memory]
    limit = [f"{r['mfu']:.1%}", f"{r['limit_ms']:.2f}", f"{r['ms'] / r['limit_ms']:.2f}"]
    first = f" ({r['compile_s']:.0f} s)" if r["compile_s"] and not r["graph"] else ""
    return [*names, how(r) + first, *figures, *limit, r["commit"]]


# ---------------------------------------- summary

MARKS = ("<!-- bench_model.py --draw -->", "<!-- end -->")
COLUMNS = (
    ("DiM-S", "bf16"), ("DiM-L", "bf16"), ("DiM-H", "bf16"), ("DiM-H", "fp8"), ("U-ViT-H", "bf16"),
    ("DiT-XL/2", "bf16"),
)  # fmt: skip
ROWS = (  # (task, pixels, batch)
    *(("train", *shape) for shape in ((32, 128), (256, 64), (512, 16))),
    ("forward", 256, 64), *(("forward", pixels, 2) for pixels in (256, 512, 1024, 1536, 2048)),
    ("sample", 256, 32),
)  # fmt: skip


def fastest(records, model, precision, row):
    """The latest records' fastest of all ways, or None."""
    same = [r for r in latest(records) if (r["model"], r["precision"]) == (model, precision)]
    same = [r for r in same if (r["task"], r["pixels"], r["batch"]) == row]
    return min(same, key=lambda r: r["ms"], default=None)


def shown(value):
    """Three digits."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def summary(records):
    """Markdown of a few rows, for the README: each model's fastest way."""
    names = [model if precision == "bf16" else f"{model}, fp8" for model, precision in COLUMNS]
    lines = ["| " + " | ".join(["", *names]) + " |", "|" + "---|" * (1 + len(names))]
    for row in ROWS:
        task, pixels, batch = row
        unit = "ms" if (task, batch) == ("forward", 2) else "img/s"
        found = [fastest(records, *column, row) for column in COLUMNS]
        key = "ms" if unit == "ms" else "img_s"
        cells = ["-" if r is None else shown(r[key]) for r in found]
        name = f"{task}, {pixels} px, batch {batch}, {unit}"
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def write_summary(records, path):
    """Replace what stands between MARKS in a Markdown file; ValueError if they are not there."""
    text = path.read_text(encoding="utf-8")
    if any(text.count(mark) != 1 for mark in MARKS):
        raise ValueError(f"{path} has not the lines {MARKS[0]} and {MARKS[1]} once each")
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = f"{before}{MARKS[0]}\n{summary(records)}\n{MARKS[1]}{after}"
    path.write_text(text, encoding="utf-8")


# ---------------------------------------- picture


def curves(records, batch=2):
    """{model: [(pixels, img/s)]} of forward passes in bf16, each the fastest way of running it."""
    best = {}
    for r in latest(records):
        if r["task"] == "forward" and r["batch"] == batch and r["precision"] == "bf16":
            key = r["model"], r["pixels"]
            best[key] = max(best.get(key, 0), r["img_s"])
    lines = {}
    for (model, pixels), img_s in sorted(best.items()):
        lines.setdefault(model, []).append((pixels, img_s))
    return lines


def draw(records, path):
    """Throughput against resolution, both logarithmic, into the PNG file `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for model, points in curves(records).items():
        style = "--s" if model in TRANSFORMERS else "-o"
        axes.plot(*zip(*points, strict=True), style, label=model)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({pixels for points in curves(records).values() for pixels, _ in points})
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
    axes.set(xlabel="pixels a side", ylabel="images a second, forward, batch 2, bf16")
    axes.set_title(f"{records[-1]['gpu']}, torch {records[-1]['torch']}; each its fastest way")
    axes.grid(True, alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
