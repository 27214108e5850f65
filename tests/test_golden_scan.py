"""Selective scan against the official code's numbers: output, last state and every gradient."""

import golden_cases
import pytest
import torch

from libs.ops import selective_scan

# The golden README's thresholds, relative to the largest value: room for another order of
# summation.
TOLERANCE = {"out": 1e-6, "last_state": 3e-6, "grad": 1e-5}
TOLERANCE_FLOAT64 = {"out": 1e-12, "last_state": 1e-12, "grad": 1e-12}
SEQUENCES = (
    "u",
    "delta",
    "z",
    "B",
    "C",
)  # stored (B, D, L) and (B, N, L), ours (B, L, D) and (B, L, N)


def to_ours(name, array):
    x = torch.from_numpy(array)
    return x.mT if name in SEQUENCES or name == "out" else x


def load_inputs(case, arrays, dtype, device):
    names = [
        n for n in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if n not in case["absent"]
    ]
    return {n: to_ours(n, arrays[n]).to(device, dtype).requires_grad_() for n in names}


def check(case, arrays, dtype, backend, suffix, tolerance):
    device = "cuda" if backend == "cuda" else "cpu"
    inputs = load_inputs(case, arrays, dtype, device)
    y, last_state = selective_scan(
        **inputs, delta_softplus=case["delta_softplus"], return_last_state=True, backend=backend
    )
    golden_cases.assert_close(y, to_ours("out", arrays["out" + suffix]), tolerance["out"], "out")
    golden_cases.assert_close(
        last_state, arrays["last_state" + suffix], tolerance["last_state"], "last_state"
    )
    g = to_ours("out", arrays["g"]).to(device, dtype)
    gradients = torch.autograd.grad(y, list(inputs.values()), g)
    for name, gradient in zip(inputs, gradients, strict=True):
        expected = to_ours(name, arrays[f"grad{suffix}/{name}"])
        golden_cases.assert_close(gradient, expected, tolerance["grad"], f"gradient of {name}")


@pytest.mark.parametrize(
    "backend", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
)
@pytest.mark.parametrize("case, arrays", golden_cases.params("selective_scan"))
def test_float32(case, arrays, backend):
    check(case, arrays, torch.float32, backend, "", TOLERANCE)


@pytest.mark.parametrize("case, arrays", golden_cases.params("selective_scan"))
def test_float64(case, arrays):
    check(case, arrays, torch.float64, "reference", "64", TOLERANCE_FLOAT64)
