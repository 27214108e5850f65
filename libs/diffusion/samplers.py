"""Samplers: from noise z_T at t = 1 to z_0, by name of the algorithm (`config.sample.algorithm`).

A new sampler is a function with the decorator `sampler`.
"""

import functools
import inspect
import itertools

import torch

from libs.diffusion.solvers import (
    blocks_on_log_snr,
    blocks_on_times,
    solve_multistep_2m,
    solve_singlestep,
    times_on_log_snr,
)
from sde import N_TIMESTEPS, require_offered
from utils import UserError

SAMPLERS = {}  # name -> (function, predicts, needs)
_LOG_SNR = ("half_log_snr", "inverse_half_log_snr", "alpha", "sigma")


def sampler(name, *, predicts, needs=()):
    """Decorator that registers f(predict, process, x, steps, noise) -> z_0.

    predict(x, t) gives what the sampler asks for, predicts = 'noise', 'x0' or 'velocity' (dx_t/dt):
    x (B, ...) float32, t a 0-dim tensor on the CPU, so that looking at t makes nobody wait for the
    device. noise: the images' ImageNoise. needs: attributes that the process must have.
    """

    def register(function):
        SAMPLERS[name] = function, predicts, needs
        return function

    return register


def _to_device_of(x, noise):
    """Copy CPU noise to x without making the host wait for the device."""
    return noise.pin_memory().to(x, non_blocking=True) if x.is_cuda else noise.to(x)


@sampler("euler", predicts="velocity")
def _euler(predict, process, x, steps, noise):
    """Euler's method on the probability flow ODE, even in time from 1 to 0."""
    times = torch.linspace(1, 0, steps + 1, dtype=x.dtype, device="cpu")
    for t, dt in zip(times, times.diff().tolist(), strict=False):
        x = x + predict(x, t) * dt
    return x


def _euler_maruyama(predict, process, x, steps, noise, *, stochastic):
    """Euler's method on equation 6 (SDE) or 13 (ODE) of Song et al., arXiv 2011.13456.

    Times are even from t = 1 to 1e-3, then comes 0; the last step adds no noise.
    """
    on_host = dict(dtype=torch.float64, device="cpu")
    times = torch.cat([torch.linspace(1, 1e-3, steps, **on_host), torch.zeros(1, **on_host)])
    for i, dt in enumerate(times.diff().tolist()):
        t = times[i].to(x.dtype)
        beta = process.g2(t)
        score = predict(x, t) / -process.sigma(t)
        x = x + (-0.5 * beta * x - (1 if stochastic else 0.5) * beta * score) * dt
        if stochastic and i + 1 < steps:
            x = x + (beta * -dt).sqrt() * _to_device_of(x, noise.draw())
    return x


@sampler("euler_maruyama_sde", predicts="noise", needs=("g2", "sigma"))
def _euler_maruyama_sde(predict, process, x, steps, noise):
    return _euler_maruyama(predict, process, x, steps, noise, stochastic=True)


@sampler("euler_maruyama_ode", predicts="noise", needs=("g2", "sigma"))
def _euler_maruyama_ode(predict, process, x, steps, noise):
    return _euler_maruyama(predict, process, x, steps, noise, stochastic=False)


def _log_snr_ends(dtype):
    return torch.tensor([1.0, 1e-4], dtype=dtype, device="cpu").unbind()


def _uniform_times(steps, dtype):
    return torch.linspace(1, 1e-3, steps + 1, dtype=dtype, device="cpu")


@sampler("dpm_solver", predicts="noise", needs=(*_LOG_SNR, "dpm_grid", "dpm_predicts"))
def _dpm_solver(predict, process, x, steps, noise):
    """Single-step 'fast', on the grid and the prediction of the process's official evaluation."""
    if process.dpm_grid == "log_snr":
        blocks = blocks_on_log_snr(process, *_log_snr_ends(x.dtype), steps)
    else:
        blocks = blocks_on_times(process, _uniform_times(steps, x.dtype))
    data_prediction = process.dpm_predicts == "x0"
    return solve_singlestep(predict, process, x, blocks, data_prediction=data_prediction)


