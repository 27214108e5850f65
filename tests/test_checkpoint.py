"""Checkpoints: exact, and whole however a save ends."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import runs
import torch

from libs.files import load_strict, read_safetensors, read_torch, weights_file
from libs.train import checkpoint
from utils import UserError

FILES = ("nnet.safetensors", "nnet_ema.safetensors", "training.pt", "config.json")

# Shared by the tests that need a process of their own, to kill it or to limit its file size.
HELPER = '''
import os, random, resource, shutil, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from libs.train import checkpoint
from utils import UserError

directory = Path(sys.argv[1])

def save(step, keep_last=2):
    weights = {"w": torch.full((300,), float(step)), "b": torch.arange(7.0)}
    checkpoint.save(directory, step, weights={"nnet": weights, "nnet_ema": weights},
                    training_state={"step": step, "m": torch.full((400,), float(step))},
                    config={"lr": 1e-4}, keep_last=keep_last)

def found():
    """Step of the checkpoint that a start finds, which is whole."""
    checkpoint.clean(directory)
    path = checkpoint.find_latest(directory)
    nnet, step = load_file(path / "nnet.safetensors"), torch.load(path / "training.pt")["step"]
    assert path.name == f"{step}.ckpt" and torch.equal(nnet["w"], torch.full((300,), float(step)))
    assert all(name.endswith(".ckpt") for name in os.listdir(directory))
    return step
'''


def run_helper(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", HELPER + textwrap.dedent(code), *map(str, arguments)],
        cwd=runs.ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def save_step(directory, step, keep_last=None, **changes):
    values = {
        "weights": {"nnet": {"w": torch.arange(6.0)}, "nnet_ema": {"w": torch.arange(6.0) - step}},
        "training_state": {"step": step, "rng": torch.arange(5, dtype=torch.uint8)},
        "config": {"optimizer": {"lr": 1e-4, "betas": (0.9, 0.99)}},
        **changes,
    }
    return checkpoint.save(directory, step, keep_last=keep_last, **values)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6, dtype=torch.float64)
    nnet = {
        "f64": base, "view": base[1:3, ::2], "bf16": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(3), "empty": torch.zeros(0, 2),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }  # fmt: skip
    weights = {"nnet": nnet, "nnet_ema": {name: tensor * 2 for name, tensor in nnet.items()}}
    state = {"scaler": None, "lr": 0.1 + 0.2, "list": [1, (2.5, "x")], "a.weight": base[0]}
    path = save_step(tmp_path, 3, weights=weights, training_state=state)
    found = read_torch(path / "training.pt")
    assert path == tmp_path / "3.ckpt" and names(path) == sorted((*FILES, "manifest.json"))
    for file, saved in weights.items():
        read = read_safetensors(path / f"{file}.safetensors")
        assert saved.keys() == read.keys()
        for name in saved:
            assert read[name].dtype == saved[name].dtype
            torch.testing.assert_close(read[name], saved[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.pop("a.weight"), state.pop("a.weight"))
    assert found == state
    (path / "other").touch()
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1, "all with the usual rights"


@pytest.mark.cuda
def test_tensors_of_a_gpu_come_back_on_the_cpu(tmp_path):
    tensors = {"w": torch.ones(3, device="cuda")}
    state = {"optimizer": [tensors]}
    path = save_step(tmp_path, 1, weights={"nnet": tensors}, training_state=state)
    assert torch.load(path / "training.pt")["optimizer"][0]["w"].device.type == "cpu"


def test_the_newest_is_found_and_keep_last_counts(tmp_path):
    assert checkpoint.find_latest(tmp_path) is None
    for step in (9, 10, 100):
        save_step(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["10.ckpt", "100.ckpt"]
    assert checkpoint.find_latest(tmp_path) == tmp_path / "100.ckpt"
    # After falling back behind a later one, the checkpoint just written is never the one deleted.
    save_step(tmp_path, 50, keep_last=1)
    assert names(tmp_path) == ["100.ckpt", "50.ckpt"]
    save_step(tmp_path, 50, weights={"nnet": {"other": torch.ones(2)}})
    assert names(tmp_path) == ["100.ckpt", "50.ckpt"]
    assert list(read_safetensors(tmp_path / "50.ckpt" / "nnet.safetensors")) == ["other"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, cut, os.remove])
@pytest.mark.parametrize("name", ["nnet.safetensors", "training.pt", "manifest.json"])
def test_damage_is_found_and_the_checkpoint_before_taken(tmp_path, caplog, name, damage):
    good, bad = save_step(tmp_path, 1), save_step(tmp_path, 2)
    damage(bad / name)
    with caplog.at_level("WARNING", "dim"):
        assert checkpoint.find_latest(tmp_path) == good
    assert f"skipping checkpoint {bad}" in caplog.text


def test_a_file_that_may_not_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    """A later save would replace it."""
    save_step(tmp_path, 1)
    newest, opened = save_step(tmp_path, 2), open

    def refusing(path, *args, **keywords):
        if Path(path) == newest / "training.pt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **keywords)

    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(PermissionError, match=r"training\.pt"):
        checkpoint.find_latest(tmp_path)


# ---------------------------------------------------------------------------------------------
# Saves that fail or die


def test_a_full_disk_in_any_file_leaves_the_checkpoint_before(tmp_path):
    """Real write errors: in safetensors, in torch's zip writer, and in a small JSON file."""
    output = run_helper('''
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save(1)
        def attempt(nnet=9, state=9, text=9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
            try:
                checkpoint.save(directory, 2, weights={"nnet": {"w": torch.zeros(nnet)}},
                                training_state={"m": torch.zeros(state)},
                                config={"text": "x" * text}, keep_last=1)
            except UserError as error:
                print(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert sorted(os.listdir(directory)) == ["1.ckpt"] and found() == 1
        attempt(nnet=20_000)
        attempt(state=20_000)
        attempt(text=50_000)
        save(2, keep_last=1)
        assert found() == 2
    ''', tmp_path)
    lines = output.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "2.ckpt: " in line and "File too large" in line, line


