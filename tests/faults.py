"""Runs that meet with faults: started in milliseconds, killed, and held against an undisturbed one.

A warm process imports everything once and forks the runs: each is a process of its own, in a
session of its own, that does what `python train.py ...` does after its imports.
"""

import contextlib
import copy
import functools
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import runs

# As runs.TINY, and faster: milliseconds a step, a save every third of them.
SMALL = dict(
    nnet__depth=3, train__batch_size=4, train__save_interval=3, train__keep_last=2,
    train__eval_interval=10, train__grid_samples=2, sample__sample_steps=1,
)  # fmt: skip
WAIT_S = 240
ORPHANS_S = 20  # data loader workers look for their dead parent every 5 s


def arguments(workdir, **changes):
    """The command line of a small run in `workdir`."""
    return runs.arguments(workdir, **{**SMALL, **changes})


# ---------------------------------------------------------------------------------------------
# Faults inside a run, by name: what the forked process does before it trains


def on_disk_change(folder, action):
    """Call action() before each change of the disk below `folder` that Python makes."""
    changing = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}

    def hook(event, args):
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wa+x")
        if (event in changing or writes) and str(args[0]).startswith(folder):
            action()

    sys.addaudithook(hook)
    fsync = os.fsync

    def watched(descriptor):
        action()
        return fsync(descriptor)

    os.fsync = watched


def die_at(count, folder):
    """kill -9 before the count-th change of the disk; how many there were is in <folder>.changes
    of a run that came to its end.
    """
    seen, main = [], os.getpid()

    def action():
        if os.getpid() == main:
            seen.append(1)
            if len(seen) == count:
                os.kill(main, signal.SIGKILL)

    on_disk_change(folder, action)


def nan_images(indices):
    """These images of the digits are NaN, as a broken file can be."""
    from datasets import Digits

    read, broken = Digits._read, set(indices)

    def bad(self, epoch, index):
        image, source = read(self, epoch, index)
        return image * float("nan") if index in broken else image, source

    Digits._read = bad


def slow(seconds):
    """A pause in each step, so that a fault hits the step it is meant for."""
    from libs.train import loop

    update = loop.update

    def slow_update(*args):
        time.sleep(seconds)
        return update(*args)

    loop.update = slow_update


def stuck(indices):
    """Reading one of these images does not come back, as on a network file system that is gone."""
    from datasets import Digits

    read = Digits._read

    def stuck_read(self, epoch, index):
        time.sleep(3600 if index in indices else 0)
        return read(self, epoch, index)

    Digits._read = stuck_read


FAULTS = {f.__name__: f for f in (die_at, nan_images, slow, stuck)}


# ---------------------------------------------------------------------------------------------
# The warm process


def serve():
    """Requests on stdin, a JSON object a line, each answered by a line; never returns in the
    parent before stdin ends.
    """
    from libs.runtime import flags

    scripts = {name: importlib.import_module(name) for name in ("train", "train_ldm_discrete")}
    _prepare()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], request["seconds"])
        else:
            sys.stdout.flush()
            answer = os.fork()
            if answer == 0:
                script = scripts[request["script"]]
                _become_a_run(request)
                flags.run_main(script.main, script.FLAGS)
                return
        print(json.dumps(answer), flush=True)


def _prepare():
    """What a run does first and waits longest for, so that its forks have it."""
    import torch
    import torchvision.utils  # noqa: F401

    from datasets import get_dataset
    from libs.model.build import build_model
    from libs.runtime import logs

    get_dataset("digits")
    logs.environment = functools.partial(copy.deepcopy, logs.environment())

    torch.set_num_threads(1)
    nnet = dict(name="dim", input_size=8, in_channels=1, dim=16, depth=3, num_classes=10)
    model = build_model({**nnet, "mamba": {"d_state": 16, "d_conv": 2, "expand": 2}})
    x, y = torch.zeros(1, 1, 8, 8), torch.zeros(1, dtype=torch.long)
    model(x, torch.zeros(1), y).sum().backward()


def _become_a_run(request):
    os.setsid()
    sys.argv = [f"{request['script']}.py", *request["words"]]
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in (nothing, 0), (output, 1), (output, 2):
        os.dup2(source, target)
    for name, value in request["faults"].items():
        FAULTS[name](**value)