@sampler("dpm_solver_upsample_g", predicts="noise", needs=_LOG_SNR)
def _dpm_solver_upsample_g(predict, process, x, steps, noise):
    """The official upsampling's solver; its guidance is libs.diffusion.guidance.upsampling."""
    blocks = blocks_on_times(process, _uniform_times(steps, x.dtype))
    return solve_singlestep(predict, process, x, blocks, data_prediction=False)


@sampler("dpm_solver_pp_2m", predicts="x0", needs=(*_LOG_SNR, "dpm_grid"))
def _dpm_solver_pp_2m(predict, process, x, steps, noise):
    if process.dpm_grid == "log_snr":
        times = times_on_log_snr(process, *_log_snr_ends(x.dtype), steps)
    else:
        times = _uniform_times(steps, x.dtype)
    return solve_multistep_2m(predict, process, x, times)


def _run_scheduler(name, predict, process, x, steps, noise):
    """A diffusers scheduler on the process's chain: timestep i is process time (i + 1) / 1000."""
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
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {"generator": noise.generators} if takes_generator and noise is not None else {}
    x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = ((timestep.to(torch.float64) + 1) / N_TIMESTEPS).to(x.dtype)
        eps = predict(scheduler.scale_model_input(x, timestep), t)
        x = scheduler.step(eps, timestep, x, **arguments).prev_sample
    return x


def _register_schedulers():
    """Those of diffusers' schedulers that sample for any network of a chain of betas."""
    names = (
        "DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete",
        "KDPM2AncestralDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "SASolver",
        "UniPCMultistep",
    )  # fmt: skip
    for name in (f"{name}Scheduler" for name in names):
        sampler(name, predicts="noise", needs=("betas",))(functools.partial(_run_scheduler, name))


_register_schedulers()


def _convert(output, process, pred, predicts):
    """predict(x, t) -> 'noise', 'x0' or 'velocity' from the raw output of a network for `pred`."""
    if pred == f"{predicts}_pred":
        return output
    if predicts == "velocity":
        return lambda x, t: process.velocity(pred, output(x, t), x, t)
    index = ("x0", "noise").index(predicts)
    return lambda x, t: process.to_x0_eps(pred, output(x, t), x, t)[index]


def _counting(output, steps, on_step):
    calls = itertools.count(1)

    def counted(x, t):
        out = output(x, t)
        on_step(next(calls), steps)
        return out

    return counted


@torch.no_grad()
def sample(output, process, z_T, *, pred, algorithm, steps, noise=None, on_step=None):
    """Integrate from z_T at t = 1 to z_0. Returns (B, ...), float32, on z_T's device.

    output(x, t) -> the network's raw, guided output (libs.diffusion.guidance) for `pred`. A float64
    z_T makes everything float64, for tests of convergence.
    algorithm: a name in SAMPLERS; steps: network calls (a second-order diffusers scheduler such as
    Heun's makes twice as many).
    noise: the images' ImageNoise, for stochastic algorithms; without it diffusers' draw from
    torch's global generator.
    on_step(i, steps) is called after network call i = 1, 2, ...
    UserError: unknown algorithm, or a process that lacks what the algorithm needs.
    """
    if algorithm not in SAMPLERS:
        known = ", ".join(SAMPLERS)
        raise UserError(f"unknown sampling algorithm {algorithm!r}, known are: {known}")
    solve, predicts, needs = SAMPLERS[algorithm]
    require_offered(process, needs, f"sampling algorithm {algorithm}")
    if on_step is not None:
        output = _counting(output, steps, on_step)
    x = z_T.to(torch.promote_types(z_T.dtype, torch.float32))
    return solve(_convert(output, process, pred, predicts), process, x, steps, noise)
