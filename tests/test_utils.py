"""Flags, run directory, lock, seeds, pictures, launchers; log, metrics, stopping (libs/run)."""

import errno
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image

import utils
from libs.runtime import flags, logs

CHECKOUT = Path(__file__).resolve().parent.parent
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
SPEC = {"config": (flags.config_file, flags.REQUIRED, "config file"),
        "workdir": (flags.file_path, None, "run directory"), "n": (int, 4, "images a class"),
        "classes": (flags.int_list, None, "classes"), "use_ema": (bool, True, "use the EMA")}
CONFIG = '''
from configs import common

def get_config():
    config = common.get_config()
    config.nnet = common.dim_nnet()
    config.z_shape, config.channels = (1, 8, 8), [1, 2]
    config.train.batch_size, config.train.resume = 64, True
    return config
'''


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "digits_X.py"
    path.write_text(CONFIG)
    return str(path)


def parse(*arguments, spec=SPEC):
    return flags.parse_flags(["x.py", *arguments], spec)


def child_environment(**changes):
    """The environment without what a launcher that runs these tests may have put there."""
    inherited = {key: value for key, value in os.environ.items()
                 if not key.startswith(("ACCELERATE_", "TORCHELASTIC_", "MASTER_"))
                 and key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    return {**inherited, "PYTHONPATH": str(CHECKOUT), **changes}


def python(code, *arguments, **keywords):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
                            env=child_environment(**keywords), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---------------------------------------------------------------------------------------------
# Flags

def test_overrides_are_typed_applied_and_listed(config):
    flags = parse("--config", config, "--config.train.batch_size=32", "--config.optimizer.lr", "1",
                  "--config.z_shape=(3,32,32)", "--config.channels=[4]", "--noconfig.train.resume",
                  "--config.max_grad_norm=0.5", "--classes=3,7", "--nouse_ema", "--n=2")
    assert flags.overrides == {
        "train.batch_size": 32, "optimizer.lr": 1.0, "z_shape": (3, 32, 32), "channels": (4,),
        "train.resume": False, "max_grad_norm": 0.5}
    assert flags.config.train.batch_size == 32 and flags.config.train.resume is False
    assert type(flags.config.optimizer.lr) is float and flags.config.channels == [4]
    assert flags.config.z_shape == (3, 32, 32) and flags.config.optimizer.betas == (0.99, 0.999)
    assert (flags.config_path, flags.workdir, flags.n) == (config, None, 2)
    assert (flags.classes, flags.use_ema) == ((3, 7), False)
    assert flags.config.is_locked


def test_a_config_may_be_optional():
    parsed = parse("--n=1", spec={**SPEC, "config": (flags.config_file, None, "config")})
    assert (parsed.config, parsed.config_path, parsed.overrides, parsed.n) == (None, None, {}, 1)


@pytest.mark.parametrize("argument, sentence", [
    ("--config.train.batchsize=3", "--config.train.batchsize; did you mean --config.train.batch_s"),
    ("--config.batch_size=3", "key --config.batch_size; did you mean --config.train.batch_size?"),
    ("--config.train.lr=3", "did you mean --config.optimizer.lr?"),
    ("--config.qqq=3", "no key --config.qqq; --help lists"),
    ("--config.train=3", "--config.train is a section, .* --config.train.batch_size=64"),
    ("--config.train.batch_size=1.5", "--config.train.batch_size must be an integer, got '1.5'"),
    ("--config.optimizer.lr=high", "--config.optimizer.lr must be a number, got 'high'"),
    ("--config.max_grad_norm=x", "--config.max_grad_norm must be a number, got 'x'"),
    ("--config.train.resume=maybe", "--config.train.resume must be true or false, got 'maybe'"),
    ("--config.z_shape=(1,a)", r"--config.z_shape has the entry '\(1,a\)'"),
    ("--config.z_shape=(1, a", "--config.z_shape must be a tuple such as"),
    ("--config.train.batch_size", "[Mm]issing value for flag --config.train.batch_size"),
    ("--wrokdir=3", "unknown flag --wrokdir; did you mean --workdir?"),
    ("--confg.train.batch_size=3", "did you mean --config.train.batch_size?"),
    ("--zzzz", "unknown flag --zzzz; --help lists"),
    ("--n=x", "--n must be an integer, got 'x'"),
    ("--classes=a,b", "--classes must be integers separated by commas, got 'a,b'"),
    ("x.py", "unexpected argument 'x.py'"),
])
def test_each_wrong_flag_is_one_sentence(config, argument, sentence):
    with pytest.raises(flags.FlagError, match=sentence):
        parse(f"--config={config}", argument)


def test_missing_configs(config, monkeypatch, tmp_path):
    (tmp_path / "configs").mkdir()
    for name in "digits_T_DiM.py", "cifar10_S_DiM.py", "common.py":
        (tmp_path / "configs" / name).touch()
    monkeypatch.setattr(flags, "CONFIGS", tmp_path / "configs")
    with pytest.raises(flags.FlagError, match=r"configs/digit_T_DiM.py does not exist; did you "
                       r"mean configs/digits_T_DiM.py\? \(configs/ has: cifar10_S_DiM.py, digits"):
        parse("--config=configs/digit_T_DiM.py")
    with pytest.raises(flags.FlagError, match="--config is required"):
        parse("--n=3")
    with pytest.raises(flags.FlagError, match="--config needs a value"):
        parse("--config")
    with pytest.raises(flags.FlagError, match="--config.seed=3 overrides a config, but no --conf"):
        parse("--config.seed=3")


@pytest.mark.parametrize("content, sentence", [
    ("x = 1\ny = = 2", r"broken.py, line 2: SyntaxError"),
    ("import nosuchmodule", r"broken.py, line 1: ModuleNotFoundError: .*nosuchmodule"),
    ("def get_config():\n    return 1 / 0", r"broken.py, line 2: ZeroDivisionError"),
    (CONFIG + "\nimport ml_collections\nml_collections.ConfigDict().lock().x = 3",
     r"broken.py, line 12: "),
    ("x = 1", r"broken.py has no function get_config\(\)"),
    ("def get_config(): return {}", r"no function get_config\(\) that returns an ml_collections"),
    ("from configs.common import get_config", r"broken.py has no value for nnet.name, nnet.pre"),
    *((CONFIG.replace("return config", f"{change}\n    return config"),
       rf"broken.py has no value for {absent}: a config file starts from configs.common.get_config")
      for change, absent in (
          ("config.train.n_steps = None", "train.n_steps"),
          ("del config.sample.labels, config.nnet.name", "sample.labels, nnet.name"),
          ("del config.autoencoder", "autoencoder.pretrained_path, autoencoder.scale_factor"),
          ("del config.lr_scheduler; config.lr_scheduler = 3; del config.ug_m, config.seed",
           "lr_scheduler.name, lr_scheduler.warmup_steps, seed and 1 more"))),
])
def test_broken_configs_name_file_line_and_error(tmp_path, content, sentence):
    (tmp_path / "broken.py").write_text(content)
    with pytest.raises(flags.FlagError, match=sentence):
        parse(f"--config={tmp_path / 'broken.py'}")


MAIN = '''
"""Draws pictures."""
import sys, utils
from libs import flags
def main(args):
    if args.n == 0:
        raise utils.UserError("n is zero;\\nuse\\n  another")
    print(1 / (args.n - 1))
flags.run_main(main, {"n": (int, 4, "images a class"),
                      "config": (flags.config_file, None, "config file")})
print("torch" in sys.modules)
'''


def test_run_main_exit_codes_and_messages(config):
    started = time.monotonic()
    processes = [python(MAIN, *arguments) for arguments in (
        ["--n=3"], ["--n=0"], ["--nn=0"], ["--n=1"], ["--help", f"--config={config}"])]
    results = [(*process.communicate(timeout=60), process.returncode) for process in processes]
    elapsed = time.monotonic() - started
    assert results[0] == ("0.5\nFalse\n", "", 0)
    assert results[1] == ("", "error: n is zero; use another\n", 1)
    assert results[2] == ("", "error: unknown flag --nn; did you mean --n?\n", 2)
    assert results[3][2] == 1 and "Traceback" in results[3][1] and "ZeroDiv" in results[3][1]
    assert results[4][2] == 0
    for part in "Draws pictures.", "--n=an integer", "(default: 4)", "train.batch_size = 64":
        assert part in results[4][0]
    assert elapsed < 20  # five starts on a busy machine: torch is not imported


GPU_SAYS = (
    "CUDA out of memory. Tried to allocate 218.00 MiB. GPU 1 has a total capacity of 79.18 GiB of "
    "which 30.56 MiB is free. Including non-PyTorch memory, this process has 13 GiB. See the "
    "documentation for Memory Management (https://pytorch.org)"
)


def raise_of_gpu():
    import torch

    raise torch.OutOfMemoryError(GPU_SAYS)


def allocate_too_much(library):
    return __import__(library).empty(1 << 58)


@pytest.mark.parametrize("end, sentence", [
    (raise_of_gpu, r"memory of the GPU ran out \(CUDA out of memory. .* which 30.56 MiB is free\)"),
    (lambda: allocate_too_much("torch"), r"memory of the host ran out \(DefaultCPUAllocator: .*\)"),
    (lambda: allocate_too_much("numpy"), r"memory of the host ran out \(Unable to allocate .*\)"),
])  # fmt: skip
def test_memory_that_ends_is_one_sentence_with_what_to_do(monkeypatch, capsys, end, sentence):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit, match="1"):
        flags.run_main(lambda args: end(), {})
    said = capsys.readouterr().err
    assert re.match(rf"error: {sentence}; take fewer images at once: raise --config\.gr", said)
    assert said.count("\n") == 1


