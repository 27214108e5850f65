"""Heads of a network, for terms of a loss that ask it something after a block in the middle."""

import itertools

from torch import nn

from libs.model.layers import predict_image
from utils import UserError, bind, look_up


class OutputHead(nn.Module):
    """A prediction in the form of the network's own, 0 at first (arXiv 2512.24176).

    block: the number of the block, from 0, whose tokens the head is given.
    """

    sampled = True  # pictures may need the head: it is in the averaged network too

    def __init__(self, model, *, block=8):
        super().__init__()
        self.block, self.patch_size = block, model.patch_size
        self.norm = nn.RMSNorm(model.dim)
        self.modulation = nn.Linear(model.dim, 2 * model.dim)
        self.linear = nn.Linear(model.dim, model.patch_size**2 * model.in_channels)
        for parameter in (*self.modulation.parameters(), *self.linear.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, image, condition):
        """Tokens (B, h, w, dim), time and class (B, dim) -> (B, C, H, W)."""
        parts = self.norm, self.modulation, self.linear
        return predict_image(image, condition, *parts, self.patch_size)


# kind of a Projector -> (side of the kernels, channels between the layers)
PROJECTORS = {"repa": (1, (2048, 2048)), "irepa": (3, ())}


class Projector(nn.Module):
    """Tokens in the space of an image network's features: by an MLP for each token (kind 'repa',
    arXiv 2410.06940) or one convolution ('irepa'). features, path: name that network, for others.
    """

    sampled = False

    def __init__(self, model, *, feature_dim, block=8, kind="repa", features=None, path=None):
        super().__init__()
        kernel, widths = look_up(PROJECTORS, kind, "loss.repa.kind")
        dims, self.block, layers = (model.dim, *widths, feature_dim), block, []
        for sides in itertools.pairwise(dims):
            layers += [nn.SiLU(), nn.Conv2d(*sides, kernel, padding="same")]
        self.layers = nn.Sequential(*layers[1:])

    def forward(self, image, condition):
        """Tokens (B, h, w, dim) -> (B, h, w, feature_dim); the condition is not used."""
        return self.layers(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# name of a loss term -> its head, whose keywords are those of config.loss.<name>
HEADS = {"internal": OutputHead, "repa": Projector}


def split_weight(value):
    """(weight, keywords) of a config.loss value: a weight, or a section, whose weight may be 1."""
    keywords = dict(value) if hasattr(value, "keys") else {"weight": value}
    return keywords.pop("weight", 1.0), keywords


def add_heads(model, terms, *, training, **options):
    """Add to `model` the heads of `terms`, config.loss; without training, only those for sampling.
    options: further keywords by head. UserError: the network takes no heads, or lacks the block.
    """
    for name in [n for n in terms if n in HEADS and (training or HEADS[n].sampled)]:
        if not hasattr(model, "heads"):
            raise UserError(f"{type(model).__name__} takes no heads: leave out loss.{name}")
        _, keywords = split_weight(terms[name])
        head = bind(HEADS[name], f"loss.{name}", model, **keywords)(**options.get(name, {}))
        if head.block not in range(len(model.blocks)):
            last = len(model.blocks) - 1
            raise UserError(f"loss.{name}.block is {head.block}, expected 0 to {last}, the last")
        model.heads[name] = head
