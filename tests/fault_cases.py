"""Faults done to small training runs, one function each: what is done, then whether the run went on
or said why not, and whether the same command reaches what the undisturbed run reached.

Each returns a dict: `complaints`, sentences on what is lost or wrong, none if all is well;
`seconds` from the fault to the run's end or message; `message`, where it ended.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import faults
import numpy as np

LAST = 12  # steps of these runs; checkpoints at 3, 6, 9, 12
FILES = ("nnet.safetensors", "nnet_ema.safetensors", "training.pt", "config.json", "manifest.json")


class Lab:
    """What the cases share: the warm process, a folder, and what an undisturbed run comes to."""

    def __init__(self, warm, folder, undisturbed):
        self.warm, self.folder, self.undisturbed = warm, Path(folder), undisturbed
        self.count = 0

    def new(self):
        """A run directory that is not there yet."""
        self.count += 1
        return self.folder / f"run-{self.count}"

    def words(self, workdir, **changes):
        return faults.arguments(workdir, **{**dict(train__n_steps=LAST, train__num_workers=0),
                                            **changes})  # fmt: skip

    def start(self, workdir, config=None, **doing):
        """A forked run; config: changed keys; doing: faults of faults.FAULTS."""
        words = self.words(workdir, **(config or {}))
        return self.warm.start(words, self.folder / "output", **doing)

    def ended(self, workdir, run, step=LAST):
        """Complaints unless the run comes to its end, and to the right one."""
        status, text = run.finish()
        said = [] if status == 0 else [f"status {status}: {text[-2000:]}"]
        return said + self.undisturbed.complaints(workdir, ended=step)

    def stopped_run(self, workdir):
        """A run that came to step 6 of LAST, to be harmed."""
        status, text = self.start(workdir, dict(train__n_steps=6)).finish()
        assert status == 0, text
        return workdir


def message(status, text, *words):
    """(the sentence, complaints) of a run that was to end with one that has these words."""
    said = faults.one_sentence(status, text)
    line = (faults.error_lines(text) or [""])[0]
    return line, said + [f"{word!r} is not in {line!r}" for word in words if word not in line]


# ---------------------------------------------------------------------------------------------
# Kills at chosen points


def killed_at(lab, count, config=None, template=None):
    """kill -9 before the count-th change of the disk; `died` is False if there are fewer."""
    workdir = lab.new()
    if template:
        shutil.copytree(template, workdir)
    run = lab.start(workdir, config, die_at=dict(count=count, folder=str(workdir)))
    status, text = run.finish()
    said = [] if status in (0, -signal.SIGKILL) else [f"status {status}: {text[-2000:]}"]
    said += lab.undisturbed.complaints(workdir) if not template else []
    last = (config or {}).get("train__n_steps", LAST)
    said += lab.ended(workdir, lab.start(workdir, config), last)
    said += [] if (workdir / "samples" / f"{last}.png").is_file() else ["lost: the last picture"]
    shutil.rmtree(workdir)
    return dict(complaints=said, died=status != 0)


# ---------------------------------------------------------------------------------------------
# Checkpoints


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << int(place * 8e6) % 8
    path.write_bytes(content)


def cut(path, place):
    os.truncate(path, int(place * path.stat().st_size))


def remove(path, place):
    path.unlink()


def harmed_checkpoint(lab, template, name, harm, place):
    """One file of the newest checkpoint is harmed at `place`, 0 to 1 of its length."""
    workdir = shutil.copytree(template, lab.new())
    harm(workdir / "ckpts" / "6.ckpt" / name, place)
    run = lab.start(workdir)
    said = lab.ended(workdir, run)
    # A space more or less in a JSON file is no damage; anything else is found and named.
    if name != "manifest.json" and f"6.ckpt/{name}" not in run.text():
        said.append(f"damage to {name} ({harm.__name__}, {place}) is not named")
    shutil.rmtree(workdir)
    return dict(complaints=said, seconds=run.seconds)


def deleted_checkpoint(lab, template, which):
    """The newest checkpoint, or every one, is deleted: the run goes on from the one before, or
    begins anew.
    """
    workdir = shutil.copytree(template, lab.new())
    for step in (3, 6) if which == "all" else (6,):
        shutil.rmtree(workdir / "ckpts" / f"{step}.ckpt")
    run = lab.start(workdir)
    return dict(complaints=lab.ended(workdir, run), seconds=run.seconds)


def harmed_run_file(lab, template, name):
    """A file of the run directory is cut to nothing, as a loss of power can do."""
    workdir = shutil.copytree(template, lab.new())
    cut(workdir / name, 0)
    run = lab.start(workdir)
    said = lab.ended(workdir, run) if name != "metrics.jsonl" else []
    if name == "metrics.jsonl":  # what is gone is gone, and nothing else
        status, text = run.finish()
        said += [] if status == 0 else [text]
        steps = [line["step"] for line in faults.logged(workdir)]
        said += [] if steps == list(range(7, LAST + 1)) else [f"logged {steps}"]
    return dict(complaints=said, seconds=run.seconds)


# ---------------------------------------------------------------------------------------------
# The disk


@contextlib.contextmanager
def disk(folder, kib):
    """A file system of this size at `folder`; yields a function that makes it large."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    subprocess.run([*mount, f"size={kib}k", "faults", folder], check=True)
    try:
        yield lambda: subprocess.run([*mount, "remount,size=64m", "faults", folder], check=True)
    finally:
        subprocess.run(["umount", folder], check=True)