def test_death_at_every_step_of_a_save(tmp_path):
    """The process ends before its n-th change of the disk, for every n, new step and same step."""
    output = run_helper('''
        os.fsync = lambda descriptor: None  # the page cache outlives a process

        def dying_at(count, step):
            calls = iter(range(count))
            def dies(function):
                def wrapper(*arguments, **keywords):
                    next(calls, None) is not None or os._exit(9)
                    return function(*arguments, **keywords)
                return wrapper
            Path.rename, Path.mkdir = dies(Path.rename), dies(Path.mkdir)
            os.replace, os.fsync, os.rmdir = dies(os.replace), dies(os.fsync), dies(os.rmdir)
            os.unlink = dies(os.unlink)
            save(step)
            os._exit(0)

        for step in (3, 2):
            for count in range(200):
                shutil.rmtree(directory)
                save(1), save(2)
                pid = os.fork()
                if pid == 0:
                    dying_at(count, step)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                assert found() in ((2,) if step == 2 else (2, 3)), (step, count)
                if status == 0:
                    break
                assert status == 9
                save(4)
                assert found() == 4
            print(count)
    ''', tmp_path)
    assert all(10 < int(count) < 100 for count in output.split()), output


@pytest.mark.slow
def test_kill_9_at_random_moments_of_a_save(tmp_path):
    """What save() returned from is found again, and an earlier one is always whole."""
    output = run_helper('''
        random.seed(0)
        torch.set_num_threads(1)
        done, deaths_inside = 0, 0
        started = time.monotonic()
        save(0)
        duration = time.monotonic() - started
        for trial in range(40):
            same_step = trial % 3 == 0
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                while True:
                    done += not same_step
                    save(done)
                    os.write(writer, done.to_bytes(4, "big"))
            time.sleep(random.uniform(0.0, 3 * duration))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                acknowledged = pipe.read()
            done = int.from_bytes(acknowledged[-4:], "big") if acknowledged else done
            deaths_inside += any(name.startswith(".") for name in os.listdir(directory))
            step = found()
            assert step in ((done,) if same_step else (done, done + 1)), (step, done)
            done = step
        print(done, deaths_inside)
    ''', tmp_path)
    done, deaths_inside = map(float, output.split())
    assert done > 5 and deaths_inside > 5, output  # else hardly any kill fell inside a save


# ---------------------------------------------------------------------------------------------
# Loading weights


def test_load_strict_names_what_does_not_fit():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weights = {name: torch.ones_like(value) for name, value in before.items()}
    extra = {f"extra.{i}": torch.ones(1) for i in range(5)}
    wrong = {"0.weight": torch.ones(3, 5), "0.bias": torch.ones(3), **extra}
    with pytest.raises(UserError) as caught:
        load_strict(module, wrong, "some.ckpt")
    said = str(caught.value)
    for part in ("some.ckpt", "missing: 1.weight, 1.bias", "extra.0, extra.1, extra.2 and 2 more",
                 "0.weight (3, 5) instead of (3, 2)"):  # fmt: skip
        assert part in said
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    load_strict(module, weights, "some.ckpt")
    assert all(torch.equal(value, torch.ones_like(value)) for value in module.parameters())


def test_of_a_pth_that_is_not_there_ours_of_the_same_name(tmp_path):
    """The README's commands name nnet_ema.pth, which published runs have."""
    for name in ("nnet_ema.pth", "nnet_ema.safetensors", "other.pth"):
        assert weights_file(tmp_path / name) == tmp_path / name
    (tmp_path / "nnet_ema.safetensors").touch()
    assert weights_file(tmp_path / "nnet_ema.pth") == tmp_path / "nnet_ema.safetensors"
    assert weights_file(tmp_path) == tmp_path / "nnet_ema.safetensors"
    (tmp_path / "nnet_ema.pth").touch()
    assert weights_file(tmp_path / "nnet_ema.pth") == tmp_path / "nnet_ema.pth"
