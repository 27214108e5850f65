"""The networks by name, as the `nnet` section of a config gives them."""

import contextlib
import inspect
import logging
from pathlib import Path

import torch

from configs import common
from libs.files import load_strict, weights_file
from libs.model.dim import DiM
from libs.model.mamba import Mamba
from libs.model.published import from_official, is_official, load_checkpoint, resize_state
from libs.model.uvit import UViT
from libs.runtime import check_elements, check_values
from utils import UserError, flatten, listed, read_json

log = logging.getLogger("dim")

NETWORKS = {"dim": DiM, "uvit": UViT}
_SECTIONS = {"dim": common.dim_nnet, "uvit": common.uvit_nnet}


def build_model(nnet, seed=None):
    """The network of an `nnet` section: its name and the keywords of its constructor.

    seed: of torch's global generator before the weights are drawn; None leaves it as it is.

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
    unknown += [
        f"mamba.{key}"
        for key in keywords.get("mamba") or ()
        if key not in of_mixer or key == "dim"
    ]
    missing = sorted(
        key for key, p in parameters.items() if p.default is p.empty and keywords.get(key) is None
    )
    if unknown or missing:
        what = f"unknown keys {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
        raise UserError(f"the nnet section has {what}; {name} takes {', '.join(parameters)}")
    if seed is not None:
        torch.manual_seed(seed)
    try:
        return NETWORKS[name](**{key: item for key, item in keywords.items() if item is not None})
    except (RuntimeError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"this machine cannot make the network of the nnet section ({reason}): give it a "
            "smaller nnet.dim, nnet.depth or nnet.input_size"
        ) from error


def check_data(model, dataset, z_shape):
    """UserError where the data do not fit the network: labels, channels or size of z (C, H, W)."""
    if dataset.num_classes > model.num_classes:
        raise UserError(
            f"the data set has {dataset.num_classes} classes, but nnet.num_classes is "
            f"{model.num_classes}; set --config.nnet.num_classes={dataset.num_classes}"
        )
    made_for = (model.in_channels, *model.input_size)
    if tuple(z_shape) != made_for:
        raise UserError(
            f"the network is made for inputs of shape {made_for}, but the data are {z_shape}; set "
            "nnet.in_channels and nnet.input_size to theirs"
        )


def check_codec(model, codec, config):
    """UserError where latents do not fit the network's input: their channels, their size in pixels,
    or z_shape.
    """
    made_for = (model.in_channels, *model.input_size)
    if config.get("z_shape") and tuple(config.z_shape) != made_for:
        raise UserError(
            f"z_shape is {tuple(config.z_shape)}, but the network is made for {made_for}: give "
            "z_shape what nnet.in_channels and nnet.input_size say"
        )
    image = codec.image_shape(made_for)
    found = codec.latent_shape(image)
    if found != made_for:
        raise UserError(
            f"the network is made for latents of shape {made_for}, but the autoencoder makes "
            f"{found}: give the autoencoder that it was trained with"
        )
    pixels = (config.dataset.resolution or image[-1]) * (config.get("ug_m") or 1)
    if image[-1] != pixels and config.dataset.resolution:
        raise UserError(
            f"the network's latents are images of {image[-1]} pixels a side to this autoencoder, "
            f"but dataset.resolution and ug_m say {pixels}: give the autoencoder it was trained "
            "with, or the right resolution"
        )


def check_kind(config, *, latent):
    """UserError for a config of latents in a script for pixels, or the other way round."""
    if (config.get("z_shape") is not None) != latent:
        kind, scripts = ("pixels", "train.py and eval.py") if latent else (
            "latents", "train_ldm_discrete.py and eval_ldm_discrete.py"
        )  # fmt: skip
        raise UserError(f"this is a config for {kind}: its scripts are {scripts}")


def _as_config(values):
    """The ConfigDict of what a config.json holds: every key, typed and in its range as if it came
    from a command line; keys that are newer than the file have their defaults.
    """
    if not isinstance(values, dict) or not {"nnet", "pred", "sample", "train"} <= values.keys():
        raise UserError("it has not all of nnet, pred, sample and train")
    config = common.get_config()
    config.nnet = _SECTIONS[values["nnet"]["name"]]()
    defaults = flatten(config)
    config.update(values)
    found = flatten(config)
    missing = [key for key, value in defaults.items() if value is not None and found[key] is None]
    if missing:
        raise UserError(f"it has no value for {listed(missing)}")
    check_elements({key: found[key] for key in defaults}, defaults)
    check_values(config)
    return config


def _check_size(network, weights, beside):
    """UserError where a network has more numbers than the file `weights` has bytes: nothing of the
    size that a config.json from somebody else asks for is allocated.
    """
    numbers = sum(tensor.numel() for tensor in network.state_dict().values())
    if numbers > weights.stat().st_size:
        raise UserError(
            f"{weights} is smaller than the {numbers:,} parameters that {beside} asks for, so it "
            "is damaged or of another config: use another checkpoint, or give --config=<config "
            "file> of this one"
        )


def config_beside(path):
    """The ConfigDict of the run that wrote the weights at `path`: config.json in the `<step>.ckpt`
    directory, or beside the file; UserError if there is none.
    """
    path = Path(path)
    if not weights_file(path).is_file():
        raise UserError(
            f"checkpoint {weights_file(path)} does not exist; give a <step>.ckpt directory or a "
            "file"
        )
    beside = (path if path.is_dir() else path.parent) / "config.json"
    needs = "give --config=<config file> of the model"
    if not beside.is_file():
        raise UserError(f"there is no {beside}: {needs} that {path} holds")
    values = read_json(beside)
    try:
        config = _as_config(values)
        with torch.device("meta"):
            network = build_model(config.nnet)
    except Exception as error:  # ConfigDict's of a wrong type, and ours
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = f"{kind}{error}".splitlines()[0]
        raise UserError(
            f"{beside} is not the config of a run ({reason}): {needs} that {path} holds"
        ) from error
    _check_size(network, weights_file(path), beside)
    return config


# Shapes of tensors do not show them, and pictures are others.
_UNSEEN = ("pred", "nnet.pad_layout", "nnet.scan_directions", "nnet.heads")


def require_trained_labels(config, saved, source):
    """UserError where `config` asks for labels that the run of the flat config `saved` never
    trains: classes, or the label of none, which guidance and unconditional pictures need. source:
    what says so.
    """
    if saved.get("nnet.pretrained_path"):  # those may know more than this run did
        return
    conditional, settings = config.train.mode == "cond", config.sample
    dropped = saved.get("dataset.cfg") and saved.get("dataset.p_uncond")
    if conditional and saved.get("train.mode") == "uncond":
        raise UserError(
            f"train.mode is 'cond', but the weights were trained without classes, says {source}: "
            "use their config, or --config.train.mode=uncond"
        )
    if saved.get("train.mode") == "cond" and not dropped:
        if not conditional or (settings.cfg and settings.scale):
            what = "guidance is" if conditional else "images without classes are"
            raise UserError(
                f"{what} asked for, but every image is trained with its class, says {source} "
                "(dataset.cfg, dataset.p_uncond): train with --config.dataset.cfg=True, or draw "
                "classes without guidance, --config.train.mode=cond --config.sample.cfg=False"
            )


def require_same(config, path):
    """UserError where the config.json beside the weights at `path`, if there is one of ours, says
    otherwise than `config` in what the weights themselves do not show.
    """
    path = Path(path)
    beside = (path if path.is_dir() else path.parent) / "config.json"
    try:
        saved = flatten(read_json(beside))
    except (UserError, AttributeError):  # none, or somebody else's
        return
    own = flatten(config)
    for key in _UNSEEN:
        if key in saved and key in own and saved[key] != own[key]:
            raise UserError(
                f"{key} is {own[key]!r}, but the weights were trained with {saved[key]!r}, says "
                f"{beside}: use their config, or --config.{key}={saved[key]}"
            )
    require_trained_labels(config, saved, beside)


def load_into(model, path):
    """Load weights for evaluation or to start from into `model`, strictly: a `<step>.ckpt`
    directory or a file in it, or an official `.pth`.

    Weights of a DiM for another resolution or patch size are fitted
    (libs.model.published.resize_state).
    Returns sentences on what was changed.
    """
    _, tensors = load_checkpoint(path)
    changes = []
    if is_official(tensors):
        tensors = from_official(model, tensors, path)
    if isinstance(model, DiM):
        with contextlib.suppress(UserError):  # what fits no size, load_strict names
            tensors, changes = resize_state(tensors, model)
    load_strict(model, tensors, path)
    return changes


def start_from(model, path):
    """Load the weights that `nnet.pretrained_path` names into `model`, for a training that begins.

    Returns sentences for the log. UserError if they are not there: nothing is trained from scratch
    by mistake.
    """
    if not path:
        return ["starting from scratch"]
    if not weights_file(path).exists():
        raise UserError(
            f"nnet.pretrained_path {path} does not exist: put the weights to start from there, or "
            "start from scratch with --config.nnet.pretrained_path="
        )
    return [f"starting from {path}", *load_into(model, path)]