def _wait(pid, seconds):
    """The exit status of a fork, as subprocess has them, or None after so long."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.004)


class Warm:
    """The warm process from outside; a context."""

    def __init__(self):
        self._server = subprocess.Popen(
            [sys.executable, __file__], cwd=runs.ROOT, text=True,
            env=runs.environment(PYTHONPATH=str(runs.ROOT)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def ask(self, **request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, words, output, script="train", **faults):
        """A started Run; its output is appended to the file `output`."""
        request = dict(words=list(map(str, words)), output=str(output), script=script)
        pid = self.ask(**request, faults=faults)
        return Run(pid, output, lambda seconds: self.ask(wait=pid, seconds=seconds))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._server.stdin.close()
        self._server.wait()


# ---------------------------------------------------------------------------------------------
# Runs


class Run:
    """A started run. pid: of its process; output: the file of its stdout and stderr."""

    def __init__(self, pid, output, wait):
        self.pid, self.output, self._wait = pid, Path(output), wait
        self.began, self._from = time.monotonic(), self._size()
        self.status = self.seconds = None

    def _size(self):
        return self.output.stat().st_size if self.output.exists() else 0

    def wait(self, seconds=WAIT_S):
        """Its exit status, negative for a signal; None if it still runs after so long."""
        if self.status is None:
            self.status = self._wait(seconds)
            self.seconds = time.monotonic() - self.began
        return self.status

    def finish(self):
        """(exit status, what it printed); kills and complains of one that does not end."""
        status = self.wait()
        if status is None:
            self.kill()
            raise AssertionError(f"no end within {WAIT_S} s: {self.text()}")
        return status, self.text()

    def kill(self):
        """kill -9, of the process alone, as the kernel does when memory runs out."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        assert self.wait() is not None

    def children(self):
        """Its processes: data loader workers and what is still being asked (git)."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.pid).children(recursive=True)
        return []

    def text(self):
        with open(self.output, "rb") as file:
            file.seek(self._from)
            return file.read().decode(errors="replace")


def start_command(words, output, script="train", num_processes=0, **extra):
    """A Run of the real command `python train.py ...`, or of its launcher."""
    with open(output, "ab") as file:
        began = time.monotonic()
        command = [*runs.launcher(num_processes), f"{script}.py", *map(str, words)]
        process = subprocess.Popen(
            command, cwd=runs.ROOT,
            env=runs.environment(**extra), stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait(seconds):
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None

    run = Run(process.pid, output, wait)
    run.began = began
    return run


def wait_until(condition, seconds=WAIT_S):
    """Seconds until condition() held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "what was waited for never came"
        time.sleep(0.02)
    return time.monotonic() - began


def metrics_file(workdir):
    """The number of the file metrics.jsonl, which every start makes anew; None for none."""
    path = Path(workdir) / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def wait_for_step(run, workdir, step, former=None):
    """Return once the run has logged `step`, or ended. former: metrics_file of the run before."""
    def logged():
        return metrics_file(workdir) != former and last_step(workdir) >= step

    wait_until(lambda: run.wait(0) is not None or logged())


def last_step(workdir):
    """The last step with a whole line in metrics.jsonl, 0 for none."""
    lines = logged(workdir)
    return lines[-1]["step"] if lines else 0


# ---------------------------------------------------------------------------------------------
# What is right


def logged(workdir):
    """The whole lines of metrics.jsonl; one that a kill cut short has no end."""
    path = Path(workdir) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def digest(path):
    """SHA-256 of every bit of a checkpoint that a run goes on from. The bytes of training.pt are no
    measure: pickle writes the same values in several ways.
    """
    from libs.train import checkpoint

    saved, result = checkpoint.load(path), hashlib.sha256()

    def add(value):
        if hasattr(value, "numpy"):
            add([str(value.dtype), list(value.shape)])
            result.update(value.numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=repr):
                add([key])
                add(value[key])
        else:
            result.update(repr(value).encode())

    add({"nnet": saved.nnet, "ema": saved.ema, **saved.training_state})
    return result.hexdigest()


def numbers(line):
    return {key: value for key, value in line.items() if key != "img_s"}


