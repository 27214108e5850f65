"""Frozen outputs of our own, for clones without the golden fixtures.

The numbers in data/regression.npz were written when every golden case passed. Where a golden case
proves the numbers of a network wrong, they alone are written again, by
`PYTHONPATH=. python tests/test_regression.py NETWORK`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fixed_weights import fill, with_fixed_weights
from gaussian import training_loss

from configs.common import d
from libs.diffusion import ImageNoise, make_guided, sample
from libs.model.dim import DiM
from libs.model.uvit import UViT
from sde import VPSDE, DiscreteSchedule

DATA = Path(__file__).resolve().parent / "data" / "regression.npz"
TOLERANCE = 3e-5  # of the largest value, as for the golden outputs

SMALL = dict(input_size=8, in_channels=4, dim=32, depth=5, num_classes=10)
NETWORKS = {
    "lateral": (DiM, SMALL, (8, 8)),
    "rho_pad": (DiM, dict(SMALL, pad_layout="rho_pad"), (8, 8)),
    "other_grid": (DiM, SMALL, (12, 6)),
    "two_skip_linears": (DiM, dict(SMALL, dim=520, depth=3), (8, 8)),
    "options": (
        DiM,
        dict(
            SMALL, depth=7, mlp_time_embed=True, skip_tuning=(0.8, 1.0, None),
            freeu=(0.2, 0.1, 1.1, 1.2), scan_directions=2,
        ),
        (8, 8),
    ),
    "mixer": (DiM, dict(SMALL, patch_size=4, mamba=dict(d_state=5, d_conv=2, expand=3)), (8, 8)),
    "uvit": (UViT, dict(SMALL, depth=4, heads=4), (8, 8)),
}  # fmt: skip


def network_outputs(name):
    """Output and gradients of one network, the latter by three parameters."""
    kind, keywords, size = NETWORKS[name]
    model = with_fixed_weights(kind(**keywords))
    x = fill("x", (2, 4, *size), 2.0).requires_grad_()
    out = model(x, torch.tensor([17.5, 803.0]), torch.tensor([3, 10]))
    (out * fill("g", tuple(out.shape))).sum().backward()
    found = {f"{name}/out": out, f"{name}/grad_x": x.grad, f"{name}/grad_pos": model.pos_embed.grad}
    if kind is DiM:
        found[f"{name}/grad_A_log"] = model.blocks[1].mixer.A_log.grad
        found[f"{name}/grad_pads"] = model.pad_tokens.grad
    return found


def diffusion_outputs():
    """Losses and whole sampling runs of a small network."""
    model = with_fixed_weights(DiM(**SMALL)).eval()
    x0, eps, y = fill("x0", (2, 4, 8, 8)), fill("eps", (2, 4, 8, 8), 1.7), torch.tensor([1, 2])
    found = {}
    for process in (VPSDE(), DiscreteSchedule()):
        u = torch.tensor([0.3, 0.9])
        name = type(process).__name__
        for pred in ("noise_pred", "x0_pred"):
            found[f"{name}/{pred}"] = training_loss(model, process, x0, y, pred=pred, u=u, eps=eps)
        output = make_guided(
            model, process, y, pred="noise_pred", null_label=10, settings=d(cfg=False)
        )
        euler = ["euler_maruyama_sde"] if isinstance(process, VPSDE) else []
        for algorithm in ("dpm_solver", "dpm_solver_pp_2m", *euler):
            noise = ImageNoise(0, [0, 1], (4, 8, 8))
            z_T = noise.draw()
            options = dict(pred="noise_pred", algorithm=algorithm, steps=6, noise=noise)
            z = sample(output, process, z_T, **options)
            found[f"{name}/{algorithm}"] = z
    return found


def compare(found):
    with np.load(DATA, allow_pickle=False) as stored:
        for name, tensor in found.items():
            expected, actual = stored[name], tensor.detach().numpy()
            assert actual.shape == expected.shape, name
            error = np.abs(actual - expected).max() / np.abs(expected).max()
            assert error <= (TOLERANCE if "grad" not in name else 2e-4), f"{name}: {error:.2g}"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    compare(network_outputs(name))


def test_losses_and_samplers():
    with torch.no_grad():
        compare(diffusion_outputs())


if __name__ == "__main__":
    with np.load(DATA, allow_pickle=False) as stored:
        arrays = dict(stored)
    for name in sys.argv[1:]:
        found = network_outputs(name)
        arrays.update({key: tensor.detach().numpy() for key, tensor in found.items()})
    np.savez_compressed(DATA, **arrays)
