"""Training runs under faults: `python benchmarks/bench_faults.py`, 40 minutes on two CPU cores.

Each fault is done to a real process, on a tiny digits network; afterwards the same command is
started again and must reach, bit for bit, the weights, averages, optimizer state and logged numbers
of an undisturbed run. Counts and seconds go to benchmarks/results/faults_cpu.json and .md.
`--only kills_forked,full_disk` runs some of the parts and keeps the results of the others.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fault_cases as cases  # noqa: E402
import fault_ranks as ranks  # noqa: E402
import faults  # noqa: E402

from libs.runtime import logs  # noqa: E402

STEPS = 300  # of the runs that are killed at random


def summary(rows):
    """What was done: how often, what was lost, how long it took, and the messages."""
    return {
        "faults": len(rows),
        "losses": sum(bool(row["complaints"]) for row in rows),
        "complaints": [text for row in rows for text in row["complaints"]],
        "seconds": max((row["seconds"] for row in rows if row.get("seconds")), default=None),
        "messages": sum(bool(row.get("message")) for row in rows),
    }


def repeat(case, arguments):
    """A case with each of these arguments, as the rows of a part."""
    rows = []
    for values in arguments:
        rows.append(case(*values))
        if rows[-1]["complaints"]:
            print(values[1:], rows[-1], flush=True)
    return summary(rows)


# ---------------------------------------------------------------------------------------------
# Parts: lab, how often -> a summary


def kills(start, lab, **options):
    """Random kills; a fault is a kill."""
    rows = []
    for row in faults.kill_cycles(start, lab.new(), lab.undisturbed, last=STEPS, **options):
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


def kills_forked(lab, count, workers=0):
    config = dict(train__n_steps=STEPS, train__num_workers=workers)
    return kills(lambda at: lab.start(at, config), lab, cycles=count, start_s=2, seed=workers)


def kills_workers(lab, count):
    return kills_forked(lab, count, workers=2)


def kills_command(lab, count):
    def start(workdir):
        words = lab.words(workdir, train__n_steps=STEPS, train__num_workers=2)
        return faults.start_command(words, lab.folder / "output")

    return kills(start, lab, cycles=count, start_s=12, seed=3)


def points(lab, count, template=None):
    """Every change of the disk, one after the other, or `count` of them."""
    rows, config = [], dict(train__n_steps=6, train__keep_last=1)
    for number in range(1, count + 1):
        rows.append(cases.killed_at(lab, number, config, template))
        if not rows[-1]["died"]:
            break
    return summary(rows) | {"faults": sum(row["died"] for row in rows)}


def points_replacing(lab, count):
    """A run whose newest checkpoint is damaged goes on before it, and comes to replace it."""
    workdir, config = lab.new(), dict(train__n_steps=6, train__keep_last=2)
    status, text = lab.start(workdir, config).finish()
    assert status == 0, text
    cases.flip(workdir / "ckpts" / "6.ckpt" / "training.pt", 0.5)
    return points(lab, count, template=workdir)


def checkpoints(lab, count):
    template = lab.stopped_run(lab.new())
    places = [(name, cases.remove, 0) for name in cases.FILES] + cases.random_places(count, seed=0)
    done = repeat(cases.harmed_checkpoint, [(lab, template, *place) for place in places[:count]])
    return done


def deletions(lab, count):
    template = lab.stopped_run(lab.new())
    which = [(lab, template, which) for which in ("newest", "all")]
    return repeat(cases.deleted_checkpoint, which[:count])


def run_files(lab, count):
    template = lab.stopped_run(lab.new())
    names = ("config.json", "environment.json", "metrics.jsonl", "output.log", ".lock")
    return repeat(cases.harmed_run_file, [(lab, template, name) for name in names[:count]])


def full_disk(lab, count):
    """Sizes from 4 KiB, at which nothing fits, to 800, at which the third checkpoint does not."""
    if not cases.can_mount():
        return {"skipped": "mounting a file system needs root on Linux"}
    sizes = [4 + 4 * round(k * 200 / count) for k in range(count)]
    return repeat(cases.full_disk, [(lab, kib) for kib in sizes])


def nan_data(lab, count):
    places = [[5], [9, 10, 22], [0, 1, 35], [12, 13, 14, 15, 16, 17]][:count]
    template = lab.stopped_run(lab.new())
    rows = [cases.nan_batches(lab, place) for place in places]
    return summary([*rows, cases.only_nan(lab, template)])


def worker_deaths(lab, count):
    arguments = [(lab, 2 + k % 8, 1 + k % 2) for k in range(count)]
    once = [cases.killed_worker(*values) for values in arguments]
    stuck, repeated = cases.killed_with_a_stuck_worker, cases.killed_workers_again_and_again
    return summary([*once, stuck(lab), repeated(lab)])


def loggers(lab, count):
    kinds = ("refused", "silent", "error")[:count]
    return repeat(cases.no_network, [(lab, kind) for kind in kinds])


def shards(lab, count):
    how = [("before", 0), ("before", 2), ("while", 2), ("while", 0)][:count]
    return repeat(cases.truncated_shard, [(lab, *values) for values in how])


def ranks_killed(lab, count):
    reference = ranks.undisturbed(lab)
    return repeat(ranks.killed_rank, [(lab, reference, k % 2, 2 + k) for k in range(count)])


def ranks_paused(lab, count):
    reference = ranks.undisturbed(lab)
    return repeat(ranks.paused_rank, [(lab, reference, k % 2, 3 + k) for k in range(count)])


def ranks_frozen(lab, count):
    if importlib.util.find_spec("libs.runtime.watch") is None:
        return {"skipped": "nothing watches the processes here"}
    reference = ranks.undisturbed(lab)
    return repeat(ranks.frozen_rank, [(lab, reference, k % 2, 3 + k) for k in range(count)])


# name -> (what is done, function, how often at most)
PARTS = {
    "kills_forked": ("kill -9 at a random time", kills_forked, 200),
    "kills_workers": ("kill -9 at a random time, two loader workers", kills_workers, 100),
    "kills_command": ("kill -9 of `python train.py ...` at a random time", kills_command, 20),
    "points": ("kill -9 before each change of the disk in a run with two saves", points, 1000),
    "points_replacing": ("the same where a damaged checkpoint is replaced", points_replacing, 1000),
    "checkpoints": ("a file of the newest checkpoint flipped, cut or removed", checkpoints, 40),
    "deletions": ("the newest checkpoint, or all, deleted", deletions, 2),
    "run_files": ("another file of the run directory emptied", run_files, 5),
    "full_disk": ("file systems of 4 to 800 KiB, full", full_disk, 16),
    "nan_data": ("NaN images, some or all", nan_data, 4),
    "worker_deaths": ("kill -9 of loader workers", worker_deaths, 4),
    "loggers": ("wandb's server down, silent or broken; TensorBoard's folder taken", loggers, 3),
    "shards": ("a shard of cached latents cut short", shards, 4),
    "ranks_killed": ("kill -9 of one of two processes", ranks_killed, 2),
    "ranks_paused": ("one of two processes frozen for 8 s", ranks_paused, 2),
    "ranks_frozen": ("one of two processes frozen for good, DIM_TIMEOUT_S=10", ranks_frozen, 2),
}


# ---------------------------------------------------------------------------------------------
# Results


def table(parts):
    lines = [
        "| fault | how often | lost or wrong | longest, s | runs that ended with a sentence |",
        "|---|---|---|---|---|",
    ]
    for name in PARTS:
        part = parts.get(name, {})
        if "faults" in part:
            seconds = "" if part["seconds"] is None else f"{part['seconds']:.0f}"
            lines.append(
                f"| {part['what']} | {part['faults']} | {part['losses']} | {seconds} | "
                f"{part['messages'] or ''} |"
            )
    return lines


def report(results):
    """The lines of the .md file."""
    parts, environment = results["parts"], results["environment"]
    cycles = [part for part in parts.values() if "inside_a_save" in part]
    done = [part for part in parts.values() if "faults" in part]
    return [
        f"`bench_faults.py`: {', '.join(environment['devices'])}, {os.cpu_count()} cores, torch "
        f"{environment['packages']['torch']}; {sum(part['took_s'] for part in done) / 60:.0f} "
        f"minutes. {sum(part['faults'] for part in done)} faults, of them "
        f"{sum(part['faults'] for part in cycles)} kills at random times "
        f"({sum(part['inside_a_save'] for part in cycles)} inside a save); "
        f"{sum(part['losses'] for part in done)} lost or wrong. Lost or wrong is whatever the same "
        "command, started again, does not bring to the bits of an undisturbed run. Seconds are "
        "from the start, or from a fault that comes later, to the end of the run or its sentence, "
        "imports included where the command itself was started.",
        "",
        *table(parts),
    ]


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
    environment = logs.environment()
    results["environment"] = {key: environment[key] for key in ("devices", "packages", "python")}
    with tempfile.TemporaryDirectory() as temporary, faults.Warm() as warm:
        undisturbed = undisturbed_run(warm, Path(temporary))
        for name in args.only.split(","):
            what, function, count = PARTS[name]
            folder, began = Path(temporary) / name, time.monotonic()
            folder.mkdir()
            lab = cases.Lab(warm, folder, undisturbed)
            part = {"what": what, **function(lab, max(1, round(count * args.scale)))}
            part |= {"took_s": round(time.monotonic() - began, 1), "commit": environment["commit"]}
            results["parts"][name] = part
            args.out.write_text(json.dumps(results, indent=1) + "\n")
            args.out.with_suffix(".md").write_text("\n".join(report(results)) + "\n")
            print(name, json.dumps(part), flush=True)


if __name__ == "__main__":
    main()
