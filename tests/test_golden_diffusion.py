"""Processes, losses, samplers, learning rate and averaging against the official code's numbers."""

import functools
import types

import golden_cases
import pytest
import torch
from gaussian import noise_prediction, training_loss
from golden_cases import assert_close

from libs.diffusion.samplers import sample
from libs.train.ema import EMA
from libs.train.optimizer import warmup_constant
from sde import VPSDE, DiscreteSchedule

SAMPLER_TOL = 5e-6  # tolerances of the golden README
FEW_STEPS_TOL = 5e-4
MANY_STEPS_TOL = 1e-5
DIM_TOL = 3e-5
# Float64 results agree to rounding; the log-SNR grid amplifies it by 1 / (1 - alpha^2) = 1e5 at t =
# 1e-4.
FLOAT64_TOL = 1e-10
BF16_TOL = 2**-7


def tensors(arrays, *names):
    return [torch.from_numpy(arrays[name]) for name in names]


# --- schedules ---


@pytest.mark.parametrize("case, arrays", golden_cases.params("vpsde"))
def test_vpsde(case, arrays):
    process = VPSDE()
    t, x = tensors(arrays, "t", "x")
    results = {
        "squared_diffusion": process.g2(t),
        "diffusion": process.g2(t).sqrt(),
        "cum_alpha": process.alpha_bar(t),
        "cum_beta": 1 - process.alpha_bar(t),
        "drift": -0.5 * process.g2(t).reshape(-1, 1, 1, 1) * x,
        "marginal_mean": process.alpha(t).reshape(-1, 1, 1, 1) * x,
        "marginal_std": process.sigma(t),
    }
    for name, result in results.items():
        assert_close(result, arrays[name], SAMPLER_TOL, name)


@pytest.mark.parametrize("process, prefix", [(DiscreteSchedule(), "discrete"), (VPSDE(), "linear")])
@pytest.mark.parametrize("case, arrays", golden_cases.params("noise_schedules"))
def test_noise_schedules(case, arrays, process, prefix):
    t, lam = tensors(arrays, "t", f"{prefix}_lambda")
    assert_close(process.log_alpha(t), arrays[f"{prefix}_log_alpha"], SAMPLER_TOL, "log_alpha")
    assert_close(process.sigma(t), arrays[f"{prefix}_sigma"], SAMPLER_TOL, "sigma")
    # One float32 unit of alpha^2 at t = 1e-3, where sigma^2 is 1.1e-4, moves lam by 3e-4, 6e-5 of
    # its largest value.
    assert_close(process.half_log_snr(t), lam, 1e-4, "lam")
    late = t > 0.01
    assert_close(process.half_log_snr(t)[late], lam[late], SAMPLER_TOL, "lam at t > 0.01")
    expected = arrays[f"{prefix}_inverse_lambda_of_lambda"]
    assert_close(process.inverse_half_log_snr(lam), expected, SAMPLER_TOL, "inverse_lam")


@pytest.mark.parametrize("case, arrays", golden_cases.params("discrete_schedule"))
def test_discrete_lookups(case, arrays):
    process = DiscreteSchedule()
    for times in "t_grid", "t_frac":
        t, expected = tensors(arrays, times, f"cum_alpha_of_{times}")
        # Elementwise: a neighbouring index changes every entry by more than 1e-4 of itself.
        torch.testing.assert_close(process.alpha_bar(t), expected, rtol=1e-6, atol=0)
    middle = (torch.arange(case["N"] + 1, dtype=torch.float64) + 0.5) / case["N"]  # of a step
    (expected,) = tensors(arrays, "cum_alphas")
    torch.testing.assert_close(process.alpha_bar(middle), expected, rtol=1e-11, atol=0)


# --- training ---


def toy_loss_net(x, t, y):
    t, y = (None if v is None else v.reshape(-1, 1, 1, 1).to(x.dtype) for v in (t, y))
    return 0.7 * x + 0.3 * torch.sin(0.01 * t) + (0 if y is None else 0.05 * y)


def discrete_draws(arrays):
    """x0, eps, y, and the uniform draw and process time of the recorded steps n."""
    x0, eps, y, n = tensors(arrays, "x0", "eps", "y", "n")
    u = ((n.double() - 0.5) / 1000).float()
    return x0, eps, y, u, DiscreteSchedule().train_time(u)


