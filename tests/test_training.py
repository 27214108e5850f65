"""What a step does: accumulation, precision, steps that are not finite, overflow, and what the log
says of them.
"""


import pytest
import runs
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from writers import cifar10_environment, write_cifar10, write_folder

import utils
from configs import digits_T_DiM
from datasets import dataset_of, get_dataset
from libs.data.codec import PixelCodec
from libs.files import weights_file
from libs.model.build import build_model
from libs.train import checkpoint, loop
from sde import VPSDE
from utils import UserError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def config_of(**changes):
    config = digits_T_DiM.get_config()
    flat = {
        **runs.TINY,
        "train.num_workers": 0,
        "train.n_steps": 4,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    config.update_from_flattened_dict(flat)
    return config.lock()


def train(workdir, config, codec=None, dataset=None):
    torch.manual_seed(config.seed)
    model = build_model(config.nnet)
    dataset = dataset or get_dataset("digits", seed=config.seed)
    loop.train(
        config, workdir, model=model, process=VPSDE(), codec=codec or PixelCodec(), dataset=dataset
    )
    return model


class Broken(PixelCodec):
    """Gives NaN in the calls whose numbers are listed."""

    def __init__(self, calls):
        self.calls, self.call = calls, -1

    def encode(self, x, noise=None):
        self.call += 1
        return x * float("nan") if self.call in self.calls else x


def test_accumulation_changes_only_rounding(tmp_path):
    one = train(tmp_path / "one", config_of(gradient_accumulation_steps=1))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    four = train(tmp_path / "four", config_of(gradient_accumulation_steps=4))
    for a, b in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    for a, b in zip(runs.numbers(tmp_path / "one"), runs.numbers(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_step_that_is_not_finite_is_skipped_logged_and_survived(tmp_path):
    changes = dict(gradient_accumulation_steps=1, train__n_steps=6)
    train(tmp_path, config_of(**changes), codec=Broken({2, 3}))
    lines = runs.steps_logged(tmp_path)
    bad = [line for line in lines if line["outcome"] == "bad"]
    assert [line["step"] for line in bad] == [2, 2] and all(
        line["loss"] == line["grad_norm"] == "NaN" for line in bad
    )
    assert [line["step"] for line in lines if line["outcome"] == "ok"] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]  # the count goes on as if nothing had been
    network, average = runs.weights(tmp_path, 6)
    assert all(tensor.isfinite().all() for tensor in [*network.values(), *average.values()])


def test_too_many_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(tmp_path):
    changes = dict(
        gradient_accumulation_steps=1,
        train__n_steps=20,
        train__max_bad_steps=3,
        train__save_interval=4,
    )
    with pytest.raises(UserError, match="3 steps in a row .* last at step 5"):
        train(tmp_path, config_of(**changes), codec=Broken(range(5, 100)))
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["4.ckpt"]
    network, _ = runs.weights(tmp_path, 4)
    assert all(tensor.isfinite().all() for tensor in network.values())


def test_an_overflow_that_the_scaler_handles_is_logged_and_not_counted(tmp_path, monkeypatch):
    """The scale starts far too high: several overflows halve it, none of them is a step, none
    counts as bad.
    """
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: scaler(device, enabled=enabled, init_scale=2.0**30),
    )
    changes = dict(
        train__mixed_precision="fp16",
        train__max_bad_steps=1,
        train__n_steps=3,
        gradient_accumulation_steps=1,
    )
    train(tmp_path, config_of(**changes))
    lines = runs.steps_logged(tmp_path)
    overflows = [line for line in lines if line["outcome"] == "overflow"]
    good = [line for line in lines if line["outcome"] == "ok"]
    assert len(overflows) >= 3 and {line["step"] for line in overflows} == {0}
    assert [line["step"] for line in good] == [1, 2, 3] and good[0][
        "lr"
    ] == 0  # the schedule did not move either
    log = (tmp_path / "output.log").read_text()
    assert "loss scale now" in log and "precision fp16" in log


def test_an_overflow_below_scale_one_counts(tmp_path, monkeypatch):
    """A gradient that stays infinite whatever the scale: the scale falls below 1 and the run
    stops.
    """
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp,
        "GradScaler",
        lambda device, enabled: scaler(device, enabled=enabled, init_scale=4.0),
    )
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.tensor(float("inf"))
    )
    monkeypatch.setattr(torch.amp.GradScaler, "__call__", None, raising=False)
    unscale = scaler.unscale_

    def overflowing(self, optimizer):
        for parameter in optimizer.param_groups[0]["params"][:1]:
            parameter.grad.fill_(float("inf"))
        unscale(self, optimizer)

    monkeypatch.setattr(scaler, "unscale_", overflowing)
    with pytest.raises(UserError, match="2 steps in a row"):
        train(
            tmp_path,
            config_of(
                train__mixed_precision="fp16", train__max_bad_steps=2, gradient_accumulation_steps=1
            ),
        )
    outcomes = [line["outcome"] for line in runs.steps_logged(tmp_path)]
    assert outcomes == ["overflow", "overflow", "bad", "bad"]  # scales 2, 1, 0.5, 0.25


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(tmp_path, precision):
    changes = dict(gradient_accumulation_steps=1, train__n_steps=4, nnet__drop_path=0.0)
    train(tmp_path / "fp32", config_of(**changes))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    train(tmp_path / precision, config_of(**changes, train__mixed_precision=precision))
    expected = [line["loss"] for line in runs.steps_logged(tmp_path / "fp32")]
    found = [
        line["loss"] for line in runs.steps_logged(tmp_path / precision) if line["outcome"] == "ok"
    ]
    # An overflow takes the next batch, so only the first steps see the same data; bfloat16 has 8
    # bits.
    count = 4 if precision == "bf16" else 1
    assert found[:count] == pytest.approx(expected[:count], rel=0.03)
    assert runs.weights(tmp_path / precision, 4)[0]["head.weight"].dtype == torch.float32


