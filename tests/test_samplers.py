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
from sde import VPSDE, DiscreteSchedule, Flow
from utils import UserError

# diffusers' own, thousands of them under numpy 2
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MU, S = 0.3, 0.5
VP = {"vpsde": VPSDE(), "discrete": DiscreteSchedule()}
PROCESSES = {**VP, "flow": Flow()}


def run(process, x, pred="noise_pred", output=None, **options):
    output = output or gaussian.prediction(process, pred, MU, S)
    return sample(output, process, x, pred=pred, **options)


def solver_error(process, algorithm, steps, t_end):
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    # On a grid of log-SNR a flow is taken from t = 0.999 to 0.001.
    t_start = 1 - t_end if isinstance(process, Flow) else 1.0
    expected = gaussian.ode_solution(process, x, MU, S, t_end, t_start)
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
    ("vpsde", "heun", (200, 400), 0, 1.9),
    ("flow", "dpm_solver", (320, 641), 1e-3, 2.85),
    ("flow", "dpm_solver_pp_2m", (80, 160), 1e-3, 1.9),
    # A grid even in time makes its last step the largest in lam, 0.4 at 500 steps: the order
    # appears late.
    ("discrete", "dpm_solver", (161, 320), 1e-3, 2.4),
    ("discrete", "dpm_solver_pp_2m", (320, 640), 1e-3, 1.8),
])
def test_order_of_convergence(process, algorithm, steps, t_end, order):
    coarse, fine = (solver_error(PROCESSES[process], algorithm, n, t_end) for n in steps)
    assert fine < 3e-3
    assert math.log(coarse / fine) / math.log(steps[1] / steps[0]) > order


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("algorithm, steps, calls, order, error", [
    ("euler", 200, 200, 0.95, 7e-2), ("heun", 100, 199, 1.9, 2e-2),
    ("adams_bashforth", 200, 200, 1.9, 2.5e-3),
])
def test_order_on_a_mixture(algorithm, steps, calls, order, error, shift):
    """Where the velocity is not linear in x, and the flow keeps quantiles; in quantiles of x_1."""
    process, mixture, times = Flow(shift=shift), gaussian.Mixture(), []
    x = torch.linspace(-2.5, 2.5, 41, dtype=torch.float64).reshape(1, 1, 1, 41)

    def output(x, t):
        times.append(t.item())
        return mixture.velocity(x, t)

    def get_error(steps):
        x_0 = run(process, x, "velocity_pred", output, algorithm=algorithm, steps=steps)
        return (mixture.normal_quantile(x_0) - x).abs().max().item()

    coarse, fine = get_error(steps // 2), get_error(steps)
    assert fine < error and math.log2(coarse / fine) > order
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    expected = process.shift_time(even)[:-1].tolist()
    assert sorted(set(times[-calls:]), reverse=True) == pytest.approx(expected, rel=1e-12)


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
    *itertools.product(VP, ["euler", "dpm_solver", "dpm_solver_pp_2m", "DDIMScheduler"]),
])
def test_what_the_output_and_on_call_receive(process, algorithm):
    """And both predictions give the same images."""
    x = torch.linspace(-3, 3, 64, dtype=torch.float64).reshape(1, 1, 8, 8)
    found, expected = (
        run(PROCESSES[process], x, pred, algorithm=algorithm, steps=7)
        for pred in ("x0_pred", "noise_pred")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    process, times, steps, predicted, expected = PROCESSES[process], [], [], [], []
    weight = torch.ones((), requires_grad=True)

    def output(x, t):
        assert x.dtype == t.dtype == torch.float32 and t.shape == () and t.device.type == "cpu"
        times.append(t.item())
        expected.append(x * (1 - process.sigma(t)) / process.alpha(t))
        return x * weight

    z_T = torch.ones(2, 1, 2, 2, dtype=torch.bfloat16)
    out = sample(output, process, z_T, pred="noise_pred", algorithm=algorithm, steps=7,
                 on_call=lambda *step: (steps.append(step[:3]), predicted.append(step[3])))
    assert out.dtype == torch.float32 and not out.requires_grad
    assert times[0] == 1 and times == sorted(times, reverse=True)
    assert steps == [(i, 7, t) for i, t in enumerate(times, 1)]
    # The noise is predicted as x itself: x_0 = (x - sigma x) / alpha, float32's rounding apart.
    torch.testing.assert_close(torch.stack(predicted), torch.stack(expected))


# --- stochastic samplers and diffusers ---


@pytest.mark.parametrize("process", PROCESSES)
def test_every_algorithm_makes_the_distribution(process):
    process = PROCESSES[process]
    offered = {name for name, (*_, needs) in SAMPLERS.items()
               if all(hasattr(process, attribute) for attribute in needs)}
    assert {"euler", "heun", "adams_bashforth", "dpm_solver_pp_2m"} <= offered
    # With x0_pred VP processes make the same images as with noise_pred, see above.
    preds = process.predictions if isinstance(process, Flow) else ["noise_pred"]
    for name, pred in itertools.product(sorted(offered), preds):
        noise = ImageNoise(0, range(64), (1, 8, 8))
        out = run(process, noise.draw(), pred, algorithm=name, steps=100, noise=noise)
        assert out.mean().item() == pytest.approx(MU, abs=0.04), (name, pred)
        assert out.std().item() == pytest.approx(S, abs=0.05), (name, pred)


def test_marginals_of_the_sde_of_flow():
    """x_t ~ N(alpha mu, alpha^2 s^2 + t^2) all the way, while x_1 is forgotten at the rate of
    w / (2 variance), w = t, until the last step.
    """
    steps, seen, noise = 200, {}, ImageNoise(0, range(256), (1, 8, 8))
    velocity = gaussian.prediction(Flow(), "velocity_pred", MU, S)

    def output(x, t):
        return velocity(seen.setdefault(t.item(), x), t)

    given = dict(algorithm="euler_maruyama_flow", steps=steps, noise=noise)
    seen[0.0] = run(Flow(), noise.draw(), "velocity_pred", output, **given)
    for t, x in seen.items():  # 16,384 numbers: 0.03 is 4 standard errors
        assert x.mean().item() == pytest.approx((1 - t) * MU, abs=0.03)
        assert x.std().item() == pytest.approx(math.hypot((1 - t) * S, t), abs=0.03)
    t = torch.linspace(1 / steps, 1, 10_001, dtype=torch.float64)
    forgotten = torch.trapezoid(t / (2 * ((1 - t)**2 * S**2 + t**2)), t)
    found = torch.corrcoef(torch.stack([seen[1.0].flatten(), seen[0.0].flatten()]))[0, 1].item()
    assert found == pytest.approx(math.exp(-forgotten), abs=0.02)


@pytest.mark.parametrize("process, algorithm", [
    ("vpsde", "euler_maruyama_sde"), ("vpsde", "DDPMScheduler"), ("flow", "euler_maruyama_flow"),
    ("vpsde", "EulerAncestralDiscreteScheduler")])
def test_an_image_does_not_depend_on_its_batch(process, algorithm):
    def images(indices):
        noise = ImageNoise(3, indices, (1, 4, 4))
        return run(PROCESSES[process], noise.draw(), algorithm=algorithm, steps=10, noise=noise)

    together = images([4, 5, 6, 7])
    assert torch.equal(together[[2]], images([6]))
    assert torch.equal(together[[3, 1]], images([7, 5]))
    assert not torch.equal(together[2], together[3])


# --- noise ---


def test_image_noise_belongs_to_the_image():
    shape = (3, 5, 7)
    batch = ImageNoise(1, [0, 1, 2**31], shape)
    alone, swapped = ImageNoise(1, [1], shape), ImageNoise(1, [2**31, 0], shape)
    first, second = batch.draw(), batch.draw()
    assert first.shape == (3, *shape) and first.dtype == torch.float32
    assert torch.equal(first[[1]], alone.draw()) and torch.equal(second[[1]], alone.draw())
    assert torch.equal(first[[2, 0]], swapped.draw())
    different = [first[0], first[1], second[0], ImageNoise(2, [0], shape).draw()[0]]
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
    ("flow", "euler_maruyama_sde", "euler_maruyama_sde needs g2, which process Flow"),
    ("flow", "DDIMScheduler", "DDIMScheduler needs betas, which process Flow"),
    ("flow", "dpm_solver_upsample_g", "upsample_g needs alpha_bar, which process Flow"),
    ("vpsde", "euler_maruyama_flow", "flow needs shift_time, which process VPSDE"),
])
def test_errors(process, algorithm, message):
    with pytest.raises(UserError, match=message):
        run(PROCESSES[process], torch.zeros(1, 1, 2, 2), algorithm=algorithm, steps=2)
