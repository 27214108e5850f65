"""The backbone, U-ViT, scan orders, positions and checkpoint loading against the numbers of the
official code.
"""

import importlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_close, det_weights, params

from libs.files import load_strict
from libs.model import layers, scan_order
from libs.model.build import build_model, resize_state
from libs.model.published import from_official, model_from_official, to_official, uvit_from_official
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent

# Tolerances of the golden README, relative to the largest value: room for another summation order,
# well below known mistakes.
OUTPUT, GRADIENT, UVIT, SUMMARY = 3e-5, 2e-4, 1e-5, 1e-3


def official_state(case, key="state_dict"):
    state = det_weights().det_state(case[key], case["weight_seed"])
    return {name: torch.from_numpy(array) for name, array in state.items()}


def run_call(model, call, arrays):
    """(x, output) on the model's device."""
    device = next(model.parameters()).device
    x, t, y = (None if call[k] is None else torch.from_numpy(arrays[call[k]]).to(device)
               for k in "xty")  # fmt: skip
    return x.requires_grad_(), model(x, t, y)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request, monkeypatch):
    """On the GPU, where the blocks are fused, without TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.mark.parametrize("case, arrays", params("dim_backbone"))
def test_outputs(case, arrays, device):
    model = model_from_official(case["nnet_kwargs"], official_state(case)).eval().to(device)
    for call in case["calls"]:
        with torch.no_grad():
            _, out = run_call(model, call, arrays)
        assert_close(out.cpu(), arrays[call["out"]], OUTPUT, call["out"])


@pytest.mark.parametrize("case, arrays", params("dim_backbone"))
def test_gradients(case, arrays, device):
    if "gradients" not in case:
        pytest.skip("this case has no gradients")
    model = model_from_official(case["nnet_kwargs"], official_state(case)).to(device).train()
    grads = case["gradients"]
    x, out = run_call(model, case["calls"][grads["call"]], arrays)
    g = torch.from_numpy(det_weights().det_input("g", tuple(out.shape), case["weight_seed"]))
    loss = (out * g.to(device)).sum()
    assert loss.item() == pytest.approx(
        grads["loss_value"], rel=GRADIENT, abs=GRADIENT * out.detach().norm().item()
    )
    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that the gradients get the official names and shapes
    found = dict(to_official(model.cpu()), x=x.grad.cpu())
    for name in grads["of"]:
        summary, grad = grads["summary"][name], found[name].double()
        assert list(grad.shape) == summary["shape"], name
        assert grad.norm().item() == pytest.approx(summary["l2"], rel=SUMMARY), name
        assert grad.abs().max().item() == pytest.approx(summary["max_abs"], rel=SUMMARY), name
        assert grad.sum().item() == pytest.approx(
            summary["sum"], abs=SUMMARY * summary["l2"] * grad.numel() ** 0.5
        ), name
        stored = torch.from_numpy(arrays["grad/" + name])
        part = grad[tuple(slice(n) for n in stored.shape)]  # of some only the first entries
        assert_close(part, stored, GRADIENT, "gradient of " + name)


@pytest.mark.parametrize("case, arrays", params("dim_backbone"))
def test_intermediates(case, arrays):
    if "intermediates" not in case:
        pytest.skip("this case has no intermediates")
    model = model_from_official(case["nnet_kwargs"], official_state(case)).eval()
    seen = {}

    def record(name, module):
        module.register_forward_hook(
            lambda _, inputs, output: seen.update({name + "/in": inputs, name + "/out": output})
        )

    for name in ("patch_embed", "modulation", "first_smoother", "last_smoother", "head_modulation"):
        record(name, getattr(model, name))
    record("head", model.head)
    record("modulation_linear", model.modulation.linear)
    for k, block in enumerate(model.blocks):
        record(f"block{k}", block)
        if block.skip is not None:
            record(f"skip{k}", block.skip)
    call = case["calls"][case["intermediates"]["call"]]
    with torch.no_grad():
        x, _ = run_call(model, call, arrays)
    _, grid = layers.fit_patches(x.shape[2:], model.patch_size)

    def tokens(image):
        return image.flatten(2).transpose(1, 2)

    def expect(actual, name):
        assert_close(actual, arrays["inter/" + name], OUTPUT, name)

    expect(seen["patch_embed/out"].flatten(1, 2), "patch_embed")
    expect(seen["modulation/out"].flatten(1), "adaln_modulation")
    embedding = F.silu(torch.from_numpy(arrays["inter/adaln_embedding"]))
    assert_close(seen["modulation_linear/in"][0], embedding, OUTPUT, "adaln_embedding")
    before = torch.from_numpy(arrays["inter/tokens_before_prepare"])
    assert_close(
        tokens(seen["first_smoother/in"][0]), before[:, 2:], OUTPUT, "image tokens before padding"
    )
    assert_close(seen["block0/in"][0][:, :2], before[:, :2], OUTPUT, "extra tokens before padding")
    expect(seen["block0/in"][0], "tokens_after_prepare")
    front = 2 + model.pad
    for k in case["intermediates"]["blocks"]:
        order = scan_order.sequence_order(
            model.patterns[k], *grid, model.pad, front, torch.device("cpu")
        )
        along = slice(None) if order is None else order
        residual = torch.from_numpy(arrays[f"inter/block{k}_residual"])
        stream = torch.from_numpy(arrays[f"inter/block{k}_branch"]) + residual
        assert_close(seen[f"block{k}/out"][0][:, along], stream, OUTPUT, f"stream after block {k}")
        if f"skip{k}/out" in seen:
            assert_close(
                seen[f"skip{k}/out"][:, along], residual, OUTPUT, f"skip projection of block {k}"
            )
    expect(tokens(seen["last_smoother/out"]), "tokens_after_finalize")
    expect(seen["head_modulation/out"], "final_shift_scale")
    shift, scale = seen["head_modulation/out"][:, None].chunk(2, dim=-1)
    normed = torch.from_numpy(arrays["inter/norm_out"]) * (1 + scale) + shift
    assert_close(seen["head/in"][0], normed, OUTPUT, "norm_out, scaled and shifted")


def list_shapes(state):
    return sorted([name, list(tensor.shape)] for name, tensor in state.items())


@pytest.mark.parametrize("case, arrays", params("dim_backbone"))
def test_round_trip(case, arrays):
    """Official -> ours -> official gives every tensor back."""
    state = official_state(case)
    back = to_official(model_from_official(case["nnet_kwargs"], state))
    assert list_shapes(back) == sorted(case["state_dict"])
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(UserError, match="do not have is_absorb=True, width=8"):
        model_from_official({**case["nnet_kwargs"], "is_absorb": True, "width": 8})


@pytest.mark.parametrize("case, arrays", params("state_dict_shapes"))
def test_full_size_names_and_shapes(case, arrays):
    """The published models at full size, on the meta device: names, shapes, parameter count."""
    if "nnet_kwargs" not in case:
        pytest.skip("not a backbone")
    build = uvit_from_official if case["nnet_kwargs"].get("name") == "uvit" else model_from_official
    with torch.device("meta"):
        model = build(case["nnet_kwargs"])
    assert list_shapes(to_official(model)) == sorted(case["state_dict"])
    assert sum(parameter.numel() for parameter in model.parameters()) == case["n_params"]


@pytest.mark.parametrize("case, arrays", params("state_dict_shapes"))
def test_the_configs_are_the_published_networks(case, arrays):
    """Our config of the same name, at full size on the meta device, has the official names, shapes
    and latents.
    """
    name = Path(case.get("official_config", "")).stem
    if not (ROOT / "configs" / f"{name}.py").is_file():
        pytest.skip(f"{name or 'the autoencoder'} is no config of ours")
    config = importlib.import_module(f"configs.{name}").get_config()
    with torch.device("meta"):
        model = build_model(config.nnet)
    assert list_shapes(to_official(model)) == sorted(case["state_dict"])
    theirs = case.get("other_config_values")
    if theirs and name.startswith("imagenet"):
        assert list(config.z_shape) == theirs["z_shape"]
        assert config.optimizer.betas == tuple(theirs["optimizer"]["betas"])
        for section, keys in {
            "train": ["batch_size", "n_steps", "mode"], "sample": ["scale", "sample_steps", "cfg"],
            "optimizer": ["lr", "weight_decay", "eps"], "dataset": ["p_uncond", "name", "cfg"],
            "lr_scheduler": ["warmup_steps"],
        }.items():  # fmt: skip
            for key in keys:
                if not (name.startswith("imagenet512_H_DiM_upsample") and section != "sample"):
                    assert config[section][key] == theirs[section][key], f"{section}.{key}"


@pytest.mark.parametrize("case, arrays", params("uvit"))
def test_uvit(case, arrays):
    state = official_state(case)
    model = uvit_from_official(case["kwargs"], state).eval()
    assert list_shapes(to_official(model)) == sorted(case["state_dict"])
    for call in case["calls"]:
        with torch.no_grad():
            _, out = run_call(model, call, arrays)
        assert_close(out, arrays[call["out"]], UVIT, call["out"])


@pytest.mark.parametrize("case, arrays", params("scan_patterns"))
def test_scan_patterns(case, arrays):
    depth, directions = case["num_layers"], case["scan_pattern_len"]
    patterns = scan_order.block_patterns(depth, directions)
    assert [list(pair) for pair in itertools.pairwise((0, *patterns))] == case["scan_pattern_chain"]
    pad, height, width = case["pad_token_len"], case["H"], case["W"]
    orders = np.stack(
        [scan_order.grid_order(p, height + pad, width + pad).numpy() for p in patterns]
    )
    np.testing.assert_array_equal(orders, arrays["absolute_patterns"])
    np.testing.assert_array_equal(orders, arrays["runtime_order"])
    for layout in scan_order.PAD_LAYOUTS:
        index = scan_order.pad_index(layout, height, width, pad, "cpu").flatten()
        np.testing.assert_array_equal(
            (index < 0).nonzero()[:, 0], arrays["x_seq_position_with_img_arrange"]
        )
        np.testing.assert_array_equal((index >= 0).nonzero()[:, 0], arrays["pad_indices"])
    for name, chain in case["other_chains"].items():
        layers_, length = name.removeprefix("layers").split("_scan_pattern_len")
        patterns = scan_order.block_patterns(int(layers_), int(length))
        assert [list(pair) for pair in itertools.pairwise((0, *patterns))] == chain, name


@pytest.mark.parametrize("case, arrays", params("pos_embed_interpolation"))
def test_position_interpolation(case, arrays):
    extra = case["extra_len"]
    for name in arrays:
        if name.startswith("out_"):
            source, target = name.removeprefix("out_").split("_to_")
            native, grid = (
                tuple(int(side) for side in size.split("x")) for size in (source, target)
            )
            resized = layers.interpolate_positions(
                torch.from_numpy(arrays["in_" + source]), native, grid, extra
            )
            assert_close(resized, arrays[name], 1e-6, name)


@pytest.mark.parametrize("case, arrays", params("load_pretrained_model"))
def test_weights_of_another_resolution(case, arrays):
    """Official weights of one resolution in the network of another: only what the official loader
    changes, changes.
    """
    model = model_from_official(case["dst_nnet_kwargs"]).eval()
    source = official_state(case, "src_state_dict")
    tensors, _ = resize_state(from_official(model, source), model)
    load_strict(model, tensors, "the source")
    after = to_official(model)
    assert list_shapes(after) == sorted(case["dst_state_dict"])
    for name, tensor in after.items():
        if name in case["changed"]:
            assert_close(tensor, arrays["after/" + name], 1e-6, name)
        else:
            assert torch.equal(tensor, source[name]), name
    for call in case["calls"]:
        with torch.no_grad():
            _, out = run_call(model, call, arrays)
        assert_close(out, arrays[call["out"]], OUTPUT, call["out"])


@pytest.mark.parametrize("case, arrays", params("det_weights_selftest"))
def test_the_fixtures_weights_are_what_they_were(case, arrays):
    """If this fails, numpy draws other numbers here and no other golden test means anything."""
    for row in case["rows"]:
        drawn = getattr(det_weights(), row["fn"])(
            row["name"], tuple(row["shape"]), seed=row["seed"]
        )
        assert det_weights().fingerprint(drawn) == row["sha256"], row["name"]