def ended(monkeypatch, capsys, error):
    """(exit code, what is said) of a script whose main raises `error`."""
    def main(args):
        raise error

    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit) as end:
        flags.run_main(main, {})
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("number, sentence", [
    (errno.ENOSPC, "cannot write {}: {}; make room or use another disk"),
    (errno.EACCES, "cannot use {}: {}; check its permissions and those of its folder"),
    (errno.ENAMETOOLONG, "cannot use {}: {}; use shorter names"),
    (errno.ENOENT, "cannot use {}: {}; check the path"),
    (errno.ENOTDIR, "cannot use {}: {}; check the path, which goes through a file"),
    (errno.EISDIR, "cannot use {}: {}; give a file instead of a folder"),
    (errno.EMFILE, "cannot use {}: {}; allow this process more open files with ulimit -n"),
    (errno.EIO, "cannot use {}: {}; its disk or network file system fails"),
])
def test_each_error_of_a_file_is_one_sentence(monkeypatch, capsys, number, sentence):
    error = OSError(number, os.strerror(number), "a/b.pt")
    code, said = ended(monkeypatch, capsys, error)
    assert code == 1 and said.startswith("error: " + sentence.format("a/b.pt", error.strerror))
    assert said.count("\n") == 1


def test_a_file_that_cannot_be_read_is_not_one_that_cannot_be_written(
        monkeypatch, capsys, tmp_path):
    path = str(tmp_path / "a.pt")
    Path(path).touch()
    monkeypatch.setattr(os, "access", lambda name, mode: (name, mode) != (path, os.R_OK))  # root
    error = PermissionError(errno.EACCES, "Permission denied", path)
    assert ended(monkeypatch, capsys, error) == (
        1, f"error: cannot read {path}: Permission denied; check its permissions\n")


