"""A run that was interrupted, however, ends bit for bit where an undisturbed one ends."""

import os
import shutil
import signal
import time

import pytest
import runs
import torch

from libs.train.resume import check_optimizer_state

STEPS = runs.TINY["train.n_steps"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    runs.train(workdir)
    return workdir


def assert_same_run(workdir, undisturbed):
    assert runs.numbers(workdir) == runs.numbers(undisturbed)
    for found, expected in zip(
        runs.weights(workdir, STEPS), runs.weights(undisturbed, STEPS), strict=True
    ):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def slow(workdir, num_processes=0, **changes):
    """A run that waits a little in each step, so that a signal hits the step it is meant for."""
    words = runs.arguments(workdir, **changes)
    return runs.start("tests/slow_train.py", *words, num_processes=num_processes)


def test_the_run_trains(undisturbed):
    network, average = runs.weights(undisturbed, STEPS)
    lines = runs.numbers(undisturbed)
    assert [line[0] for line in lines] == list(range(1, STEPS + 1))
    assert lines[0][3] == 0 and lines[3][3] == pytest.approx(
        0.001
    )  # warm-up over 3 steps, the first update at 0
    assert any(not torch.equal(network[name], average[name]) for name in network)
    assert (undisturbed / "samples" / f"{STEPS}.png").stat().st_size > 1000


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_kill_9(tmp_path, undisturbed, step):
    process = slow(tmp_path)
    runs.wait_for_step(process, tmp_path, step)
    runs.kill_group(process)
    assert len(runs.steps_logged(tmp_path)) < STEPS
    runs.train(tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("num_processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_sigterm_saves_and_exits(tmp_path, undisturbed, num_processes):
    """To the trainer itself, and to the launcher of one process, which dies of it without a word to
    its child.
    """
    process = slow(tmp_path, num_processes=num_processes)
    runs.wait_for_step(process, tmp_path, 5)
    os.kill(process.pid, signal.SIGTERM)
    status, output = runs.finish(process)
    assert status != 0
    saved = wait_for_stop(tmp_path)
    assert 5 <= saved < STEPS and saved % 4, output  # not one of the regular checkpoints
    runs.train(tmp_path)
    assert_same_run(tmp_path, undisturbed)


def wait_for_stop(workdir):
    """The step of the checkpoint that a stopping run says it ended with."""
    for _ in range(600):
        log = (workdir / "output.log").read_text()
        if "stopped at step" in log:
            return int(log.split("stopped at step ")[1].split()[0])
        time.sleep(0.1)
    raise AssertionError(f"the run did not stop: {log}")


@pytest.mark.slow
def test_two_processes_stop_and_go_on(tmp_path, undisturbed):
    """Two ranks under a launcher that gets SIGTERM; the gradients are summed in another order, so
    rounding differs from one process.
    """
    process = slow(tmp_path, num_processes=2)
    runs.wait_for_step(process, tmp_path, 5)
    os.kill(process.pid, signal.SIGTERM)
    status, output = runs.finish(process)
    assert status != 0
    assert 5 <= wait_for_stop(tmp_path) < STEPS, output
    output = runs.train(tmp_path, num_processes=2)
    assert "2 process(es), ranks [0, 1]" in output
    expected = runs.numbers(undisturbed)
    assert [line[0] for line in runs.numbers(tmp_path)] == [line[0] for line in expected]
    for found, line in zip(runs.numbers(tmp_path), expected, strict=True):
        assert found[1:] == pytest.approx(line[1:], rel=1e-4)
    for name, tensor in runs.weights(undisturbed, STEPS)[0].items():
        torch.testing.assert_close(
            runs.weights(tmp_path, STEPS)[0][name], tensor, rtol=1e-3, atol=1e-5
        )


def test_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path, undisturbed):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    for step, harm in ((12, "truncate"), (8, "flip")):
        file = workdir / "ckpts" / f"{step}.ckpt" / "nnet.safetensors"
        content = bytearray(file.read_bytes())
        if harm == "truncate":
            content = content[:-100]
        else:
            content[-5] ^= 1
        file.write_bytes(content)
    output = runs.train(workdir)
    assert "12.ckpt" in output and "8.ckpt" in output and "resuming from" in output
    assert "4.ckpt" in output.split("resuming from")[1].splitlines()[0]
    assert_same_run(workdir, undisturbed)


def test_nothing_is_started_over_where_every_checkpoint_is_damaged(tmp_path, undisturbed):
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    for folder in (workdir / "ckpts").iterdir():
        (folder / "training.pt").write_bytes(b"")
    before = (workdir / "metrics.jsonl").read_bytes()
    status, output = runs.run("train.py", *runs.arguments(workdir))
    assert status == 1 and "is whole" in output and "12.ckpt" in output, output
    assert "Traceback" not in output
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_second_run_in_the_directory_is_refused(tmp_path):
    first = slow(tmp_path, train__n_steps=200)
    runs.wait_for_step(first, tmp_path, 1)
    status, output = runs.run("train.py", *runs.arguments(tmp_path))
    runs.kill_group(first)
    assert status == 1
    error = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(error) == 1 and str(first.pid) in error[0] and "Traceback" not in output


@pytest.mark.parametrize(
    "key, value",
    [("step", -1e300), ("step", float("nan")), ("betas", (1.5, 0.9)), ("lr", float("inf"))],
)
def test_an_optimizer_state_that_no_run_has_is_refused(key, value):
    """Found by fuzzing: torch takes it and fails in the next step, or steps into nothing."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    state = optimizer.state_dict()
    check_optimizer_state(state, optimizer)
    if key == "step":
        state["state"][0]["step"] = torch.tensor(value, dtype=torch.float64)
    else:
        state["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"its {key}"):
        check_optimizer_state(state, optimizer)
