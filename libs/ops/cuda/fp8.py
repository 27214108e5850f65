"""Matrix products in fp8 (e4m3, Micikevicius et al., arXiv 2209.05433), by torch's scaled product:
an option for the blocks' in_proj, out_proj and skip projections (DiM.use_fp8).

Every row of both factors (backwards, the whole weight) is scaled by its largest value at every
call. The gradients of weights, sums over all tokens, take one scale for each of their factors, the
largest of its rows'. Needs a GPU of compute capability 9.0 or newer.
"""

import torch

from libs.ops.cuda import launch
from libs.ops.cuda.launch_plan import CTYPES, Launch, Plan, find_slots, make_kernel
from utils import UserError

E4M3 = torch.float8_e4m3fn

_THREADS = 256
# (vectors of 8 elements that a lane of the kernel holds, warps that share a row)
_SHAPES = ((2, 1), (4, 1), (6, 1), (4, 2), (6, 2), (4, 4), (6, 4), (4, 8))
COLUMNS = tuple(256 * vectors * warps for vectors, warps in _SHAPES)  # up to which each goes
OLDEST_ARCH = 90  # that torch's product of rows with scales runs on
# Multiples as torch's products want, up to the kernel's; DiM-S, 512 wide, is slower in fp8.
WIDTHS = range(1024, COLUMNS[-1] + 1, 16)

QuantizeParams = find_slots("rows columns split", "x more", "out scale")  # more may be absent


