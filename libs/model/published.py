"""Official configurations and checkpoints <-> ours, exactly, both ways, for DiM and U-ViT.

Only names and shapes of the official repositories appear here. Checkpoints are read without running
code from them.
"""

import math

import torch

from libs.files import check_manifest, load_strict, read_safetensors, read_torch, weights_file
from libs.model.dim import EXTRA_TOKENS, DiM
from libs.model.layers import interpolate_positions
from libs.model.uvit import UViT
from utils import UserError, listed, read_json

# ----------------------------------------------------------------------------------- configurations

# Keys whose value selects a network: only this value is that of the published models.
_DIM_FIXED = {
    "encoder_start_blk_id": 1, "is_absorb": False, "is_align_exchange_q_kv": False,
    "is_extra_tokens": True, "is_uconnect": True, "mamba_type": "enc", "no_ff": True,
    "norm_type": "ada_norm_single", "pos_encoding_type": "learnable", "rms": True,
    "sub_sequence_schedule": ("reverse_single", "layerwise_cross"), "use_a4m_adapter": True,
    "use_adapter_modules": True, "use_bidirectional_rnn": False, "use_conv1d": True,
    "use_pad_token": True, "is_random_patterns": False, "pattern_type": "base",
}  # fmt: skip
# Keys that do not reach the network at all (golden item 15; multi_times by item 7): any value of
# the type.
_DIM_WITHOUT_EFFECT = {
    "activation_fn": str, "attention_bias": bool, "kv_as_one_token_idx": int, "nested_order": int,
    "norm_elementwise_affine": bool, "num_2d_enc_dec_layers": int, "sequence_schedule": str,
    "multi_times": int, "name": str, "pretrained_path": (str, type(None)),
}  # fmt: skip
_DIM_READ = (
    "attention_head_dim", "drop_path_rate", "in_channels", "mamba_d_conv", "mamba_d_state",
    "mamba_expand", "num_attention_heads", "num_embeds_ada_norm", "num_layers", "out_channels",
    "pad_token_schedules", "patch_size", "sample_size", "scan_pattern_len",
)  # fmt: skip
_DIM_OPTIONAL = {
    "is_random_patterns", "pattern_type", "multi_times", "name", "pretrained_path", "num_patches",
    "is_freeu", "freeu_param", "is_skip_tune", "skip_tune_param", "mlp_time_embed",
}  # fmt: skip
# Our keywords, as the networks' own complaints name them.
_DIM_OFFICIAL_NAMES = {
    "nnet.input_size": "sample_size", "nnet.patch_size": "patch_size", "nnet.depth": "num_layers",
    "nnet.dim": "attention_head_dim * num_attention_heads", "nnet.freeu": "freeu_param",
    "nnet.scan_directions": "scan_pattern_len", "nnet.pad_layout": "pad_token_schedules",
    "nnet.drop_path": "drop_path_rate", "nnet.skip_tuning": "skip_tune_param",
}  # fmt: skip

_UVIT_READ = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
_UVIT_OPTIONAL = {
    "in_chans": 3, "mlp_ratio": 4, "qkv_bias": False, "mlp_time_embed": False, "conv": True,
    "use_checkpoint": False, "name": "uvit", "skip": True, "qk_scale": None,
}  # fmt: skip
_UVIT_OFFICIAL_NAMES = {
    "nnet.input_size": "img_size", "nnet.patch_size": "patch_size", "nnet.dim": "embed_dim",
    "nnet.heads": "num_heads",
}  # fmt: skip


def _check_keys(kwargs, known, optional, network):
    unknown = sorted(set(kwargs) - set(known))
    missing = sorted(set(known) - set(optional) - set(kwargs))
    if unknown:
        raise UserError(
            f"official {network} configuration has unknown keys: {', '.join(unknown)}; known are "
            f"{', '.join(sorted(known))}"
        )
    if missing:
        raise UserError(
            f"official {network} configuration lacks keys: {', '.join(missing)}; add them to its "
            "nnet section"
        )


def _tuple(value):
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _positive(kwargs, *keys):
    for key in keys:
        value = kwargs[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"official key {key} is {value!r}, expected a positive integer")


def _booleans(kwargs, *keys):
    for key in keys:
        if not isinstance(kwargs.get(key, False), bool):
            raise UserError(f"official key {key} is {kwargs[key]!r}, expected True or False")


