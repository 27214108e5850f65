"""DPM-Solver (Lu et al., arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095).

Both solve the probability flow ODE exactly but for one integral over lam = log(alpha / sigma), half
the log-SNR. With (c, s, k) = (alpha, sigma, lam) and f the predicted noise (DPM-Solver), or with
(c, s, k) = (sigma, alpha, -lam) and f the predicted x_0 (DPM-Solver++),

    x_t / c_t = x_r / c_r - integral from k_r to k_t of exp(-k) f dk,        s_t / c_t = exp(-k_t),

so one set of formulas serves both.

Times are 0-dim tensors on the CPU, of x's dtype: no step waits for the device.
"""

import itertools

import torch


def make_times(process, grid, intervals, dtype):
    """Times (intervals + 1,) falling from t = 1: even in lam down to 1e-4 for the grid 'log_snr',
    even in t down to 1e-3 for 'time'.
    """
    like = dict(dtype=dtype, device="cpu")
    if grid == "time":
        return torch.linspace(1, 1e-3, intervals + 1, **like)
    first, last = process.half_log_snr(torch.tensor([1.0, 1e-4], **like)).tolist()
    return process.inverse_half_log_snr(torch.linspace(first, last, intervals + 1, **like))


def make_blocks(process, grid, steps, dtype):
    """'Fast' blocks, of order 3, then 2 and 1, or 1, or 2: [(start, end, where in lam between them
    the inner points lie)]. On 'log_snr' the blocks are equally long, their inner points even; on
    'time' a block of order k takes k intervals, and its inner points are the grid times between.
    """
    full, rest = divmod(steps, 3)
    orders = [3] * (full - 1) + [2, 1] if rest == 0 else [3] * full + [rest]
    if grid == "log_snr":
        times = make_times(process, grid, len(orders), dtype)
        ratios = [[(i + 1) / order for i in range(order - 1)] for order in orders]
        return list(zip(times[:-1], times[1:], ratios, strict=True))
    times = make_times(process, grid, steps, dtype)
    lam, ends = process.half_log_snr(times), itertools.accumulate(orders, initial=0)
    return [
        (times[a], times[b], list((lam[a + 1 : b] - lam[a]) / (lam[b] - lam[a])))
        for a, b in itertools.pairwise(ends)
    ]


def _psi(k):
    return torch.expm1(k) / k - 1


def _block(predict, process, x, start, end, ratios, *, data_prediction):
    """One update of order len(ratios) + 1, 1 to 3 (arXiv 2206.00927, eq. 3.7, algorithms 1, 2)."""
    c, s = process.alpha, process.sigma
    if data_prediction:
        c, s = s, c
    lam_start = process.half_log_snr(start)
    h = process.half_log_snr(end) - lam_start
    k = -h if data_prediction else h
    f_start = predict(x, start)

    def first_order(t, ratio):
        return c(t) / c(start) * x - s(t) * torch.expm1(ratio * k) * f_start

    inner = [process.inverse_half_log_snr(lam_start + ratio * h) for ratio in ratios]
    if not ratios:
        return first_order(end, 1)
    change = predict(first_order(inner[0], ratios[0]), inner[0]) - f_start
    if len(ratios) == 1:
        return first_order(end, 1) - s(end) * torch.expm1(k) / (2 * ratios[0]) * change
    r1, r2 = ratios
    x_inner = first_order(inner[1], r2) - s(inner[1]) * r2 / r1 * _psi(r2 * k) * change
    change = predict(x_inner, inner[1]) - f_start
    return first_order(end, 1) - s(end) / r2 * _psi(k) * change


def solve_singlestep(predict, process, x, blocks, *, data_prediction):
    """Integrate x (B, ...) through `blocks`: x at the last time. predict(x, t) is x_0 with
    `data_prediction` (DPM-Solver++), else noise (DPM-Solver), never called at the last time.
    """
    for start, end, ratios in blocks:
        x = _block(predict, process, x, start, end, ratios, data_prediction=data_prediction)
    return x


def solve_multistep_2m(predict_x0, process, x, times):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): x at the last of times (steps + 1,). Of
    order 2, the first step of order 1, with one predict_x0(x, t) at each of `times` but the last.
    """
    alpha, sigma, lam = process.alpha(times), process.sigma(times), process.half_log_snr(times)
    x0 = None
    for i, t in enumerate(times[:-1]):
        x0_before, x0 = x0, predict_x0(x, t)
        h = lam[i + 1] - lam[i]
        direction = x0 if i == 0 else x0 + h / (2 * (lam[i] - lam[i - 1])) * (x0 - x0_before)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * direction
    return x
