"""Each kernel's self-check: at its first use in a process it solves a small random problem, which
must agree with the reference in float64.

A compiler, driver or GPU that computes wrong numbers is found before they reach a model. The result
is not kept on disk: it would have to be distrusted after every change of driver or GPU, and a check
takes some hundredths of a second. The reference runs on the CPU, which owes nothing to the GPU.
"""

import threading

import torch

from utils import UserError

LENGTH = 43  # several tiles and two segments, the last ones incomplete


def random_inputs(shapes, low, dtype, seed=0):
    """name -> random CPU tensor; those named in `low` in the dtype, the others in float32."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    inputs = {k: torch.randn(shape, **options) for k, shape in shapes.items()}
    return {k: x.to(dtype) if k in low else x for k, x in inputs.items()}


def random_order():
    return torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0), device="cpu")


def undisturbed(function, *args):
    """Call it in a thread of its own: outside the caller's autocast, inference mode, autograd and
    stream. Exceptions come through."""
    outcome = []

    def call():
        try:
            outcome.append((function(*args), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def require_agreement(what, gpu, actual, expected, dtype):
    """UserError unless every tensor of `actual` (name -> tensor) is the one of `expected`, to the
    rounding of the dtype."""
    tolerance = max(1e-4, 2 * torch.finfo(dtype).eps)
    for name, x in expected.items():
        error = (actual[name].cpu().double() - x.double()).abs().max() / x.double().abs().max()
        if not error <= tolerance:  # not: a NaN is no agreement
            raise UserError(
                f"the CUDA kernels of {what}, compiled for {gpu.name} (sm_{gpu.arch}), compute "
                f"wrong numbers: {name} is off by {error.item():.2g} of its largest value, "
                f"{tolerance:.2g} is allowed; DIM_BACKEND=reference runs without them; please "
                "report this with the output of `python -m libs.ops`"
            )
