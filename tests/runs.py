"""Runs of the project's scripts as users start them, on a tiny digits network."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 240

# Every source of randomness is on: label dropout, stochastic depth, accumulation, data loader
# workers; and every kind of average.
TINY = {
    "nnet.dim": 16, "nnet.depth": 5, "nnet.drop_path": 0.2, "gradient_accumulation_steps": 2,
    "train.batch_size": 8, "train.n_steps": 12, "train.num_workers": 2, "train.log_interval": 1,
    "train.eval_interval": 1000, "train.save_interval": 4, "sample.sample_steps": 2,
    "sample.mini_batch_size": 50, "lr_scheduler.name": "customized",
    "lr_scheduler.warmup_steps": 3, "optimizer.lr": 0.001, "train.keep_last": 5,
    "train.grid_samples": 20, "train.ema_rates": (0.9,), "train.ema_lengths": (0.05, 0.1),
}  # fmt: skip


def arguments(workdir, **changes):
    """The command line of a tiny run in `workdir`; changes: config keys with '__' for '.'."""
    values = {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [
        f"--workdir={workdir}",
        "--config=configs/digits_T_DiM.py",
        *(f"--config.{key}={value}" for key, value in values.items()),
    ]


def launcher(num_processes, precision="no"):
    """The words before the script: plain python, or accelerate as users type it, gloo on a machine
    without a GPU.
    """
    if num_processes == 0:
        return [sys.executable]
    words = ["--num_processes", str(num_processes), "--mixed_precision", precision]
    words += ["--multi_gpu", "--main_process_port", "0"] if num_processes > 1 else []
    return [sys.executable, "-m", "accelerate.commands.launch", *words]


def environment(**extra):
    """Environment without a GPU and with one thread a process, so that every run sums in the same
    order.
    """
    fixed = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **fixed, **extra}


def start(script, *args, num_processes=0, precision="no", **extra):
    """A started process of `script`; stdout and stderr are one text stream."""
    return _start([*launcher(num_processes, precision), script, *args], extra)


def start_words(words, script, *args, **extra):
    """The same under `accelerate launch` with these words of its own."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words]
    return _start([*launch, script, *args], extra)


def _start(command, extra):
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**extra), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    """(exit status, output) of a started process."""
    output, _ = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, output


def run(script, *args, **keywords):
    """(exit status, output) of a whole run."""
    return finish(start(script, *args, **keywords))


def train(workdir, num_processes=0, precision="no", **changes):
    """A tiny training run that must succeed; its output."""
    status, output = run(
        "train.py", *arguments(workdir, **changes), num_processes=num_processes, precision=precision
    )
    assert status == 0, output
    return output


def steps_logged(workdir):
    """Lines of metrics.jsonl as dicts."""
    path = Path(workdir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(process, workdir, step):
    """Return once metrics.jsonl has `step`."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if any(line["step"] >= step for line in steps_logged(workdir)):
                return
        except ValueError:  # a line that is being written
            pass
        time.sleep(0.01)
    raise AssertionError(
        f"step {step} never came: {finish(process)[1] if process.poll() is not None else 'timeout'}"
    )


def weights(workdir, step):
    """[network, average, further averages] of a checkpoint, name -> tensor."""
    files = (Path(workdir) / "ckpts" / f"{step}.ckpt").glob("nnet*.safetensors")
    return [load_file(file) for file in sorted(files, key=lambda file: file.stem)]


def numbers(workdir):
    """What must repeat exactly: (step, loss, gradient norm, learning rate) of every logged step."""
    return [
        (line["step"], line["loss"], line["grad_norm"], line["lr"])
        for line in steps_logged(workdir)
        if "loss" in line
    ]


def fresh_state():
    """Every call is the first of its process, for accelerate and for the log."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    logger = logging.getLogger("dim")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def snapshot(*folders):
    """{path: content} of all files, without the lock of a run, which holds a process id."""
    files = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if path.name != ".lock"}


def assert_nothing_lost(before):
    """Every file is what it was; the log of a run may have grown."""
    for path, content in before.items():
        assert path.is_file(), f"{path} is gone"
        found = path.read_bytes()
        assert found.startswith(content) if path.name == "output.log" else found == content, path


def assert_one_sentence(status, output, *says, expected=1):
    """One line that begins 'error:' and holds the key words; returned."""
    lines = [line for line in output.split("\n") if line.startswith("error:")]
    assert len(lines) == 1, output
    assert status == expected, output
    assert "Traceback" not in output, output
    for words in says:
        assert words in lines[0], f"{words!r} is not in {lines[0]!r}"
    return lines[0]