def test_errors_that_name_no_file_keep_their_traceback(monkeypatch):
    with pytest.raises(OSError, match="Too many"):
        ended(monkeypatch, None, OSError(errno.EMFILE, "Too many open files"))


def test_ctrl_c_is_one_line_and_tells_the_others(monkeypatch, capsys):
    failed, fail = [], flags.watch.fail
    monkeypatch.setattr(flags.watch, "fail", lambda report: (failed.append(1), fail(report)))
    assert ended(monkeypatch, capsys, KeyboardInterrupt()) == (130, "error: interrupted\n")
    assert failed


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["abc", ""])
def test_a_launchers_variable_that_is_no_number(monkeypatch, capsys, name, value):
    monkeypatch.setenv(name, value)
    code, said = ended(monkeypatch, capsys, AssertionError("main was called"))
    assert code == 1 and f"variable {name} is {value!r}, expected a whole number: unset" in said
    assert said.count("\n") == 1


def test_a_tilde_is_the_home_directory(config, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = parse(f"--config={config}", "--workdir=~/runs", "--config.dataset.path=~/images",
                   "--config.sample.adm_npz=a/~b")
    assert parsed.workdir == str(tmp_path / "runs")
    assert parsed.config.dataset.path == str(tmp_path / "images")
    assert parsed.config.sample.adm_npz == "a/~b" and parsed.config.sample.path is None


def test_of_several_processes_rank_0_reports():
    others, alone = [python(MAIN, "--n=0", RANK="1", WORLD_SIZE="2") for _ in range(2)]
    time.sleep(1.5)
    others.terminate()  # as the launcher does once rank 0 has exited
    assert others.communicate(timeout=20)[1] == ""
    assert alone.communicate(timeout=20)[1] == "error (rank 1): n is zero; use another\n"
    assert alone.returncode == 1


# ---------------------------------------------------------------------------------------------
# The run directory

def test_run_directory_names():
    def name(**overrides):
        return utils.run_directory("configs/a_DiM.py", overrides, None).relative_to("workdir/a_DiM")

    assert str(name()) == "default"
    ordered = {"train.batch_size": 64, "optimizer.lr": 1e-3}
    assert str(name(**ordered)) == "optimizer.lr=0.001-train.batch_size=64"
    assert utils.run_directory("x.py", ordered, "some/where") == Path("some/where")
    different = [{"p": "a/b"}, {"p": "a_b"}, {"p": "a b"}, {"p": "a", "q": 1}, {"p": "a-q=1"},
                 {"p": "../.."}, {"p": (1, 2)}, {"p": (1, 2, 3)}, {"p": ("1", 2)},
                 {"p": "x" * 300}, {"p": "x" * 301}, {"p": "é" * 200}, {"p": ""}, {"p": None}]
    names = [str(name(**overrides)) for overrides in different]
    assert len(set(names)) == len(names)
    assert all(len(text.encode()) <= 255 and "/" not in text and " " not in text for text in names)


def test_run_files_record_the_run_and_a_resume_tells_differences(tmp_path, config):
    loaded = flags.load_config(config)
    loaded.optimizer.lr = 0.1 + 0.2
    environment = logs.environment()
    assert utils.write_run_files(tmp_path, loaded, environment) == []
    assert utils.write_run_files(tmp_path, loaded, environment) == []
    read = utils.read_json(tmp_path / "config.json")
    assert read == {**loaded.to_dict(), "channels": (1, 2)}
    assert type(read["optimizer"]["betas"]) is tuple and read["optimizer"]["lr"] == 0.1 + 0.2
    loaded.train.batch_size = 32
    threads = environment["torch_threads"]
    assert utils.write_run_files(tmp_path, loaded, {**environment, "torch_threads": 99}) == [
        "config: train.batch_size: 64 -> 32", f"environment: torch_threads: {threads} -> 99"]
    assert utils.read_json(tmp_path / "config.json")["train"]["batch_size"] == 32
    assert sorted(os.listdir(tmp_path)) == ["config.json", "digits_X.py", "environment.json"]
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(utils.UserError, match=r"config\.json is not valid JSON"):
        utils.read_json(tmp_path / "config.json")


def test_config_differences():
    old = ConfigDict({"a": {"b": (1, 2), "c": 1.0}, "gone": None})
    new = {"a": {"b": [1, 2], "c": 2.0}, "new": "x"}
    assert utils.config_differences(old, new) == [
        "a.c: 1.0 -> 2.0", "gone: None -> absent", "new: absent -> 'x'"]


def test_environment():
    environment = logs.environment()
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["torch_threads"] == torch.get_num_threads()
    assert environment["argv"] == sys.argv and environment["devices"][0]
    assert "/" not in json.dumps({**environment, "argv": [], "devices": []}), "a path"


def test_commit_is_the_checkouts_own(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b.c",
                        *arguments], check=True, capture_output=True)

    monkeypatch.setattr(logs, "_CHECKOUT", tmp_path.resolve())
    assert logs._commit() == "unknown"
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    (tmp_path / "untracked").touch()
    commit = logs._commit()
    assert len(commit) == 40 and int(commit, 16)
    (tmp_path / "file").write_text("2")
    assert logs._commit() == f"{commit}-dirty"
    (tmp_path / "unpacked").mkdir()
    monkeypatch.setattr(logs, "_CHECKOUT", tmp_path.resolve() / "unpacked")
    assert logs._commit() == "unknown"


