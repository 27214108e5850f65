"""Networks by name, as the `nnet` section of a config gives them, and weights for them."""

import math
import re

import torch

from libs.files import load_strict, read_safetensors, read_torch, unwrap, weights_file
from libs.model.dim import DiM
from libs.model.layers import EXTRA_TOKENS, interpolate_positions
from libs.model.published import from_official
from libs.model.routing import Routing
from libs.model.uvit import UViT
from utils import UserError, look_up

NETWORKS = {"dim": DiM, "uvit": UViT}


def build_model(nnet, seed=None):
    """The network of an `nnet` section: its name, the keywords of its constructor, and `routing`.

    seed: of torch's global generator before the weights are drawn; None leaves it as it is.
    UserError: an unknown name, or sizes that do not fit.
    """
    nnet = nnet.to_dict() if hasattr(nnet, "to_dict") else nnet
    keywords = {key: value for key, value in nnet.items() if value is not None}
    keywords.pop("pretrained_path", None)
    first = keywords.pop("routing", {}).get("first")
    network = look_up(NETWORKS, keywords.pop("name"), "nnet.name")
    if seed is not None:
        torch.manual_seed(seed)
    model = network(**keywords)
    if first:
        model.routing = Routing(model, first=first)
    return model


def resize_state(state_dict, model):
    """Fit DiM weights of another resolution or patch size to `model`, as the official fine-tuning
    does: (name -> tensor, list of sentences on what changed).

    The position table is interpolated (its grid is taken to be square); for another patch size the
    [0, 0] tap of the patch embedding and of the output head are repeated over the new patch.
    Weights with other names than the model's stay as they are.
    """
    tensors, changes = dict(state_dict), []
    if tensors.keys() != model.state_dict().keys():
        return tensors, changes
    weight, table = tensors["patch_embed.weight"], tensors["pos_embed"]
    old, new = weight.shape[-1], model.patch_size
    if old != new:
        tensors["patch_embed.weight"] = weight[:, :, :1, :1].repeat(1, 1, new, new)
        for name in [n for n in tensors if re.match(r"(head|heads\.internal\.linear)\.", n)]:
            tensors[name] = torch.cat([tensors[name][: model.in_channels]] * new**2)
        changes.append(f"patch size {old} -> {new}: patch_embed and head repeat their [0, 0] tap")
    side, (h, w) = math.isqrt(table.shape[1] - EXTRA_TOKENS), model.native_grid
    if table.shape[1] == EXTRA_TOKENS + side**2 != EXTRA_TOKENS + h * w:
        tensors["pos_embed"] = interpolate_positions(table, (side, side), (h, w))
        changes.append(f"pos_embed: {side}x{side} grid interpolated to {h}x{w}")
    return tensors, changes


def _list_parts(names):
    """The heads and the routing among names of tensors: what some weights of a DiM lack."""
    return {found[0] for name in names if (found := re.match(r"heads\.\w+|routing", name))}


def fit_parts(tensors, model, *, new):
    """Leave out the heads that `tensors` or `model` lack, of the other; if `new`, heads and routing
    that `tensors` lack go in, as the model has them. Returns sentences.
    """
    own, said = model.state_dict(), []
    for part in sorted(_list_parts(tensors) ^ _list_parts(own)):
        kind, _, name = part.partition(".")
        if new and part in _list_parts(own):
            tensors.update({key: x for key, x in own.items() if key.startswith(f"{part}.")})
            said.append(f"{part.replace('heads.', 'head ')} starts anew")
        elif kind == "heads":
            if name in model.heads:
                del model.heads[name]
            for key in [key for key in tensors if key.startswith(f"{part}.")]:
                del tensors[key]
            said.append(f"head {name} is left out")
    return said


def load_into(model, path, *, new=False):
    """Load weights into `model`, strictly; those of a DiM for another resolution or patch size are
    fitted (resize_state). Returns sentences on what was changed.

    path: a `<step>.ckpt` directory, whose averaged weights are read, a .safetensors file, or an
    official .pth, wrapped or not (files.unwrap). Heads that the model or the weights lack are left
    out. new: the model keeps its own label tables, where they have another number of classes, and
    its own heads and routing, where the weights have none. UserError: no weights, or those of
    another network.
    """
    file = weights_file(path)
    if not file.is_file():
        raise UserError(
            f"checkpoint {file} does not exist; give a <step>.ckpt directory, a .safetensors file "
            "or an official .pth"
        )
    tensors = (read_safetensors if file.suffix == ".safetensors" else read_torch)(file)
    tensors, changes = unwrap(tensors)
    tensors = from_official(model, tensors)
    for name, own in model.state_dict().items() if new else ():
        if name in tensors and "label_embed" in name and len(own) != len(tensors[name]):
            classes = f"{len(tensors[name]) - 1} -> {len(own) - 1} classes"
            changes.append(f"{classes}: {name} starts anew, the other tensors are kept")
            tensors[name] = own
    if isinstance(model, DiM):
        changes += fit_parts(tensors, model, new=new)
        tensors, resized = resize_state(tensors, model)
        changes += resized
    load_strict(model, tensors, path)
    return changes