class Undisturbed:
    """What every step of an undisturbed run logged, the digest of each of its checkpoints, and its
    pictures.
    """

    def __init__(self, workdir):
        self.lines = [numbers(line) for line in logged(workdir)]
        folders = (Path(workdir) / "ckpts").glob("*.ckpt")
        self.digests = {int(path.stem): digest(path) for path in folders}
        pictures = (Path(workdir) / "samples").glob("*.png")
        self.pictures = {int(path.stem): path.read_bytes() for path in pictures}

    def complaints(self, workdir, ended=None):
        """Sentences on what is lost or wrong in `workdir`, where a run was killed, or ended at the
        step `ended`.
        """
        workdir, said = Path(workdir), []
        path, step = newest(workdir)
        if step < acknowledged(workdir):
            said.append(f"lost: {acknowledged(workdir)}.ckpt was saved, the newest is {step}")
        if path and digest(path) != self.digests.get(step):
            said.append(f"wrong: {path.name} is not that of the undisturbed run")
        lines, expected = [numbers(line) for line in logged(workdir)], self.lines
        if lines != expected[: len(lines)]:
            said.append("wrong: metrics.jsonl is not that of the undisturbed run")
        if len(lines) < sum(line["step"] <= step for line in expected):
            said.append(f"lost: metrics.jsonl has not every step up to {step}.ckpt")
        if ended and (step, lines[-1:]) != (ended, [x for x in expected if x["step"] == ended]):
            said.append(f"lost: ended at step {step} instead of {ended}")
        for number, picture in self.pictures.items() if ended else ():
            path = workdir / "samples" / f"{number}.png"
            if number <= ended and not (path.is_file() and path.read_bytes() == picture):
                said.append(f"lost: {path.name} is not that of the undisturbed run")
        return said + (litter(workdir) if ended else [])


def newest(workdir):
    """(path, step) of the checkpoint that a run would go on from; (None, 0) if there is none."""
    from libs.train import checkpoint

    found = checkpoint.latest(Path(workdir) / "ckpts", report=lambda line: None)
    return found or (None, 0)


def acknowledged(workdir):
    """The last step that the log says was saved."""
    path = Path(workdir) / "output.log"
    saved = re.findall(r"saved .*/(\d+)\.ckpt$", path.read_text() if path.exists() else "", re.M)
    return max(map(int, saved), default=0)


def litter(workdir):
    """What a run that ended must not leave behind."""
    hidden = [p.name for p in Path(workdir).rglob(".*") if p.name != ".lock"]
    return [f"left over: {', '.join(sorted(hidden))}"] if hidden else []


def error_lines(text):
    """The sentences for the user in a run's output."""
    return [line for line in re.split(r"[\r\n]", text) if line.startswith("error")]


def one_sentence(status, text):
    """Complaints unless a run that failed said why in one sentence."""
    lines = error_lines(text)
    fine = status == 1 and len(lines) == 1 and "Traceback" not in text
    return [] if fine else [f"no clear message: status {status}, {text[-2000:]}"]


# ---------------------------------------------------------------------------------------------
# Kills


def kill_cycles(start, workdir, undisturbed, *, cycles, start_s, seed, last):
    """Start a run of `last` steps, kill it at a random time, look, and start it again; from scratch
    whenever it came to its end. Yields a dict for each start.

    start(workdir): a Run. One kill in three comes up to start_s after the start, the others up to
    2 s after the first new step, uniformly.
    """
    times, killed, workers = random.Random(seed), 0, []
    while killed < cycles:
        saving, resumed = set(Path(workdir).glob("ckpts/.*")), newest(workdir)[1]
        former = metrics_file(workdir)
        run, early, share = start(workdir), times.random() < 1 / 3, times.random()
        if not early:
            wait_for_step(run, workdir, resumed + 1, former)
        status = run.wait(share * (start_s if early else 2))
        if status is None:
            workers += [(time.monotonic(), child) for child in run.children()]
            run.kill()
            killed += 1
        said = undisturbed.complaints(workdir, ended=last if status == 0 else None)
        if status not in (None, 0):
            said.append(f"status {status}: {run.text()[-2000:]}")
        old = [child for since, child in workers if time.monotonic() - since > ORPHANS_S]
        said += [f"{child} outlives its run" for child in filter(alive, old)]
        workers = [(since, child) for since, child in workers if child not in old]
        yield dict(
            killed=status is None, made=max(0, last_step(workdir) - resumed),
            saving=bool(set(Path(workdir).glob("ckpts/.*")) - saving), complaints=said,
        )  # fmt: skip
        if status == 0:
            shutil.rmtree(workdir)


def alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


if __name__ == "__main__":
    serve()