HOLDER = '''
import os, sys, time, utils
lock = utils.RunLock(sys.argv[1])
if len(sys.argv) > 2 and os.fork() == 0:
    time.sleep(20)  # as a data loader worker that outlives the trainer for a while
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
'''


@POSIX
def test_lock_refuses_a_second_run_and_dies_with_its_process(tmp_path):
    directory = tmp_path / "new" / "run"
    holder = python(HOLDER, directory, "fork")
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(utils.UserError, match=f"in use by process {holder.pid} on .*--workdir"):
        utils.RunLock(directory)
    holder.kill()
    holder.wait()
    with utils.RunLock(directory):
        second = python(HOLDER, directory)
        assert f"in use by process {os.getpid()} on " in second.communicate(timeout=20)[1]
    third = python(HOLDER, directory)
    assert third.stdout.readline() == "locked\n"
    third.kill()
    third.communicate()


def test_a_run_directory_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(utils.UserError, match="cannot make the directory .*file/run: Not a dir"):
        utils.RunLock(tmp_path / "file" / "run")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(utils.UserError, match="cannot write into .*run: Is a directory"):
        utils.RunLock(tmp_path / "run")


# ---------------------------------------------------------------------------------------------
# Seeds

def test_seeds_are_stable_and_distinct():
    # Frozen: a change would silently change every draw of every run that is resumed.
    assert utils.derive_seed(0, "noise", 3) == 7346017372464610397
    assert utils.derive_seed(np.int64(0), "noise", torch.tensor(3)) == 7346017372464610397
    keys = [(), (0,), ("0",), (0, 0), (1, 23), (12, 3), ("a", "b"), ("ab",), (-1,), (2**70,)]
    seeds = [utils.derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    many = np.array([utils.derive_seed(0, i) for i in range(2000)], dtype=np.float64) / 2**63
    assert abs(many.mean() - 0.5) < 4 / math.sqrt(12 * 2000)  # 4 standard errors of a uniform
    with pytest.raises(TypeError):
        utils.derive_seed(0.5)


# ---------------------------------------------------------------------------------------------
# Pictures

def test_png_values(tmp_path):
    image = torch.tensor([[-1.0, 0.0, 0.5], [0.25, 1.0, 7.0]]).expand(3, 2, 3) * 1.0
    image[2] = 0.0
    utils.save_png(tmp_path / "a.png", image)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels[..., 0].tolist() == pixels[..., 1].tolist() == [[0, 0, 128], [64, 255, 255]]
    assert not pixels[..., 2].any()
    utils.save_png(tmp_path / "a.png", torch.arange(6, dtype=torch.uint8).reshape(1, 2, 3))
    assert np.asarray(Image.open(tmp_path / "a.png")).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert os.listdir(tmp_path) == ["a.png"]
    with pytest.raises(ValueError, match="expected an image"):
        utils.save_png(tmp_path / "a.png", torch.zeros(2, 3))
    with pytest.raises(utils.UserError, match=r"cannot write .*b\.png: No such file"):
        utils.save_png(tmp_path / "absent" / "b.png", image)


def test_grid_is_enlarged_by_whole_pixels(tmp_path):
    images = torch.linspace(0, 1, 20)[:, None, None, None].expand(20, 1, 8, 8).clone()
    images[13, 0, 0, 1] = 1.0
    utils.save_grid(tmp_path / "grid.png", images, nrow=10)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 64 + 6, 10 * 64 + 22, 3)  # 8 times as large, 2 pixels between
    for index in range(20):
        row, column = divmod(index, 10)
        cell = pixels[2 + 66 * row:66 + 66 * row, 2 + 66 * column:66 + 66 * column, 0]
        expected = np.full((64, 64), round(index / 19 * 255))
        if index == 13:
            expected[:8, 8:16] = 255
        assert (cell == expected).all()
    utils.save_grid(tmp_path / "grid.png", torch.zeros(3, 3, 256, 256), nrow=8)
    assert Image.open(tmp_path / "grid.png").size == (3 * 256 + 8, 256 + 4)


