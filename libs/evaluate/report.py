"""What a result says of itself: one line for a paper's table, means of repeats, differences."""

from pathlib import Path

import numpy as np

import utils
from libs.evaluate.metrics import METRICS


def summarize(found):
    """The figures of one evaluation; of several, flat, their means, `spread` and `each`."""
    flat = [utils.flatten(figures) for figures in found]
    if len(found) == 1:
        return found[0]
    numbers = {k: [x[k] for x in flat] for k, value in flat[0].items() if type(value) is float}
    spread = {key: float(np.std(values, ddof=1)) for key, values in numbers.items()}
    means = {key: float(np.mean(values)) for key, values in numbers.items()}
    return {**flat[0], **means, "spread": spread, "each": found}


def _describe_guidance(spec, name, key):
    scale, interval = spec[f"{key}_scale"], spec[f"{key}_interval"]
    where = f" in {tuple(interval)}" if interval else ""
    return f"{name} {scale:g} (w = {1 + scale:g}){where}" if scale else f"no {name}"


def describe_setting(spec):
    """The setting of a result, a dict as its json file has it, in one line."""
    parts = [f"n = {spec['n']:,}" + f" x {spec['repeats']} seeds" * (spec["repeats"] > 1)]
    if stored := spec.get("images"):
        parts += [f"pictures of {stored['file']}", f"preprocessing {stored['preprocessing']}"]
    else:
        one, weights = spec["vis_label"] is not None, spec["weights"]
        parts += [
            "one label" if one else f"{spec['labels'] or 'no'} labels",
            f"{spec['algorithm']}, {spec['steps']} steps, {spec['network_calls']} network calls"
            + (f" at the cost of {spec['network_cost']:g}" if spec.get("reuse") else ""),
            _describe_guidance(spec, "guidance", "guidance"),
            _describe_guidance(spec, "internal guidance", "internal"),
            f"average {Path(weights['file']).stem} {weights['sha256'][:8]}",
            f"precision {spec['precision']}",
        ]
    if real := spec["statistics"]:
        name = f"{real['file']} {real['sha256'][:8]}" if real["file"] else "the data set"
        parts.append(f"against {name} ({real['origin']})")
    return "; ".join([*parts, f"features {', '.join(spec['extractors']) or 'none'}"])


# What a figure does not depend on, and what no table holds.
ASIDE = ("config", "environment", "images_made_now", "img_s", "figures_s", "ranks", "each")
ASIDE += ("metrics", "mini_batch_size", "pictures")


def compare(results):
    """{name: result, as in its json file} -> lines of a Markdown table, a column a result: figures,
    then every setting that differs; last a sentence that names these.
    """
    known = {*METRICS, "spread"}.union(*(result.get("metrics", ()) for result in results.values()))
    columns, figures, differing = [utils.flatten(result) for result in results.values()], [], []
    for key in dict.fromkeys(key for column in columns for key in column):
        section, values = key.split(".")[0], [column.get(key, "absent") for column in columns]
        texts = [f"{x:.5g}" if isinstance(x, float) else str(x)[:60] for x in values]
        if section in known:
            figures.append([key, *texts])
        elif len(set(map(repr, values))) > 1 and not (section in ASIDE or key.endswith(".file")):
            differing.append([key, *texts])
    head = [["figure", *results], ["---"] * (1 + len(results))]
    yield from (f"| {' | '.join(row)} |" for row in [*head, *figures, *differing])
    names = ", ".join(row[0] for row in differing)
    yield f"\nThe settings differ: {names}." if names else "\nThe settings are the same."
