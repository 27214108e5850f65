"""Checkpoints: exact, strict, and whole however a save ends."""

import errno
import json
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from libs.files import load_strict, weights_file
from libs.train import checkpoint
from utils import UserError

CHECKOUT = Path(__file__).resolve().parent.parent
FILES = ("nnet.safetensors", "nnet_ema.safetensors", "training.pt", "config.json")

# Shared by the tests that need a process of their own (to kill it, or to limit its file size).
HELPER = '''
import os, random, resource, shutil, signal, sys, time
from pathlib import Path
import torch
from libs import checkpoint
from utils import UserError

directory = Path(sys.argv[1])

def save(step, keep_last=2):
    weights = {"w": torch.full((300,), float(step)), "b": torch.arange(7.0)}
    checkpoint.save(directory, step, nnet=weights, ema=weights, config={"lr": 1e-4},
                    training_state={"step": step, "m": torch.full((400,), float(step))},
                    keep_last=keep_last)

def found():
    """Step of the newest good checkpoint, having looked at what is in it."""
    result = checkpoint.latest(directory, report=lambda line: None)
    if result is None:
        return None
    loaded = checkpoint.load(result[0])
    assert loaded.step == result[1] == loaded.training_state["step"]
    assert torch.equal(loaded.nnet["w"], torch.full((300,), float(loaded.step)))
    return loaded.step
'''


