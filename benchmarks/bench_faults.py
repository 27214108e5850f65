"""Training runs under faults: `python benchmarks/bench_faults.py`, 20 minutes on two CPU cores.

Each fault is done to a real process, on a tiny digits network; afterwards the same command is
started again and must reach, bit for bit, the weights, averages, optimizer state and logged numbers
of an undisturbed run. Counts and seconds go to benchmarks/results/faults_cpu.json and .md.
`--only kills_forked,disk` runs some of the parts and keeps the results of the others.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import faults  # noqa: E402

from libs import run  # noqa: E402

STEPS = 300  # of the runs that are killed at random


def summary(rows):
    """One line of the table from what was done: how often, what was lost, how long it took."""
    return {
        "faults": len(rows),
        "losses": sum(bool(row["complaints"]) for row in rows),
        "complaints": [text for row in rows for text in row["complaints"]],
        "seconds": max((row["seconds"] for row in rows if row.get("seconds")), default=None),
    }


def kills(start, folder, undisturbed, **options):
    """Random kills; a fault is a kill."""
    rows = []
    for row in faults.kill_cycles(start, folder / "run", undisturbed, last=STEPS, **options):
        rows.append(row)
        if row["complaints"] or len(rows) % 25 == 0:
            print(len(rows), row, flush=True)
    killed = [row for row in rows if row["killed"]]
    return summary(rows) | {
        "faults": len(killed),
        "inside_a_save": sum(row["saving"] for row in killed),
        "before_a_new_step": sum(row["made"] == 0 for row in killed),
        "runs_finished": len(rows) - len(killed),
    }


def kills_forked(warm, folder, undisturbed, count, workers=0):
    def start(workdir):
        words = faults.arguments(workdir, train__n_steps=STEPS, train__num_workers=workers)
        return warm.start(words, folder / "output")

    return kills(start, folder, undisturbed, cycles=count, delay_s=3, seed=workers)


def kills_workers(warm, folder, undisturbed, count):
    return kills_forked(warm, folder, undisturbed, count, workers=2)


def kills_command(warm, folder, undisturbed, count):
    """The command as users type it, imports and all."""
    def start(workdir):
        words = faults.arguments(workdir, train__n_steps=STEPS, train__num_workers=2)
        return faults.start_command(words, folder / "output")

    return kills(start, folder, undisturbed, cycles=count, delay_s=16, seed=3)


# name -> (what is done, function, how often)
PARTS = {
    "kills_forked": ("kill -9 at a random time, no data loader workers", kills_forked, 400),
    "kills_workers": ("kill -9 at a random time, two data loader workers", kills_workers, 400),
    "kills_command": ("kill -9 of `python train.py ...` at a random time", kills_command, 40),
}


def undisturbed_run(warm, folder):
    words = faults.arguments(
        folder / "undisturbed", train__n_steps=STEPS, train__num_workers=0, train__keep_last=1000
    )
    status, text = warm.start(words, folder / "undisturbed.txt").finish()
    assert status == 0, text
    return faults.Undisturbed(folder / "undisturbed")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/faults_cpu.json")
    parser.add_argument("--scale", type=float, default=1.0, help="of how often each fault is done")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {"parts": {}}
    results["environment"] = run.environment()
    with tempfile.TemporaryDirectory() as temporary, faults.Warm() as warm:
        undisturbed = undisturbed_run(warm, Path(temporary))
        for name in args.only.split(","):
            what, function, count = PARTS[name]
            folder, began = Path(temporary) / name, time.monotonic()
            folder.mkdir()
            part = function(warm, folder, undisturbed, max(1, round(count * args.scale)))
            part = {"what": what, **part, "took_s": round(time.monotonic() - began, 1)}
            results["parts"][name] = part
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            print(name, json.dumps(part), flush=True)


if __name__ == "__main__":
    main()
