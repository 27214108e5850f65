"""Samplers on a Gaussian, whose denoiser and probability flow are known in closed form, and the
images' noise.
"""

import itertools
import math

import gaussian
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from libs.diffusion.noise import ImageNoise, _splitmix64, image_seed
from libs.diffusion.samplers import SAMPLERS, sample
from sde import VPSDE, DiscreteSchedule
from utils import UserError

# diffusers' own, thousands of them under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MU, S = 0.3, 0.5
PROCESSES = {"vpsde": VPSDE(), "discrete": DiscreteSchedule()}


def run(process, x, pred="noise_pred", **options):
    output = gaussian.prediction(process, pred, MU, S)
    return sample(output, process, x, pred=pred, **options)


def solver_error(process, algorithm, steps, t_end):
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    expected = gaussian.ode_solution(process, x, MU, S, t_end)
    return (run(process, x, algorithm=algorithm, steps=steps) - expected).abs().max().item()


# --- solvers ---


@pytest.mark.parametrize("process, algorithm, steps, t_end, order", [
    # Step counts of the form 3k + 2 end 'fast' in a block of order 2, which leaves the global order
    # at 3.
    ("vpsde", "dpm_solver", (80, 161), 1e-4, 2.9),
    ("vpsde", "dpm_solver_pp_2m", (80, 160), 1e-4, 1.9),
    ("vpsde", "euler_maruyama_ode", (400, 800), 0, 0.95),
    ("vpsde", "euler", (400, 800), 0, 0.95),
    ("discrete", "euler", (400, 800), 0, 0.95),
    # A grid even in time makes its last step the largest in lam, 0.4 at 500 steps: the order
    # appears late.
    ("discrete", "dpm_solver", (161, 320), 1e-3, 2.4),
    ("discrete", "dpm_solver_pp_2m", (320, 640), 1e-3, 1.8),
])
def test_order_of_convergence(process, algorithm, steps, t_end, order):
    coarse, fine = (solver_error(PROCESSES[process], algorithm, n, t_end) for n in steps)
    assert fine < 3e-3
    assert math.log(coarse / fine) / math.log(steps[1] / steps[0]) > order


def test_2m_is_diffusers_2m():
    """On a grid of whole steps: 999 intervals in 27, ending at step 1, all of order 2 after the
    first.
    """
    process, steps = DiscreteSchedule(), 27
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=process.betas().numpy(), algorithm_type="dpmsolver++",
        solver_order=2, lower_order_final=False, timestep_spacing="linspace",
        final_sigmas_type="sigma_min")
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == list(range(999, 0, -37))
    predict = gaussian.prediction(process, "noise_pred", MU, S)
    x_init = x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        x = scheduler.step(predict(x, (timestep + 1) / 1000), timestep, x).prev_sample
    # Its betas and sigmas are float32 and lose 1e-5 of lam at the last step.
    ours = run(process, x_init, algorithm="dpm_solver_pp_2m", steps=steps)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("process, algorithm", [
    ("vpsde", "euler_maruyama_ode"),
    *itertools.product(PROCESSES, ["euler", "dpm_solver", "dpm_solver_pp_2m", "DDIMScheduler"]),
])
def test_what_the_output_and_on_step_receive(process, algorithm):
    """And both predictions give the same images."""
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    found, expected = (
        run(PROCESSES[process], x, pred, algorithm=algorithm, steps=7)
        for pred in ("x0_pred", "noise_pred")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    times, steps = [], []
    weight = torch.ones((), requires_grad=True)

    def output(x, t):
        assert x.dtype == t.dtype == torch.float32 and t.shape == () and t.device.type == "cpu"
        times.append(t.item())
        return x * weight

    z_T = torch.ones(2, 1, 2, 2, dtype=torch.bfloat16)
    out = sample(output, PROCESSES[process], z_T, pred="noise_pred", algorithm=algorithm, steps=7,
                 on_step=lambda i, n: steps.append((i, n)))
    assert out.dtype == torch.float32 and not out.requires_grad
    assert times[0] == 1 and times == sorted(times, reverse=True)
    assert steps == [(i, 7) for i in range(1, 8)]


# --- stochastic samplers and diffusers ---


@pytest.mark.parametrize("process", PROCESSES)
def test_every_algorithm_makes_the_distribution(process):
    for name, (_, _, needs) in SAMPLERS.items():
        if all(hasattr(PROCESSES[process], attribute) for attribute in needs):
            noise = ImageNoise(0, range(64), (1, 8, 8))
            options = dict(algorithm=name, steps=100, noise=noise)
            out = run(PROCESSES[process], noise.initial(), **options)
            assert out.mean().item() == pytest.approx(MU, abs=0.04), name
            assert out.std().item() == pytest.approx(S, abs=0.05), name


@pytest.mark.parametrize("algorithm", [
    "euler_maruyama_sde", "DDPMScheduler", "EulerAncestralDiscreteScheduler"])
def test_an_image_does_not_depend_on_its_batch(algorithm):
    def images(indices):
        noise = ImageNoise(3, indices, (1, 4, 4))
        return run(VPSDE(), noise.initial(), algorithm=algorithm, steps=10, noise=noise)

    together = images([4, 5, 6, 7])
    assert torch.equal(together[[2]], images([6]))
    assert torch.equal(together[[3, 1]], images([7, 5]))
    assert not torch.equal(together[2], together[3])


# --- noise ---


def test_image_noise_belongs_to_the_image():
    shape = (3, 5, 7)
    batch = ImageNoise(1, [0, 1, 2**31], shape)
    alone, swapped = ImageNoise(1, [1], shape), ImageNoise(1, [2**31, 0], shape)
    first, second = batch.initial(), batch.draw()
    assert first.shape == (3, *shape) and first.dtype == torch.float32
    assert torch.equal(first[[1]], alone.initial()) and torch.equal(second[[1]], alone.draw())
    assert torch.equal(first[[2, 0]], swapped.initial())
    assert torch.equal(first, batch.initial())
    different = [first[0], first[1], second[0], ImageNoise(2, [0], shape).initial()[0]]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(different, 2))


def test_image_seeds():
    """SplitMix64's published first output for state 0; and no two images share a 32-bit seed
    (random ones would: 1 - 1e-5).
    """
    assert _splitmix64(0) == 0xE220A8397B1DCDAF
    seeds = {image_seed(0, index) for index in range(300_000)}
    assert len(seeds) == 300_000
    assert max(seeds) < 2**32


# --- errors ---


@pytest.mark.parametrize("process, algorithm, message", [
    ("vpsde", "ddim", "sample.algorithm is 'ddim'.*euler_maruyama_sde.*DDIMScheduler"),
    ("discrete", "euler_maruyama_ode", "euler_maruyama_ode needs g2, which process Discrete"),
])
def test_errors(process, algorithm, message):
    with pytest.raises(UserError, match=message):
        run(PROCESSES[process], torch.zeros(1, 1, 2, 2), algorithm=algorithm, steps=2)
