"""What training minimises: loss terms by name, and the random numbers that go into them."""

import math
from collections import namedtuple

import torch
import torch.nn.functional as F

import utils
from libs.model import split_weight
from sde import make_input
from utils import look_up

LOSSES = {}  # name, chosen by config.loss.<name> -> (f(output, target, inner, batch), its hidden)

# What a loss term may ask of a micro-batch: clean z, noise eps and their mixture z_t, each
# (B, C, H, W); process times t (B,); labels y (B,), dropped ones the null class, or None; the data
# set's x; features (B, N, D), tokens that an image network makes of the clean images, or None.
Batch = namedtuple("Batch", "z eps z_t t y x features")

# The random numbers of a global batch, or of some of its rows (B); all float32. u_time, u_label
# (B,) and u_drop_path (B, depth) are uniform in [0, 1); eps (B, C, H, W) and codec_eps, of the same
# shape or None, are standard normal. route: (B, h/2, w/2) int64, 0 to 3, as DiM takes it, or None.
Draws = namedtuple("Draws", "u_time u_label u_drop_path eps codec_eps route", defaults=(None,))


def loss_term(name, hidden=()):
    """Decorator: f(output, target, inner, batch) -> (B,) float32 becomes config.loss.<name>; f and
    a head of that name take the keywords that stand there beside the weight.

    output, target (B, C, H, W): of the network and of the process; inner: of the blocks and heads
    `hidden`, block -> tokens (B, L, D) and head -> its output; batch: a Batch.
    """

    def enter(function):
        LOSSES[name] = function, tuple(hidden)
        return function

    return enter


@loss_term("mse")
def mse(output, target, inner, batch):
    """Squared error averaged over C, H, W, in float32 (Ho et al., arXiv 2006.11239, eq. 14)."""
    return (output.float() - target.float()).square().flatten(1).mean(1)


@loss_term("direction")
def direction(output, target, inner, batch):
    """1 - cos(output, target) over the channels, averaged over H, W (arXiv 2501.01423); over C, H,
    W of one channel, where a pixel's cosine is a sign without a gradient.
    """
    pair = output.float(), target.float()
    pair = [x.flatten(1)[..., None] if x.shape[1] == 1 else x for x in pair]
    return 1 - F.cosine_similarity(*pair, dim=1).flatten(1).mean(1)


@loss_term("internal", hidden=("internal",))
def internal(output, target, inner, batch, **of_the_head):
    """The squared error of the head `internal` (arXiv 2512.24176)."""
    return mse(inner["internal"], target, inner, batch)


@loss_term("repa", hidden=("repa",))
def repa(output, target, inner, batch, kind="repa", **of_the_head):
    """Minus the cosine of projected tokens and features, averaged over the tokens (REPA, arXiv
    2410.06940, equation 8). kind 'irepa' standardises each feature over the tokens of an image.
    Features, whose grid is square, are resized to the tokens', bilinear with antialiasing.
    """
    tokens, features = inner["repa"].float(), batch.features.float()  # (B, h, w, D), (B, N, D)
    if kind == "irepa":
        std, mean = torch.std_mean(features, 1, keepdim=True)
        features = (features - mean) / (std + 1e-6)
    image = features.mT.unflatten(2, (math.isqrt(features.shape[1]), -1))  # (B, D, side, side)
    image = F.interpolate(image, size=tokens.shape[1:3], mode="bilinear", antialias=True)
    return -F.cosine_similarity(tokens, image.permute(0, 2, 3, 1), dim=-1).mean((1, 2))


def make_draws(seed, batch, *, size, shape, depth, encoding, device, routing=(0,)):
    """The Draws of global batch number `batch`, of this size, the same on every rank. shape:
    (C, H, W) of z; depth: of a network with stochastic depth, else 0; encoding: the codec draws;
    routing: (number of batches from the first that are routed, h/2, w/2).
    """
    rng = torch.Generator(device).manual_seed(utils.derive_seed("training", seed, batch))
    uniform = torch.rand(size, 2 + depth, generator=rng, device=device)
    eps = torch.randn(size, *shape, generator=rng, device=device)
    codec_eps = torch.randn(size, *shape, generator=rng, device=device) if encoding else None
    until, *groups = routing
    routed = batch < until
    route = torch.randint(4, (size, *groups), generator=rng, device=device) if routed else None
    return Draws(uniform[:, 0], uniform[:, 1], uniform[:, 2:], eps, codec_eps, route)


class Objective:
    """The losses of a micro-batch.

    pred: what the network predicts; weights: config.loss, of terms by name; p_uncond: share of
    labels that are dropped to the class null_label, None for a network that is given no labels;
    tokens: of an image network, images (B, C, H, W) in [0, 1] -> features (B, N, D), or None.
    """

    def __init__(self, process, codec, *, pred, weights, p_uncond, null_label, tokens=None):
        self.process, self.codec, self.pred = process, codec, pred
        self.p_uncond, self.null_label, self.tokens = p_uncond, null_label, tokens
        self.terms, hidden = [], set()
        for name, value in weights.items():
            (term, needed), (weight, keywords) = look_up(LOSSES, name, "loss"), split_weight(value)
            self.terms.append((weight, utils.bind(term, f"loss.{name}", **keywords)))
            hidden.update(needed)
        self.hidden = tuple(sorted(hidden, key=str))

    def __call__(self, model, x, y, draws, features=None):
        """Losses (B,) float32 of `model` on x (B, ...), y (B,) and features, as the data set has
        them, with Draws of these rows.
        """
        features = self.tokens(0.5 * x + 0.5) if self.tokens else features
        dropped = draws.u_label < (self.p_uncond or 0.0)
        y = None if self.p_uncond is None else torch.where(dropped, self.null_label, y)
        z, eps = self.codec.encode(x, draws.codec_eps), draws.eps
        t = self.process.train_time(draws.u_time)
        z_t = self.process.mix(z, eps, t)
        options = {"drop_path_draw": draws.u_drop_path} if draws.u_drop_path.shape[1] else {}
        options |= {"hidden": self.hidden} if self.hidden else {}
        options |= {} if draws.route is None else {"route": draws.route}
        z_in = make_input(self.process, z_t, t)
        output = model(z_in, self.process.model_time(t), y, **options)
        output, inner = output if self.hidden else (output, {})
        target = self.process.target(self.pred, z, eps, t)
        batch = Batch(z, eps, z_t, t, y, x, features)
        return sum(weight * term(output, target, inner, batch) for weight, term in self.terms)