def plan_rows(rows, columns, dtype, multiprocessors):
    vectors, warps = next(s for s in _SHAPES if columns <= 256 * s[0] * s[1])
    kernel = make_kernel(
        "fp8/quantize_rows.cu", "quantize_rows", kInput=CTYPES[dtype], kVectors=vectors,
        kWarps=warps,
    )  # fmt: skip
    blocks = -(-rows * warps // (_THREADS // 32))
    return Plan((Launch(kernel, (blocks, 1, 1), (_THREADS, 1, 1)),))


def plan_transposed(rows, columns, dtype, multiprocessors):
    kernel = make_kernel("fp8/quantize_transposed.cu", "quantize_transposed", kInput=CTYPES[dtype])
    return Plan((Launch(kernel, (-(-columns // 128), -(-rows // 128), 1), (128, 1, 1)),))


def require_fp8(device, widths):
    """UserError where products of these widths cannot run in fp8."""
    device, odd = torch.device(device), [width for width in widths if width not in WIDTHS]
    oldest, reason = divmod(OLDEST_ARCH, 10), None
    if device.type != "cuda":
        reason = f"it needs a GPU, not {device.type}"
    elif (found := torch.cuda.get_device_capability(device)) < oldest:
        reason = f"it needs compute capability 9.0 (Hopper), not {'.'.join(map(str, found))}"
    elif odd:
        reason = (
            f"widths must be multiples of 16 from {WIDTHS[0]} to {WIDTHS[-1]}, not {odd[0]} "
            "(narrow products are slower in fp8 than in bf16)"
        )
    if reason:
        keys = "--config.sample.fp8=False, or train.fp8 in training, does without"
        raise UserError(f"matrix products in fp8 are asked for, but {reason}; {keys}")


def turn_on_fp8(network, dtype, key):
    """Products of the network in fp8 from now on, as the config's `key` asks. dtype: autocast's, or
    None. UserError where that cannot be."""
    if not hasattr(network, "use_fp8"):
        raise UserError(f"{key} is for DiM, not for {type(network).__name__}: leave it out")
    if dtype is None:
        raise UserError(
            f"{key} replaces products in half precision: add --config.train.mixed_precision=bf16, "
            f"or --config.{key}=False"
        )
    network.use_fp8(next(network.parameters()).device)


def quantize_rows_ref(x):
    """(x8, scale) of x (M, K): e4m3 numbers (M, K) and scales (M, 1), x ~ x8 scale. Rows of zeros
    have the smallest scale, so that they never are the largest."""
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448.0
    return (x.float() / scale).to(E4M3), scale


def _run(plan_of, columns, out, scale, x, *more):
    rows, split = x.shape
    prepared = launch.prepared(x.device.index, plan_of, QuantizeParams, (rows, columns), x.dtype)
    scalars = {"rows": rows, "columns": columns, "split": split, "out": out, "scale": scale}
    parts = zip(("x", "more"), (part[None] for part in (x, *more)), strict=False)
    launch.run(prepared, x.device, dict(parts), scalars)


def quantize_rows(x, *more):
    """`quantize_rows_ref` of x (M, K), or of [x, more], rows contiguous, by our kernel."""
    columns = sum(part.shape[1] for part in (x, *more))
    out = torch.empty(len(x), columns, dtype=E4M3, device=x.device)
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    _run(plan_rows, columns, out, scale, x, *more)
    return out, scale


def quantize_transposed(x, scale):
    """x (M, K) divided by scale () and transposed, as e4m3 numbers (K, M), M padded with zeros to a
    multiple of 16."""
    out = torch.empty(x.shape[1], -(-x.shape[0] // 16) * 16, dtype=E4M3, device=x.device)
    _run(plan_transposed, x.shape[1], out, scale, x)
    return out


def _scaled_product(parts, w8, w_scale, bias=None):
    """x (B, L, K), in one or two parts along K, times the transpose of w8 w_scale (N, K), w_scale
    (N, 1), plus bias (N) in bfloat16; and x's scales (B L, 1)."""
    x8, x_scale = quantize_rows(*(part.flatten(0, 1) for part in parts))
    out = torch._scaled_mm(
        x8, w8.t(), scale_a=x_scale, scale_b=w_scale.t(), bias=bias, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip
    return out.to(parts[0].dtype).view(*parts[0].shape[:2], -1), x_scale


def product(x, weight):
    """x (B, L, K) times the transpose of weight (N, K), in x's dtype; and x's scales (B L, 1)."""
    return _scaled_product([x], *quantize_rows(weight))


def product_back(g, weight):
    """g (B, L, N) times weight (N, K), in g's dtype; and g's scales (B L, 1). The GPU wants the
    weight transposed in memory, which one scale for all of it makes a single pass."""
    scale = quantize_rows(weight)[1].amax()
    w8 = quantize_transposed(weight, scale)
    return _scaled_product([g], w8, scale.expand(w8.shape[0], 1).contiguous())


def weight_gradient(g, g_scale, x, x_scale):
    """The sum over tokens of g (B, L, N) x (B, L, K), (N, K) in float32. g_scale, x_scale (B L, 1):
    from the products that had g and x."""
    g_scale, x_scale = g_scale.amax(), x_scale.amax()
    g8 = quantize_transposed(g.flatten(0, 1), g_scale)
    x8 = quantize_transposed(x.flatten(0, 1), x_scale)
    return torch._scaled_mm(g8, x8.t(), scale_a=g_scale, scale_b=x_scale, out_dtype=torch.float32)


def _merge(x, skip, x_weight, skip_weight, bias):
    return _scaled_product((x, skip), *quantize_rows(x_weight, skip_weight), bias.bfloat16())


def _merge_backward(g, scale, x, skip, x_weight, skip_weight, bias):
    g = g.contiguous()
    g_x, g_scale = product_back(g, x_weight)
    g_skip, _ = product_back(g, skip_weight)
    weights = (weight_gradient(g, g_scale, part, scale).to(g.dtype) for part in (x, skip))
    return g_x, g_skip, *weights, g.sum((0, 1))


def _fake(x, skip, x_weight, *rest):
    out = x.new_empty((*x.shape[:2], x_weight.shape[0]))
    return out, x.new_empty((x.shape[0] * x.shape[1], 1), dtype=torch.float32)


launch.operator(
    "fp8_merge", "Tensor x, Tensor skip, Tensor x_weight, Tensor skip_weight, Tensor bias", (2, 5),
    _merge, _fake, _merge_backward, lambda g, scale, *inputs: launch.like(*inputs), saved=1,
)  # fmt: skip


def fp8_merge(x, skip, x_weight, skip_weight, bias):
    """x (B, L, K) times the transpose of x_weight (N, K), plus the same of skip, plus bias (N), as
    one product in fp8, a token of x and of skip under one scale; x and skip in bfloat16 or float16.
    Differentiable."""
    parameters = (parameter.to(x.dtype) for parameter in (x_weight, skip_weight, bias))
    return torch.ops.dim.fp8_merge(x.contiguous(), skip.contiguous(), *parameters)[0]
