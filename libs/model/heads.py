"""Heads of a DiM: what it is also asked after a block in the middle, for the terms of a loss."""

from torch import nn

from libs.model.layers import RMSNorm, predict_image
from utils import UserError, look_up


class OutputHead(nn.Module):
    """A prediction from the middle of the network, in the form of its final one (the weak model of
    internal guidance, arXiv 2512.24176). At first it predicts 0.

    block: the number of the block, from 0, whose tokens it is given.
    """

    sampled = True  # whether pictures may need the head: then it is in the averaged network too

    def __init__(self, model, *, block=8):
        super().__init__()
        self.block, self.patch_size = block, model.patch_size
        self.norm = RMSNorm(model.dim)
        self.modulation = nn.Linear(model.dim, 2 * model.dim)
        self.linear = nn.Linear(model.dim, model.patch_size**2 * model.in_channels)
        for parameter in (*self.modulation.parameters(), *self.linear.parameters()):
            nn.init.zeros_(parameter)

    def forward(self, image, condition):
        """Tokens (B, h, w, dim), time and class (B, dim) -> (B, C, H, W)."""
        return predict_image(
            image, condition, self.norm, self.modulation, self.linear, self.patch_size
        )


class Projector(nn.Module):
    """Tokens in the space of an image network's features.

    block: as of OutputHead. kind: 'repa', an MLP of three layers (arXiv 2410.06940, section 3), or
    'irepa', a 3x3 convolution over the grid. width: of the hidden layers; feature_dim: of the
    features. features, path: the image network, which the head itself does not need.
    """

    sampled = False

    def __init__(
        self, model, *, feature_dim, block=8, kind="repa", width=2048, features=None, path=None
    ):
        super().__init__()
        self.block = block
        make = look_up({"repa": self._make_mlp, "irepa": self._make_conv}, kind, "loss.repa.kind")
        self.layers = make(model.dim, width, feature_dim)

    @staticmethod
    def _make_mlp(dim, width, feature_dim):
        sizes = nn.Linear(dim, width), nn.Linear(width, width), nn.Linear(width, feature_dim)
        return nn.Sequential(sizes[0], nn.SiLU(), sizes[1], nn.SiLU(), sizes[2])

    @staticmethod
    def _make_conv(dim, width, feature_dim):
        return nn.Conv2d(dim, feature_dim, 3, padding=1)

    def forward(self, image, condition):
        """Tokens (B, h, w, dim) -> (B, h, w, feature_dim); the condition is not used."""
        if isinstance(self.layers, nn.Conv2d):
            return self.layers(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.layers(image)


# By the name of the loss term that a head serves. A head is a module with `block`, `sampled` and
# forward(image, condition), see OutputHead; its keywords are those of config.loss.<name>.
HEADS = {"internal": OutputHead, "repa": Projector}


def split_weight(value):
    """(weight, keywords) of a loss term from its value in config.loss: a weight alone, or a section
    with `weight` and keywords.
    """
    keywords = dict(value) if hasattr(value, "keys") else {"weight": value}
    return keywords.pop("weight"), keywords


def add_heads(model, terms, *, training, **options):
    """Add to `model` the heads that the loss terms `terms`, config.loss, need; without training
    those alone that sampling needs. options: further keywords of the head of a name.

    UserError: the network takes no heads, or lacks the block.
    """
    for name, value in terms.items():
        head = HEADS.get(name)
        if head is None or not (training or head.sampled):
            continue
        if not hasattr(model, "heads"):
            raise UserError(
                f"the loss term {name} needs a head in the network, and {type(model).__name__} "
                f"takes none: use a DiM, or leave config.loss.{name} out"
            )
        keywords = split_weight(value)[1]
        added = head(model, **keywords, **options.get(name, {}))
        if not 0 <= added.block < model.depth:
            raise UserError(
                f"loss.{name}.block is {added.block}, but the network has {model.depth} blocks, "
                f"from 0 on: set --config.loss.{name}.block"
            )
        model.heads[name] = added
