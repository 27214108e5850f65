"""report.html, a run on one page, without scripts and without requests to anywhere."""

import base64
import io
import json
import logging
import math
import shlex
from html import escape
from pathlib import Path

from PIL import Image

import utils
from configs import common
from libs.evaluate.report import compare, describe_setting
from libs.runtime import load_config

CURVES = {  # key of metrics.jsonl -> title
    "loss": "Loss", "grad_norm": "Gradient norm", "frechet_distance": "Frechet distance",
    "lr": "Learning rate", "img_s": "Images a second",
}  # fmt: skip
BINS = 300  # of a curve, which goes through their means
GRIDS, GRID_SIDE = 6, 720  # grids of samples, and their pixels: at most 3 MB of JPEG
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>
<meta name="viewport" content="width=device-width"><style>{style}</style><h1>{name}</h1>
{body}</html>
"""


def _draw_curve(points):
    """The SVG of [(step, value), ..], logarithmic where values span a factor of 20."""
    first, last, size = points[0][0], points[-1][0], math.ceil(len(points) / BINS)
    bins = [zip(*points[i : i + size], strict=True) for i in range(0, len(points), size)]
    points = [(sum(steps) / len(steps), sum(values) / len(values)) for steps, values in bins]
    low, high = (f(value for _, value in points) for f in (min, max))
    scale, back = (math.log, math.exp) if low > 0 and high > 20 * low else (float, float)
    bottom, span, across = scale(low), scale(high) - scale(low) or 1, 336 / (last - first or 1)
    places = [
        f"{56 + (step - first) * across:.1f},{158 - 150 * (scale(value) - bottom) / span:.1f}"
        for step, value in points
    ]
    drawn = [
        f'<path d="M56,{158 - 150 * up}h336"/><text x="50" y="{162 - 150 * up}" text-anchor="end">'
        f"{back(bottom + up * span):.3g}</text>"
        for up in (0, 0.5, 1)
    ]
    drawn += [f'<path class="curve" d="M{places[0]}L{" ".join(places)}"/><text x="56" y="176">']
    drawn += [f'{first:,}</text><text x="392" y="176" text-anchor="end">{last:,}</text>']
    return f'<svg viewBox="0 0 400 180" role="img">{"".join(drawn)}</svg>'


def _embed(path):
    file, image = io.BytesIO(), Image.open(path).convert("RGB")
    image.thumbnail((GRID_SIDE, GRID_SIDE))
    image.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="samples" src="data:image/jpeg;base64,{data}">'


def _show(title, parts, kind="cards"):
    return f'<h2>{title}</h2><div class="{kind}">{"".join(parts)}</div>' if parts else ""


def _make_card(title, said, content):
    return f"<figure><figcaption>{title}<b>{said}</b></figcaption>{content}</figure>"


def _make_table(rows):
    """Of plain texts, whose first row is the head."""
    rows = ["".join(f"<td>{escape(str(x))}</td>" for x in row) for row in rows]
    return f"<table><thead><tr>{'<tr>'.join([f'{rows[0]}</thead>', *rows[1:]])}</table>"


def _show_pictures(lines, folder):
    """The curves, and GRIDS of the grids, evenly chosen, the first and the last among them."""
    paths = {int(path.stem): path for path in folder.glob("*.png") if path.stem.isdigit()}
    steps, n, curves = sorted(paths), min(GRIDS, len(paths)), []
    for key, title in CURVES.items():  # a value that is not finite is a string
        points = [(x["step"], x[key]) for x in lines if isinstance(x.get(key), (int, float))]
        curves += [(title, f"{points[-1][1]:.4g}", _draw_curve(points))] if points else []
    chosen = [steps[i * (len(steps) - 1) // max(1, n - 1)] for i in range(n)]
    grids = [("step", f"{step:,}", _embed(paths[step])) for step in chosen]
    sections = ("Curves", curves), ("Samples", grids)
    return "".join(_show(title, [_make_card(*x) for x in cards]) for title, cards in sections)


def _show_results(paths):
    results = {path.stem: utils.read_json(path) for path in paths}
    rows = [line.strip("| ").split(" | ") for line in compare(results) if line.startswith("|")]
    parts = [_make_table([rows[0], *rows[2:]])] if results else []
    parts += [f"<p>{escape(f'{k}: {describe_setting(x)}')}</p>" for k, x in results.items()]
    return _show("Evaluation", parts, "")


def _show_commands(directory, config):
    newest = max(directory.glob("ckpts/*.ckpt"), key=lambda path: int(path.stem), default="CKPT")
    run, weights = shlex.quote(str(directory)), f"--nnet_path={shlex.quote(str(newest))}"
    commands = f"""python train.py --config={run}/config.json --workdir={run}
# further, once it has ended: --config.train.n_steps={2 * config.train.n_steps}
python sample.py {weights} --out=grid.png
python eval.py {weights} --workdir={run}"""
    return _show("To go on", [f"<pre>{escape(commands)}</pre>"], "")


def _show_config(config):
    """What differs from the config of the repository that is nearest."""
    shipped = {path.stem: path for path in Path(common.__file__).parent.glob("[!_]*_*.py")}
    found = {k: utils.config_differences(load_config(str(p)), config) for k, p in shipped.items()}
    nearest = min(found, key=lambda name: len(found[name]))
    rows = [line.replace(": ", " -> ", 1).split(" -> ", 2) for line in found[nearest]]
    said = "<p>What the run changes against the config of the repository that is nearest to it.</p>"
    return _show("Config", [said, _make_table([["", f"{nearest}.py", "this run"], *rows])], "")


def write_report(directory):
    """Write report.html into the run directory `directory` and return its path."""
    directory = Path(directory)
    config = load_config(str(directory / "config.json"))
    log, about = directory / "metrics.jsonl", utils.read_json(directory / "environment.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    bad = sum(line.get("outcome") in ("bad", "overflow") for line in lines)
    step = max((line["step"] for line in lines), default=0)
    about = [["", ""], *((key, str(x)[:300]) for key, x in utils.flatten(about).items())]
    body = [
        f"<p>Step {step:,} of {config.train.n_steps:,}. Steps that were not finite: {bad}.</p>",
        _show_pictures(lines, directory / "samples"),
        _show_results(sorted(directory.glob("evaluation*.json"))),
        _show_commands(directory, config), _show_config(config),
        _show("Environment", [_make_table(about)], ""),
    ]  # fmt: skip
    name, style = "/".join(directory.absolute().parts[-2:]), Path(__file__).with_suffix(".css")
    with utils.replacing(directory / "report.html") as temporary:
        page = PAGE.format(name=escape(name), style=style.read_text(), body="\n".join(body))
        temporary.write_text(page, encoding="utf-8")
    return directory / "report.html"


def report_run(directory):
    """write_report at the end of a run: its failure is a line of the log."""
    try:
        write_report(directory)
    except Exception as error:  # of any kind
        logging.getLogger("dim").warning("could not write report.html: %s", error)
