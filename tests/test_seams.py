"""The seams: one of each kind that a user may add, each registered by a line, train, resume, sample
and evaluate together.
"""

import json

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import save_file
from torch import nn

import datasets
from libs.diffusion import GUIDANCE, SAMPLERS, sampler
from libs.evaluate import Classifier, metric
from libs.evaluate.metrics import METRICS
from libs.model import MIXERS
from libs.train import LOSSES, OPTIMIZERS, SCHEDULES, loss_term
from sde import PROCESSES, per_sample

CONFIG = """
from configs import digits_T_DiM
from configs.common import d


def get_config():
    config = digits_T_DiM.get_config()
    config.process, config.pred = d(name="line", time_scale=1000.0), "velocity_pred"
    config.dataset.name = "stripes"
    config.nnet.update(num_classes=2, mixer=d(name="mean", width=8))
    config.loss = d(mse=1.0, small_tokens=0.01)
    config.optimizer.name = "sgd"
    config.sample.update(algorithm="corrected_euler", guidance="push", labels="balanced")
    return config
"""


class Line:
    """Flow matching (Lipman et al., arXiv 2210.02747): x_t = (1 - t) x0 + t eps, and the network
    predicts dx_t/dt. At t = 1 eps is x_t for every prediction, so x0 needs the raw output.
    """

    predictions = ("velocity_pred",)

    def __init__(self, time_scale):
        self.time_scale = time_scale

    def mix(self, x0, eps, t):
        t = per_sample(t, x0)
        return (1 - t) * x0 + t * eps

    def target(self, pred, x0, eps, t):
        return eps - x0

    def to_x0_eps(self, pred, out, x_t, t):
        t = per_sample(t, x_t)
        return x_t - t * out, x_t + (1 - t) * out

    def velocity(self, pred, out, x_t, t):
        return out

    def train_time(self, u):
        return u

    def model_time(self, t):
        return self.time_scale * t


def corrected_euler(predict, process, x, steps, noise):
    """Heun's method on dx/dt, whose last step is Euler's."""
    times = torch.linspace(1, 0, steps + 1)
    for t, dt in zip(times, times.diff(), strict=False):
        slope = predict(x, t)
        later = x + slope * dt
        x = later if t + dt <= 0 else x + (slope + predict(later, t + dt)) / 2 * dt
    return x


def push(predict, y, null_label, settings):
    """With a factor from tokens inside the network."""

    def output(x, t):
        cond, tokens = predict(x, t, y, hidden=(2,))
        scale = per_sample(tokens[2].mean((1, 2)).sigmoid(), x)
        return cond + scale * (cond - predict(x, t, torch.full_like(y, null_label)))

    return output


class Mean(nn.Module):
    """Every token gets the mean of all, through a bottleneck."""

    def __init__(self, dim, width):
        super().__init__()
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)

    def forward(self, x, order):
        return self.up(self.down(x).mean(1, keepdim=True)).expand_as(x)


def small_tokens(output, target, inner, batch):
    return (1 - batch.t) * inner[2].float().square().mean((1, 2))


def sgd(network, settings):
    return torch.optim.SGD(network.parameters(), lr=settings.lr, momentum=0.9)


def halving(step, warmup_steps, n_steps):
    return 0.5**step


def first_feature(generated, real):
    return (generated.mu[0] - real.mu[0]).item()


class Stripes(datasets.ImageDataset):
    """32 images of 8 x 8 pixels, striped along or across."""

    def __init__(self, *, path, resolution, labels, random_flip, seed):
        super().__init__(length=32, shape=(1, 8, 8), labels=np.arange(32) % 2, num_classes=2,
                         random_flip=random_flip, seed=seed)  # fmt: skip

    def _read(self, epoch, index):
        row = torch.cos(torch.arange(8.0) * (1 + index // 2)).expand(1, 8, 8)
        return row if index % 2 else row.mT, index


PARTS = {
    "line": (PROCESSES, Line), "corrected_euler": (SAMPLERS, corrected_euler),
    "push": (GUIDANCE, push),
    "mean": (MIXERS, Mean), "small_tokens": (LOSSES, small_tokens), "sgd": (OPTIMIZERS, sgd),
    "halving": (SCHEDULES, halving), "stripes": (datasets.DATASETS, Stripes),
    "first_feature": (METRICS, first_feature),
}  # fmt: skip


@pytest.fixture
def used(monkeypatch):
    """The names of PARTS that have been called; all are registered, as a user would do it."""
    names = set()
    for name, (registry, part) in PARTS.items():

        def record(*args, name=name, part=part, **keywords):
            names.add(name)
            return part(*args, **keywords)

        record.needs_path = record.latent = False  # as of a data set
        monkeypatch.setitem(registry, name, record)
    sampler("corrected_euler", predicts="velocity")(SAMPLERS["corrected_euler"])
    loss_term("small_tokens", hidden=(2,))(LOSSES["small_tokens"])
    metric("first_feature")(METRICS["first_feature"])
    return names


def test_one_of_each_kind_from_training_to_figures(used, in_process, tmp_path, capsys):
    config = tmp_path / "mine.py"
    config.write_text(CONFIG)
    tiny = dict(train__num_workers=0, train__grid_samples=0, train__fid_samples=0,
                train__save_interval=2, lr_scheduler__name="halving")  # fmt: skip

    def train(name, n_steps):
        words = runs.arguments(tmp_path / name, **tiny, train__n_steps=n_steps)
        assert in_process("train", [*words, f"--config={config}"]) == 0

    train("run", 2)
    train("run", 4)
    train("whole", 4)
    assert runs.numbers(tmp_path / "run") == runs.numbers(tmp_path / "whole")
    weights = tmp_path / "run" / "ckpts" / "4.ckpt"
    assert json.loads((weights / "config.json").read_text())["process"]["name"] == "line"

    picture = tmp_path / "grid.png"
    assert in_process("sample", [f"--nnet_path={weights}", "--n=1", f"--out={picture}"]) == 0
    assert picture.is_file()
    features = tmp_path / "classifier.safetensors"
    save_file(Classifier(channels=1, num_classes=10).state_dict(), features)
    changes = dict(
        sample__n_samples=8, sample__mini_batch_size=4, sample__fid_weights_path=features,
        sample__metrics="standard,first_feature",
    )
    words = [*runs.arguments(tmp_path / "run", **changes), f"--config={config}"]
    assert in_process("eval", [*words, f"--nnet_path={weights}"]) == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert np.isfinite([found["frechet_distance"], found["first_feature"]]).all()
    assert used == PARTS.keys()

    # What the process does not define is named by the sampler that needs it.
    words = [f"--nnet_path={weights}", "--algorithm=dpm_solver", f"--out={picture}"]
    assert in_process("sample", words) == 1
    assert "dpm_solver needs half_log_snr, which process Line" in capsys.readouterr().err
