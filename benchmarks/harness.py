"""What the benchmarks share: time on a device, records in benchmarks/results, Markdown tables."""

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project runs from its checkout

import torch  # noqa: E402

from libs.runtime import environment  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"


def mark(device):
    """A point in time: an event in the GPU's stream, or the host's clock."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start, end):
    """Between two marks that have passed."""
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def time_in_a_row(call, device, repeats):
    """Milliseconds of each call; the host waits for the device after the last call only."""
    marks = [mark(device)]
    for _ in range(repeats):
        call()
        marks.append(mark(device))
    if device == "cuda":
        torch.cuda.synchronize()
    return [milliseconds(*pair) for pair in itertools.pairwise(marks)]


def time_apart(call, device, repeats, prepare=lambda: None):
    """Sorted milliseconds of each call; prepare() runs before each, untimed."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        prepare()
        times += time_in_a_row(call, device, 1)
    return sorted(times)


def summarize(times):
    """{median 'ms', 'spread' [10th, 90th percentile]} of sorted milliseconds."""
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    return {"ms": round(statistics.median(times), 4), "spread": [round(low, 4), round(high, 4)]}


def device_name(device):
    return torch.cuda.get_device_name() if device == "cuda" else environment()["devices"][0]


def describe_setting(device, commit=None):
    """What every record says of its machine and code."""
    commit = commit or environment()["commit"][:7]
    return {"gpu": device_name(device), "torch": torch.__version__, "commit": commit}


def result_path(folder, subject, device="cuda"):
    """<subject>_<gpu>.json or <subject>_cpu.json in `folder`."""
    name = device_name(device) if device == "cuda" else "cpu"
    return Path(folder) / f"{subject}_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}.json"


def load(path):
    """The records at `path`; else the repository's of the same name; else none."""
    found = next((p for p in (path, RESULTS / path.name) if p.exists()), None)
    return json.loads(found.read_text(encoding="utf-8")) if found else []


def merge(old, new, keys):
    """`old` and `new` records; a new record replaces the old record with the same `keys`."""
    replaced = {tuple(r.get(k) for k in keys) for r in new}
    return [r for r in old if tuple(r.get(k) for k in keys) not in replaced] + new


def write(path, records, text):
    """The records at `path` and the table `text` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")


def make_table(columns, rows):
    """A Markdown table; rows: sequences of cells."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"


def make_parser(description):
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose line holds this; or hold: the few "
                        "cases that a change of structure must not slow down")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--commit", help="what is measured; default: git's HEAD")
    return parser


def is_selected(case, only, hold):
    """Whether the line `case` is measured: --only=hold selects the lines of `hold`, any other
    --only the lines that hold its text."""
    return case in hold if only == "hold" else only.lower() in case.lower()