@pytest.mark.parametrize("case, arrays", golden_cases.params("training_losses"))
def test_discrete_loss(case, arrays):
    process = DiscreteSchedule()
    x0, eps, y, u, t = discrete_draws(arrays)
    assert torch.equal(process.model_time(t), tensors(arrays, "discrete_t")[0])
    assert_close(process.mix(x0, eps, t), arrays["discrete_xn"], 1e-6, "x_n")
    for labels, name in (y, "discrete_toy_loss"), (None, "discrete_toy_loss_y_none"):
        loss = training_loss(toy_loss_net, process, x0, labels, pred="noise_pred", u=u, eps=eps)
        assert_close(loss, arrays[name], SAMPLER_TOL, name)


@pytest.mark.parametrize("case, arrays", golden_cases.params("training_losses"))
def test_discrete_loss_with_bfloat16_draws(case, arrays):
    """The official script also rounds the network's time; ours stays exact, so the network here
    rounds it.
    """
    process = DiscreteSchedule()
    x0, eps, y, u, t = discrete_draws(arrays)
    x0, eps = x0.bfloat16(), eps.bfloat16()
    times = []

    def rounding_net(x, time, y):
        times.append(time.to(x.dtype))
        return toy_loss_net(x, times[-1], y)

    x_n = process.mix(x0, eps, t)
    assert x_n.dtype == torch.bfloat16
    assert_close(x_n.float(), arrays["discrete_bf16_xn"], BF16_TOL, "x_n")
    loss = training_loss(rounding_net, process, x0, y, pred="noise_pred", u=u, eps=eps)
    assert loss.dtype == torch.float32
    assert_close(loss, arrays["discrete_bf16_toy_loss"], BF16_TOL, "loss")
    assert torch.equal(times[0].float(), tensors(arrays, "discrete_bf16_t")[0])


@pytest.mark.parametrize("case, arrays", golden_cases.params("training_losses"))
def test_vpsde_loss(case, arrays):
    process = VPSDE()
    x0, eps, y, u = tensors(arrays, "x0", "eps", "y", "u")
    t = process.train_time(u)
    assert_close(process.model_time(t), arrays["vpsde_network_time"], 1e-7, "network time")
    assert_close(process.mix(x0, eps, t), arrays["vpsde_xt"], 1e-6, "x_t")
    for pred, name in ("noise_pred", "vpsde_toy_loss"), ("x0_pred", "vpsde_x0pred_toy_loss"):
        loss = training_loss(toy_loss_net, process, x0, y, pred=pred, u=u, eps=eps)
        assert_close(loss, arrays[name], SAMPLER_TOL, name)


def dim_network(nnet_kwargs, weight_seed):
    from libs.model.published import model_from_official, to_official

    untrained = to_official(model_from_official(nnet_kwargs, None))
    shapes = [(name, tuple(value.shape)) for name, value in untrained.items()]
    weights = golden_cases.det_weights().det_state(shapes, weight_seed)
    state_dict = {name: torch.from_numpy(value) for name, value in weights.items()}
    return model_from_official(nnet_kwargs, state_dict).eval()


@pytest.mark.parametrize("case, arrays", golden_cases.params("training_losses"))
def test_loss_of_the_backbone(case, arrays):
    model = dim_network(case["dim_network"]["nnet_kwargs"], case["dim_network"]["weight_seed"])
    x0, eps, y, u, _ = discrete_draws(arrays)
    draws = ("discrete", DiscreteSchedule(), u), ("vpsde", VPSDE(), *tensors(arrays, "u"))
    for name, process, u in draws:
        with torch.no_grad():
            loss = training_loss(model, process, x0, y, pred="noise_pred", u=u, eps=eps)
        assert_close(loss, arrays[f"{name}_dim_loss"], DIM_TOL, name)


@pytest.mark.parametrize("case, arrays", golden_cases.params("lr_and_ema"))
def test_warmup(case, arrays):
    for key, lr_at_step in case["lr_at_step"].items():
        warmup_steps = int(key.removeprefix("warmup_"))
        for step, lr in lr_at_step.items():
            result = case["base_lr"] * warmup_constant(int(step), warmup_steps, None)
            assert result == pytest.approx(lr, rel=1e-12), (key, step)


