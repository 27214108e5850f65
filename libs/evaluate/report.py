"""What a result says of itself: one line for a paper's table, means of repeats, differences."""

from pathlib import Path

import numpy as np

import utils


def summarize(found):
    """The figures of one evaluation; of several, their means, with `spread`: {figure: standard
    deviation} and `each`: all figures.
    """
    if len(found) == 1:
        return found[0]
    flat = [utils.flatten(figures) for figures in found]
    keys = [key for key, value in flat[0].items() if type(value) is float]
    numbers = {key: [figures[key] for figures in flat] for key in keys}
    means = {key: float(np.mean(values)) for key, values in numbers.items()}

    def fill(figures, prefix=""):
        return {
            key: fill(value, f"{prefix}{key}.") if isinstance(value, dict)
            else means.get(prefix + key, value)
            for key, value in figures.items()
        }  # fmt: skip

    spread = {key: float(np.std(values, ddof=1)) for key, values in numbers.items()}
    return {**fill(found[0]), "spread": spread, "each": found}


def _describe_sampling(spec):
    """Of a network's images."""
    scale, internal = spec["guidance_scale"], spec["internal_scale"]
    yield f"{spec['labels'] or 'no'} labels" if spec["vis_label"] is None else "one label"
    yield f"{spec['algorithm']}, {spec['steps']} steps, {spec['network_calls']} network calls"
    for name, value, interval in (
        ("guidance", scale, spec["guidance_interval"]),
        ("internal guidance", internal, spec["internal_interval"]),
    ):
        where = f" in {tuple(interval)}" if interval else ""
        yield f"{name} {value:g} (w = {1 + value:g}){where}" if value else f"no {name}"
    yield f"average {Path(spec['weights']['file']).stem} {spec['weights']['sha256'][:8]}"
    yield f"precision {spec['precision']}"


def describe_setting(spec):
    """The setting of a result, a dict as its json file has it, in one line."""
    parts = [f"n = {spec['n']:,}" + f" x {spec['repeats']} seeds" * (spec["repeats"] > 1)]
    if "images" in spec:
        parts.append(f"pictures of {spec['images']['file']}, {spec['images']['preprocessing']}")
    else:
        parts.extend(_describe_sampling(spec))
    if real := spec["statistics"]:
        name = f"{real['file']} {real['sha256'][:8]}" if real["file"] else "the data set"
        parts.append(f"against {name} ({real['origin']})")
    return "; ".join([*parts, f"features {', '.join(spec['extractors']) or 'none'}"])