# ---------------------------------------------------------------------------------------------
# Log and metrics

def test_log_goes_to_file_and_console_by_rank(tmp_path, capsys):
    logs.get_logger(tmp_path, rank=0).info("first run")
    logger = logs.get_logger(tmp_path, rank=0)
    logger.info("second run")
    other = logs.get_logger(tmp_path, rank=3)
    other.info("silent")
    other.warning("odd %s", "im\nage\x1b[2J")
    lines = (tmp_path / "output.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == [
        "INFO first run", "INFO second run", r"rank 3 WARNING odd im age\x1b[2J"]
    assert capsys.readouterr().err.splitlines() == lines
    other.handlers.clear()


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
    assert lines[4] == {"step": 5, "loss": "NaN", "up": "Infinity", "down": "-Infinity",
                        "note": "x"}
    with path.open("a") as file:
        file.write('{"step": 3, "lo')  # kill -9 in the middle of a line
    log = logs.MetricsLog(tmp_path)
    log.truncate_after(3)
    log.write(4, {"loss": 7})
    log.close()
    expected = [(1, 0.5), (2, 0.5), (3, 0.5), (4, 7)]
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == expected
    os.truncate(path, path.stat().st_size - 1)  # cut short by nothing but the line's end
    log.truncate_after(4)
    log.write(5, {"loss": 8})
    log.close()
    assert [(line["step"], line["loss"]) for line in read_lines(path)] == [*expected, (5, 8)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_batches_that_are_taken_again_are_dropped(tmp_path):
    """Of steps that were not made, because a loss was not finite, there may be many at one step."""
    log = logs.MetricsLog(tmp_path)
    for step, batch in (1, 1), (1, 2), (2, 3), (2, 4), (2, 5):
        log.write(step, {"batch": batch})
    log.write(2, {"frechet_distance": 3.0})
    log.truncate_after(2, batch=3)
    found = [(line["step"], line.get("batch")) for line in read_lines(tmp_path / "metrics.jsonl")]
    assert found == [(1, 1), (1, 2), (2, 3), (2, None)]


def test_a_disk_that_takes_a_part_of_a_line(tmp_path):
    """Short writes go on where they stopped; the error, when it comes, names the file."""
    taken = []

    def write(data):
        if sum(map(len, taken)) > 20:
            raise OSError(28, "No space left on device")
        taken.append(bytes(data[:7]))
        return len(taken[-1])

    log = logs.MetricsLog(tmp_path)
    log._file = types.SimpleNamespace(write=write)
    log.write(1, {"a": 1})
    assert b"".join(taken) == b'{"step": 1, "a": 1}\n'
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        log.write(2, {"a": 1})


def test_a_log_file_that_cannot_grow_is_said_once(tmp_path, capsys):
    logger = logs.get_logger(tmp_path, rank=0)

    def full(text):
        raise OSError(28, "No space left on device")

    logger.handlers[0].stream = types.SimpleNamespace(write=full, flush=lambda: None,
                                                      close=lambda: None)
    logger.info("first")
    logger.info("second")
    said = capsys.readouterr().err
    assert said.count("output.log: No space left on device") == 1 and "Traceback" not in said
    assert "first" in said and "second" in said, "the console has everything"
    logger.handlers.clear()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_that_hangs_delays_nothing(tmp_path, monkeypatch, where):
    """As on a network that is gone: writing takes no time, closing no longer than agreed."""
    release, said = threading.Event(), []

    def maybe(name):
        return lambda *values, **keywords: where == name and release.wait(60)

    def init(**keywords):
        maybe("init")()
        return types.SimpleNamespace(log=maybe("log"), finish=maybe("finish"))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(logs, "_CLOSE_S", 0.5)
    monkeypatch.setattr(logs, "_QUEUED_STEPS", 4)
    monkeypatch.setattr(logging.getLogger("dim"), "warning",
                        lambda text, *values: said.append(text % values))
    began = time.monotonic()
    log = logs.MetricsLog(tmp_path, wandb=True)
    log.truncate_after(0)
    for step in range(10 if where == "log" else 3):
        log.write(step, {"loss": 0.5})
    written = time.monotonic()
    log.close()
    release.set()
    assert written - began < 0.4 and time.monotonic() - written < 10
    expected = "is 4 entries behind" if where == "log" else "did not finish within 0.5 s"
    assert len(said) == 1 and expected in said[0]
    assert len(read_lines(tmp_path / "metrics.jsonl")) == (10 if where == "log" else 3)


def test_what_was_left_behind_is_removed(tmp_path):
    for name in (".config.json.123.tmp", "config.json", ".lock", "mine.tmp"):
        (tmp_path / name).touch()
    utils.remove_leftovers(tmp_path, tmp_path / "absent")
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "mine.tmp"]
    for name in (".a[1].npz.5.tmp", ".b.npz.5.tmp"):
        (tmp_path / name).touch()
    utils.remove_leftovers(tmp_path, name="a[1].npz")
    assert sorted(os.listdir(tmp_path)) == [".b.npz.5.tmp", ".lock", "config.json", "mine.tmp"]