def test_the_disk_is_full(tmp_path, monkeypatch):
    """The sentence names the file and what is still good; the earlier checkpoint stays."""
    config = config_of(train__n_steps=8, train__save_interval=4)
    save, saves = checkpoint._write_files, []

    def full(*args):
        saves.append(args)
        if len(saves) > 1:
            raise OSError(28, "No space left on device")
        return save(*args)

    monkeypatch.setattr(checkpoint, "_write_files", full)
    with pytest.raises(UserError, match="8.ckpt.*No space left.*4.ckpt"):
        train(tmp_path, config)
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["4.ckpt"]


def test_settings_of_the_optimizer_are_the_config_s(tmp_path):
    """As the log says of a changed value, its averages stay."""
    train(tmp_path, config_of(train__n_steps=2, train__grid_samples=0))
    AcceleratorState._reset_state()
    changes = {"optimizer__weight_decay": 0.5, "optimizer__betas": (0.0, 0.5)}
    train(tmp_path, config_of(train__n_steps=4, train__grid_samples=0, **changes))
    assert "optimizer.weight_decay: 0.03 -> 0.5" in (tmp_path / "output.log").read_text()
    state = checkpoint.load(tmp_path / "ckpts" / "4.ckpt").training_state["optimizer"]
    (group,) = state["param_groups"]
    assert group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0, 0.5)
    assert state["state"][0]["step"] == 4


def test_run_directory_holds_config_commit_versions_and_devices(tmp_path):
    config = config_of()
    train(tmp_path, config)
    saved = utils.read_json(tmp_path / "config.json")
    assert utils.config_differences(saved, config.to_dict()) == []
    environment = utils.read_json(tmp_path / "environment.json")
    assert (
        environment["packages"]["torch"] == torch.__version__
        and environment["devices"]
        and environment["commit"]
    )


def test_fid_at_intervals(tmp_path):
    """Its figures go to the metrics, from the classifier's features and the data set itself."""
    classifier = runs.ROOT / "assets" / "digits_classifier.safetensors"
    if not classifier.is_file():
        assert runs.run("scripts/train_digits_classifier.py")[0] == 0
    changes = dict(train__n_steps=4, train__save_interval=2, train__fid_samples=60)
    train(tmp_path, config_of(**changes))
    figures = [line for line in runs.steps_logged(tmp_path) if "frechet_distance" in line]
    assert [line["step"] for line in figures] == [2, 4]
    assert all(line["frechet_distance"] > 0 for line in figures)
    assert all(0 <= line["class_agreement"] <= 1 for line in figures)
    assert "two halves of the real images" in (tmp_path / "output.log").read_text()