def run_helper(code, *arguments):
    result = subprocess.run([sys.executable, "-c", HELPER + textwrap.dedent(code),
                             *map(str, arguments)], cwd=CHECKOUT, capture_output=True, text=True,
                            timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def save_step(directory, step, keep_last=None, **changes):
    values = {"nnet": {"w": torch.arange(6.0).reshape(2, 3) + step},
              "ema": {"w": torch.arange(6.0).reshape(2, 3) - step},
              "training_state": {"step": step, "rng": torch.arange(5, dtype=torch.uint8)},
              "config": {"optimizer": {"lr": 1e-4, "betas": (0.9, 0.99)}}, **changes}
    return checkpoint.save(directory, step, keep_last=keep_last, **values)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


# ---------------------------------------------------------------------------------------------
# Values

def test_everything_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(4, 6, dtype=torch.float64)
    nnet = {"f64": base, "transposed": base.T, "view": base[1:3, ::2], "tied": base,
            "bf16": torch.randn(5).bfloat16(), "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 2), "nan": torch.tensor([float("nan"), float("inf"), -0.0])}
    ema = {name: tensor * 2 for name, tensor in nnet.items()}
    state = {"scaler": None, "counters": {"step": 3, "skipped": 0}, "lr": 0.1 + 0.2, "flag": True,
             "list": [1, (2.5, "x")], 7: base[0], "rng": torch.get_rng_state()}
    config = {"optimizer": {"lr": 0.1 + 0.2, "betas": (0.9, 0.99)}, "z_shape": (3, 8, 8), "n": None}
    path = save_step(tmp_path, 3, nnet=nnet, ema=ema, training_state=state, config=config)
    loaded = checkpoint.load(path)
    assert (path, loaded.step) == (tmp_path / "3.ckpt", 3)
    assert names(path) == sorted((*FILES, "manifest.json"))
    for saved, read in (nnet, loaded.nnet), (ema, loaded.ema):
        assert saved.keys() == read.keys()
        for name in saved:
            assert read[name].dtype == saved[name].dtype
            torch.testing.assert_close(read[name], saved[name], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(loaded.training_state.pop(7), state.pop(7))
    assert torch.equal(loaded.training_state.pop("rng"), state.pop("rng"))
    assert loaded.training_state == state
    assert loaded.config == config


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    big = torch.zeros(1_000_000)
    path = save_step(tmp_path, 1, nnet={"w": big[:3]}, training_state={"w": big[:3]})
    assert sum(file.stat().st_size for file in path.iterdir()) < 20_000


def adamw_step(model, optimizer):
    torch.manual_seed(1)
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_adamw_goes_on_as_if_never_stopped(tmp_path):
    models = [torch.nn.Linear(4, 4) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in models]
    adamw_step(models[0], optimizers[0])
    path = save_step(tmp_path, 1, nnet=models[0].state_dict(),
                     training_state={"optimizer": optimizers[0].state_dict()})
    adamw_step(models[0], optimizers[0])
    loaded = checkpoint.load(path)
    load_strict(models[1], loaded.nnet, path)
    optimizers[1].load_state_dict(loaded.training_state["optimizer"])
    adamw_step(models[1], optimizers[1])
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_tensors_come_back_on_the_cpu(tmp_path):
    loaded = checkpoint.load(save_step(tmp_path, 1, nnet={"w": torch.ones(3, device="cuda")},
                                       training_state={"m": torch.ones(2, device="cuda")}))
    assert loaded.nnet["w"].device.type == loaded.training_state["m"].device.type == "cpu"


def test_state_that_could_not_be_read_back_is_refused(tmp_path):
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match=r"training_state\['a'\]\[1\] is a float64"):
        save_step(tmp_path, 1, training_state={"a": [1.0, numpy.float64(2)]})
    with pytest.raises(TypeError, match="JSON serializable"):
        save_step(tmp_path, 1, config={"a": object()})
    assert names(tmp_path) == []


# ---------------------------------------------------------------------------------------------
# Which checkpoints there are

def test_latest_goes_by_number_and_keep_last_counts(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 10, 100):
        save_step(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["10.ckpt", "100.ckpt"]
    assert checkpoint.latest(tmp_path) == (tmp_path / "100.ckpt", 100)
    # After falling back behind a later one, the checkpoint just written is never the one deleted.
    save_step(tmp_path, 50, keep_last=1)
    assert names(tmp_path) == ["100.ckpt", "50.ckpt"]


def test_the_same_step_again_replaces(tmp_path):
    save_step(tmp_path, 5)
    path = save_step(tmp_path, 5, nnet={"other": torch.ones(2)})
    assert names(tmp_path) == ["5.ckpt"]
    assert list(checkpoint.load(path).nnet) == ["other"]


def test_leftovers_are_ignored_named_and_cleaned(tmp_path):
    save_step(tmp_path, 5)
    for name in (".saving-6-123", ".removing-4", ".replaced-5"):
        (tmp_path / name).mkdir()
    lines = []
    assert checkpoint.latest(tmp_path, lines.append) == (tmp_path / "5.ckpt", 5)
    assert len(lines) == 1 and ".saving-6-123" in lines[0]
    save_step(tmp_path, 6)
    assert names(tmp_path) == ["5.ckpt", "6.ckpt"]


def test_killed_while_replacing_the_old_one_is_still_there(tmp_path):
    save_step(tmp_path, 5).rename(tmp_path / ".replaced-5")
    assert checkpoint.latest(tmp_path) == (tmp_path / ".replaced-5", 5)
    save_step(tmp_path, 6)
    assert names(tmp_path) == ["5.ckpt", "6.ckpt"]
    assert checkpoint.verify(tmp_path / "5.ckpt") == 5


# ---------------------------------------------------------------------------------------------
# Damage

def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip, truncate, os.remove])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_to_any_file_is_found_named_and_skipped(tmp_path, name, damage):
    good, bad = save_step(tmp_path, 1), save_step(tmp_path, 2)
    damage(bad / name)
    for reader in checkpoint.verify, checkpoint.load:
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            reader(bad)
    lines = []
    assert checkpoint.latest(tmp_path, lines.append) == (good, 1)
    assert len(lines) == 1 and str(bad) in lines[0] and name in lines[0]


@pytest.mark.parametrize("name", ["nnet.safetensors", "manifest.json"])
def test_what_the_system_does_not_let_us_read_is_not_taken_for_damaged(tmp_path, monkeypatch, name):
    """It would be replaced by a later save."""
    save_step(tmp_path, 1)
    newest, opened = save_step(tmp_path, 2), open

    def refusing(path, *args, **keywords):
        if Path(path) == newest / name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **keywords)

    monkeypatch.setattr("builtins.open", refusing)
    with pytest.raises(UserError, match=r"cannot read checkpoint .*2.ckpt \(Permission denied\)"):
        checkpoint.latest(tmp_path)


