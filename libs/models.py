"""The networks by name, as the `nnet` section of a config gives them."""

import inspect

from libs.dim import DiM
from libs.mamba import Mamba
from libs.official import from_official, is_official, load_checkpoint
from libs.uvit import UViT
from libs.weights import load_strict
from utils import UserError

NETWORKS = {"dim": DiM, "uvit": UViT}


def build_model(nnet):
    """The network of an `nnet` section: its name and the keywords of its constructor.

    Raises:
        UserError: unknown name, unknown or missing keyword, impossible value; each named.
    """
    keywords = dict(nnet)
    name = keywords.pop("name", None)
    keywords.pop("pretrained_path", None)
    if name not in NETWORKS:
        raise UserError(f"nnet.name is {name!r}, expected one of {', '.join(NETWORKS)}")
    parameters = inspect.signature(NETWORKS[name]).parameters
    of_mixer = inspect.signature(Mamba).parameters
    unknown = sorted(set(keywords) - set(parameters))
    unknown += [f"mamba.{key}" for key in keywords.get("mamba") or () if key not in of_mixer]
    missing = sorted(
        key for key, p in parameters.items() if p.default is p.empty and keywords.get(key) is None
    )
    if unknown or missing:
        what = f"unknown keys {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
        raise UserError(f"the nnet section has {what}; {name} takes {', '.join(parameters)}")
    return NETWORKS[name](**{key: value for key, value in keywords.items() if value is not None})


def load_into(model, path):
    """Load weights for evaluation into `model`, strictly: a `<step>.ckpt` directory or a file in
    it, or an official `.pth`.
    """
    _, tensors = load_checkpoint(path)
    if is_official(tensors):
        tensors = from_official(model, tensors, path)
    load_strict(model, tensors, path)