def test_tensorboard_gets_the_same_numbers(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator")
    log = logs.MetricsLog(tmp_path, tensorboard=True)
    log.truncate_after(0)
    log.write(1, {"loss": torch.tensor(0.25), "note": "x"})
    log.write(2, {"loss": 0.5})
    log.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.25), (2, 0.5)]


def test_wandb_is_offline_and_its_failure_is_told_once(tmp_path, monkeypatch):
    calls, warnings = [], []

    def log_metrics(metrics, step):
        calls.append((step, metrics))
        if step > 1:
            raise RuntimeError("no network")

    def init(**keywords):
        calls.append(keywords)
        return types.SimpleNamespace(log=log_metrics, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(logging.getLogger("dim"), "warning",
                        lambda text, *values: warnings.append(text % values))
    log = logs.MetricsLog(tmp_path, wandb=True)
    log.truncate_after(0)
    for step in 1, 2, 3:
        log.write(step, {"loss": 0.5})
    log.close()
    assert calls[0]["mode"] == "offline" and calls[0]["dir"] == str(tmp_path)
    assert calls[1:] == [(1, {"loss": 0.5}), (2, {"loss": 0.5})]
    assert warnings == ["wandb failed and is switched off: no network"]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# ---------------------------------------------------------------------------------------------
# Stopping

STOPPABLE = '''
import sys, time
from libs import run
end = time.monotonic() + float((sys.argv + ["15"])[2])
with run.StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested and time.monotonic() < end:
        time.sleep(0.05)
    print("stopping" if stop.requested else "not asked", flush=True)
    time.sleep(float(sys.argv[1]))
print("saved", flush=True)
time.sleep(float(sys.argv[1]))
'''


@POSIX
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_only_asks(number):
    process = python(STOPPABLE, 0)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("stopping\nsaved\n", "")
    assert process.returncode == 0


@POSIX
def test_a_second_ctrl_c_interrupts_and_handlers_are_restored():
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
    process = python(STOPPABLE, 0.5)
    process.stdout.readline()
    process.terminate()
    assert [process.stdout.readline() for _ in range(2)] == ["stopping\n", "saved\n"]
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGTERM


LAUNCHER = '''
import os, subprocess, sys
subprocess.Popen([sys.executable, "-c", *sys.argv[1:]]).wait()
'''


@POSIX
def test_the_death_of_a_one_process_launcher_is_noticed():
    """accelerate's simple_launcher waits for its child and passes no signal on."""
    launched = python(LAUNCHER, STOPPABLE, 0, 15, ACCELERATE_MIXED_PRECISION="no")
    nohup = python(LAUNCHER, STOPPABLE, 0, 2)
    for process in launched, nohup:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
    # Both pipes stay open until the orphans end.
    assert launched.communicate(timeout=30)[0] == "stopping\nsaved\n"
    assert nohup.communicate(timeout=30)[0] == "not asked\nsaved\n"


# ---------------------------------------------------------------------------------------------
# Launchers

@pytest.mark.parametrize("gpu", [False, True])
def test_cpu_is_chosen_only_without_a_gpu(monkeypatch, gpu):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    utils.set_cpu_if_no_gpu()
    assert os.environ["ACCELERATE_USE_CPU"] == ("False" if gpu else "true")


def test_world_size_must_be_the_launchers(monkeypatch):
    for name in "WORLD_SIZE", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION":
        monkeypatch.delenv(name, raising=False)
    utils.check_world_size(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    utils.check_world_size(2)
    with pytest.raises(utils.UserError, match="started 2 processes, but accelerate sees 1"):
        utils.check_world_size(1)


LAUNCHED = '''
import json, os, sys, time
from pathlib import Path
import torch, utils
from libs import flags, run

alive_at_exit = []

def slow_start(worker_id):
    time.sleep(1.5)  # SIGTERM comes before the worker is ready for it
    run.detach_worker(worker_id)

def main(args):
    utils.set_cpu_if_no_gpu()
    from accelerate import Accelerator
    accelerator = Accelerator()
    utils.check_world_size(accelerator.num_processes)
    rank = accelerator.process_index
    loader = torch.utils.data.DataLoader(range(10**6), num_workers=2,
                                         worker_init_fn=slow_start)
    total = accelerator.reduce(torch.tensor(rank + 1.0, device=accelerator.device), "sum")
    with run.StopRequest() as stop:
        with run.starting_workers():
            batches = iter(loader)
            alive_at_exit.append(batches)
        Path(args.out, f"ready{rank}").touch()
        end = time.monotonic() + 30
        while not stop.requested and time.monotonic() < end:
            next(batches)
            time.sleep(0.02)
        for _ in range(50):
            next(batches)  # the workers are still there
    Path(args.out, f"{rank}.json").write_text(json.dumps(
        [accelerator.num_processes, rank, accelerator.device.type, total.item()]))
flags.run_main(main, {"out": (str, flags.REQUIRED, "folder")})
'''


def launch(tmp_path, *options):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    return subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", *options,
                             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend",
                             "no", str(script), f"--out={tmp_path}"],
                            env=child_environment(CUDA_VISIBLE_DEVICES=""), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@POSIX
def test_two_cpu_ranks_and_a_sigterm_to_their_launcher(tmp_path):
    """torchrun sends SIGTERM to each rank's whole process group, data loader workers included."""
    process = launch(tmp_path, "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 25, "the launcher had to kill its ranks, after 30 s"
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert results == [[2, 0, "cpu", 3.0], [2, 1, "cpu", 3.0]], output


def test_several_processes_without_multi_gpu_is_one_sentence(tmp_path):
    output, _ = launch(tmp_path, "--num_processes", "2").communicate(timeout=60)
    assert "error: accelerate launch was asked for several processes but started one" in output
    assert not list(tmp_path.glob("ready*"))
