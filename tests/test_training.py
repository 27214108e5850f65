"""What a step does: losses, accumulation, precision, steps that are not finite; what a run logs and
makes at intervals.
"""

import re
import signal
import types

import pytest
import runs
import torch

from configs import digits_T_DiM
from datasets import get_dataset
from libs.data.codec import PixelCodec
from libs.files import weights_file
from libs.model.build import build_model
from libs.train import loop, losses, optimizer, snapshots
from libs.train.resume import Progress
from libs.train.step import finish_step
from sde import VPSDE
from utils import UserError

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def make_config(**changes):
    config = digits_T_DiM.get_config()
    flat = {
        **runs.TINY,
        "train.num_workers": 0,
        "train.n_steps": 4,
        "train.grid_samples": 0,
        "gradient_accumulation_steps": 1,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    config.update_from_flattened_dict(flat)
    return config.lock()


def train(workdir, config, codec=None, dataset=None):
    runs.fresh_state()
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


# ---------------------------------------------------------------------------------------------
# Losses, optimizers, schedules by name


def make_draws(batch=4):
    return losses.make_draws(
        1, 2, size=batch, shape=(1, 8, 8), depth=0, encoding=False, device=torch.device("cpu")
    )


def test_terms_are_added_by_weight_and_may_ask_for_hidden_activations(monkeypatch):
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))

    @losses.loss_term("size", hidden=(2, 5))
    def size(output, target, inner, batch):
        assert set(inner) == {2, 5} and batch.z.shape == output.shape == target.shape
        return inner[2].square().mean((1, 2)) + inner[5].mean((1, 2)) * batch.y

    def network(x, t, y, hidden=()):
        tokens = {block: block * x.flatten(2).mT for block in hidden}
        return (0.5 * x, tokens) if hidden else 0.5 * x

    def loss(**weights):
        objective = losses.Objective(
            VPSDE(), PixelCodec(), pred="noise_pred", weights=weights, p_uncond=0.0, null_label=10
        )
        return objective(network, torch.ones(4, 1, 8, 8), torch.arange(4), make_draws())

    draws, process = make_draws(), VPSDE()
    z_t = process.mix(torch.ones(4, 1, 8, 8), draws.eps, draws.u_time)
    mse = (0.5 * z_t - draws.eps).square().flatten(1).mean(1)
    inner = 4 * z_t.square().flatten(1).mean(1) + 5 * z_t.flatten(1).mean(1) * torch.arange(4)
    torch.testing.assert_close(loss(mse=1.0), mse, rtol=0, atol=0)
    torch.testing.assert_close(loss(mse=0.5, size=0.25), 0.5 * mse + 0.25 * inner)
    with pytest.raises(UserError, match="loss is 'huber', expected one of mse"):
        loss(huber=1.0)


def test_labels_are_dropped_as_the_draws_say():
    def labels(p_uncond):
        objective = losses.Objective(
            VPSDE(), PixelCodec(), pred="noise_pred", weights={"mse": 1.0}, p_uncond=p_uncond,
            null_label=10,
        )  # fmt: skip
        given = []
        objective(
            lambda x, t, y: given.append(y) or x, torch.ones(4, 1, 8, 8), torch.arange(4),
            make_draws()._replace(u_label=torch.tensor([0.05, 0.5, 0.0, 0.1])),
        )  # fmt: skip
        return given[0]

    assert labels(None) is None
    assert labels(0.1).tolist() == [10, 1, 10, 3] and labels(0.0).tolist() == [0, 1, 2, 3]


def orthogonalise(x):
    """Five Newton-Schulz steps with Muon's coefficients."""
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x


