"""Command lines, the run directory, lock, seeds, pictures; log, metrics, stopping, launching."""

import errno
import itertools
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from ml_collections import ConfigDict
from PIL import Image

import utils
from libs.runtime import flags, launch, logs

SPEC = {"config": (flags.file_path, None, "config file"),
        "workdir": (flags.file_path, None, "run directory"), "n": (int, 4, "images a class"),
        "classes": (flags.int_list, None, "classes"), "use_ema": (bool, True, "use the EMA")}


def parse(*arguments):
    return flags.parse_flags(["x.py", *arguments], SPEC)


def python(code, *arguments, **keywords):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(runs.ROOT), **keywords},
    )  # fmt: skip


# ------------------------------------------------------------ command lines (mistakes: bad_input)


def test_overrides_are_typed_applied_and_listed(monkeypatch, tmp_path):
    monkeypatch.chdir(runs.ROOT)
    monkeypatch.setenv("HOME", str(tmp_path))
    args = parse(
        "--config", "configs/digits_T_DiM.py", "--config.train.batch_size=16",
        "--config.optimizer.lr", "1", "--config.z_shape=(3,32,32)", "--config.train.fp8",
        "--noconfig.sample.cuda_graphs", "--config.max_grad_norm=0.5", "--classes=3,7",
        "--nouse_ema", "--n=2", "--workdir=~/runs", "--config.dataset.path=~/images",
    )  # fmt: skip
    assert args.overrides == {
        "train.batch_size": 16, "optimizer.lr": 1.0, "z_shape": (3, 32, 32), "train.fp8": True,
        "sample.cuda_graphs": False, "max_grad_norm": 0.5, "dataset.path": "~/images"}
    assert args.config.train.batch_size == 16 and args.config.sample.cuda_graphs is False
    assert type(args.config.optimizer.lr) is float and args.config.is_locked
    assert args.config.dataset.path == str(tmp_path / "images")
    assert args.workdir == str(tmp_path / "runs")
    assert (args.config_path, args.n, args.classes, args.use_ema) == (
        "configs/digits_T_DiM.py", 2, (3, 7), False)


def test_a_config_may_be_optional_and_help_lists_its_keys(monkeypatch, capsys):
    args = parse("--n=1")
    assert (args.config, args.config_path, args.overrides, args.n) == (None, None, {}, 1)
    monkeypatch.chdir(runs.ROOT)
    with pytest.raises(SystemExit, match="0"):
        parse("--config=configs/digits_T_DiM.py", "--help")
    said = capsys.readouterr().out
    assert "--n: images a class (default: 4)" in said and "--config.train.batch_size=32" in said


def test_ranges_and_choices_are_of_keys_and_allow_the_configs():
    for file in (runs.ROOT / "configs").glob("[a-z]*_*.py"):
        config = flags.load_config(str(file))
        flags.check_values(config)
        known = utils.flatten(config).keys() | {f"nnet.{key}" for key in flags.common.dim_nnet()}
        assert {*flags.common.RANGES, *flags.common.CHOICES} <= known


@pytest.mark.parametrize("error, code, says", [
    (utils.UserError("n is zero;\n use another"), 1, "error: n is zero; use another\n"),
    (utils.UserError("Caught UserError in worker 0.\nTraceback\nutils.UserError: bad\n"), 1,
     "error: bad\n"),
    (flags.FlagError("no such flag"), 2, "error: no such flag\n"),
    (KeyboardInterrupt(), 130, "error: interrupted\n"),
    (OSError(errno.ENOSPC, "No space left", "a/b.pt"), 1, "cannot write a/b.pt: No space left;"),
    (torch.OutOfMemoryError("CUDA out of memory."), 1, "memory ran out (CUDA out of memory.)"),
    (MemoryError("Unable to allocate"), 1, "raise --config.gradient_accumulation_steps"),
])  # fmt: skip
def test_what_ends_a_script_is_one_line(monkeypatch, capsys, error, code, says):
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as end:
        flags.run_main(main, {})
    said = capsys.readouterr().err
    assert end.value.code == code and says in said and said.strip().count("\n") == 0


# ------------------------------------------------------------ the run directory


def test_run_directory_names():
    def name(**overrides):
        return utils.run_directory("configs/a_DiM.py", overrides, None).relative_to("workdir/a_DiM")

    assert str(name()) == "default"
    ordered = {"train.batch_size": 64, "optimizer.lr": 1e-3}
    assert str(name(**ordered)) == "optimizer.lr=0.001-train.batch_size=64"
    assert utils.run_directory("x.py", ordered, "some/where") == Path("some/where")
    different = [{"p": "a/b"}, {"p": "a_b"}, {"p": "a", "q": 1}, {"p": "a-q=1"}, {"p": "../.."},
                 {"p": (1, 2)}, {"p": ("1", 2)}, {"p": "x" * 300}, {"p": "x" * 301}, {"p": None}]
    names = {str(name(**overrides)) for overrides in different}
    assert len(names) == len(different)
    assert all(len(text.encode()) <= 255 and "/" not in text and " " not in text for text in names)