def _numbers(kwargs, *keys):
    for key in keys:
        if isinstance(kwargs[key], bool) or not isinstance(kwargs[key], (int, float)):
            raise UserError(f"official key {key} is {kwargs[key]!r}, expected a number")


def _build(network, keywords, official_names):
    """network(**keywords), whose complaints name the official keys."""
    try:
        return network(**keywords)
    except UserError as error:
        said = str(error)
        for ours, official in official_names.items():
            said = said.replace(ours, official)
        raise UserError(f"official configuration: {said}") from error


def _dim_keywords(kwargs):
    """Keywords of DiM from the `nnet` section of an official configuration; UserError names what
    cannot be.
    """
    known = {*_DIM_FIXED, *_DIM_WITHOUT_EFFECT, *_DIM_READ, *_DIM_OPTIONAL}
    _check_keys(kwargs, known, _DIM_OPTIONAL, "DiM")
    for key, only in _DIM_FIXED.items():
        if _tuple(kwargs.get(key, only)) != only:
            raise UserError(
                f"official key {key} is {kwargs[key]!r}; this project has the network for {only!r} "
                "only"
            )
    for key, kind in _DIM_WITHOUT_EFFECT.items():
        if key in kwargs and not isinstance(kwargs[key], kind):
            raise UserError(
                f"official key {key} is {kwargs[key]!r}, expected "
                f"{getattr(kind, '__name__', 'a path or None')}"
            )
    _positive(
        kwargs, "attention_head_dim", "num_attention_heads", "num_layers", "in_channels",
        "sample_size", "patch_size", "mamba_d_state", "mamba_d_conv", "mamba_expand",
        "num_embeds_ada_norm", "scan_pattern_len",
    )  # fmt: skip
    _booleans(kwargs, "mlp_time_embed", "is_skip_tune", "is_freeu")
    _numbers(kwargs, "drop_path_rate")
    if kwargs["out_channels"] != kwargs["in_channels"]:
        raise UserError(
            f"official key out_channels is {kwargs['out_channels']!r}, expected in_channels, "
            f"{kwargs['in_channels']}"
        )
    schedules = _tuple(kwargs["pad_token_schedules"])
    if not isinstance(schedules, tuple) or len(schedules) != 2 or schedules[0] != "dec_split":
        raise UserError(
            f"official key pad_token_schedules is {schedules!r}, expected ('dec_split', 'lateral' "
            "or 'rho_pad')"
        )
    _check_num_patches(kwargs)
    return dict(
        input_size=kwargs["sample_size"],
        in_channels=kwargs["in_channels"],
        dim=kwargs["attention_head_dim"] * kwargs["num_attention_heads"],
        depth=kwargs["num_layers"],
        num_classes=kwargs["num_embeds_ada_norm"],
        patch_size=kwargs["patch_size"],
        mamba=dict(
            d_state=kwargs["mamba_d_state"],
            d_conv=kwargs["mamba_d_conv"],
            expand=kwargs["mamba_expand"],
        ),
        pad_layout=schedules[1],
        scan_directions=kwargs["scan_pattern_len"],
        mlp_time_embed=kwargs.get("mlp_time_embed", False),
        drop_path=kwargs["drop_path_rate"],
        skip_tuning=_skip_tuning(kwargs),
        freeu=_freeu(kwargs),
    )


