"""Inputs of the operators, and how far a result is from float64."""

import functools

import torch

from libs.model.block import Block, Modulation
from libs.model.mamba import Mamba
from libs.ops import selective_scan
from libs.ops.reference import selective_scan_ref

# Oracle: error(kernel, float64) <= 2 error(reference in the same dtypes, float64) + FLOOR, errors
# relative to the tensor's largest value. The floor is two units in the last place of float32, for
# tensors in which the reference happens to round well.
FLOOR = 2.0**-22

scan = functools.partial(selective_scan, delta_softplus=True)
scan_ref = functools.partial(selective_scan_ref, delta_softplus=True)


def scan_inputs(B=2, L=19, D=5, N=16, absent=(), seed=0):
    """float32 inputs like those of a network: decays between 0 and 1 over a wide range."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "u": normal(B, L, D),
        "delta": normal(B, L, D) - 1,
        "A": -torch.exp(normal(D, N)),
        "B": normal(B, L, N),
        "C": normal(B, L, N),
        "D": normal(D),
        "z": normal(B, L, D),
        "delta_bias": 0.3 * normal(D),
    }
    return {name: x for name, x in inputs.items() if name not in absent}


def conv_inputs(B=2, L=19, D=5, W=3, absent=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = {
        "x": torch.randn(B, L, D, generator=generator),
        "weight": torch.randn(D, W, generator=generator),
        "bias": torch.randn(D, generator=generator),
    }
    return {name: x for name, x in inputs.items() if name not in absent}


def adaln_inputs(gate, B=2, L=7, dim=8, seed=0):
    """Of gated_residual or of modulated_norm, in the order of their arguments."""
    generator = torch.Generator().manual_seed(seed)
    sequence, parameters = (B, L, dim), {"modulation": (B, 3, dim), "table": (3, dim)}
    own = {"branch": sequence} if gate else {"weight": (dim,)}
    shapes = {"x": sequence, **own, **parameters}
    return {k: torch.randn(shape, generator=generator) for k, shape in shapes.items()}


def on(device, inputs, dtype=None):
    """On the device; what the network has in half precision, in `dtype`."""
    kept = ("A", "D", "delta_bias", "weight", "bias", "modulation", "table")
    return {
        k: x.to(device) if k in kept or dtype is None else x.to(device, dtype)
        for k, x in inputs.items()
    }


def make_block(dim, rounds=False):
    torch.manual_seed(0)
    return Block(dim, lambda: Mamba(dim), has_skip=False, half_output=rounds)


def around(block, modulation):
    return Modulation(modulation, block.scale_shift_table, block.norm.weight, False)


def make_order(kind, length):
    if kind == "permuted":
        return torch.randperm(length, generator=torch.Generator().manual_seed(length)).to(
            torch.int32
        )
    return {"none": None, "reversed": torch.arange(length).flip(0)}[kind]


def run(function, inputs, dtype=None, **options):
    """Outputs and the gradient of every input, for fixed random output gradients: the same numbers
    for every dtype, those that bfloat16 has."""
    inputs = {k: x.detach().to(dtype or x.dtype).requires_grad_() for k, x in inputs.items()}
    outputs = function(**inputs, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    g = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(inputs.values()), g)
    results = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return results | {f"gradient of {k}": x for k, x in zip(inputs, gradients, strict=True)}


def error(actual, exact):
    return ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()


def check_oracle(operator, reference, inputs, backend, floor=FLOOR, **options):
    exact = run(reference, inputs, torch.float64, **options)
    plain = run(reference, inputs, **options)
    actual = run(operator, inputs, backend=backend, **options)
    for name in exact:
        assert actual[name].dtype == plain[name].dtype, name
        found, allowed = error(actual[name], exact[name]), error(plain[name], exact[name])
        assert found <= 2 * allowed + floor, f"{name}: {found:.3g}, reference {allowed:.3g}"
