"""Sampling: from noise z_T to z_0 with a noise prediction eps_fn(x, t), by name of the algorithm.
"""

import difflib
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
from sde import N_TIMESTEPS, VPSDE
from utils import UserError

_MASK_64 = (1 << 64) - 1


def _splitmix64(state):
    """One output of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), a bijection of 64 bits."""
    z = (state + 0x9E3779B97F4A7C15) & _MASK_64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)


def _mix32(z):
    """MurmurHash3's finalizer, a bijection of 32 bits."""
    z = ((z ^ (z >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    z = ((z ^ (z >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return z ^ (z >> 16)


def image_seed(seed, index):
    """Generator seed of image `index` < 2**32: mix32((splitmix64(seed) + index) mod 2**32).

    A torch generator on the CPU keeps only 32 bits of its seed. With 64 mixed bits, two of 50,000
    images would share their noise in one run of four; a bijection of the index never lets two
    images of one seed share it.
    """
    return _mix32((_splitmix64(seed & _MASK_64) + index) & 0xFFFFFFFF)


class ImageNoise:
    """Gaussian noise of images, each with a CPU generator of its own seeded by (seed, index).

    An image's numbers are the same, bit for bit, whatever the batch, the device and the number of
    processes.
    indices: the images of this batch; shape: (C, H, W). `generators`: one for each image, for
    diffusers' schedulers.
    """

    def __init__(self, seed, indices, shape):
        self.shape = tuple(shape)
        seeds = [image_seed(seed, int(index)) for index in indices]
        self.generators = [torch.Generator().manual_seed(s) for s in seeds]
        self._initial = self.draw()

    def initial(self):
        """The images' first numbers, for z_T: (B, C, H, W) float32 on the CPU."""
        return self._initial

    def draw(self):
        """The images' next numbers: (B, C, H, W) float32 on the CPU."""
        as_drawn = dict(dtype=torch.float32, device="cpu")  # whatever torch's defaults are
        return torch.stack(
            [torch.randn(self.shape, generator=g, **as_drawn) for g in self.generators]
        )


def _to_device_of(x, noise):
    """Copy CPU noise to x without making the host wait for the device."""
    return noise.pin_memory().to(x, non_blocking=True) if x.is_cuda else noise.to(x)


def _euler_maruyama(eps_fn, process, x, steps, noise, *, stochastic):
    """Euler's method on equation 6 (SDE) or 13 (ODE) of Song et al., arXiv 2011.13456.

    Times are even from t = 1 to 1e-3, then comes 0; the last step adds no noise.
    """
    if not isinstance(process, VPSDE):
        raise UserError(f"Euler-Maruyama is for process VPSDE, not {type(process).__name__}: "
                        "choose another sampling algorithm")
    if stochastic and noise is None:
        raise UserError("'euler_maruyama_sde' draws noise at each step: pass noise=ImageNoise(...)")
    on_host = dict(dtype=torch.float64, device="cpu")
    times = torch.cat([torch.linspace(1, 1e-3, steps, **on_host), torch.zeros(1, **on_host)])
    for i, dt in enumerate(times.diff().tolist()):
        t = times[i].to(x.dtype)
        beta = process.squared_diffusion(t)
        score = eps_fn(x, t) / -process.sigma(t)
        x = x + (process.drift(x, t) - (1 if stochastic else 0.5) * beta * score) * dt
        if stochastic and i + 1 < steps:
            x = x + (beta * -dt).sqrt() * _to_device_of(x, noise.draw())
    return x


def _euler_maruyama_sde(eps_fn, process, x, steps, noise):
    return _euler_maruyama(eps_fn, process, x, steps, noise, stochastic=True)


def _euler_maruyama_ode(eps_fn, process, x, steps, noise):
    return _euler_maruyama(eps_fn, process, x, steps, noise, stochastic=False)


def _log_snr_ends(dtype):
    return torch.tensor([1.0, 1e-4], dtype=dtype, device="cpu").unbind()


def _uniform_times(steps, dtype):
    return torch.linspace(1, 1e-3, steps + 1, dtype=dtype, device="cpu")


def _dpm_solver(eps_fn, process, x, steps, noise):
    """As the official evaluations: DPM-Solver even in lam for VPSDE, else ++ even in time."""
    if isinstance(process, VPSDE):
        blocks = blocks_on_log_snr(process, *_log_snr_ends(x.dtype), steps)
        return solve_singlestep(eps_fn, process, x, blocks, data_prediction=False)
    blocks = blocks_on_times(process, _uniform_times(steps, x.dtype))
    return solve_singlestep(eps_fn, process, x, blocks, data_prediction=True)


def _dpm_solver_upsample_g(eps_fn, process, x, steps, noise):
    """The official upsampling: `dpm_solver` in time, but on the noise prediction; the guidance is
    in eps_fn (libs.diffusion.guidance.upsampling)."""
    blocks = blocks_on_times(process, _uniform_times(steps, x.dtype))
    return solve_singlestep(eps_fn, process, x, blocks, data_prediction=False)


def _dpm_solver_pp_2m(eps_fn, process, x, steps, noise):
    if isinstance(process, VPSDE):
        times = times_on_log_snr(process, *_log_snr_ends(x.dtype), steps)
    else:
        times = _uniform_times(steps, x.dtype)
    return solve_multistep_2m(eps_fn, process, x, times)


def _trained_betas(process):
    """The betas (1000,) of the chain that is the process at t = 0.001, 0.002, ..., 1."""
    steps = torch.arange(N_TIMESTEPS + 1, dtype=torch.float64)
    cum_alpha = process.alpha(steps / N_TIMESTEPS) ** 2
    return (1 - cum_alpha[1:] / cum_alpha[:-1]).numpy()


# Not samplers from noise to images for any network that predicts noise: inversion, distilled
# consistency models, and CogVideoX's, which change the signal-to-noise ratio that they are given
_NOT_SAMPLERS = {
    "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "LCMScheduler", "TCDScheduler",
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",
}


@functools.cache
def _diffusers_schedulers():
    """Names of diffusers' samplers for a network that predicts the noise of a chain of betas."""
    from diffusers import schedulers  # seconds to import, and needed for few algorithms

    names = []
    for name in dir(schedulers):
        if not name.endswith("Scheduler") or name in _NOT_SAMPLERS:
            continue
        try:
            keywords = inspect.signature(getattr(schedulers, name)).parameters
        except (AttributeError, ImportError):  # its own requirements are not installed
            continue
        if {"trained_betas", "prediction_type"} <= keywords.keys():
            names.append(name)
    return names


def _make_scheduler(name, process, steps):
    from diffusers import schedulers

    if steps > N_TIMESTEPS:  # some raise ValueError, others IndexError while sampling, or make NaN
        raise UserError(
            f"diffusers' {name} cannot do {steps} steps: take {N_TIMESTEPS} or fewer, or another "
            "sampling algorithm"
        )

    scheduler_class = getattr(schedulers, name)
    settings = {
        "num_train_timesteps": N_TIMESTEPS,
        "trained_betas": _trained_betas(process),
        "prediction_type": "epsilon",
        "clip_sample": False,  # latents are not bounded
        "timestep_spacing": "trailing",  # starts at pure noise (Lin et al., arXiv 2305.08891)
    }
    accepted = settings.keys() & inspect.signature(scheduler_class).parameters.keys()
    try:
        scheduler = scheduler_class(**{key: settings[key] for key in accepted})
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"diffusers' {name} cannot do {steps} steps ({reason}): choose other steps, or another "
            "sampling algorithm"
        ) from error
    return scheduler


def _run_scheduler(eps_fn, scheduler, x, noise):
    """Run a diffusers scheduler, whose timestep i is process time (i + 1) / 1000."""
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    arguments = {"generator": noise.generators} if takes_generator and noise is not None else {}
    x = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = ((timestep.to(torch.float64) + 1) / N_TIMESTEPS).to(x.dtype)
        eps = eps_fn(scheduler.scale_model_input(x, timestep), t)
        x = scheduler.step(eps, timestep, x, **arguments).prev_sample
    return x


_ALGORITHMS = {
    "dpm_solver": _dpm_solver,
    "dpm_solver_upsample_g": _dpm_solver_upsample_g,
    "dpm_solver_pp_2m": _dpm_solver_pp_2m,
    "euler_maruyama_sde": _euler_maruyama_sde,
    "euler_maruyama_ode": _euler_maruyama_ode,
}


def known_algorithms():
    """Every name that `sample` takes: ours, then diffusers' (to import it takes seconds)."""
    return [*_ALGORITHMS, *_diffusers_schedulers()]


def _unknown(algorithm):
    known = known_algorithms()
    by_lower_case = {name.lower(): name for name in known}
    nearest = difflib.get_close_matches(algorithm.lower(), by_lower_case, n=1, cutoff=0.4)
    hint = f"; did you mean {by_lower_case[nearest[0]]!r}?" if nearest else ""
    return UserError(
        f"unknown sampling algorithm {algorithm!r}{hint} (known are: {', '.join(known)})")


def _counting(eps_fn, total, on_step):
    calls = itertools.count(1)

    def counted(x, t):
        eps = eps_fn(x, t)
        on_step(next(calls), total)
        return eps

    return counted


@torch.no_grad()
def sample(eps_fn, process, z_T, *, algorithm, steps, noise=None, on_step=None):
    """Integrate from z_T at t = 1 to z_0. Returns (B, ...), float32, on z_T's device.

    eps_fn(x, t) -> predicted noise: x like z_T in float32, t the process time, a 0-dim float32
    tensor on the CPU, so that looking at it makes nobody wait for the device. A float64 z_T makes
    everything float64, for tests of convergence.
    algorithm, for either process: 'dpm_solver' (single-step 'fast', as the official evaluations
    call it: DPM-Solver for VPSDE, DPM-Solver++ for DiscreteSchedule), 'dpm_solver_upsample_g' (as
    they upsample), 'dpm_solver_pp_2m', or the class name of a diffusers scheduler, made for the
    process's betas; for VPSDE also 'euler_maruyama_sde' and 'euler_maruyama_ode'.
    steps: network calls (a second-order diffusers scheduler such as Heun's makes twice as many).
    noise: the images' ImageNoise, for stochastic algorithms; without it diffusers' draw from
    torch's global generator.
    on_step(i, n) is called after network call i = 1..n.
    UserError: unknown algorithm, no steps or more than a diffusers scheduler can do, Euler-Maruyama
    without noise or with another process than VPSDE.
    """
    if steps < 1:
        raise UserError(f"sampling takes at least 1 step, not {steps}")
    x = z_T.to(torch.promote_types(z_T.dtype, torch.float32))
    if algorithm in _ALGORITHMS:
        calls = steps
        solve = functools.partial(_ALGORITHMS[algorithm], process=process, steps=steps)
    elif algorithm in _diffusers_schedulers():
        scheduler = _make_scheduler(algorithm, process, steps)
        calls = len(scheduler.timesteps)
        solve = functools.partial(_run_scheduler, scheduler=scheduler)
    else:
        raise _unknown(algorithm)
    if on_step is not None:
        eps_fn = _counting(eps_fn, calls, on_step)
    return solve(eps_fn, x=x, noise=noise)