def test_muon_steps_the_matrices_of_the_blocks_and_adamw_the_others():
    """Against float64 and a plain AdamW."""
    settings = make_config(optimizer__name="muon", optimizer__lr=0.01).optimizer
    network, plain = (build_model(make_config().nnet, seed=1) for _ in "ab")
    muon, adamw = optimizer.MuonAdamW(network, settings), optimizer.adamw(plain, settings)
    rule = r"blocks\.\d\.(mixer\.(in|out|x)_proj|skip\.linear)\.weight"
    exact = {n: p.detach().double() for n, p in network.named_parameters() if re.fullmatch(rule, n)}
    found = {id(p) for p in muon.param_groups[0]["params"]}
    assert found == {id(network.get_parameter(name)) for name in exact} and len(found) == 17
    generator, averages = torch.Generator().manual_seed(0), dict.fromkeys(exact, 0.0)
    for _ in range(3):
        for (name, p), other in zip(network.named_parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            other.grad, gradient = p.grad.clone(), 0.05 * p.grad.double()
            if name in exact:
                averages[name] = 0.95 * averages[name] + gradient
                step = orthogonalise(0.95 * averages[name] + gradient) * max(p.shape) ** 0.5
                exact[name] *= 1 - 0.01 * settings.weight_decay
                exact[name] -= 0.01 * 0.2 * step
        muon.step()
        adamw.step()
    for (name, p), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        # Of a step: Muon iterates in bfloat16, whose 2^-8 grow in 15 products to 0.04.
        scale = 0.06 * 0.01 * 0.2 * p.numel() ** 0.5
        assert (p - exact[name]).norm() < scale if name in exact else torch.equal(p, other), name


def test_muon_resumes_and_keeps_its_weights_where_a_gradient_is_not_finite(tmp_path):
    muon = {"optimizer__name": "muon", "train__save_interval": 2}
    train(tmp_path / "whole", make_config(**muon))
    train(tmp_path / "run", make_config(**muon, train__n_steps=2))
    train(tmp_path / "run", make_config(**muon))
    assert runs.numbers(tmp_path / "run") == runs.numbers(tmp_path / "whole")
    for precision in "no", "fp16":
        changes = muon | {"train__mixed_precision": precision, "train__n_steps": 3}
        broken = train(tmp_path / precision, make_config(**changes), codec=Broken({1, 2}))
        assert all(tensor.isfinite().all() for tensor in broken.state_dict().values())


def test_schedules():
    """Warm-up, and its product with half a cosine or with a last fifth that falls to 0."""

    def factors(name, *steps, warmup=4):
        schedule = optimizer.SCHEDULES[name]
        return [schedule(step, warmup_steps=warmup, n_steps=100) for step in steps]

    assert factors("warmup_constant", 0, 1, 2, 4, 99) == [0, 0.25, 0.5, 1, 1]
    assert factors("customized", 0, 2, warmup=0) == factors("customized", 0, 2, warmup=-1) == [1, 1]
    assert factors("cosine", 0, 2, 50, 100, 120) == pytest.approx([0, 0.499507, 0.5, 0, 0])
    assert factors("warmup_stable_decay", 2, 80, 90, 100) == pytest.approx([0.5, 1, 0.5, 0])


# ---------------------------------------------------------------------------------------------
# Steps


def test_accumulation_changes_only_rounding(tmp_path):
    one = train(tmp_path / "one", make_config())
    four = train(tmp_path / "four", make_config(gradient_accumulation_steps=4))
    for a, b in zip(one.parameters(), four.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
    for a, b in zip(runs.numbers(tmp_path / "one"), runs.numbers(tmp_path / "four"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_step_that_is_not_finite_is_skipped_logged_and_survived(tmp_path):
    train(tmp_path, make_config(train__n_steps=6), codec=Broken({2, 3}))
    lines = runs.steps_logged(tmp_path)
    bad = [line for line in lines if line["outcome"] == "bad"]
    assert [line["step"] for line in bad] == [2, 2]
    assert all(line["loss"] == line["grad_norm"] == "NaN" for line in bad)
    assert [line["step"] for line in lines if line["outcome"] == "ok"] == [1, 2, 3, 4, 5, 6]
    weights = runs.weights(tmp_path, 6)
    assert all(tensor.isfinite().all() for file in weights for tensor in file.values())


def test_too_many_in_a_row_stop_the_run_and_leave_the_last_good_checkpoint(tmp_path):
    changes = dict(train__n_steps=20, train__max_bad_steps=3, train__save_interval=4)
    with pytest.raises(UserError, match="3 steps in a row .* last at step 5"):
        train(tmp_path, make_config(**changes), codec=Broken(range(5, 100)))
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["4.ckpt"]
    network, *_ = runs.weights(tmp_path, 4)
    assert all(tensor.isfinite().all() for tensor in network.values())


def test_an_overflow_that_the_scaler_handles_is_logged_and_not_counted(tmp_path, monkeypatch):
    """The scale starts far too high: several overflows halve it, none of them is a step, none
    counts as bad.
    """
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler",
        lambda device, enabled: scaler(device, enabled=enabled, init_scale=2.0**30),
    )  # fmt: skip
    changes = dict(train__mixed_precision="fp16", train__max_bad_steps=1, train__n_steps=3)
    train(tmp_path, make_config(**changes))
    lines = runs.steps_logged(tmp_path)
    overflows = [line for line in lines if line["outcome"] == "overflow"]
    good = [line for line in lines if line["outcome"] == "ok"]
    assert len(overflows) >= 3 and {line["step"] for line in overflows} == {0}
    assert [line["step"] for line in good] == [1, 2, 3]
    assert good[0]["lr"] == 0, "the schedule did not move either"
    assert "batch 0: overflow, skipped" in (tmp_path / "output.log").read_text()


def test_a_gradient_that_overflows_at_every_scale_counts_once_the_scale_is_below_one():
    weight = torch.nn.Parameter(torch.ones(2))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=4.0), torch.optim.SGD([weight], 0.1)
    state = types.SimpleNamespace(
        progress=Progress(), precision=types.SimpleNamespace(scaler=scaler)
    )
    outcomes = []
    for _ in range(4):
        scale = scaler.get_scale()
        scaler.scale(weight.sum() * float("inf")).backward()
        scaler.unscale_(optimizer)
        stats = types.SimpleNamespace(
            loss=1.0, grad_norm=float("inf"), loss_scale=scale, stop=False
        )
        outcomes.append(finish_step(state, stats))
    assert outcomes == ["overflow", "overflow", "bad", "bad"]  # scales 2, 1, 0.5, 0.25
    assert state.progress == Progress(step=0, batch=4, bad_in_a_row=2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(tmp_path, precision):
    train(tmp_path / "fp32", make_config(nnet__drop_path=0.0))
    train(tmp_path / precision, make_config(nnet__drop_path=0.0, train__mixed_precision=precision))
    expected = [line["loss"] for line in runs.steps_logged(tmp_path / "fp32")]
    found = [
        line["loss"] for line in runs.steps_logged(tmp_path / precision) if line["outcome"] == "ok"
    ]
    # An overflow takes the next batch, so that only the first step sees the same data; bfloat16 has
    # 8 bits.
    count = 4 if precision == "bf16" else 1
    assert found[:count] == pytest.approx(expected[:count], rel=0.03)
    assert runs.weights(tmp_path / precision, 4)[0]["head.weight"].dtype == torch.float32


def test_settings_of_the_optimizer_are_the_config_s(tmp_path):
    """As the log says of a changed value; the averages go on."""
    train(tmp_path, make_config(train__n_steps=2))
    changes = {"optimizer__weight_decay": 0.5, "optimizer__betas": (0.0, 0.5)}
    train(tmp_path, make_config(**changes))
    assert "optimizer.weight_decay: 0.03 -> 0.5" in (tmp_path / "output.log").read_text()
    state = torch.load(tmp_path / "ckpts" / "4.ckpt" / "training.pt")["optimizer"]
    (group,) = state["param_groups"]
    assert group["weight_decay"] == 0.5 and tuple(group["betas"]) == (0, 0.5)
    assert state["state"]["head.weight"]["step"] == 4


# ---------------------------------------------------------------------------------------------
# Stops


class Stopping(PixelCodec):
    """In a run's call number `last` comes a SIGTERM, and its z is multiplied by `factor`."""

    def __init__(self, last, factor=1.0):
        self.left, self.factor = last, factor

    def encode(self, x, noise=None):
        self.left -= 1
        if self.left:
            return x
        signal.raise_signal(signal.SIGTERM)
        return self.factor * x


def test_a_run_with_more_steps_than_the_config_has_ended_well(tmp_path):
    """Else a scheduler starts it again."""
    with pytest.raises(SystemExit, match="143"):
        train(tmp_path, make_config(), codec=Stopping(2))
    train(tmp_path, make_config(train__n_steps=1))
    said = (tmp_path / "output.log").read_text()
    assert said.index("stopped at step 2") < said.index("finished 2 steps")


def test_a_save_at_a_stop_keeps_the_best_checkpoint_whose_fid_is_being_computed(
    tmp_path, monkeypatch
):
    figures = types.SimpleNamespace(done=lambda: False, result=lambda: {"frechet_distance": 1.0})

    def measure_fid(self, step):
        self.pending = step, figures

    monkeypatch.setattr(snapshots.Snapshots, "measure_fid", measure_fid)
    monkeypatch.setattr(snapshots.Snapshots, "prepare_fid", lambda self: None)
    config = make_config(train__save_interval=2, train__keep_last=1, train__fid_samples=4)
    with pytest.raises(SystemExit, match="143"):
        train(tmp_path, config, codec=Stopping(3))
    assert {path.name for path in (tmp_path / "ckpts").iterdir()} == {"2.ckpt", "3.ckpt"}


def test_a_run_that_stopped_before_its_first_step_owes_no_pictures(tmp_path):
    config = make_config(train__n_steps=1, train__grid_samples=20)
    with pytest.raises(SystemExit, match="143"):
        train(tmp_path, config, codec=Stopping(1, factor=float("nan")))
    assert (tmp_path / "ckpts" / "0.ckpt").is_dir()
    train(tmp_path, config)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["1.png"]


# ---------------------------------------------------------------------------------------------
# What a run writes


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot make the directory .*file/run: Not a directory"):
        train(tmp_path / "file" / "run", make_config())


def test_published_weights_among_a_run_s_checkpoints_are_not_touched(tmp_path):
    """As the evaluation's command has them."""
    published = tmp_path / "ckpts" / "4.ckpt" / "nnet_ema.pth"
    published.parent.mkdir(parents=True)
    published.write_bytes(b"weights")
    with pytest.raises(UserError, match="4.ckpt/nnet_ema.pth is not of this run"):
        train(tmp_path, make_config())
    assert published.read_bytes() == b"weights" and weights_file(published.parent) == published


FID = dict(train__n_steps=4, train__save_interval=2, train__fid_samples=60)
FID["train__metrics"] = "training,density_coverage"


def test_fid_at_intervals_and_after_a_kill_that_prevented_it(tmp_path, monkeypatch):
    """Its figures go to the metrics, from the classifier's features and the data set itself; what a
    run owes that ended after its last save is made by the next start, and only by that one.
    """
    classifier = runs.ROOT / "assets" / "digits_classifier.safetensors"
    if not classifier.is_file():
        words = ["--dataset=digits", "--epochs=10", f"--out={classifier}"]
        assert runs.run("scripts/train_classifier.py", *words)[0] == 0
    config = make_config(**FID, train__grid_samples=20)

    def figures():
        return [line for line in runs.steps_logged(tmp_path) if "density_coverage.coverage" in line]

    make = snapshots.Snapshots.make
    with monkeypatch.context() as patch:
        patch.setattr(snapshots.Snapshots, "make",
                      lambda self, due, step: make(self, due if step < 4 else set(), step))
        train(tmp_path, config)
    assert [line["step"] for line in figures()] == [2]
    assert not (tmp_path / "samples" / "4.png").exists()
    config.train.metrics = "density_coverage"
    for _ in range(2):
        train(tmp_path, config)
        assert [line["step"] for line in figures()] == [2, 4]
    assert (tmp_path / "samples" / "4.png").is_file()
    assert figures()[0]["frechet_distance"] > 0 and 0 <= figures()[0]["class_agreement"] <= 1
    assert all(0 <= line["density_coverage.coverage"] <= 1 for line in figures())
    assert "real_halves" in (tmp_path / "output.log").read_text()


def test_fid_that_cannot_be_made_is_noted_at_the_start_and_tried_again(tmp_path):
    """Unknown features do."""
    absent = str(tmp_path / "absent.npz")
    train(tmp_path / "run", make_config(**FID, dataset__fid_stats=absent))
    log = (tmp_path / "run" / "output.log").read_text()
    assert log.count("no FID until this is mended") > 1 and absent in log
    assert "finished 4 steps" in log
    with pytest.raises(UserError, match="sample.features is 'digits', expected one of"):
        train(tmp_path / "other", make_config(**FID, sample__features="digits"))