@pytest.mark.parametrize("case, arrays", golden_cases.params("lr_and_ema"))
def test_ema(case, arrays):
    """Stages and rates are those of the case's "meaning"."""
    model = torch.nn.Module()
    model.lin = torch.nn.Linear(3, 2)
    model.register_buffer("count", torch.full((2,), 9.0))
    det_input = golden_cases.det_weights().det_input
    ema = EMA(model, [0, 0.9999, 0.9999, 0.9999, 0.9, 0.9].__getitem__)
    model.count.fill_(1.0)
    trajectory = arrays["ema_trajectory/lin.weight"]
    for stage in range(6):
        for name, parameter in model.named_parameters():
            value = det_input(f"ema{stage}/{name}", parameter.shape, case["seed"])
            parameter.data.copy_(torch.from_numpy(value))
        ema.update(model, stage)
        expected = trajectory[stage - 1] if stage else arrays["ema_after_init/lin.weight"]
        assert_close(ema.model.lin.weight, expected, 1e-6, f"stage {stage}")
    assert torch.equal(ema.model.count, tensors(arrays, "ema_buffer_after")[0])


# --- samplers ---


class Recorder:
    """The fixtures' toy network, and what it was called with."""

    def __init__(self, process, arrays):
        self.process = process
        self.mu, self.s = tensors(arrays, "mu64", "s")
        self.x, self.t, self.network_times = [], [], []

    def __call__(self, x, t):
        time = self.process.model_time(t).item()
        self.x.append(x)
        self.t.append(t)
        self.network_times.append(time)
        t = time / self.process.model_time(torch.tensor(1.0, dtype=torch.float64))
        return noise_prediction(x, self.mu, self.s, self.process.log_alpha(t)).to(x.dtype)


def run(process, arrays, algorithm, case, x, noise=()):
    """(Recorder, z_0) of a sampler from x, with recorded noise."""
    net, draw = Recorder(process, arrays), functools.partial(next, iter(noise))
    options = dict(pred="noise_pred", algorithm=algorithm, steps=case["steps"])
    return net, sample(net, process, x, **options, noise=types.SimpleNamespace(draw=draw))


@pytest.mark.parametrize("case, arrays", golden_cases.params("sampler_euler_maruyama"))
def test_euler_maruyama(case, arrays):
    kind = "sde" if "ReverseSDE(" in case["official_entry"] else "ode"
    x_init, noise = tensors(arrays, "x_init", "noise")
    start = VPSDE(), arrays, f"euler_maruyama_{kind}", case
    net, out = run(*start, x_init, noise)
    assert_close(net.network_times, case["network_times"], 1e-7, "network times")
    assert_close(torch.stack([*net.x, out]), arrays["trace"], SAMPLER_TOL, "trace")
    assert_close(out, arrays["out"], SAMPLER_TOL, "out")
    assert_close(run(*start, x_init.double(), noise)[1], arrays["out64"], FLOAT64_TOL, "out64")


def check_solver(start, arrays, out_tol, call_tol):
    (x_init,) = tensors(arrays, "x_init")
    net, out = run(*start, x_init)
    assert_close(torch.stack(net.t), arrays["call_t"], call_tol, "t at calls")
    assert_close(net.network_times, arrays["call_network_time"], call_tol, "network times")
    assert_close(torch.stack(net.x), arrays["call_x"], call_tol, "x at calls")
    assert_close(out, arrays["out"], out_tol, "out")
    assert_close(run(*start, x_init.double())[1], arrays["out64"], FLOAT64_TOL, "out64")


@pytest.mark.parametrize("case, arrays", golden_cases.params("sampler_dpm_solver_pytorch"))
def test_dpm_solver(case, arrays):
    out_tol = MANY_STEPS_TOL if case["steps"] >= 25 else FEW_STEPS_TOL
    check_solver((VPSDE(), arrays, "dpm_solver", case), arrays, out_tol, FEW_STEPS_TOL)


@pytest.mark.parametrize("case, arrays", golden_cases.params("sampler_dpm_solver_pp"))
def test_dpm_solver_pp(case, arrays):
    predict_x0 = case["defaults_in_effect"]["predict_x0"]
    algorithm = "dpm_solver" if predict_x0 else "dpm_solver_upsample_g"
    check_solver((DiscreteSchedule(), arrays, algorithm, case), arrays, SAMPLER_TOL, SAMPLER_TOL)
