"""Every kernel of the shipped configs against the operators' definition, on small random problems.

It runs at the first use of a dtype on a GPU, driver, compiler and csrc/; what passed is noted in
the cache's directory. A compiler, driver or GPU that computes wrong numbers is found before they
reach a model. The definition runs in float64 on the CPU, which owes nothing to the GPU.
"""

import hashlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from libs.ops import reference
from libs.ops.cuda import adaln, causal_conv1d, compiler, fp8, launch, launch_plan, selective_scan
from libs.ops.cuda.prebuild import OLDEST_FUSED, kernels_of_configs, streams
from utils import UserError

BATCH, LENGTH, CHANNELS = 2, 43, 72  # several tiles and two segments, the last ones incomplete
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _random(seed, dtype, *shapes):
    """Random CPU tensors of these shapes."""
    rng = torch.Generator().manual_seed(seed)
    options = {"generator": rng, "dtype": torch.float32, "device": "cpu"}
    return [torch.randn(shape, **options).to(dtype) for shape in shapes]


def _exact(tensors):
    return [x.double().requires_grad_() for x in tensors]


def _gradients(outputs, inputs, g):
    return torch.autograd.grad(outputs, inputs, [x.double() for x in g])


def _order():
    return torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0), device="cpu")


def check_scan(gpu, dtype):
    sequence, outer = (BATCH, LENGTH, CHANNELS), (BATCH, LENGTH, 16)
    u, delta, z, g_y, B, C = _random(0, dtype, *[sequence] * 4, outer, outer)
    shapes = (CHANNELS, 16), CHANNELS, CHANNELS, (BATCH, CHANNELS, 16)
    A, D, bias, g_state = _random(1, torch.float32, *shapes)
    order, tensors = _order(), (u, delta, -A.exp(), B, C, D, z, bias)
    exact = _exact(tensors)
    outputs = reference.selective_scan_ref(*exact, True, order, True)
    g_u, g_delta, g_A, g_B, g_C, *rest = _gradients(outputs, exact, (g_y, g_state))
    g_D, g_z, g_bias = rest
    gradients = g_u, g_delta, g_A, torch.stack([g_B, g_C]), g_D, g_z, g_bias
    x = selective_scan.Inputs(*(t.to(gpu.device) for t in (*tensors, order)), True)
    shape = (*sequence, 16, launch.spell_dtype(dtype), gpu.multiprocessors)

    def prepare(plan_of, variant, **options):
        plan = plan_of(*shape, variant=variant, **options)
        return launch.prepare(plan, launch_plan.ScanParams, gpu.index)

    in_segments = launch_plan.ONE_THREAD._replace(segments=2)
    lanes = launch_plan.FOUR_LANES, launch_plan.EIGHT_LANES
    for variant in (launch_plan.ONE_THREAD, in_segments, *lanes):
        prepared = prepare(launch_plan.scan_forward, variant)
        yield f"scan {variant}", selective_scan.run_forward(prepared, x, True), outputs
    for output, segments in itertools.product((False, True), (1, 2)):
        if output and gpu.arch < OLDEST_FUSED:
            continue
        variant = launch_plan.backward_variant(*shape)._replace(segments=segments)
        prepared, y = prepare(launch_plan.scan_backward, variant, output=output), x.u.clone()
        g = selective_scan.run_backward(
            prepared, g_y.to(x.u), g_state.to(x.A), x, y=y if output else None
        )
        again = ((y,), outputs[:1]) if output else ((), ())
        yield f"scan's gradients {variant}", (*g, *again[0]), (*gradients, *again[1])


def check_convolution(gpu, dtype):
    x, g_y = _random(0, dtype, *[(BATCH, LENGTH, CHANNELS)] * 2)
    tensors = (x, *_random(1, torch.float32, (CHANNELS, 3), CHANNELS))
    order, exact = _order(), _exact(tensors)
    y = reference.causal_conv1d_ref(*exact, "silu", order)
    inputs = *(t.to(gpu.device) for t in (*tensors, order)), True
    yield "convolution", (causal_conv1d.forward(*inputs),), (y,)
    g = causal_conv1d.backward(g_y.to(gpu.device), *inputs)
    yield "convolution's gradients", g, _gradients(y, exact, (g_y,))


