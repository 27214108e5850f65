"""Official configurations and weights <-> ours, exactly, both ways, for DiM and U-ViT."""

import re

import torch

from libs.files import load_strict
from libs.model.dim import DiM
from libs.model.uvit import UViT
from utils import UserError

# ------------------------------------------------------------ configurations

# official key -> our keyword of the same meaning
_DIM_KEYS = {
    "sample_size": "input_size", "in_channels": "in_channels", "num_layers": "depth",
    "num_embeds_ada_norm": "num_classes", "patch_size": "patch_size",
    "scan_pattern_len": "scan_directions", "mlp_time_embed": "mlp_time_embed",
    "drop_path_rate": "drop_path",
}  # fmt: skip
# Keys that select a network: every published one has these values.
_DIM_FIXED = {
    "encoder_start_blk_id": 1, "is_absorb": False, "is_align_exchange_q_kv": False,
    "is_extra_tokens": True, "is_uconnect": True, "mamba_type": "enc", "no_ff": True,
    "norm_type": "ada_norm_single", "pos_encoding_type": "learnable", "rms": True,
    "sub_sequence_schedule": ("reverse_single", "layerwise_cross"), "use_a4m_adapter": True,
    "use_adapter_modules": True, "use_bidirectional_rnn": False, "use_conv1d": True,
    "use_pad_token": True, "is_random_patterns": False, "pattern_type": "base",
}  # fmt: skip
# Keys that are computed with below, and keys that do not reach the network.
_DIM_OTHERS = {
    "attention_head_dim", "num_attention_heads", "mamba_d_state", "mamba_d_conv", "mamba_expand",
    "pad_token_schedules", "is_skip_tune", "skip_tune_param", "is_freeu", "freeu_param",
    "activation_fn", "attention_bias", "kv_as_one_token_idx", "nested_order", "name",
    "norm_elementwise_affine", "num_2d_enc_dec_layers", "sequence_schedule", "multi_times",
    "pretrained_path", "num_patches", "out_channels",
}  # fmt: skip
_UVIT_KEYS = {
    "img_size": "input_size", "in_chans": "in_channels", "embed_dim": "dim", "depth": "depth",
    "num_heads": "heads", "patch_size": "patch_size", "mlp_ratio": "mlp_ratio",
    "qkv_bias": "qkv_bias", "mlp_time_embed": "mlp_time_embed", "conv": "final_conv",
    "use_checkpoint": "activation_checkpointing",
}  # fmt: skip
_UVIT_FIXED = {"skip": True, "qk_scale": None}


def _build(network, kwargs, keys, fixed, others, state_dict, **keywords):
    """The network of `keywords` and of the official `kwargs` that `keys` translates."""
    strange = [
        f"{key}={value!r}"
        for key, value in kwargs.items()
        if key not in {*keys, *fixed, *others} or value != fixed.get(key, value)
    ]
    if strange:
        raise UserError(f"the published networks do not have {', '.join(strange)}")
    keywords |= {ours: kwargs[official] for official, ours in keys.items() if official in kwargs}
    model = network(**keywords)
    if state_dict is not None:
        load_strict(model, from_official(model, state_dict), "the official state dict")
    return model


def model_from_official(nnet_kwargs, state_dict=None):
    """Our DiM from the `nnet` section of an official configuration and, if given, official weights.

    nnet_kwargs: dict, every key of the section. state_dict: official name -> tensor or array,
    loaded strictly. UserError: a key or value that no published network has, or tensors that are
    missing, unexpected or misshapen.
    """
    kwargs = {k: tuple(v) if isinstance(v, list) else v for k, v in nnet_kwargs.items()}
    return _build(
        DiM, kwargs, _DIM_KEYS, _DIM_FIXED, _DIM_OTHERS, state_dict,
        dim=kwargs["attention_head_dim"] * kwargs["num_attention_heads"],
        mamba={key: kwargs[f"mamba_{key}"] for key in ("d_state", "d_conv", "expand")},
        pad_layout=kwargs["pad_token_schedules"][1],
        skip_tuning=kwargs["skip_tune_param"] if kwargs.get("is_skip_tune") else None,
        freeu=kwargs["freeu_param"] if kwargs.get("is_freeu") else None,
    )  # fmt: skip


