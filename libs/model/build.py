"""Networks by name, as the `nnet` section of a config gives them, and weights for them."""

import math
from pathlib import Path

import torch

from configs import common
from libs.files import load_strict, read_safetensors, read_torch, weights_file
from libs.model.dim import EXTRA_TOKENS, DiM
from libs.model.layers import interpolate_positions
from libs.model.published import from_official
from libs.model.uvit import UViT
from libs.runtime import check_elements, check_values
from utils import UserError, flatten, listed, read_json

NETWORKS = {"dim": DiM, "uvit": UViT}
_SECTIONS = {"dim": common.dim_nnet, "uvit": common.uvit_nnet}


def build_model(nnet, seed=None):
    """The network of an `nnet` section: its name and the keywords of its constructor.

    seed: of torch's global generator before the weights are drawn; None leaves it as it is.
    UserError: an unknown name, or sizes that do not fit.
    """
    keywords = {key: value for key, value in nnet.items() if value is not None}
    keywords.pop("pretrained_path", None)
    name = keywords.pop("name")
    if name not in NETWORKS:
        raise UserError(f"nnet.name is {name!r}, expected one of {', '.join(NETWORKS)}")
    if seed is not None:
        torch.manual_seed(seed)
    return NETWORKS[name](**keywords)


def resize_state(state_dict, model):
    """Fit DiM weights of another resolution or patch size to `model`, as the official fine-tuning
    does.

    The position table is interpolated (its grid is taken to be square); for another patch size the
    [0, 0] tap of the patch embedding and of the output head are repeated over the new patch.

    Args:
        state_dict: our names -> tensor.
        model: the DiM to be loaded.

    Returns:
        (our names -> tensor, list of sentences on what changed). Weights with other names stay as
        they are.
    """
    tensors, changes = dict(state_dict), []
    if tensors.keys() != model.state_dict().keys():
        return tensors, changes
    weight, table = tensors["patch_embed.weight"], tensors["pos_embed"]
    old, new = weight.shape[-1], model.patch_size
    if old != new:
        tensors["patch_embed.weight"] = weight[:, :, :1, :1].repeat(1, 1, new, new)
        for name in ("head.weight", "head.bias"):
            tensors[name] = torch.cat([tensors[name][: model.in_channels]] * new**2)
        changes.append(f"patch size {old} -> {new}: patch_embed and head repeat their [0, 0] tap")
    side, (h, w) = math.isqrt(table.shape[1] - EXTRA_TOKENS), model.native_grid
    if table.shape[1] == EXTRA_TOKENS + side**2 != EXTRA_TOKENS + h * w:
        tensors["pos_embed"] = interpolate_positions(table, (side, side), (h, w), EXTRA_TOKENS)
        changes.append(f"pos_embed: {side}x{side} grid interpolated to {h}x{w}")
    return tensors, changes


def load_into(model, path):
    """Load weights for evaluation or to start from into `model`, strictly.

    path: a `<step>.ckpt` directory, whose averaged weights are read, a .safetensors file, or an
    official .pth. Weights of a DiM for another resolution or patch size are fitted (resize_state).

    Returns sentences on what was changed. UserError if there are no weights, or of another network.
    """
    file = weights_file(path)
    if not file.is_file():
        raise UserError(
            f"checkpoint {file} does not exist; give a <step>.ckpt directory, a .safetensors file "
            "or an official .pth"
        )
    tensors = (read_safetensors if file.suffix == ".safetensors" else read_torch)(file)
    tensors, changes = from_official(model, tensors), []
    if isinstance(model, DiM):
        tensors, changes = resize_state(tensors, model)
    load_strict(model, tensors, path)
    return changes


def start_from(model, path):
    """Load the weights that `nnet.pretrained_path` names into `model`, for a training that begins.

    Returns sentences for the log. UserError as load_into: nothing is trained from scratch by
    mistake.
    """
    if not path:
        return ["starting from scratch"]
    return [f"starting from {path}", *load_into(model, path)]


# ------------------------------------------------------------ what fits a config together


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