def _check_num_patches(kwargs):
    """num_patches lists token counts of square grids, the native one first; any grid works here, so
    it is only checked.
    """
    counts = _tuple(kwargs.get("num_patches"))
    native = (kwargs["sample_size"] // kwargs["patch_size"]) ** 2
    squares = isinstance(counts, tuple) and all(
        type(n) is int and n > 0 and math.isqrt(n) ** 2 == n for n in counts
    )
    if counts is not None and not (squares and counts[:1] == (native,)):
        raise UserError(
            f"official key num_patches is {counts!r}, expected square numbers beginning with "
            f"{native}, which sample_size and patch_size give"
        )


def _skip_tuning(kwargs):
    return _factors(kwargs, "skip_tune_param", 2) if kwargs.get("is_skip_tune", False) else None


def _freeu(kwargs):
    return _factors(kwargs, "freeu_param", 4) if kwargs.get("is_freeu", False) else None


def _factors(kwargs, key, count):
    value = _tuple(kwargs.get(key))
    numbers = isinstance(value, tuple) and all(type(item) in (int, float) for item in value)
    if not numbers or len(value) != count:
        raise UserError(f"official key {key} is {value!r}, expected {count} numbers")
    return value


def model_from_official(nnet_kwargs, state_dict=None):
    """Our DiM from the `nnet` section of an official configuration and, if given, official weights.

    Args:
        nnet_kwargs: dict, every key of the section.
        state_dict: official name -> tensor or array, loaded strictly; None leaves the
            initialisation.

    Raises:
        UserError: unknown, missing or impossible keys; missing, unexpected or wrong-shaped tensors;
            each named.
    """
    model = _build(DiM, _dim_keywords(dict(nnet_kwargs)), _DIM_OFFICIAL_NAMES)
    if state_dict is not None:
        load_official(model, state_dict)
    return model


def uvit_from_official(kwargs, state_dict=None):
    """Our UViT from official U-ViT keywords and, if given, official weights; as
    `model_from_official`.
    """
    kwargs = dict(kwargs)
    _check_keys(kwargs, {*_UVIT_READ, *_UVIT_OPTIONAL}, _UVIT_OPTIONAL, "U-ViT")
    kwargs = {**_UVIT_OPTIONAL, **kwargs}
    _positive(kwargs, "img_size", "patch_size", "embed_dim", "depth", "num_heads", "in_chans")
    for key in ("skip", "qk_scale"):
        if kwargs[key] != _UVIT_OPTIONAL[key]:
            raise UserError(
                f"official key {key} is {kwargs[key]!r}; this project has the network for "
                f"{_UVIT_OPTIONAL[key]!r} only"
            )
    _booleans(kwargs, "qkv_bias", "mlp_time_embed", "conv", "use_checkpoint")
    _numbers(kwargs, "mlp_ratio")
    if not kwargs["mlp_ratio"] > 0:
        raise UserError(f"official key mlp_ratio is {kwargs['mlp_ratio']!r}, expected more than 0")
    labels = kwargs["num_classes"]  # rows of the label table, the null class included; -1 for none
    if type(labels) is not int or (labels != -1 and labels < 2):
        raise UserError(
            f"official key num_classes is {labels!r}, expected -1 or the classes plus one null "
            "class"
        )
    keywords = dict(
        input_size=kwargs["img_size"],
        in_channels=kwargs["in_chans"],
        dim=kwargs["embed_dim"],
        depth=kwargs["depth"],
        heads=kwargs["num_heads"],
        num_classes=0 if labels == -1 else labels - 1,
        patch_size=kwargs["patch_size"],
        mlp_ratio=kwargs["mlp_ratio"],
        qkv_bias=kwargs["qkv_bias"],
        mlp_time_embed=kwargs["mlp_time_embed"],
        final_conv=kwargs["conv"],
        activation_checkpointing=kwargs["use_checkpoint"],
    )
    model = _build(UViT, keywords, _UVIT_OFFICIAL_NAMES)
    if state_dict is not None:
        load_official(model, state_dict)
    return model


# ------------------------------------------------------------------------------------------ tensors

_DIM_BLOCK = {
    "scale_shift_table": "scale_shift_table",
    "norm1.norm.weight": "norm.weight",
    "attn1.A_log": "mixer.A_log",
    "attn1.D": "mixer.D",
    "attn1.in_proj": "mixer.in_proj",
    "attn1.conv1d.weight": "mixer.conv_weight",
    "attn1.conv1d.bias": "mixer.conv_bias",
    "attn1.x_proj": "mixer.x_proj",
    "attn1.dt_proj": "mixer.dt_proj",
    "attn1.out_proj": "mixer.out_proj",
    "skip_linear.0": "skip.stream",
    "skip_linear.1": "skip.skip",
    "skip_linear": "skip.linear",
}
_DIM_BEFORE = {"additional_embed": "pos_embed", "pos_embed.proj": "patch_embed"}
_DIM_AFTER = {
    "norm_out.norm.weight": "norm_out.weight",
    "adaln_single.emb.timestep_embedder.linear_1": "modulation.time_mlp.0",
    "adaln_single.emb.timestep_embedder.linear_2": "modulation.time_mlp.2",
    "adaln_single.emb.class_embedder.embedding_table": "modulation.label_embed",
    "adaln_single.linear": "modulation.linear",
    "label_emb": "label_embed",
    "time_embed": "time_embed",
    "a4m_adapter.pad_token_dec_split": "split_tokens",
    "a4m_adapter.pad_token": "pad_tokens",
    "a4m_adapter.first_smoother": "first_smoother",
    "a4m_adapter.last_smoother": "last_smoother",
    "proj_out_2": "head",
    "proj_out_1": "head_modulation",
}
_UVIT_BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.proj": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "skip_linear": "skip",
}
_UVIT_BEFORE = {
    "pos_embed": "pos_embed",
    "patch_embed.proj": "patch_embed",
    "time_embed": "time_embed",
    "label_emb": "label_embed",
}
_UVIT_AFTER = {"norm": "norm", "decoder_pred": "head", "final_layer": "final_conv"}

