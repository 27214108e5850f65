"""report.html, a run on one page, without scripts and without requests to anywhere."""

import base64
import io
import json
import logging
import shlex
from html import escape
from pathlib import Path

import numpy as np
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
<meta name="viewport" content="width=device-width"><style>{style}</style><h1>{name}</h1>{body}"""


def _draw_curve(points):
    """The SVG of [(step, value), ..], logarithmic where values span a factor of 20."""
    first, last = points[0][0], points[-1][0]
    bins = np.array_split(np.array(points, dtype=float), min(BINS, len(points)))
    x, y = np.stack([part.mean(0) for part in bins]).T
    logarithmic = y.min() > 0 and y.max() > 20 * y.min()
    y, back = (np.log(y), np.exp) if logarithmic else (y, float)
    x, low, span = 56 + 336 * (x - first) / (last - first or 1), y.min(), np.ptp(y) or 1.0
    y = 158 - 150 * (y - low) / span
    line = "L".join(f"{a:.1f},{b:.1f}" for a, b in zip([x[0], *x], [y[0], *y], strict=True))
    ticks = "".join(
        f'<path d="M56,{158 - 150 * up}h336"/><text x="50" y="{162 - 150 * up}" text-anchor="end">'
        f"{back(low + up * span):.3g}</text>"
        for up in (0, 0.5, 1)
    )
    return (
        f'<svg viewBox="0 0 400 180">{ticks}<path class="curve" d="M{line}"/><text x="56" y="176">'
        f'{first:,}</text><text x="392" y="176" text-anchor="end">{last:,}</text></svg>'
    )


def _embed(path):
    file, image = io.BytesIO(), Image.open(path).convert("RGB")
    image.thumbnail((GRID_SIDE, GRID_SIDE))
    image.save(file, "JPEG", quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="samples" src="data:image/jpeg;base64,{data}">'


def _list_pictures(lines, folder):
    """(section, title, text, picture): the curves, and GRIDS of the grids, evenly chosen."""
    for key, title in CURVES.items():  # a value that is not finite is a string
        points = [(x["step"], x[key]) for x in lines if isinstance(x.get(key), (int, float))]
        if points:
            yield "Curves", title, f"{points[-1][1]:.4g}", _draw_curve(points)
    steps = sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdigit())
    for i in np.linspace(0, len(steps) - 1, min(GRIDS, len(steps))).astype(int):
        yield "Samples", "step", f"{steps[i]:,}", _embed(folder / f"{steps[i]}.png")


def _make_table(head, rows):
    rows = ["".join(f"<td>{escape(str(x))}</td>" for x in row) for row in (head, *rows)]
    return f"<table><thead><tr>{'<tr>'.join([f'{rows[0]}</thead>', *rows[1:]])}</table>"


def _show_results(paths):
    """Figures and settings that differ, a column an evaluation, and each setting in a line."""
    results = {path.stem: utils.read_json(path) for path in paths}
    rows = [line.strip("| ").split(" | ") for line in compare(results) if line.startswith("|")]
    settings = [f"<p>{escape(f'{k}: {describe_setting(x)}')}</p>" for k, x in results.items()]
    return _make_table(rows[0], rows[2:]) + "".join(settings) if results else ""


def _show_commands(directory, config):
    newest = max(directory.glob("ckpts/*.ckpt"), key=lambda path: int(path.stem), default="CKPT")
    run, weights = shlex.quote(str(directory)), f"--nnet_path={shlex.quote(str(newest))}"
    commands = f"""python train.py --config={run}/config.json --workdir={run}
# further, once it has ended: --config.train.n_steps={2 * config.train.n_steps}
python sample.py {weights} --out=grid.png
python eval.py {weights}"""
    return f"<pre>{escape(commands)}</pre>"


def _show_config(config):
    """What differs from the config of the repository that is nearest."""
    shipped = {path.name: path for path in Path(common.__file__).parent.glob("[!_]*_*.py")}
    found = {k: utils.config_differences(load_config(str(p)), config) for k, p in shipped.items()}
    nearest = min(found, key=lambda name: len(found[name]))
    rows = [line.replace(": ", " -> ", 1).split(" -> ", 2) for line in found[nearest]]
    said = f"<p>Values that differ from those of the repository's nearest config: {len(rows)}</p>"
    return said + _make_table(["", nearest, "this run"], rows)


def write_report(directory):
    """Write report.html into the run directory `directory` and return its path."""
    directory, log = Path(directory), Path(directory) / "metrics.jsonl"
    if not (directory / "config.json").exists():
        raise utils.UserError(f"{directory} is no run's directory: it has no config.json")
    config = load_config(str(directory / "config.json"))
    about = utils.flatten(utils.read_json(directory / "environment.json"))
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    step = max((line["step"] for line in lines), default=0)
    bad = sum(line.get("outcome") in ("bad", "overflow") for line in lines)
    said = f"Step {step:,} of {config.train.n_steps:,}; not finite: {bad}."
    sections = {"Progress": said, "Curves": "", "Samples": ""}
    for part, title, said, picture in _list_pictures(lines, directory / "samples"):
        sections[part] += f"<figure><figcaption>{title}<b>{said}</b></figcaption>{picture}</figure>"
    sections["Evaluation"] = _show_results(sorted(directory.glob("evaluation*.json")))
    sections["To go on"] = _show_commands(directory, config)
    sections["Config"] = _show_config(config)
    sections["Environment"] = _make_table(["", ""], ((k, str(x)[:300]) for k, x in about.items()))
    body = [f'<h2>{k}</h2><div class="{k}">{x}</div>' for k, x in sections.items() if x]
    name, style = "/".join(directory.absolute().parts[-2:]), Path(__file__).with_suffix(".css")
    page = PAGE.format(name=escape(name), style=style.read_text(), body="\n".join(body))
    with utils.replacing(directory / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return directory / "report.html"


def report_run(directory):
    """write_report at the end of a run: its failure is a line of the log."""
    try:
        write_report(directory)
    except Exception as error:  # of any kind
        logging.getLogger("dim").warning("could not write report.html: %s", error)
