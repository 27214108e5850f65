"""benchmarks/bench_scaling.py, with its tiny network on the CPU."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import runs

SCRIPT = runs.ROOT / "benchmarks" / "bench_scaling.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def run(out, *words):
    """(records, table) of a run of the script."""
    done = subprocess.run(
        [sys.executable, SCRIPT, "--models=tiny", "--steps=2", f"--out={out}", *words],
        env=runs.environment(), capture_output=True, text=True, timeout=runs.TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "scaling_cpu.json").read_text()), done.stdout


@pytest.mark.slow
def test_one_process(tmp_path):
    records, printed = run(tmp_path, "--gpus=1")
    assert [r["mode"] for r in records] == ["weak", "strong", "evaluation"]
    for record in records:
        assert record["img_s"] > 0 and record["efficiency"] == 1
        assert f"{record['img_s']:.1f}" in printed
    for record in records[:2]:
        parts = record["compute_s"] + record["communication_s"] + record["input_s"]
        assert record["step_s"] == pytest.approx(parts)
        assert record["step_s"] == pytest.approx(record["batch"] / record["img_s"])
    assert [r["batch"] for r in records] == [8, 16, 8] and records[1]["accumulation"] == 2
    assert "| tiny | strong | 1 | one process |" in (tmp_path / "scaling_cpu.md").read_text()


@pytest.mark.slow
def test_two_processes_by_every_engine(tmp_path):
    records, _ = run(tmp_path, "--gpus=1,2")
    engines = {"DDP", "FSDP2"}
    engines |= {"DeepSpeed ZeRO-2"} if importlib.util.find_spec("deepspeed") else set()
    for mode in ("weak", "strong"):
        found = [r for r in records if r["mode"] == mode and r["gpus"] == 2]
        assert {r["engine"] for r in found} == engines
        assert all(0 < r["efficiency"] < 2 for r in found)
    assert [r["gpus"] for r in records if r["mode"] == "evaluation"] == [1, 2]


def record(**changes):
    return {
        "model": "L", "mode": "weak", "gpus": 1, "launch": "one", "img_s": 100.0, **changes
    }  # fmt: skip


def test_figures_of_several_runs_are_merged(bench):
    """The new one of the same measurement counts, and efficiency is of the figures that remain."""
    old = [record(), record(gpus=2, launch="ddp", img_s=150.0), record(mode="strong")]
    new = [record(img_s=80.0), record(gpus=2, launch="fsdp2", img_s=140.0)]
    found = bench.merged(old, new)
    assert [(r["mode"], r["launch"], r["img_s"]) for r in found] == [
        ("weak", "one", 80.0), ("weak", "ddp", 150.0), ("weak", "fsdp2", 140.0),
        ("strong", "one", 100.0),
    ]  # fmt: skip
    assert [r["efficiency"] for r in found[:3]] == [1, 150 / 160, 140 / 160]
    assert bench.merged([], [record(gpus=2)])[0]["efficiency"] is None
    assert "| L | weak | 2 | - " not in bench.table(found[:1])


@pytest.mark.parametrize("gpus, micro, expected", [
    (1, 96, [("weak", 96, 1), ("strong", 768, 8)]),
    (8, 96, [("weak", 768, 1), ("strong", 768, 1)]),
    (8, 48, [("weak", 768, 2), ("strong", 768, 2)]),
    (3, 96, [("weak", 288, 1), ("strong", 768, 4)]),
    (5, 96, [("weak", 480, 1)]),  # 768 images do not divide
])  # fmt: skip
def test_batches(bench, gpus, micro, expected):
    job = {"model": "L", "gpus": gpus, "micro_batch": micro, "steps": 9}
    found = list(bench.settings_of(job))
    assert [entry[:3] for entry in found] == expected
    assert [entry[3] for entry in found] == [9, 3][: len(found)]


def test_memory_that_does_not_suffice_halves_the_micro_batch(bench, monkeypatch):
    answers = {96: bench.OUT_OF_MEMORY, 48: bench.OUT_OF_MEMORY, 24: ["figures"]}
    monkeypatch.setattr(bench, "launch", lambda job: answers[job["micro_batch"]])
    job = {"model": "H", "micro_batch": 96}
    assert bench.launch_that_fits(job) == ["figures"] and job["micro_batch"] == 24
    job["micro_batch"] = 1
    monkeypatch.setattr(bench, "launch", lambda job: bench.OUT_OF_MEMORY)
    with pytest.raises(SystemExit, match="does not fit with one image"):
        bench.launch_that_fits(job)


def test_jobs(bench, tmp_path):
    arguments = SimpleNamespace(
        models=["L"], gpus=[2, 1], engines=["ddp", "fsdp2"], steps=3, set=[], sample_steps=2
    )
    jobs = [dict(job) for job in bench.jobs_of(arguments, tmp_path, tmp_path)]
    assert [(job["gpus"], job["launch"], job["evaluation"]) for job in jobs] == [
        (1, "one", True), (2, "ddp", True), (2, "fsdp2", False),
    ]  # fmt: skip
    command = bench.command_of(jobs[2])
    assert str(runs.ROOT / "configs/accelerate/fsdp2.yaml") in command
    assert command[command.index("--num_processes") + 1] == "2"