# Tensors that the two sides hold in another shape: official name's end -> (to ours, to official).
_RESHAPED = {
    # (channels, 1, width) <-> (channels, width)
    "attn1.conv1d.weight": (lambda w: w[:, 0], lambda w: w[:, None]),
    # (1, pad, dim) <-> (pad, dim)
    "a4m_adapter.pad_token_dec_split": (lambda w: w[0], lambda w: w[None]),
    # (1, dim, pad) <-> (pad, dim)
    "a4m_adapter.pad_token": (lambda w: w[0].T, lambda w: w.T[None]),
}


def _modules(model):
    """(official, ours) names of modules and parameters in the official order."""
    if isinstance(model, UViT):
        groups = [(f"in_blocks.{k}", f"in_blocks.{k}") for k in range(len(model.in_blocks))]
        groups += [("mid_block", "mid_block")] + [
            (f"out_blocks.{k}", f"out_blocks.{k}") for k in range(len(model.out_blocks))
        ]
        before, block, after = _UVIT_BEFORE, _UVIT_BLOCK, _UVIT_AFTER
    else:
        groups = [(f"transformer_blocks.{k}", f"blocks.{k}") for k in range(model.depth)]
        before, block, after = _DIM_BEFORE, _DIM_BLOCK, _DIM_AFTER
    yield from before.items()
    for official, ours in groups:
        yield from ((f"{official}.{a}", f"{ours}.{b}") for a, b in block.items())
    yield from after.items()


def _names(model):
    """{official name: our name} of every tensor, in the official order."""
    ours = model.state_dict()
    by_module = {}
    for name in ours:
        by_module.setdefault(name, []).append("")
        module, _, leaf = name.rpartition(".")
        by_module.setdefault(module, []).append("." + leaf)
        outer, _, inner = module.rpartition(".")
        if inner.isdigit():  # a Sequential such as time_embed.0
            by_module.setdefault(outer, []).append(f".{inner}.{leaf}")
    names = {}
    for official, mine in _modules(model):
        for leaf in by_module.get(mine, []):
            if mine + leaf in ours and mine + leaf not in names.values():
                names[official + leaf] = mine + leaf
    return names


def _reshape(official_name, tensor, direction):
    for end, functions in _RESHAPED.items():
        if official_name.endswith(end):
            return functions[direction](tensor)
    return tensor


def to_official(model):
    """The weights of a DiM or UViT under the official names, shapes and order: dict of name ->
    tensor (contiguous copies where reshaped).
    """
    state = model.state_dict()
    return {
        official: _reshape(official, state[ours], 1).contiguous()
        for official, ours in _names(model).items()
    }


def is_official(state_dict):
    """Whether the names are official ones (our DiM and UViT have no tensor of these names)."""
    return "additional_embed" in state_dict or "decoder_pred.weight" in state_dict


def from_official(model, state_dict, source="the official state dict"):
    """Official names and shapes -> ours: dict of name -> tensor. UserError names `source` and what
    is missing or unexpected.
    """
    names = _names(model)
    unexpected, missing = sorted(set(state_dict) - set(names)), sorted(set(names) - set(state_dict))
    if missing or unexpected:
        said = [
            f"{kind}: {listed(found)}"
            for kind, found in (("missing", missing), ("unexpected", unexpected))
            if found
        ]
        raise UserError(
            f"the weights in {source} do not fit this network; {'; '.join(said)}; use the "
            "configuration that they were trained with"
        )
    tensors = {}
    for official, ours in names.items():
        tensor = torch.as_tensor(state_dict[official])
        expected = 3 if any(official.endswith(end) for end in _RESHAPED) else tensor.dim()
        if tensor.dim() != expected:
            raise UserError(
                f"the weights in {source} do not fit this network; {official} has shape "
                f"{tuple(tensor.shape)}, expected {expected} axes"
            )
        tensors[ours] = _reshape(official, tensor, 0)
    return tensors


