"""A run that is killed or stopped at any moment goes on to the same bits with the same command."""

import errno
import os
import shutil
import signal
import time

import psutil
import pytest
import runs
import torch

from libs.train import checkpoint

STEPS = 12


@pytest.fixture(scope="module")
def undisturbed(in_process, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert in_process("train", runs.arguments(workdir)) == 0
    return workdir


def assert_same_run(workdir, undisturbed):
    assert runs.numbers(workdir) == runs.numbers(undisturbed)
    for found, expected in zip(
        runs.weights(workdir, STEPS), runs.weights(undisturbed, STEPS), strict=True
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def start_slow(workdir, num_processes=0, **extra):
    """A run that waits a little in each step, so that a signal hits the step it is meant for."""
    words = runs.arguments(workdir)
    return runs.start("tests/slow_train.py", *words, num_processes=num_processes, **extra)


def get_saved_step(workdir):
    """The step that a stopped run says it ended with; it may outlive its launcher."""
    for _ in range(600):
        log = (workdir / "output.log").read_text()
        if "stopped at step" in log:
            return int(log.split("stopped at step ")[-1].split(";")[0])
        time.sleep(0.1)
    raise AssertionError(f"the run did not stop: {log}")


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_the_run_trains(undisturbed):
    network, average, *_ = runs.weights(undisturbed, STEPS)
    lines = runs.numbers(undisturbed)
    assert [line[0] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0][3] == 0 and lines[3][3] == pytest.approx(0.001)  # warm-up over 3 steps
    assert any(not torch.equal(network[name], average[name]) for name in network)
    assert (undisturbed / "samples" / f"{STEPS}.png").stat().st_size > 1000


@pytest.mark.parametrize("slow_save_s", ["0", "60"])
def test_kill_9(in_process, capfd, tmp_path, undisturbed, slow_save_s):
    """Also during a save. A second run is refused; the data loader's workers end with the first."""
    process = start_slow(tmp_path, SLOW_SAVE_S=slow_save_s)
    runs.wait_for_step(process, tmp_path, 1)
    status = in_process("train", runs.arguments(tmp_path))
    runs.assert_one_sentence(status, capfd.readouterr().err, str(process.pid))
    runs.wait_for_step(process, tmp_path, 7)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(workers) >= 2 and len(runs.steps_logged(tmp_path)) < STEPS
    assert (tmp_path / "ckpts" / ".saving-4").exists() == (slow_save_s == "60")
    _, outlive = psutil.wait_procs(workers, timeout=20)
    assert not any(map(alive, outlive))
    assert in_process("train", runs.arguments(tmp_path)) == 0
    assert_same_run(tmp_path, undisturbed)


def test_a_full_disk(in_process, capfd, tmp_path, undisturbed, monkeypatch):
    def refuse(path, value, write=checkpoint.write_json):
        if path.parent.name == ".saving-8":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_json", refuse)
        status = in_process("train", runs.arguments(tmp_path))
    runs.assert_one_sentence(status, capfd.readouterr().err, "8.ckpt: No space left on device")
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["4.ckpt"]
    assert in_process("train", runs.arguments(tmp_path)) == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("num_processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sigterm_saves_and_exits(in_process, tmp_path, undisturbed, num_processes):
    """To the trainer itself, and to the launcher of one process, which dies of it without a word to
    its child.
    """
    process = start_slow(tmp_path, num_processes=num_processes)
    runs.wait_for_step(process, tmp_path, 5)
    os.kill(process.pid, signal.SIGTERM)
    status, output = runs.finish(process)
    assert status == 143 if num_processes == 0 else status != 0
    saved = get_saved_step(tmp_path)
    assert 5 <= saved < STEPS and saved % 4, output  # not one of the regular checkpoints
    assert in_process("train", runs.arguments(tmp_path)) == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_two_processes_are_killed_and_stopped_and_go_on(tmp_path, undisturbed):
    """One of the two dies by kill -9 and the launcher ends the other; then the launcher gets
    SIGTERM.
    """
    runs.train(tmp_path / "two", num_processes=2)
    process = start_slow(tmp_path / "run", num_processes=2)
    runs.wait_for_step(process, tmp_path / "run", 5)
    find_rank(process, 1).kill()
    assert runs.finish(process)[0] != 0
    process = start_slow(tmp_path / "run", num_processes=2)
    runs.wait_for_step(process, tmp_path / "run", 9)
    os.kill(process.pid, signal.SIGTERM)
    assert runs.finish(process)[0] != 0
    assert 9 <= get_saved_step(tmp_path / "run") < STEPS
    assert "2 process(es), ranks [0, 1]" in runs.train(tmp_path / "run", num_processes=2)
    assert_same_run(tmp_path / "run", tmp_path / "two")
    # The gradients of two processes are summed in another order than those of one.
    for found, line in zip(runs.numbers(tmp_path / "two"), runs.numbers(undisturbed), strict=True):
        assert found == pytest.approx(line, rel=1e-4)


def find_rank(launcher, rank):
    """The process of a rank; its workers have the same environment."""
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


@pytest.mark.slow
def test_a_hang_ends_by_the_time_out_of_the_process_group(tmp_path):
    process = start_slow(tmp_path, num_processes=2, DIM_TIMEOUT_S="10")
    runs.wait_for_step(process, tmp_path, 3)
    find_rank(process, 1).suspend()
    status, output = runs.finish(process)  # the launcher kills the frozen one after 30 s
    assert status != 0 and len(runs.steps_logged(tmp_path)) < STEPS, output


def test_damaged_checkpoints_are_named_and_the_one_before_used(in_process, tmp_path, undisturbed):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    os.truncate(workdir / "ckpts" / "12.ckpt" / "nnet.safetensors", 1000)
    file = workdir / "ckpts" / "8.ckpt" / "training.pt"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert in_process("train", runs.arguments(workdir)) == 0
    log = (workdir / "output.log").read_text()
    for step in 8, 12:
        assert f"skipping checkpoint {workdir / 'ckpts' / f'{step}.ckpt'}, which is damaged" in log
    assert f"resuming from {workdir / 'ckpts' / '4.ckpt'}" in log
    assert_same_run(workdir, undisturbed)


def test_nothing_is_started_over_where_every_checkpoint_is_damaged(
    in_process, capfd, tmp_path, undisturbed
):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    for folder in (workdir / "ckpts").iterdir():
        (folder / "training.pt").write_bytes(b"")
    before = runs.snapshot(workdir)
    assert in_process("train", runs.arguments(workdir)) == 1
    runs.assert_one_sentence(1, capfd.readouterr().err, "is whole", "12.ckpt")
    runs.assert_nothing_lost(before)