def check_adaln(gpu, dtype):
    sequence, shapes = (BATCH, LENGTH, CHANNELS), ((BATCH, 3, CHANNELS), (3, CHANNELS), CHANNELS)
    parameters = _random(0, torch.float32, *shapes, BATCH)
    at = adaln.Adaln(*(t.to(gpu.device) for t in parameters))
    for x_dtype, out_dtype in streams(launch.spell_dtype(dtype)):
        x_dtype, out_dtype = DTYPES[x_dtype], DTYPES[out_dtype]
        (x,), (branch, g_n, g_rounded), (g_out,) = (
            _random(seed, kind, *[sequence] * count)
            for seed, kind, count in ((1, x_dtype, 1), (2, dtype, 3), (3, out_dtype, 1))
        )
        g_rounded *= x_dtype != dtype  # else x is not rounded
        exact = _exact((x, branch, *parameters))
        n = reference.modulated_norm_ref(exact[0], exact[4], exact[2], exact[3])
        out = reference.gated_residual_ref(*exact[:4], exact[5])
        g = _gradients((n, out, exact[0]), exact[:5], (g_n, g_out, g_rounded))
        tensors = x, branch, g_n, g_out, g_rounded
        x, branch, g_n, g_out, g_rounded = (t.to(gpu.device) for t in tensors)
        rounded = x if x_dtype == dtype else torch.empty_like(branch)
        yield "norm", (adaln.norm(x, at, dtype, rounded), rounded), (n, exact[0])
        yield "gate", (adaln.gate(x, branch, at, out_dtype),), (out,)
        g_branch, g_factor = adaln.gate_backward(g_out, branch, at)
        for kept in (rounded, x) if out_dtype == dtype else (rounded,):  # x: without a fused block
            again = torch.empty_like(g_n)
            g_x, g_shift, g_gain = adaln.norm_backward(
                g_n, g_out, kept, at, again, x_dtype, g_rounded
            )
            g_parameters = adaln.modulation_backward(g_shift, g_gain, g_factor, at)
            yield "gradients of norm and gate", (g_x, g_branch, *g_parameters, again), (*g, n)


def check_fp8(gpu, dtype):
    if gpu.arch < fp8.OLDEST_ARCH or dtype == torch.float32:
        return
    for columns in fp8.COLUMNS:
        (x,) = _random(0, dtype, (19, columns))
        expected8, expected = fp8.quantize_rows_ref(x)
        for parts in ((x,), x.chunk(2, 1)):
            x8, scale = fp8.quantize_rows(*(part.to(gpu.device) for part in parts))
            # At most half a unit of e4m3's last place apart, where a division rounds elsewhere.
            yield "quantize_rows", (x8.float() * scale,), (expected8.float() * expected,), fp8.E4M3
    (x,) = _random(0, dtype, (80, 112))
    scale = x.float().abs().amax() / 448.0
    actual = fp8.quantize_transposed(x.to(gpu.device), scale.to(gpu.device))
    expected = (x.float() / scale).to(fp8.E4M3).t()
    yield "quantize_transposed", (actual.float(),), (expected.float(),), fp8.E4M3


def worst_errors(gpu, dtype):
    """Runs every kernel of the dtype; (what, largest error relative to the largest value, what is
    allowed) of each problem."""
    for problems in (check_scan, check_convolution, check_adaln, check_fp8):
        for what, actual, expected, *rounding in problems(gpu, dtype):
            allowed = max(1e-4, 2 * torch.finfo(*rounding or (dtype,)).eps)
            errors = [
                (a.cpu().double() - e.double()).abs().max() / e.double().abs().max()
                for a, e in zip(actual, expected, strict=True)
            ]
            yield what, torch.stack(errors).max().item(), allowed


def check(gpu, dtype):
    """Lines for people; UserError if a kernel computes wrong numbers."""
    gpu.checked.add(dtype)  # the problems use the kernels as a model does
    kernels = kernels_of_configs(launch.spell_dtype(dtype), gpu.arch)
    compiler.compile_all(kernels, gpu.arch)
    lines = []
    with torch.cuda.device(gpu.index):
        for what, error, allowed in worst_errors(gpu, dtype):
            if not error <= allowed:  # not: a NaN is no agreement
                raise UserError(
                    f"the CUDA kernels compute wrong numbers on {gpu.name} (sm_{gpu.arch}): {what} "
                    f"in {dtype} is off by {error:.2g} of its largest value, {allowed:.2g} is "
                    "allowed; DIM_BACKEND=reference runs without them; please report this"
                )
            lines.append(f"{what}: {error:.2g} of {allowed:.2g}")
    return lines


def driver_version():
    module = Path("/proc/driver/nvidia/version")
    return module.read_text() if module.exists() else launch.driver().cuDriverGetVersion()


def note(gpu, dtype):
    """The file that says that this dtype's kernels passed on this GPU with this software."""
    facts = (str(gpu), driver_version(), compiler.digest("*.cu*"), dtype)
    name = hashlib.sha256(repr(facts).encode()).hexdigest()
    return compiler.cache_directory() / "checked" / name


def require_checked(gpu, dtype):
    """UserError unless the kernels of this dtype pass, now or as noted earlier."""
    path = note(gpu, dtype)
    if path.exists():
        gpu.checked.add(dtype)
        return
    try:
        launch.refuse_capture()
        # In a thread of its own: outside the caller's autocast, inference mode and stream.
        with ThreadPoolExecutor(1) as thread:
            lines = thread.submit(check, gpu, dtype).result()
    except BaseException:
        gpu.checked.discard(dtype)
        raise
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        compiler.warn_of_cache(error.strerror)
