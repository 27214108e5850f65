"""DPM-Solver (Lu et al., arXiv 2206.00927) and DPM-Solver++ (arXiv 2211.01095).

They take any process with alpha, sigma, half_log_snr and its inverse. Both solve the probability
flow ODE exactly but for one integral over lam = half_log_snr = log(alpha / sigma). With (c, s, k) =
(alpha, sigma, lam) and f the predicted noise (DPM-Solver), or (c, s, k) = (sigma, alpha, -lam) and
f the predicted x_0 (DPM-Solver++),

    x_t / c_t = x_r / c_r - integral from k_r to k_t of exp(-k) f dk,        s_t / c_t = exp(-k_t),

so one set of formulas serves both.

Times and coefficients are 0-dim tensors on the CPU, of x's dtype: no step waits for the device.
"""

import torch


def fast_orders(steps):
    """Orders of DPM-Solver-fast's blocks, `steps` in all: 3, 3, ..., then 2, 1 or 1 or 2."""
    full, rest = divmod(steps, 3)
    return [3] * (full - 1) + [2, 1] if rest == 0 else [3] * full + [rest]


def blocks_on_times(process, times):
    """'Fast' blocks on a given grid of times (steps + 1,).

    A block of order k takes k intervals, and its inner points are the grid times between. Returns a
    list of (start, end, ratios), a ratio being where in lam from start to end an inner point lies.
    """
    lam = process.half_log_snr(times)
    blocks, start = [], 0
    for order in fast_orders(len(times) - 1):
        end = start + order
        ratios = (lam[start + 1:end] - lam[start]) / (lam[end] - lam[start])
        blocks.append((times[start], times[end], list(ratios)))
        start = end
    return blocks


def blocks_on_log_snr(process, t_start, t_end, steps):
    """'Fast' blocks of equal length in lam from t_start to t_end, inner points evenly spaced.

    t_start and t_end are 0-dim tensors; the result is as that of `blocks_on_times`.
    """
    orders = fast_orders(steps)
    times = times_on_log_snr(process, t_start, t_end, len(orders))
    ratios = [[(i + 1) / order for i in range(order - 1)] for order in orders]
    return list(zip(times[:-1], times[1:], ratios, strict=True))


def times_on_log_snr(process, t_start, t_end, intervals):
    """Times (intervals + 1,) equally spaced in lam; t_start and t_end are 0-dim tensors."""
    ends = process.half_log_snr(t_start).item(), process.half_log_snr(t_end).item()
    like = dict(dtype=t_start.dtype, device=t_start.device)
    return process.inverse_half_log_snr(torch.linspace(*ends, intervals + 1, **like))


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

    def change_of_f(x_inner, t):
        return predict(x_inner, t) - f_start

    inner = [process.inverse_half_log_snr(lam_start + ratio * h) for ratio in ratios]
    if not ratios:
        return first_order(end, 1)
    change = change_of_f(first_order(inner[0], ratios[0]), inner[0])
    if len(ratios) == 1:
        return first_order(end, 1) - s(end) * torch.expm1(k) / (2 * ratios[0]) * change
    r1, r2 = ratios
    x_inner = first_order(inner[1], r2) - s(inner[1]) * r2 / r1 * _psi(r2 * k) * change
    return first_order(end, 1) - s(end) / r2 * _psi(k) * change_of_f(x_inner, inner[1])


def solve_singlestep(predict_noise, process, x, blocks, *, data_prediction):
    """Integrate x (B, ...) through `blocks`; returns x at the last time.

    With `data_prediction` the solver is DPM-Solver++, otherwise DPM-Solver.
    predict_noise(x, t), t a 0-dim tensor, is called once for each order of each block, never at the
    last time.
    """

    def predict_x0(x, t):
        return process.to_x0_eps("noise_pred", predict_noise(x, t), x, t)[0]

    predict = predict_x0 if data_prediction else predict_noise
    for start, end, ratios in blocks:
        x = _block(predict, process, x, start, end, ratios, data_prediction=data_prediction)
    return x


def solve_multistep_2m(predict_x0, process, x, times):
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2); returns x at the last time.

    x (B, ...), times (steps + 1,). It is of order 2, the first step of order 1, with one call of
    predict_x0(x, t) at each of `times` but the last.
    """
    alpha, sigma, lam = process.alpha(times), process.sigma(times), process.half_log_snr(times)
    x0_before = None
    for i, t in enumerate(times[:-1]):
        x0 = predict_x0(x, t)
        h = lam[i + 1] - lam[i]
        direction = x0
        if x0_before is not None:
            direction = x0 + h / (2 * (lam[i] - lam[i - 1])) * (x0 - x0_before)
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * direction
        x0_before = x0
    return x