def uvit_from_official(kwargs, state_dict=None):
    """Our UViT from official U-ViT keywords, and weights, as `model_from_official`."""
    kwargs = {"in_chans": 3, "num_classes": -1, **kwargs}
    # The official num_classes counts the null class too; -1 is a network without labels.
    return _build(
        UViT, kwargs, _UVIT_KEYS, _UVIT_FIXED, {"num_classes", "name"}, state_dict,
        num_classes=max(kwargs["num_classes"] - 1, 0),
    )  # fmt: skip


# ------------------------------------------------------------ names of tensors

_BLOCK, _OFFICIAL = r"blocks\.(\d+)\.", r"transformer_blocks.\1."
_UVIT_BLOCK = r"((?:in|out)_blocks\.\d+|mid_block)\."
# (our name's beginning, a regex; the official one); other names are the same on both sides.
_DIM_NAMES = [
    (r"pos_embed", "additional_embed"),
    (r"patch_embed", "pos_embed.proj"),
    (_BLOCK + r"scale_shift_table", _OFFICIAL + "scale_shift_table"),
    (_BLOCK + r"norm\.weight", _OFFICIAL + "norm1.norm.weight"),
    (_BLOCK + r"mixer\.(A_log|D|in_proj|x_proj|dt_proj|out_proj)", _OFFICIAL + r"attn1.\2"),
    (_BLOCK + r"mixer\.conv_(weight|bias)", _OFFICIAL + r"attn1.conv1d.\2"),
    (_BLOCK + r"skip\.stream", _OFFICIAL + "skip_linear.0"),
    (_BLOCK + r"skip\.skip", _OFFICIAL + "skip_linear.1"),
    (_BLOCK + r"skip\.linear", _OFFICIAL + "skip_linear"),
    (r"norm_out\.weight", "norm_out.norm.weight"),
    (r"modulation\.time_mlp\.0", "adaln_single.emb.timestep_embedder.linear_1"),
    (r"modulation\.time_mlp\.2", "adaln_single.emb.timestep_embedder.linear_2"),
    (r"modulation\.label_embed", "adaln_single.emb.class_embedder.embedding_table"),
    (r"modulation\.linear", "adaln_single.linear"),
    (r"label_embed", "label_emb"),
    (r"split_tokens", "a4m_adapter.pad_token_dec_split"),
    (r"pad_tokens", "a4m_adapter.pad_token"),
    (r"(first|last)_smoother", r"a4m_adapter.\1_smoother"),
    (r"head", "proj_out_2"),
    (r"head_modulation", "proj_out_1"),
]
_UVIT_NAMES = [
    (r"patch_embed", "patch_embed.proj"),
    (r"label_embed", "label_emb"),
    (_UVIT_BLOCK + r"mlp\.0", r"\1.mlp.fc1"),
    (_UVIT_BLOCK + r"mlp\.2", r"\1.mlp.fc2"),
    (_UVIT_BLOCK + r"skip", r"\1.skip_linear"),
    (r"head", "decoder_pred"),
    (r"final_conv", "final_layer"),
]
# Tensors that the two sides hold in another shape: end of the official name -> (to ours, back).
_RESHAPED = {
    "attn1.conv1d.weight": (lambda w: w.squeeze(1), lambda w: w[:, None]),
    "a4m_adapter.pad_token_dec_split": (lambda w: w.squeeze(0), lambda w: w[None]),
    "a4m_adapter.pad_token": (lambda w: w.squeeze(0).mT, lambda w: w.mT[None]),
}


def _pair_names(model):
    """{official name: our name} of every tensor."""
    rules, names = _UVIT_NAMES if isinstance(model, UViT) else _DIM_NAMES, {}
    for ours in model.state_dict():
        official = ours
        for pattern, replacement in rules:
            if match := re.match(rf"{pattern}(?=\.|$)", ours):
                official = match.expand(replacement) + ours[match.end() :]
        names[official] = ours
    return names


def _reshape(official, tensor, direction):
    for end, functions in _RESHAPED.items():
        if official.endswith(end):
            return functions[direction](tensor)
    return tensor


def to_official(model):
    """The weights of a DiM or UViT under the official names and shapes: dict of name -> tensor.
    Official names know the Mamba mixer; tensors of another keep their own.
    """
    state, names = model.state_dict(), _pair_names(model)
    return {name: _reshape(name, state[ours], 1).contiguous() for name, ours in names.items()}


def from_official(model, state_dict):
    """Our names and shapes from official ones: dict of name -> tensor; other names stay."""
    names, tensors = _pair_names(model), dict(state_dict)
    for official in [name for name in names if name in state_dict]:
        tensors[names[official]] = _reshape(official, torch.as_tensor(tensors.pop(official)), 0)
    return tensors