def load_official(model, state_dict):
    """Load official weights into our model, strictly."""
    load_strict(model, from_official(model, state_dict), "the official state dict")


# -------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path):
    """Read weights without running any code from the file.

    Args:
        path: an official `.pth` (a plain state dict), one of our `.safetensors`, or one of our
            `<step>.ckpt` directories, of which the averaged weights, nnet_ema.safetensors, are
            read.

    Returns:
        (nnet, tensors): for ours the `nnet` section of the config.json beside the file, None for an
        official file, whose keywords are not in it; and name -> CPU tensor, official or our names
        as the file has them.

    Raises:
        UserError: missing, truncated, or not a file of plain tensors.
    """
    path = weights_file(path)
    if not path.is_file():
        raise UserError(
            f"checkpoint {path} does not exist; give a <step>.ckpt directory, a .safetensors file "
            "or an official .pth"
        )
    check_manifest(path)
    if path.suffix == ".safetensors":
        beside = path.with_name("config.json")
        config = read_json(beside) if beside.is_file() else None
        nnet = config.get("nnet") if isinstance(config, dict) else None
        return nnet, read_safetensors(path)
    return None, _read_pth(path)


def _read_pth(path):
    state = read_torch(path)
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise UserError(
            f"checkpoint {path} is no plain dict of tensors; export the network's state_dict() and "
            "save that"
        )
    return state


def _check_resizable(tensors, model):
    """UserError unless what is resized has the model's shapes but for the patch's side and the
    grid's: everything else that a file claims there would be multiplied.
    """
    names = ("patch_embed.weight", "head.weight", "head.bias", "pos_embed")
    shapes = [tuple(tensors[name].shape) if name in tensors else () for name in names]
    patch, tokens = shapes[0][-1:], shapes[3][1:2]
    out = model.in_channels * math.prod(patch * 2)
    expected = [
        (model.dim, model.in_channels, *patch, *patch), (out, model.dim), (out,),
        (1, *tokens, model.dim),
    ]  # fmt: skip
    if shapes != expected or math.prod(tokens) <= EXTRA_TOKENS:
        raise UserError(
            f"the weights are of another network: {', '.join(names)} have the shapes {shapes}, "
            f"expected {expected} for any patch and grid"
        )


def resize_state(state_dict, model):
    """Fit DiM weights of another resolution or patch size to `model`, as the official fine-tuning
    does.

    The position table is interpolated (its grid is taken to be square); for another patch size the
    [0, 0] tap of the patch embedding and of the output head are repeated over the new patch (golden
    item 12b). Everything else must fit; UserError where that shows here.

    Args:
        state_dict: official or our names -> tensor.
        model: the DiM to be loaded.

    Returns:
        (our names -> tensor, list of sentences on what changed).
    """
    tensors = dict(from_official(model, state_dict) if is_official(state_dict) else state_dict)
    _check_resizable(tensors, model)
    changes = []
    weight = tensors["patch_embed.weight"]
    if weight.shape[-1] != model.patch_size:
        old, new = weight.shape[-1], model.patch_size
        tensors["patch_embed.weight"] = weight[:, :, :1, :1].repeat(1, 1, new, new)
        for name in ("head.weight", "head.bias"):
            tensors[name] = (
                tensors[name]
                .unflatten(0, (old * old, -1))[:1]
                .repeat(new * new, *[1] * tensors[name].dim())
                .flatten(0, 1)
            )
        changes.append(f"patch size {old} -> {new}: patch_embed and head repeat their [0, 0] tap")
    table = tensors["pos_embed"]
    if table.shape[1] != model.pos_embed.shape[1]:
        side = math.isqrt(table.shape[1] - EXTRA_TOKENS)
        if side**2 + EXTRA_TOKENS != table.shape[1]:
            raise UserError(
                f"the position table has {table.shape[1] - EXTRA_TOKENS} rows, no square grid, so "
                "it cannot be interpolated"
            )
        tensors["pos_embed"] = interpolate_positions(
            table, (side, side), model.native_grid, EXTRA_TOKENS
        )
        changes.append(
            f"pos_embed: {side}x{side} grid interpolated to "
            f"{model.native_grid[0]}x{model.native_grid[1]}"
        )
    return tensors, changes