def test_run_files_record_the_run_and_a_resume_tells_differences(tmp_path):
    config, environment = ConfigDict({"a": {"b": (1, 2)}, "lr": 0.1 + 0.2}), logs.environment()
    assert utils.write_run_files(tmp_path, config, environment) == []
    assert utils.write_run_files(tmp_path, config, environment) == []
    assert utils.read_json(tmp_path / "config.json") == {"a": {"b": (1, 2)}, "lr": 0.1 + 0.2}
    config.lr = 1.0
    assert utils.write_run_files(tmp_path, config, environment | {"new": "x"}) == [
        "config: lr: 0.30000000000000004 -> 1.0", "environment: new: absent -> 'x'"]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "environment.json"]
    assert environment["packages"]["torch"] == torch.__version__ and environment["devices"][0]
    assert "/" not in json.dumps({**environment, "devices": []}), "a path"


HOLDER = '''
import os, sys, time, utils
lock = utils.locked(sys.argv[1])
lock.__enter__()
if os.fork() == 0:
    time.sleep(20)  # as a data loader worker that outlives the trainer for a while
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
'''


def test_lock_refuses_a_second_run_and_dies_with_its_process(tmp_path):
    directory = tmp_path / "new" / "run"
    holder = python(HOLDER, directory)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(utils.UserError, match=f"in use by process {holder.pid} on .*--workdir"):
        utils.locked(directory).__enter__()
    holder.kill()
    holder.wait()
    with utils.locked(directory):
        pass


# ------------------------------------------------------------ seeds, pictures


def test_seeds_are_stable_and_distinct():
    # Frozen: a change would silently change every draw of every run that is resumed.
    assert utils.derive_seed(0, "noise", 3) == 7346017372464610397
    assert utils.derive_seed(np.int64(0), "noise", torch.tensor(3)) == 7346017372464610397
    keys = [(), (0,), ("0",), (0, 0), (1, 23), (12, 3), ("a", "b"), ("ab",), (-1,), (2**70,)]
    seeds = [utils.derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_png_values(tmp_path):
    image = torch.tensor([[-1.0, 0.0, 0.5], [0.25, 1.0, 7.0]]).expand(3, 2, 3)
    utils.save_png(tmp_path / "a.png", image)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels[..., 0].tolist() == pixels[..., 2].tolist() == [[0, 0, 128], [64, 255, 255]]
    utils.save_png(tmp_path / "a.png", torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3))
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert os.listdir(tmp_path) == ["a.png"]


def test_grid_is_enlarged_by_whole_pixels(tmp_path):
    images = torch.linspace(0, 1, 20)[:, None, None, None].expand(20, 1, 8, 8)
    utils.save_grid(tmp_path / "grid.png", images, nrow=10)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 64 + 6, 10 * 64 + 22, 3)  # 8 times as large, 2 pixels between
    for index in range(20):
        row, column = divmod(index, 10)
        cell = pixels[2 + 66 * row:66 + 66 * row, 2 + 66 * column:66 + 66 * column]
        assert (cell == round(index / 19 * 255)).all()


# ------------------------------------------------------------ log and metrics


def test_log_goes_to_file_and_console_by_rank(tmp_path, capsys):
    logs.get_logger(tmp_path, rank=0).info("first run")
    logs.get_logger(tmp_path, rank=0).info("second run")
    other = logs.get_logger(tmp_path, rank=3)
    other.info("silent")
    other.warning("odd %s", "image")
    lines = (tmp_path / "output.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO first run", "INFO second run", "rank 3 WARNING odd image"]
    assert capsys.readouterr().err.splitlines() == lines
    runs.fresh_state()