@pytest.mark.parametrize("name", ["", "training.pt", "manifest.json"])
def test_what_the_system_does_not_know_is_not_taken_for_missing(tmp_path, monkeypatch, name):
    """As pathlib does from Python 3.14 on."""
    save_step(tmp_path, 1)
    newest, asked = save_step(tmp_path, 2), os.stat

    def stale(path, *args, **keywords):
        if Path(path) == newest / name:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return asked(path, *args, **keywords)

    def quiet(self):
        try:
            return stat.S_ISREG(os.stat(self).st_mode)
        except OSError:
            return False

    monkeypatch.setattr(os, "stat", stale)
    monkeypatch.setattr(Path, "is_file", quiet)
    with pytest.raises(UserError, match=r"cannot read checkpoint .*2.ckpt \(Stale file handle\)"):
        checkpoint.latest(tmp_path)


def test_all_files_have_the_rights_that_files_usually_get(tmp_path):
    path = save_step(tmp_path, 1)
    (path / "other").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(path / "other").stat().st_mode}


def test_other_directories_and_formats_are_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint directory"):
        checkpoint.load(tmp_path / "absent")
    path = save_step(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UserError, match="has checkpoint format 2"):
        checkpoint.load(path)


# ---------------------------------------------------------------------------------------------
# Saves that fail or die

def test_no_space_left(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    directory = tmp_path / "ckpts"
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"1\.ckpt: No space left.*there is no earlier"):
            save_step(directory, 1)
    save_step(directory, 1)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"2\.ckpt: No space left.*last good checkpoint is .*1\.ck"):
        save_step(directory, 2)
    with pytest.raises(UserError, match=r"1\.ckpt: No space left"):
        save_step(directory, 1)
    assert names(directory) == ["1.ckpt"]
    assert checkpoint.verify(directory / "1.ckpt") == 1


def test_every_file_hitting_the_file_size_limit(tmp_path):
    """Real write errors: in safetensors, in torch's zip writer, and in a small JSON file."""
    output = run_helper('''
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save(1)
        def attempt(limit, nnet=9, state=9, text=9):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            try:
                checkpoint.save(directory, 2, nnet={"w": torch.zeros(nnet)}, ema={},
                                training_state={"m": torch.zeros(state)},
                                config={"text": "x" * text}, keep_last=1)
            except UserError as error:
                print(error)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            assert sorted(os.listdir(directory)) == ["1.ckpt"] and found() == 1
        attempt(40_000, nnet=20_000)
        attempt(40_000, state=20_000)
        attempt(40_000, state=9_900)
        attempt(40_000, text=50_000)
        save(2, keep_last=1)
        assert found() == 2
    ''', tmp_path)
    lines = output.splitlines()
    assert len(lines) == 4
    for line in lines:
        assert "2.ckpt: " in line and "File too large" in line and "1.ckpt" in line


@pytest.mark.skipif(sys.platform == "win32", reason="uses fork and kill -9")
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
                assert found() in ((2,) if step == 2 else (2, 3)), (step, count, found())
                if status == 0:
                    break
                assert status == 9
                save(4)
                assert all(name.endswith(".ckpt") for name in os.listdir(directory))
            print(count)
    ''', tmp_path)
    assert all(10 < int(count) < 100 for count in output.split()), output


@pytest.mark.skipif(sys.platform == "win32", reason="uses fork and kill -9")
def test_kill_9_at_random_moments(tmp_path):
    """Whatever save() returned from is found again; an earlier one always verifies."""
    output = run_helper('''
        random.seed(0)
        torch.set_num_threads(1)
        done, deaths_inside = 0, 0
        started = time.monotonic()
        save(0)
        duration = time.monotonic() - started
        for trial in range(60):
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
        print(done, deaths_inside, duration)
    ''', tmp_path)
    done, deaths_inside, _ = map(float, output.split())
    assert done > 5 and deaths_inside > 5, output  # else hardly any kill fell inside a save


# ---------------------------------------------------------------------------------------------
# Loading weights

def test_load_strict_names_what_does_not_fit():
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    weights = {name: torch.ones_like(value) for name, value in before.items()}
    wrong = {"0.weight": torch.ones(3, 5), "0.bias": torch.ones(3),
             **{f"extra.{i}": torch.ones(1) for i in range(5)}}
    with pytest.raises(UserError) as caught:
        load_strict(module, wrong, "some.ckpt")
    said = str(caught.value)
    for part in ("some.ckpt", "missing: 1.weight, 1.bias", "extra.0, extra.1, extra.2 and 2 more",
                 "0.weight (3, 5) instead of (3, 2)"):
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