def can_mount():
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


def full_disk(lab, kib):
    """The run directory is on a file system of `kib` KiB, which fills up; then there is room."""
    with disk(lab.new(), kib) as enlarge:
        workdir = lab.folder / f"run-{lab.count}" / "run"
        run = lab.start(workdir)
        status, text = run.finish()
        if status == 0:
            return dict(complaints=lab.undisturbed.complaints(workdir, ended=LAST), full=False)
        line, said = message(status, text, "No space left on device")
        said += lab.undisturbed.complaints(workdir)
        enlarge()
        said += lab.ended(workdir, lab.start(workdir))
    return dict(complaints=said, seconds=run.seconds, message=line, full=True)


# ---------------------------------------------------------------------------------------------
# Data


def images_at(places):
    """The images at these places of the first epoch."""
    from datasets import permutation

    return permutation(1797, seed=1234, epoch=0)[places].tolist()  # the seed of configs/common.py


def nan_batches(lab, places):
    """Some images are NaN, by their places in the training stream: their steps are skipped, and a
    kill among them changes nothing.
    """
    found, config = [], dict(train__n_steps=9)
    broken = dict(indices=images_at(places))
    for kill in (False, True):
        workdir = lab.new()
        if kill:
            run = lab.start(workdir, config, nan_images=broken, slow=dict(seconds=0.1))
            faults.wait_for_step(run, workdir, 5)
            run.kill()
        run = lab.start(workdir, config, nan_images=broken)
        status, text = run.finish()
        lines = [faults.numbers(line) for line in faults.logged(workdir)]
        found.append((status, faults.newest(workdir)[1], faults.digest(workdir / "ckpts/9.ckpt"),
                      lines))  # fmt: skip
    skipped = sum(line["outcome"] == "bad" for line in found[0][3])
    said = [] if found[0] == found[1] else ["a kill changes a run with NaN batches"]
    said += [] if found[0][0] == 0 else [f"status {found[0][0]}"]
    said += [] if skipped else ["no batch was skipped"]
    return dict(complaints=said, seconds=run.seconds, skipped=skipped)


def only_nan(lab, template):
    """Every image is NaN from step 6 on; with the data repaired, the same command goes on."""
    workdir = shutil.copytree(template, lab.new())
    run = lab.start(workdir, nan_images=dict(indices=list(range(1797))))
    line, said = message(*run.finish(), "10 steps in a row", "non-finite", "last checkpoint")
    said += lab.ended(workdir, lab.start(workdir))
    return dict(complaints=said, seconds=run.seconds, message=line)


# ---------------------------------------------------------------------------------------------
# Data loader workers


def killed_worker(lab, step, number):
    """kill -9 of `number` of two workers after `step`: the run goes on."""
    workdir = lab.new()
    run = lab.start(workdir, dict(train__num_workers=2), slow=dict(seconds=0.2))
    faults.wait_for_step(run, workdir, step)
    for worker in workers_of(run)[:number]:
        worker.kill()
    began = time.monotonic()
    said = lab.ended(workdir, run)
    if "died (SIGKILL" not in run.text():
        said.append("the death is not in the log")
    return dict(complaints=said, seconds=time.monotonic() - began)


def workers_of(run):
    found = [child for child in run.children() if "data" in child.name()]
    assert len(found) == 2, run.children()
    return found


def killed_with_a_stuck_worker(lab):
    """kill -9 of a run whose workers read and read: they end with it."""
    workdir = lab.new()
    stuck = dict(indices=images_at(list(range(24, 32))))
    run = lab.start(workdir, dict(train__num_workers=2), stuck=stuck)
    faults.wait_for_step(run, workdir, 4)
    workers = workers_of(run)
    run.kill()
    seconds = faults.wait_until(lambda: not any(map(faults.alive, workers)), faults.ORPHANS_S)
    return dict(complaints=lab.ended(workdir, lab.start(workdir)), seconds=seconds)


