"""Samplers by name, from noise z_T at t = 1 to z_0; a new one is a function with `@sampler`."""

import functools
import inspect
import itertools

import torch

from libs.diffusion.noise import ImageNoise
from libs.diffusion.solvers import make_blocks, make_times, solve_multistep_2m, solve_singlestep
from sde import N_TIMESTEPS, require_offered
from utils import look_up

SAMPLERS = {}  # name -> (function, predicts, needs)
_LOG_SNR = ("half_log_snr", "inverse_half_log_snr", "alpha", "sigma", "dpm_grid")


def sampler(name, *, predicts, needs=()):
    """Decorator that registers f(predict, process, x, steps, noise) -> z_0.

    predict(x, t) gives predicts = 'noise', 'x0' or 'velocity' (dx_t/dt): x (B, ...) float32, t a
    0-dim tensor on the CPU, so that looking at t makes nobody wait for the device. noise: the
    images' ImageNoise. needs: attributes that the process must have.
    """

    def register(function):
        SAMPLERS[name] = function, predicts, needs
        return function

    return register


def _iter_steps(process, steps, dtype):
    """(start, end, end - start) of steps from t = 1 to 0, even but for the process's shift."""
    times = torch.linspace(1, 0, steps + 1, dtype=dtype, device="cpu")
    times = getattr(process, "shift_time", lambda t: t)(times)
    return zip(times[:-1], times[1:], times.diff().tolist(), strict=True)


@sampler("euler", predicts="velocity")
def _euler(predict, process, x, steps, noise):
    """Euler's method on the probability flow ODE: a call a step."""
    for t, _, dt in _iter_steps(process, steps, x.dtype):
        x = x + predict(x, t) * dt
    return x


@sampler("heun", predicts="velocity")
def _heun(predict, process, x, steps, noise):
    """Heun's method (Karras et al., arXiv 2206.00364, algorithm 1): 2 calls a step, 1 the last."""
    for t, end, dt in _iter_steps(process, steps, x.dtype):
        slope = predict(x, t)
        if end > 0:
            slope = (slope + predict(x + slope * dt, end)) / 2
        x = x + slope * dt
    return x


@sampler("adams_bashforth", predicts="velocity")
def _adams_bashforth(predict, process, x, steps, noise):
    """Adams-Bashforth of order 2, after one step of Euler's: a call a step."""
    slope = dt_before = None
    for t, _, dt in _iter_steps(process, steps, x.dtype):
        slope_before, slope = slope, predict(x, t)
        change = 0 if slope_before is None else dt / (2 * dt_before) * (slope - slope_before)
        x, dt_before = x + (slope + change) * dt, dt
    return x


def _draw(noise, x):
    z = noise.draw().pin_memory() if x.is_cuda else noise.draw()  # pinned: nobody waits
    return z.to(x, non_blocking=True)


@sampler("euler_maruyama_flow", predicts="velocity", needs=("shift_time", "alpha", "sigma"))
def _euler_maruyama_flow(predict, process, x, steps, noise):
    """Euler's method on the reverse SDE (Ma et al., arXiv 2401.08740, eq. 4) with w = sigma: drift
    v - w / 2 score, score = -eps / sigma, eps = x + alpha v. The last step is the ODE's.
    """
    for t, end, dt in _iter_steps(process, steps, x.dtype):
        velocity = predict(x, t)
        if end == 0:
            return x + velocity * dt
        drift = velocity + (x + process.alpha(t) * velocity) / 2
        x = x + drift * dt + (process.sigma(t) * -dt).sqrt() * _draw(noise, x)


def _euler_maruyama(stochastic, predict, process, x, steps, noise):
    """Euler's method on equation 6 (SDE) or 13 (ODE) of Song et al., arXiv 2011.13456. Times are
    even from t = 1 to 1e-3, then comes 0; the last step adds no noise.
    """
    on_host = dict(dtype=torch.float64, device="cpu")
    times = torch.cat([torch.linspace(1, 1e-3, steps, **on_host), torch.zeros(1, **on_host)])
    for i, dt in enumerate(times.diff().tolist()):
        t = times[i].to(x.dtype)
        beta = process.g2(t)
        score = predict(x, t) / -process.sigma(t)
        x = x + (-0.5 * beta * x - (1 if stochastic else 0.5) * beta * score) * dt
        if stochastic and i + 1 < steps:
            x = x + (beta * -dt).sqrt() * _draw(noise, x)
    return x


for _kind in ("sde", "ode"):
    _register = sampler(f"euler_maruyama_{_kind}", predicts="noise", needs=("g2", "sigma"))
    _register(functools.partial(_euler_maruyama, _kind == "sde"))


@sampler("dpm_solver", predicts="noise", needs=(*_LOG_SNR, "dpm_predicts"))
def _dpm_solver(predict, process, x, steps, noise):
    """Single-step 'fast', with grid and prediction of the process's official evaluation."""
    blocks, predicts = make_blocks(process, process.dpm_grid, steps, x.dtype), process.dpm_predicts
    predict = _convert(predict, process, "noise_pred", predicts)
    return solve_singlestep(predict, process, x, blocks, data_prediction=predicts == "x0")