def read_lines(path):
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_metrics_are_valid_json_and_truncate_on_resume(tmp_path):
    log = logs.MetricsLog(tmp_path)
    log.truncate_after(0)
    for step in range(1, 5):
        log.write(step, {"loss": torch.tensor(0.5), "lr": np.float64(0.1 + 0.2), "n": step})
    log.write(5, {"loss": math.nan, "up": math.inf, "down": torch.tensor(-math.inf), "note": "x"})
    path = tmp_path / "metrics.jsonl"
    lines = read_lines(path)  # before close: each write has reached the file
    assert lines[1] == {"step": 2, "loss": 0.5, "lr": 0.1 + 0.2, "n": 2}
    special = {"loss": "NaN", "up": "Infinity", "down": "-Infinity"}
    assert lines[4] == {"step": 5, **special, "note": "x"}
    with path.open("a") as file:
        file.write('{"step": 3, "lo')  # kill -9 in the middle of a line
    log = logs.MetricsLog(tmp_path)
    log.truncate_after(3)
    log.write(4, {"loss": 7})
    expected = [(1, 0.5), (2, 0.5), (3, 0.5), (4, 7)]
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == expected
    # Of steps that were not made, because a loss was not finite, there may be many at one step.
    for batch in 3, 4, 5:
        log.write(4, {"batch": batch})
    log.truncate_after(4, batch=3)
    assert [line.get("batch") for line in read_lines(path)] == [None] * 4 + [3]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_wandb_is_offline_and_its_failure_is_told_once(tmp_path, monkeypatch, caplog, fails):
    calls = []

    def call(name):
        def function(*values, **keywords):
            calls.append((name, values, keywords))
            if name == fails:
                raise RuntimeError("no network")
            return types.SimpleNamespace(log=call("log"), finish=call("finish"))

        return function

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=call("init")))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    log = logs.MetricsLog(tmp_path, wandb=True)
    with caplog.at_level(logging.WARNING, "dim"):
        log.truncate_after(0)
        for step in 1, 2, 3:
            log.write(step, {"loss": 0.5})
        log.close()
    assert calls[0][2]["mode"] == "offline" and calls[0][2]["dir"] == str(tmp_path)
    assert len(calls) == {"init": 1, "log": 2, "finish": 5}[fails]
    assert [record.getMessage()[-10:] for record in caplog.records] == ["no network"]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# ------------------------------------------------------------ stopping, launching

STOPPABLE = '''
import sys, time
from libs.runtime import stop
with stop.StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.05)
    print("stopping", flush=True)
    time.sleep(float(sys.argv[1]))
print("saved", flush=True)
time.sleep(float(sys.argv[1]))
'''


def test_a_second_ctrl_c_interrupts():
    process = python(STOPPABLE, 3)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopping\n"
    process.send_signal(signal.SIGINT)  # the same key press, passed on by the launcher
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=20)
    assert output == "" and "KeyboardInterrupt" in errors


LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"


def test_the_death_of_a_one_process_launcher_is_noticed():
    """accelerate's simple_launcher waits for its child and passes no signal on."""
    launched = python(LAUNCHER, STOPPABLE, 0, ACCELERATE_MIXED_PRECISION="no")
    assert launched.stdout.readline() == "ready\n"
    launched.terminate()
    # The pipe stays open until the orphan ends.
    assert launched.communicate(timeout=30)[0] == "stopping\nsaved\n"


@pytest.mark.parametrize("engine", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_an_engine_needs_two_processes_and_its_package(monkeypatch, fresh_accelerate, engine):
    monkeypatch.setenv(engine, "true")
    with pytest.raises(utils.UserError, match="pip install|--num_processes 2"):
        launch.make_accelerator()
    assert os.environ[engine] == "true"


LAUNCHED = '''
import os, time
from libs.runtime import StopRequest, make_accelerator, read_batches, run_main
from libs.runtime import wait_without_timeout
import torch

def main(args):
    accelerator = make_accelerator()
    if accelerator.is_main_process:
        time.sleep(4)
    wait_without_timeout(accelerator)
    with StopRequest() as stop:
        batches = read_batches(range(10**6), num_workers=1)
        next(batches)
        os.write(1, b"ready\\n")  # at once, between the lines of the other rank
        while not stop.requested:
            next(batches)
            time.sleep(0.02)
        for _ in range(50):
            next(batches)  # the worker is still there
    os.write(1, f"saved {accelerator.process_index}\\n".encode())
    accelerator.end_training()
run_main(main, {})
'''


def test_two_ranks_wait_and_a_sigterm_to_their_launcher_stops_them(tmp_path):
    """Waiting outlasts the time-out. torchrun sends SIGTERM to each rank's whole process group,
    data loader workers included.
    """
    (tmp_path / "launched.py").write_text(LAUNCHED)
    words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    process = runs.start_words(
        words, str(tmp_path / "launched.py"), DIM_TIMEOUT_S="2", PYTHONPATH=str(runs.ROOT)
    )
    lines = iter(process.stdout.readline, "")
    assert len(list(itertools.islice((line for line in lines if "ready" in line), 2))) == 2
    process.terminate()
    output = runs.finish(process)[1]
    assert "saved 0" in output and "saved 1" in output, output
