"""Runs that are killed, starved and fed nonsense end with a sentence or go on, and the same command
comes to the bits of an undisturbed run. benchmarks/bench_faults.py does the same hundreds of times.
"""

import importlib.util
import json
import shutil

import fault_cases as cases
import fault_ranks as ranks
import faults
import pytest

from libs.train import checkpoint

STEPS = 30
needs_mount = pytest.mark.skipif(not cases.can_mount(), reason="mounting needs root on Linux")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    with faults.Warm() as warm:
        lab = cases.Lab(warm, folder, None)
        config = dict(train__n_steps=STEPS, train__keep_last=STEPS)
        status, text = lab.start(folder / "undisturbed", config).finish()
        assert status == 0, text
        lab.undisturbed = faults.Undisturbed(folder / "undisturbed")
        yield lab


@pytest.fixture(scope="module")
def template(lab):
    """A run that stopped at step 6 of 12."""
    return lab.stopped_run(lab.new())


def right(result):
    assert result["complaints"] == []
    return result


def test_the_harness_notices_what_is_lost_or_wrong(lab):
    """Else the other tests could not fail."""
    expected, workdir = lab.undisturbed, lab.new()

    def complaints(harm):
        shutil.copytree(lab.folder / "undisturbed", workdir)
        harm()
        said = expected.complaints(workdir, ended=STEPS)
        shutil.rmtree(workdir)
        return " ".join(said)

    def other_weights():
        path = workdir / "ckpts" / f"{STEPS}.ckpt"
        saved = checkpoint.load(path)
        saved.training_state["optimizer"]["state"][3]["exp_avg"].view(-1)[0] += 1e-9
        state = vars(saved)
        step = state.pop("step")
        checkpoint.save(workdir / "ckpts", step, **state, keep_last=None)

    def edit_metrics(edit):
        path = workdir / "metrics.jsonl"
        path.write_text("".join(edit(path.read_text().splitlines(keepends=True))))

    def another_loss(lines):
        line = json.loads(lines[7])
        return [*lines[:7], json.dumps({**line, "loss": line["loss"] + 1e-7}) + "\n", *lines[8:]]

    assert complaints(lambda: None) == ""
    assert "wrong: 30.ckpt" in complaints(other_weights)
    assert "30.ckpt was saved" in complaints(lambda: shutil.rmtree(workdir / "ckpts" / "30.ckpt"))
    assert "wrong: metrics" in complaints(lambda: edit_metrics(another_loss))
    assert "wrong: metrics" in complaints(lambda: edit_metrics(lambda x: [*x[:5], *x[4:]]))
    assert "not every step" in complaints(lambda: edit_metrics(lambda x: x[:-1]))
    assert "left over" in complaints(lambda: (workdir / ".x.1.tmp").touch())


def test_kills_at_random_times(lab):
    """Each goes on from what the one before it left."""
    config = dict(train__n_steps=STEPS, train__num_workers=2)
    workdir, killed = lab.new(), 0
    for row in faults.kill_cycles(
        lambda at: lab.start(at, config), workdir, lab.undisturbed,
        cycles=6, start_s=1.5, seed=0, last=STEPS,
    ):  # fmt: skip
        killed += right(row)["killed"]
    assert killed == 6


# Of 53: the first file half-way, a checkpoint without its name, an old one half deleted, the last
# picture without its name.
@pytest.mark.parametrize("count", [7, 28, 48, 51])
def test_kill_at_a_chosen_point(lab, count):
    config = dict(train__n_steps=6, train__keep_last=1)
    assert right(cases.killed_at(lab, count, config))["died"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kill_at_every_point(lab):
    count, config = 1, dict(train__n_steps=6, train__keep_last=1)
    while right(cases.killed_at(lab, count, config))["died"]:
        count += 1
    assert count > 40


def test_a_harmed_checkpoint(lab, template):
    right(cases.harmed_checkpoint(lab, template, "manifest.json", cases.flip, 0.3))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_harmed_checkpoints(lab, template):
    for place in cases.random_places(20, seed=1):
        right(cases.harmed_checkpoint(lab, template, *place))


def test_the_newest_checkpoint_is_deleted(lab, template):
    right(cases.deleted_checkpoint(lab, template, "newest"))


def test_the_config_of_the_run_is_emptied(lab, template):
    right(cases.harmed_run_file(lab, template, "config.json"))


@needs_mount
@pytest.mark.parametrize("kib", [12, 420])
def test_the_disk_is_full(lab, kib):
    assert right(cases.full_disk(lab, kib))["full"]


def test_nan_batches_are_skipped_the_same_way_after_a_kill(lab):
    assert right(cases.nan_batches(lab, [9, 10, 22]))["skipped"] == 2


def test_nothing_but_nan(lab, template):
    right(cases.only_nan(lab, template))


def test_both_data_loader_workers_are_killed(lab):
    right(cases.killed_worker(lab, step=7, number=2))


def test_workers_end_with_a_run_that_is_killed(lab):
    right(cases.killed_with_a_stuck_worker(lab))


@pytest.mark.slow
def test_data_loader_workers_are_killed_again_and_again(lab):
    right(cases.killed_workers_again_and_again(lab))


@pytest.mark.slow
@pytest.mark.parametrize("when, workers", [("before", 0), ("while", 2), ("while", 0)])
def test_a_shard_of_latents_is_cut_short(lab, when, workers):
    right(cases.truncated_shard(lab, when, workers))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "silent", "error"])
def test_the_loggers_have_no_network(lab, kind):
    right(cases.no_network(lab, kind))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_of_two_processes_is_killed_or_frozen(lab):
    reference = ranks.undisturbed(lab)
    if importlib.util.find_spec("libs.runtime.watch"):
        right(ranks.frozen_rank(lab, reference, 1, 4))
    right(ranks.killed_rank(lab, reference, 0, 4))
    right(ranks.killed_rank(lab, reference, 1, 5))
    right(ranks.paused_rank(lab, reference, 1, 4))
