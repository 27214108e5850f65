"""Processes that hang, freeze or fail: the run ends, and a sentence names the rank."""

import os
import signal
import sys
import time

import psutil
import pytest
import runs
import torch

from libs.runtime import watch
from libs.runtime.watch import WAITING, Watch
from utils import UserError


@pytest.fixture
def watches():
    """Of three processes with a timeout of 10 s, in one store; each has begun."""
    store = torch.distributed.HashStore()
    found = [Watch(store, rank, 3, 10) for rank in range(3)]
    for one in found:
        one.beats, one.doing = 1, "computing"
    return found


def poll(watches, seconds, times=1):
    """Let these poll in turn; what they say last."""
    for _ in range(times):
        said = [one.step(seconds) for one in watches]
    return said


def test_progress_of_one_is_enough(watches):
    for _ in range(100):
        watches[2].beats += 1
        assert poll(watches, 1) == [None] * 3


def test_nothing_is_said_before_all_have_begun(watches):
    watches[1].beats = 0
    assert poll(watches, 1, times=100) == [None] * 3


def test_a_process_that_freezes_before_it_has_begun_is_named(watches):
    watches[1].beats = 0
    assert poll(watches, 1) == [None] * 3
    assert poll([watches[0], watches[2]], 1, times=10) == [None] * 2
    sentence, other = poll([watches[0], watches[2]], 1, times=3)
    assert "rank 1 is not answering" in sentence and other is None


def test_the_cause_of_a_collective_that_fails_is_told(watches, monkeypatch):
    monkeypatch.setattr(watch, "_current", watches[0])
    error = RuntimeError("NCCL error in: x.cpp:1, invalid usage\nLast error:\nDuplicate GPU")
    said = watch.ended_by_others(error)
    assert said.endswith("(NCCL error in: x.cpp:1, invalid usage ... Duplicate GPU)")


THROUGH = """
import sys, time
sys.path.insert(0, {root!r})
import torch
from libs import watch
store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True)
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
watch.start(1)
watch._current.interval = 0
time.sleep(1)  # after the first poll the thread is in the store nearly all the time
torch.distributed.is_initialized = lambda: True
"""


def test_the_thread_does_not_outlive_the_interpreter():
    """It would abort a process whose work is done: "terminate called without an active exception".
    """
    script = THROUGH.format(root=str(runs.ROOT))
    for process in [runs._start([sys.executable, "-c", script], {}) for _ in range(3)]:
        assert runs.finish(process) == (0, "")


def test_a_process_that_is_behind_is_named(watches):
    for rank in (0, 2):
        watches[rank].beats += 1
    watches[1].doing = "reading data"
    assert poll(watches, 1, times=10) == [None] * 3
    sentence, *others = poll(watches, 1, times=4)
    assert sentence == (
        "no process got on for 10 s: the others wait for rank 1 (rank 1 is reading data)"
    )
    assert others == [None, None], "one speaks for all"


def test_a_process_that_writes_while_the_others_wait_is_named(watches):
    """However many images each has made before."""
    watches[0].beats, watches[0].doing = 50, "saving a checkpoint"
    watches[1].doing = watches[2].doing = WAITING
    assert "wait for rank 0 (rank 0 is saving" in poll(watches, 1, times=14)[0]


def test_a_frozen_process_is_named_by_those_that_live(watches):
    poll(watches, 1)
    said = poll(watches[1:], 1, times=14)  # rank 0 is frozen
    assert said[0] == (
        "no process got on for 10 s: rank 0 is not answering: frozen, killed, or its machine is "
        "lost"
    ) and said[1] is None  # fmt: skip


def test_without_anyone_behind_it_says_so(watches):
    assert "none is behind: the network" in poll(watches, 1, times=14)[0]


def test_a_run_that_was_suspended_goes_on(watches):
    """`run` counts at most two intervals a poll, whatever the clock says."""
    interval = watches[0].interval
    poll(watches, 2 * interval, times=2)
    for one in watches:
        one.beats += 1
    assert poll(watches, 2 * interval, times=3) == [None] * 3


def test_the_failure_of_one_ends_the_others(watches, monkeypatch):
    monkeypatch.setattr(watch, "_current", watches[1])
    said = []
    watch.fail(lambda: said.append("why"))
    assert said == ["why"] and watch._current is None
    sentence = "stopped because rank 1 did; its message says why"
    assert poll(watches, 1) == [sentence, None, sentence]
    monkeypatch.setattr(watch, "_current", watches[0])
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer")
    assert watch.ended_by_others(broken) == sentence
    assert watch.ended_by_others(RuntimeError("size mismatch")) is None
    assert watch.ended_by_others(KeyError("gloo/")) is None


def test_a_timeout_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv(watch.TIMEOUT, "soon")
    with pytest.raises(UserError, match="DIM_TIMEOUT_S is 'soon', expected a whole number"):
        watch.timeout_s()
    monkeypatch.setenv(watch.TIMEOUT, "90")
    assert watch.timeout_s() == 90
    monkeypatch.delenv(watch.TIMEOUT)
    assert watch.timeout_s() == 1800


# ---------------------------------------------------------------------------------------------
# Whole runs


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    if request.param == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, found {torch.cuda.device_count()}")
    return request.param


def start(workdir, device, timeout, **changes):
    words = runs.arguments(workdir, train__num_workers=0, train__grid_samples=0, **changes)
    extra = {"CUDA_VISIBLE_DEVICES": "0,1"} if device == "cuda" else {}
    return runs.start(
        "train.py", *words, num_processes=2, DIM_TIMEOUT_S=str(timeout), NCCL_NVLS_ENABLE="0",
        **extra,
    )  # fmt: skip


def process_of_rank(launcher, rank):
    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no process of rank {rank}")


def test_a_frozen_process_ends_the_run_by_name(device, tmp_path):
    process = start(tmp_path, device, 15, train__n_steps=100000, train__save_interval=100000)
    try:
        runs.wait_for_step(process, tmp_path, 3)
        frozen = process_of_rank(process, 1)
        frozen.suspend()
        began, sentence = time.monotonic(), ""
        while not sentence.startswith("error") and time.monotonic() - began < 120:
            sentence = process.stdout.readline()
        assert "error: no process got on for 15 s: rank 1 is not answering" in sentence
        assert time.monotonic() - began > 10
        os.kill(frozen.pid, signal.SIGCONT)  # the launcher would kill it after 30 s
        rest, _ = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            runs.kill_group(process)
    assert process.returncode not in (0, None)
    assert "Traceback" not in rest.split("torch/distributed", 1)[0]


def test_when_rank_0_refuses_the_others_end_with_a_sentence(device, tmp_path):
    """What only the main process looks at: checkpoints of which none is whole."""
    folder = tmp_path / "ckpts" / "4.ckpt"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    status, output = runs.finish(start(tmp_path, device, 60))
    assert status != 0 and "error: no checkpoint in" in output, output
    before_launcher = output.split("torch/distributed/elastic", 1)[0]
    assert "Traceback" not in before_launcher and "gloo" not in before_launcher, output


@pytest.mark.slow
def test_a_killed_process_ends_the_others_with_a_sentence(device, tmp_path):
    process = start(tmp_path, device, 60, train__n_steps=100000, train__save_interval=100000)
    runs.wait_for_step(process, tmp_path, 3)
    process_of_rank(process, 1).kill()
    status, output = runs.finish(process)
    assert status != 0, output
    if device == "cpu":  # NCCL's processes wait for the launcher, which names the one that died
        assert "error: what the processes do together failed" in output, output