@sampler("dpm_solver_upsample_g", predicts="noise", needs=(*_LOG_SNR, "alpha_bar"))
def _dpm_solver_upsample_g(predict, process, x, steps, noise):
    """The official upsampling's solver; its guidance is libs.diffusion.guidance.upsampling."""
    blocks = make_blocks(process, "time", steps, x.dtype)
    return solve_singlestep(predict, process, x, blocks, data_prediction=False)


@sampler("dpm_solver_pp_2m", predicts="x0", needs=_LOG_SNR)
def _dpm_solver_pp_2m(predict, process, x, steps, noise):
    times = make_times(process, process.dpm_grid, steps, x.dtype)
    return solve_multistep_2m(predict, process, x, times)


def _run_scheduler(name, predict, process, x, steps, noise):
    """A diffusers scheduler on the chain of betas: timestep i is process time (i + 1) / 1000."""
    from diffusers import schedulers  # seconds to import, and needed for few algorithms

    scheduler_class = getattr(schedulers, name)
    settings = {
        "num_train_timesteps": N_TIMESTEPS,
        "trained_betas": process.betas().numpy(),
        "prediction_type": "epsilon",
        "clip_sample": False,  # latents are not bounded
        "timestep_spacing": "trailing",  # starts at pure noise (Lin et al., arXiv 2305.08891)
    }
    accepted = settings.keys() & inspect.signature(scheduler_class).parameters.keys()
    scheduler = scheduler_class(**{key: settings[key] for key in accepted})
    scheduler.set_timesteps(steps)
    random = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {"generator": noise.generators} if random and noise else {}
    x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = ((timestep.to(torch.float64) + 1) / N_TIMESTEPS).to(x.dtype)
        eps = predict(scheduler.scale_model_input(x, timestep), t)
        x = scheduler.step(eps, timestep, x, **arguments).prev_sample
    return x


for _name in (  # those of diffusers that sample for any network of a chain of betas
    "DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep "
    "EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete "
    "LMSDiscrete PNDM SASolver UniPCMultistep"
).split():
    _register = sampler(f"{_name}Scheduler", predicts="noise", needs=("betas",))
    _register(functools.partial(_run_scheduler, f"{_name}Scheduler"))


def _convert(output, process, pred, predicts):
    """predict(x, t) -> 'noise', 'x0' or 'velocity' from the raw output of a network for `pred`."""
    if pred == f"{predicts}_pred":
        return output
    if predicts == "velocity":
        return lambda x, t: process.velocity(pred, output(x, t), x, t)
    index = ("x0", "noise").index(predicts)
    return lambda x, t: process.to_x0_eps(pred, output(x, t), x, t)[index]


def choose_sampler(algorithm, process):
    """(function, predicts) of a sampler; UserError if it is unknown or does not fit the process."""
    solve, predicts, needs = look_up(SAMPLERS, algorithm, "sample.algorithm")
    require_offered(process, needs, f"sampling algorithm {algorithm}")
    return solve, predicts


def count_calls(process, z_shape, make_output=lambda network: network, *, reused_cost=1, **given):
    """Images that a network is given for one of z_shape, in a run of `sample(**given)` without the
    network; make_output: from the network to its guided output(x, t). A call with `reused` tokens
    counts as reused_cost.
    """
    counts = []

    def network(x, t, y=None, hidden=(), reused=None):
        counts.append(len(x) * (1 if reused is None else reused_cost))
        inner = {key: x if isinstance(key, str) else x.flatten(2) for key in hidden}
        return (x, inner) if hidden else x

    noise = ImageNoise(0, [0], z_shape)
    sample(make_output(network), process, noise.draw(), noise=noise, **given)
    return sum(counts)


@torch.no_grad()
def sample(output, process, z_T, *, pred, algorithm, steps, noise=None, on_call=None):
    """Integrate from z_T at t = 1 to z_0: (B, ...) float32, or float64 as z_T, on z_T's device.

    output(x, t): the raw, guided output of a network for `pred`; steps: of the sampler, most make
    one call each; noise: ImageNoise, for stochastic algorithms; on_call(i, n, t, x_0) follows
    call i = 1, ..., n of output, at time t, with the x_0 that it predicts. UserError: see
    `choose_sampler`.
    """
    solve, predicts = choose_sampler(algorithm, process)
    calls = itertools.count(1)
    n = on_call and count_calls(process, (1, 1, 1), pred=pred, algorithm=algorithm, steps=steps)

    def told(x, t):
        out = output(x, t)
        on_call(next(calls), n, t, process.to_x0_eps(pred, out, x, t)[0])
        return out

    predict = _convert(told if on_call else output, process, pred, predicts)
    x = z_T.to(torch.promote_types(z_T.dtype, torch.float32))
    return solve(predict, process, x, steps, noise)
