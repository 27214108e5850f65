"""The parts that a config names: process, codec, data set and network, fitted to one another."""

from collections import namedtuple

from datasets import LATENTS, get_dataset
from libs.data import PixelCodec, make_latent_codec
from libs.evaluate import FEATURES, make_features
from libs.model import add_heads, build_model, load_into, split_weight
from libs.runtime import config_beside
from sde import make_process
from utils import UserError, flatten, read_json

# Keys that change the pictures, but no tensor's shape.
_UNSEEN = ("process.name", "pred", "nnet.pad_layout", "nnet.scan_directions", "loss.internal.block")
_UNSEEN += ("nnet.heads", "nnet.mixer.heads", "nnet.routing.first")
Parts = namedtuple("Parts", "process codec dataset model")  # the data set may be None


def _name_process(flat):
    """process.name of a flat config; by default that of its kind."""
    return flat.get("process.name") or ("discrete" if flat.get("z_shape") else "vpsde")


def choose_process(config):
    """The process of a config, in which its name is resolved."""
    config.process.name = _name_process(flatten(config))
    return make_process(**config.process)


def open_dataset(config, *, augmented=False):
    """The data set of a config; augmented, as training reads it: flipped at random."""
    settings, side = config.dataset, config.nnet.input_size if config.z_shape is None else None
    return get_dataset(
        settings.name, path=settings.path, resolution=settings.resolution or side,
        labels=config.train.mode == "cond", seed=config.seed,
        random_flip=augmented and settings.random_flip,
        features=augmented and bool(config.loss.get("repa")),
    )  # fmt: skip


def _check_shapes(config, codec, dataset, model):
    """UserError where the network's input is not what the config, the data or the codec have."""
    made_for = (model.in_channels, *model.input_size)
    image = codec.image_shape(made_for)
    shapes = {"z_shape is": config.z_shape, "the autoencoder makes": codec.latent_shape(image)}
    if dataset is not None:
        shapes["the data are"] = codec.latent_shape(dataset.shape)
    for what, shape in shapes.items():
        if shape is not None and tuple(shape) != made_for:
            raise UserError(f"the network takes inputs of shape {made_for}, but {what} {(*shape,)}")
    side = (config.dataset.resolution or 0) * (config.ug_m or 1)
    if side and side != image[-1]:
        raise UserError(
            f"the network makes images of {image[-1]} pixels a side, but dataset.resolution and "
            f"ug_m say {side}: give the right resolution, or the autoencoder of the training"
        )
    if dataset is not None and dataset.num_classes > model.num_classes:
        raise UserError(
            f"the data set has {dataset.num_classes} classes, but nnet.num_classes is "
            f"{model.num_classes}; set --config.nnet.num_classes={dataset.num_classes}"
        )


def _require_trained_labels(config, saved, source):
    """UserError where `config` asks for labels that the run of the flat config `saved` never
    trains: classes, or the null label, which guidance and pictures without classes need.
    """
    if saved.get("nnet.pretrained_path"):  # those weights may know more labels than this run
        return
    conditional = config.train.mode == "cond"
    if conditional and saved.get("train.mode") == "uncond":
        raise UserError(
            f"train.mode is 'cond', but the weights were trained without classes, says {source}: "
            "use their config, or --config.train.mode=uncond"
        )
    dropped = saved.get("dataset.cfg") and saved.get("dataset.p_uncond")
    guided = config.sample.cfg and config.sample.scale
    if saved.get("train.mode") == "cond" and not dropped and (guided or not conditional):
        what = "guidance is" if conditional else "images without classes are"
        raise UserError(
            f"{what} asked for, but every image is trained with its class, says {source} "
            "(dataset.cfg, dataset.p_uncond): train with --config.dataset.cfg=True, or draw "
            "classes without guidance, --config.train.mode=cond --config.sample.cfg=False"
        )


def _get_feature_dim(repa, dataset):
    """D of the features (B, N, D) of config.loss.repa: the data set's, else those of the image
    network that it names, else UserError.
    """
    if dataset.feature_shape:
        return dataset.feature_shape[-1]
    known = [name for name, kind in FEATURES.items() if hasattr(kind, "tokens")]
    _, keywords = split_weight(repa)
    if dataset.latent or keywords.get("features") not in known:
        raise UserError(
            "the loss term repa needs features beside latents (scripts/extract_imagenet_feature.py "
            f"--features), or images and a loss.repa.features of {', '.join(known)}, with its file "
            "as loss.repa.path"
        )
    return make_features(keywords["features"], keywords.get("path"), "cpu").dim


def make_parts(config, *, data=None):
    """The Parts of a config, whose process.name and scale of latents are resolved.

    data: 'training' also draws the network's weights anew; 'real' opens the images of an
    evaluation, unless a statistics file or nothing stands for them; None opens no data set.
    UserError for an unknown name, a missing file, or parts that do not fit one another.
    """
    training = data == "training"
    process = choose_process(config)
    if training:
        _require_trained_labels(config, flatten(config), "the config")
    if config.pred not in process.predictions:
        raise UserError(f"pred is {config.pred!r}, expected one of {process.predictions}")
    stored = config.dataset.fid_stats or config.dataset.name in LATENTS
    measured = data == "real" and config.sample.features != "none" and not stored
    dataset = open_dataset(config, augmented=training) if training or measured else None
    aligned = training and "repa" in config.loss
    given = {"feature_dim": _get_feature_dim(config.loss.repa, dataset)} if aligned else {}
    model = build_model(config.nnet, seed=config.seed if training else None)
    add_heads(model, config.loss, training=training, repa=given)
    codec = PixelCodec()
    if config.z_shape is not None:
        decoding = not training or bool(config.train.grid_samples or config.train.fid_samples)
        codec = make_latent_codec(config.autoencoder, dataset, decoding=decoding)
        config.autoencoder.update(codec.scaling._asdict())
    _check_shapes(config, codec, dataset, model)
    return Parts(process, codec, dataset, model)


def load_weights(config, model, path):
    """Load the weights at `path` into `model`; returns sentences on what was changed for it.
    UserError: no weights that fit, or the config.json beside them says otherwise than `config`.
    """
    beside = config_beside(path)
    values = read_json(beside) if beside.is_file() else {}
    if "nnet" in values:  # of a run, not of another library
        saved, own = flatten(values), flatten(config)
        saved["process.name"], own["process.name"] = _name_process(saved), _name_process(own)
        for key in _UNSEEN:
            if key in saved and key in own and saved[key] != own[key]:
                raise UserError(
                    f"{key} is {own[key]!r}, but the weights were trained with {saved[key]!r}, "
                    f"says {beside}: use their config, or --config.{key}={saved[key]}"
                )
        _require_trained_labels(config, saved, beside)
    return load_into(model, path)