def killed_workers_again_and_again(lab):
    """Workers die as soon as they are there: a message, and the same command goes on."""
    workdir = lab.new()
    run = lab.start(workdir, dict(train__num_workers=2), slow=dict(seconds=0.1))
    faults.wait_for_step(run, workdir, 4)
    began = time.monotonic()
    while run.wait(0.02) is None and time.monotonic() - began < 120:
        for worker in run.children():
            with contextlib.suppress(Exception):
                worker.kill()
    line, said = message(run.wait(), run.text(), "data loader worker", "SIGKILL")
    said += lab.ended(workdir, lab.start(workdir))
    return dict(complaints=said, seconds=time.monotonic() - began, message=line)


# ---------------------------------------------------------------------------------------------
# Loggers


@contextlib.contextmanager
def bad_server(kind):
    """Address of a server that is down ('refused'), silent ('silent') or broken ('error')."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        connections = []

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    connections.append(connection)
                    if kind == "error":
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 500 Error\r\nContent-Length: 0\r\n\r\n")
                        connection.close()

        if kind != "refused":
            listener.listen(50)
            threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def no_network(lab, kind):
    """wandb is to send to a server that does not work; TensorBoard's folder cannot be written."""
    workdir = lab.new()
    workdir.mkdir()
    (workdir / "tensorboard").write_text("a file where the folder is to be")
    words = lab.words(workdir, train__wandb=True, train__tensorboard=True)
    with bad_server(kind) as address:
        run = faults.start_command(
            words, lab.folder / "output", WANDB_MODE="online", WANDB_BASE_URL=address,
            WANDB_API_KEY="0" * 40,
        )  # fmt: skip
        said = lab.ended(workdir, run)
    text = (workdir / "output.log").read_text()
    for logger in ("wandb", "TensorBoard"):
        if not any(f"WARNING {logger} " in line for line in text.splitlines()):
            said.append(f"the log does not speak of {logger}")
    return dict(complaints=said, seconds=run.seconds)


# ---------------------------------------------------------------------------------------------
# Cached latents


def write_latents(folder, count=64, shape=(8, 8, 8)):
    """Packed latents of `count` images without classes, 32 of them in a shard."""
    from libs.data.latent_writer import Packing, ShardWriter, make_settings

    records = np.random.default_rng(0).standard_normal((count, *shape)).astype(np.float16)
    packing = Packing(folder, make_settings(
        record_shape=shape, scale_factor=0.18215, resolution=64, flips=False,
        autoencoder_sha256="a" * 64, precision="fp32", crop="centre crop", source="folder",
        images_sha256="b" * 64, num_images=count, images_per_shard=32, class_names=None,
    ))  # fmt: skip
    packing.begin()
    for number in packing.missing():
        images = packing.images(number)
        with ShardWriter(packing, number) as writer:
            writer.write(records[images.start : images.stop])
            writer.commit({})
    packing.finish(None)
    return folder


def start_on_latents(lab, workdir, latents, workers=0, **doing):
    words = lab.words(
        workdir, z_shape="(4,8,8)", dataset__name="folder_features", dataset__path=latents,
        dataset__cfg=False, train__mode="uncond", nnet__in_channels=4, train__grid_samples=0,
        sample__algorithm="dpm_solver",
        train__num_workers=workers,
    )  # fmt: skip
    output = lab.folder / "output"
    return lab.warm.start(words, output, script="train_ldm_discrete", **doing)


def truncated_shard(lab, when, workers):
    """A shard is cut short before the run starts, or while it reads; then it is repaired."""
    latents, name = write_latents(lab.new()), "shard-00001.bin"
    reference, workdir = lab.new(), lab.new()
    status, text = start_on_latents(lab, reference, latents).finish()
    assert status == 0, text
    whole = (latents / name).read_bytes()
    began = time.monotonic()
    if when == "before":
        cut(latents / name, 0.5)
        run = start_on_latents(lab, workdir, latents, workers)
    else:
        run = start_on_latents(lab, workdir, latents, workers, slow=dict(seconds=0.1))
        faults.wait_for_step(run, workdir, 4)
        began = time.monotonic()
        cut(latents / name, 0)
    status, text = run.finish()
    line, said = message(status, text, "data set" if when == "while" and workers else name)
    seconds = time.monotonic() - began
    (latents / name).write_bytes(whole)
    status, text = start_on_latents(lab, workdir, latents, workers).finish()
    said += [] if status == 0 else [f"status {status}: {text[-2000:]}"]
    said += faults.Undisturbed(reference).complaints(workdir, ended=LAST)
    return dict(complaints=said, seconds=seconds, message=line)


def random_places(count, seed):
    """(file, harm, place) of `count` different harms of a checkpoint."""
    draw = random.Random(seed)
    return [
        (FILES[i % len(FILES)], draw.choice((flip, flip, cut)), draw.random()) for i in range(count)
    ]
