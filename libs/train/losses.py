"""What training minimises: loss terms by name, each times its weight config.loss.<name>, and the
random numbers that go into them.
"""

from typing import NamedTuple

import torch

import utils
from libs.train.registry import register
from utils import look_up

LOSSES = {}  # name -> f(output, target, hidden, batch) -> (B,) float32


class Batch(NamedTuple):
    """What a loss term may ask of a micro-batch: clean z, noise eps and their mixture z_t, each
    (B, C, H, W); process times t (B,); labels y (B,), dropped ones the null class, or None.
    """

    z: torch.Tensor
    eps: torch.Tensor
    z_t: torch.Tensor
    t: torch.Tensor
    y: torch.Tensor | None


def loss_term(name, hidden=()):
    """Decorator: f(output, target, hidden, batch) -> (B,) float32 becomes config.loss.<name>.

    f is given output and target (B, C, H, W), of the network and of the process; hidden, tokens
    (B, L, D) by the number of the block, of the blocks that the decorator names; and a Batch.
    """

    def enter(function):
        function.hidden = tuple(hidden)
        return register(LOSSES, name)(function)

    return enter


@loss_term("mse")
def mse(output, target, hidden, batch):
    """Squared error averaged over C, H, W, in float32 (Ho et al., arXiv 2006.11239, eq. 14)."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


class Draws(NamedTuple):
    """The random numbers of a global batch, or of some of its rows (B); all float32.

    time, label (B,) and drop_path (B, depth) are uniform in [0, 1); eps (B, C, H, W) and latent, of
    the same shape or None, are standard normal.
    """

    time: torch.Tensor
    label: torch.Tensor
    drop_path: torch.Tensor
    eps: torch.Tensor
    latent: torch.Tensor | None

    def rows(self, rows):
        """Those of a slice of the batch."""
        return Draws(*(None if draw is None else draw[rows] for draw in self))


def make_draws(seed, batch, *, size, shape, depth, encoding, device):
    """The Draws of global batch number `batch`, the same on every rank.

    size: of the batch; shape: (C, H, W) of z; depth: of a network with stochastic depth, else 0;
    encoding: whether the codec draws, too.
    """
    rng = torch.Generator(device).manual_seed(utils.derive_seed("training", seed, batch))
    uniform = torch.rand(size, 2 + depth, generator=rng, device=device)
    eps = torch.randn(size, *shape, generator=rng, device=device)
    latent = torch.randn(size, *shape, generator=rng, device=device) if encoding else None
    return Draws(uniform[:, 0], uniform[:, 1], uniform[:, 2:], eps, latent)


class Objective:
    """The losses of a micro-batch.

    process, codec: of the run; pred: what the network predicts; weights: by the names of loss
    terms; p_uncond: how many labels are dropped to the class null_label, None for a network that is
    given no labels.
    """

    def __init__(self, process, codec, *, pred, weights, p_uncond, null_label):
        self.process, self.codec, self.pred = process, codec, pred
        self.p_uncond, self.null_label = p_uncond, null_label
        self.terms = [(weight, look_up(LOSSES, name, "loss")) for name, weight in weights.items()]
        self.hidden = tuple(sorted({block for _, term in self.terms for block in term.hidden}))

    def drop_labels(self, y, draw):
        """Labels (B,) with the null class where the draw falls below p_uncond, or None."""
        return None if self.p_uncond is None else torch.where(
            draw < self.p_uncond, self.null_label, y
        )  # fmt: skip

    def __call__(self, model, x, y, draws):
        """Losses (B,) float32 of `model` on x (B, ...) and y (B,), as the data set has them, with
        Draws of these rows.
        """
        y = self.drop_labels(y, draws.label)
        t = self.process.train_time(draws.time)
        z, eps = self.codec.encode(x, draws.latent), draws.eps
        z_t = self.process.mix(z, eps, t)
        options = {"drop_path_draw": draws.drop_path} if draws.drop_path.shape[1] else {}
        if self.hidden:
            options["hidden"] = self.hidden
        found = model(z_t, self.process.model_time(t), y, **options)
        output, hidden = found if self.hidden else (found, {})
        target = self.process.target(self.pred, z, eps, t)
        batch = Batch(z, eps, z_t, t, y)
        return sum(weight * term(output, target, hidden, batch) for weight, term in self.terms)