def test_fid_that_a_kill_prevented_is_made_by_the_next_start(tmp_path, monkeypatch):
    """A run that ended after its last checkpoint and before its last evaluation; and only then."""
    changes = dict(train__n_steps=2, train__save_interval=2, train__fid_samples=60)
    monkeypatch.setattr(loop.Outputs, "make", lambda *args: None)
    train(tmp_path, config_of(**changes))
    monkeypatch.undo()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for _ in range(2):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        train(tmp_path, config_of(**changes))
        figures = [line for line in runs.steps_logged(tmp_path) if "frechet_distance" in line]
        assert [line["step"] for line in figures] == [2]
    assert (tmp_path / "samples" / "2.png").is_file()


def test_what_fid_will_miss_is_said_at_the_start(tmp_path, monkeypatch):
    """And unknown features end the run there."""
    monkeypatch.setattr(loop.Outputs, "make", lambda *args: None)
    changes = dict(train__n_steps=1, train__fid_samples=60)
    absent = str(tmp_path / "absent.npz")
    train(tmp_path / "run", config_of(**changes, dataset__fid_stats=absent))
    said = f"FID will be left out, unless this changes before the first: the statistics {absent}"
    assert said in (tmp_path / "run" / "output.log").read_text()
    AcceleratorState._reset_state()
    with pytest.raises(UserError, match="unknown features 'digits'"):
        train(tmp_path / "other", config_of(**changes, sample__features="digits"))


def test_the_log_has_classes_and_broken_images_and_says_that_a_class_was_renamed(tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    write_folder(data)
    (data / "bee" / "05.png").write_bytes(b"broken")
    changes = dict(
        dataset__name="folder", dataset__path=str(data), nnet__in_channels=3,
        train__save_interval=1, train__grid_samples=0,
    )  # fmt: skip
    for n_steps in 1, 2:
        config = config_of(train__n_steps=n_steps, **changes)
        train(run, config, dataset=dataset_of(config, augmented=True))  # at the network's 8 pixels
        log = (run / "output.log").read_text()
        if n_steps == 1:
            assert "2 classes: 0 ant, 1 bee" in log and "changed since" not in log
            assert "the data set has 2 classes, but nnet.num_classes is 10" in log
            assert "WARNING unreadable image, the next stands in for it" in log
            (data / "ant").rename(data / "cat")
            AcceleratorState._reset_state()
    said = [line.split(": ", 1)[1] for line in log.splitlines() if "changed since" in line]
    assert {"environment: classes.ant: 0 -> absent", "environment: classes.bee: 1 -> 0",
            "environment: classes.cat: absent -> 1"} <= set(said)  # fmt: skip


def test_published_weights_among_a_run_s_checkpoints_are_not_touched(tmp_path):
    """As the evaluation's command has them: a save of that step would replace them."""
    published = tmp_path / "ckpts" / "4.ckpt" / "nnet_ema.pth"
    published.parent.mkdir(parents=True)
    published.write_bytes(b"weights")
    with pytest.raises(UserError, match="4.ckpt holds weights that this run has not saved"):
        train(tmp_path, config_of())
    assert published.read_bytes() == b"weights" and weights_file(published.parent) == published


def test_fid_that_cannot_be_made_is_noted_once_and_does_not_stop_the_run(tmp_path):
    changes = dict(
        train__n_steps=4, train__save_interval=2, train__fid_samples=60,
        sample__features="inception", sample__fid_weights_path=str(tmp_path / "absent.pth"),
    )  # fmt: skip
    train(tmp_path, config_of(**changes))
    log = (tmp_path / "output.log").read_text()
    assert log.count("no FID in this run") == 1 and "absent.pth" in log
    assert "finished 4 steps" in log


@pytest.mark.slow
def test_cifar10_config_trains_two_steps_on_files_in_its_format(tmp_path):
    """The published configuration, 50.6M parameters; only the batch is smaller and the sampling
    short.
    """
    write_cifar10(tmp_path)
    overrides = {
        "dataset.path": tmp_path, "train.batch_size": 2, "train.n_steps": 2,
        "train.log_interval": 1, "train.num_workers": 0, "train.fid_samples": 0,
        "train.grid_samples": 1, "sample.algorithm": "euler_maruyama_ode", "sample.sample_steps": 1,
    }  # fmt: skip
    words = [f"--config.{key}={value}" for key, value in overrides.items()]
    status, output = runs.run(
        "train.py", "--config=configs/cifar10_S_DiM.py", f"--workdir={tmp_path / 'run'}", *words,
        **cifar10_environment(tmp_path),
    )  # fmt: skip
    assert status == 0, output
    assert "50,568,716 parameters" in output and "100 images of shape (3, 32, 32)" in output
    assert [line["step"] for line in runs.steps_logged(tmp_path / "run")] == [1, 2]
