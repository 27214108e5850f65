"""Faults done to one of two processes of a run under `accelerate launch`, gloo on the CPU; the
functions are as those of fault_cases.
"""

import os
import signal
import time

import faults
from fault_cases import LAST


def start(lab, workdir, slow=False, **extra):
    words = lab.words(workdir, train__grid_samples=0, train__num_workers=1)
    script = "tests/slow_train" if slow else "train"
    return faults.start_command(
        words, lab.folder / "output-ranks", script=script, num_processes=2, **extra
    )


def process_of(run, rank):
    """The process of a rank; its workers have the same environment, and it for a parent."""
    ranks = [p for p in run.children() if p.environ().get("RANK") == str(rank)]
    parents = {process.pid for process in ranks}
    return next(process for process in ranks if process.ppid() not in parents)


def undisturbed(lab):
    """Two processes add gradients in another order than one, so this is a run of its own."""
    workdir = lab.new()
    run = start(lab, workdir)
    status, text = run.finish()
    assert status == 0, text
    return faults.Undisturbed(workdir)


def goes_on(lab, workdir, reference):
    status, text = start(lab, workdir).finish()
    said = [] if status == 0 else [f"status {status}: {text[-2000:]}"]
    return said + reference.complaints(workdir, ended=LAST)


def started(lab, step, **extra):
    """(run directory, a run of two processes that has come to `step`)."""
    workdir = lab.new()
    run = start(lab, workdir, slow=True, **extra)
    faults.wait_for_step(run, workdir, step)
    return workdir, run


def ended(run, processes, seconds):
    """Complaints unless the run and all of its processes end within so long."""
    status = run.wait(seconds)
    if status is None:
        os.kill(run.pid, signal.SIGKILL)
        return [f"no end within {seconds} s"]
    try:
        faults.wait_until(lambda: not any(map(faults.alive, processes)), faults.ORPHANS_S)
    except AssertionError:
        return ["a process outlives the run"]
    return [] if status else ["the run says that all is well"]


def killed_rank(lab, reference, rank, step):
    """kill -9 of one process: the launcher ends the other."""
    workdir, run = started(lab, step)
    processes, began = run.children(), time.monotonic()
    process_of(run, rank).kill()
    said = ended(run, processes, 60)
    seconds = time.monotonic() - began
    return dict(complaints=said + goes_on(lab, workdir, reference), seconds=seconds)


def paused_rank(lab, reference, rank, step, pause_s=8):
    """One process is frozen for a while: the other waits, and nothing is lost."""
    workdir, run = started(lab, step)
    frozen = process_of(run, rank)
    frozen.suspend()
    time.sleep(pause_s)
    before = faults.last_step(workdir)
    frozen.resume()
    status, text = run.finish()
    said = [] if status == 0 else [f"status {status}: {text[-2000:]}"]
    said += [] if before <= step + 3 else [f"step {before} was made with a frozen process"]
    return dict(complaints=said + reference.complaints(workdir, ended=LAST))


def frozen_rank(lab, reference, rank, step, timeout_s=10):
    """One process is frozen for good: the other names it within three times the timeout."""
    workdir, run = started(lab, step, DIM_TIMEOUT_S=str(timeout_s))
    processes, began = run.children(), time.monotonic()
    process_of(run, rank).suspend()
    said = ended(run, processes, 60 + 3 * timeout_s)
    seconds = time.monotonic() - began
    lines = [line for line in faults.error_lines(run.text()) if "no process got on" in line]
    said += [] if len(lines) == 1 and f"rank {rank} is not answering" in lines[0] else [
        f"the frozen rank {rank} is not named: {faults.error_lines(run.text())}"
    ]  # fmt: skip
    said += goes_on(lab, workdir, reference)
    return dict(complaints=said, seconds=seconds, message="".join(lines))
