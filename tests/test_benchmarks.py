"""The benchmarks of whole networks run, on tiny ones, and count the products that there are."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import bench_model  # noqa: E402
import model_report  # noqa: E402
import profile_step  # noqa: E402
import workloads  # noqa: E402
from bench_model import Case  # noqa: E402

from libs.model.dim import DiM  # noqa: E402
from libs.model.uvit import UViT  # noqa: E402


def tiny_dim(pixels, dim=16, depth=3):
    return DiM(input_size=pixels // 8, in_channels=4, dim=dim, depth=depth, num_classes=10)


def tiny_uvit(pixels, dim=32):
    return UViT(
        input_size=pixels // 8, in_channels=4, dim=dim, depth=4, heads=2, num_classes=10,
        final_conv=False,
    )  # fmt: skip


def tiny_dit(pixels, width=16):
    size = dict(num_layers=3, num_attention_heads=2, attention_head_dim=width)
    return workloads.DiT(pixels // 8, num_classes=10, **size)


TINY = {"DiM-H": tiny_dim, "U-ViT-H": tiny_uvit, "DiT-XL/2": tiny_dit}
FACTS = {"gpu": "Some GPU 1", "torch": "2.0", "commit": "abc"}


@pytest.fixture
def tiny_networks(monkeypatch):
    monkeypatch.setattr(workloads, "NETWORKS", TINY)
    monkeypatch.setattr(bench_model, "SECONDS", 0.01)
    monkeypatch.setattr(profile_step, "SKIPPED", 3)
    monkeypatch.setattr(profile_step, "STEPS", 2)


def counted_flops(network, pixels, batch=2):
    x, t, y = workloads.random_inputs(network, pixels, batch, "cpu")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(x, t, y)
    convolutions = sum(  # the depthwise ones are no matrix products, nor in the formula
        n for op, n in counter.get_flop_counts()["Global"].items() if "conv" in str(op)
    )
    patch_embedding = 2 * batch * x[0].numel() * patch_width(network)
    return (counter.get_total_flops() - convolutions + patch_embedding) / batch


def patch_width(network):
    return network.network.inner_dim if isinstance(network, workloads.DiT) else network.dim


@pytest.mark.parametrize(
    "make", [lambda p: tiny_dim(p, 128, 5), lambda p: tiny_uvit(p, 64), lambda p: tiny_dit(p, 32)]
)
@pytest.mark.parametrize("pixels", [128, 256])
def test_flops_of_the_formula_are_those_that_torch_counts(make, pixels, monkeypatch):
    monkeypatch.setenv("DIM_BACKEND", "reference")
    network = make(pixels).eval()
    assert workloads.product_flops(network, pixels) == pytest.approx(
        counted_flops(network, pixels), rel=0.01
    )


def test_published_networks_have_the_flops_of_the_literature():
    """DiT-XL/2: 118.6 GFLOPs a multiply-add counted once (arXiv 2212.09748, table 4), where
    attention's products and the conditioning of diffusers are extra; DiM-H: 1.69 a token."""
    with torch.device("meta"):
        dit, dim = workloads.NETWORKS["DiT-XL/2"](256), workloads.NETWORKS["DiM-H"](256)
    assert workloads.product_flops(dit, 256) / 2e9 == pytest.approx(118.6, rel=0.02)
    assert workloads.product_flops(dim, 256) / 366e9 == pytest.approx(1.69, rel=0.01)


def test_networks_follow_the_resolution():
    with torch.device("meta"):
        for pixels, layout in ((256, "lateral"), (512, "rho_pad"), (1024, "rho_pad")):
            network = workloads.NETWORKS["DiM-S"](pixels)
            assert (network.dim, network.depth, network.pad_layout) == (512, 25, layout)
            assert network.input_size == (pixels // 8,) * 2
        assert workloads.NETWORKS["U-ViT-H"](1024).input_size == (128, 128)
        large = workloads.NETWORKS["DiM-L"](512)
        assert (large.dim, large.depth, large.input_size) == (1024, 49, (64, 64))
        small = workloads.NETWORKS["DiM-S"](32)
    assert sum(p.numel() for p in small.parameters()) == 50_568_716


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("task", bench_model.TASKS)
def test_every_task_is_measured(model, task, tiny_networks):
    case = Case(model, task, 64, 2, "bf16")
    records, problem = bench_model.attempt(case, "cpu", peak=1e8)
    assert problem is None
    (r,) = records
    assert all(math.isfinite(r[k]) and r[k] > 0 for k in ("ms", "img_s", "mfu", "limit_ms"))
    network = TINY[model](64)
    factor = {"train": 3, "forward": 1, "sample": 2}[task]
    limit_ms = 1e3 * 2 * factor * workloads.product_flops(network, 64) / 1e8
    assert r["limit_ms"] == pytest.approx(limit_ms, abs=1e-3)
    steps = bench_model.IMAGE_STEPS if task == "sample" else 1
    assert r["img_s"] == pytest.approx(2e3 / r["ms"] / steps, rel=1e-2)


def test_training_step_trains(tiny_networks):
    torch.manual_seed(0)
    network = workloads.make_network("DiM-H", 64, "cpu", "bf16")
    step = workloads.training_step(network, 64, 8, "cpu", "bf16")
    losses = [step().item() for _ in range(40)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_sampling_keeps_matrices_in_bf16_and_changes_the_result_little(tiny_networks):
    torch.manual_seed(0)
    network = workloads.make_network("DiM-H", 64, "cpu", "bf16")
    inputs = workloads.random_inputs(network, 64, 2, "cpu")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = network.eval()(*inputs)
    evaluate = workloads.prepare_for_sampling(network, "cpu", "bf16")
    torch.testing.assert_close(evaluate(*inputs), before, rtol=0, atol=0)  # autocast rounds alike
    assert network.blocks[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert network.blocks[0].mixer.A_log.dtype == torch.float32


def test_what_cannot_run_leaves_one_line(tiny_networks, tmp_path, capsys, monkeypatch):
    def broken(pixels):
        raise ValueError("no such\nthing")

    monkeypatch.setitem(workloads.NETWORKS, "DiT-XL/2", broken)
    monkeypatch.setattr(bench_model, "product_peak", lambda device: 1e12)
    cases = [
        Case("DiT-XL/2", "forward", 64, 2, "bf16"),
        Case("U-ViT-H", "forward", 64, 2, "fp8"),
        Case("U-ViT-H", "forward", 64, 2, "bf16"),
    ]
    path = tmp_path / "model_some_gpu_1.json"
    assert bench_model.run(cases, path, FACTS, "cpu", minutes=5) == []
    lines = capsys.readouterr().out.splitlines()
    assert "DiT-XL/2 forward 64 2 bf16 eager: failed: ValueError: no such" in lines
    assert "U-ViT-H forward 64 2 fp8 eager: skipped: U-ViT-H has no fp8 products" in lines
    assert [r["model"] for r in json.loads(path.read_text())] == ["U-ViT-H"]
    bench_model.run(cases, path, FACTS, "cpu", minutes=-1)
    assert "no time for 3 cases" in capsys.readouterr().out


def fake(model="DiM-H", pixels=256, ms=1.0, commit="abc", graph=False, task="forward"):
    case = Case(model, task, pixels, 2, "bf16")
    peak = {"peak_tflops": 700.0, "gib": 1.0, "compile_s": None}
    figures = {"ms": ms, "spread": [ms, ms], "img_s": 2e3 / ms, "mfu": 0.5, "limit_ms": ms / 2}
    return {**case._asdict(), "graph": graph, **figures, **peak, **FACTS, "commit": commit}


def test_records_of_several_calls_add_up(tmp_path):
    path = model_report.result_path(tmp_path, "Some GPU 1")
    assert path.name == "model_some_gpu_1.json"
    old = [fake(ms=3.0), fake(ms=9.0, pixels=512)]
    model_report.write(path, old)
    new = [fake(ms=2.0), fake(ms=1.0, commit="def")]
    both = model_report.merged(model_report.load(path), new)
    assert [(r["ms"], r["commit"]) for r in both] == [(9.0, "abc"), (2.0, "abc"), (1.0, "def")]
    assert [r["ms"] for r in model_report.latest(both)] == [9.0, 1.0]
    model_report.write(path, both)
    rows = path.with_suffix(".md").read_text().splitlines()[4:]
    assert len(rows) == 2 and rows[0].startswith("| DiM-H | forward | 256 | 2 | bf16 | eager | 1.0")


def test_missing_cases_are_those_without_records_of_this_commit():
    case = Case("DiM-H", "forward", 256, 2, "bf16")
    assert not bench_model.is_done(case, [fake()], FACTS)  # its graph is not there
    assert bench_model.is_done(case, [fake(), fake(graph=True)], FACTS)
    assert not bench_model.is_done(case, [fake(), fake(graph=True, commit="def")], FACTS)


def test_picture_is_drawn_from_the_records_alone(tmp_path):
    pytest.importorskip("matplotlib")
    records = [fake(m, p, ms=p / 100) for m in TINY for p in (256, 1024)]
    records.append(fake(ms=0.5, graph=True))
    points = model_report.curves(records)["DiM-H"]
    assert points == [(256, 4000.0), (1024, pytest.approx(195.3, 1e-3))]
    model_report.write(tmp_path / "model_x.json", records)
    picture = tmp_path / "throughput.png"
    readme = tmp_path / "README.md"
    readme.write_text("before\n{}\nold\n{}\nafter\n".format(*model_report.MARKS))
    files = [f"--picture={picture}", f"--readme={readme}"]
    bench_model.main(["--draw", f"--out={tmp_path}", *files])
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = readme.read_text()
    assert "old" not in text and text.startswith("before\n") and text.endswith("\nafter\n")
    # the fastest of two ways, and dashes where nothing was measured
    assert "| forward, 256 px, batch 2, ms | - | - | 0.50 | - | 2.56 | 2.56 |" in text


def test_the_readme_has_the_table_of_the_records():
    (path,) = model_report.RESULTS.glob("model_*.json")
    text = (model_report.ROOT / "README.md").read_text(encoding="utf-8")
    assert model_report.summary(model_report.load(path)) in text


def test_bad_arguments_are_one_sentence(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--models=DiM-X"])
    assert "'DiM-X' is none of DiM-S, DiM-L" in capsys.readouterr().err


# ---------------------------------------- profile_step.py


def test_kernels_are_grouped_by_name():
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": "matrix products",
        "scan_forward_lanes<16, 4>": "scan",
        "sum_parts": "scan",
        "conv_backward": "convolution",
        "void at::native::conv_depthwise2d_forward_kernel": "convolution",
        "norm_backward": "norm, modulation, gate",
        "gate_forward": "norm, modulation, gate",
        "multi_tensor_apply_kernel<LpNormFunctor>": "optimizer, clipping, average",
        "at::native::FusedAdamMathFunctor": "optimizer, clipping, average",
        "Memcpy HtoD (Pinned -> Device)": "copies, casts, fills",
        "at::native::bfloat16_copy_kernel_cuda": "copies, casts, fills",
        "pytorch_flash::flash_fwd_kernel": "attention",
        "at::native::reduce_kernel<512, 1>": "other",
    }
    assert {name: profile_step.group_of(name) for name in names} == names


def test_busy_time_is_the_union_of_kernels():
    kernels = [("a", 0, 2000), ("b", 1000, 3000), ("c", 1500, 1600), ("d", 5000, 6000)]
    assert profile_step.busy_ms(kernels) == 4.0


def test_profile_of_steps_and_of_the_real_loop(tiny_networks):
    text = profile_step.report([profile_step.Target("DiM-H", 64, 2)], "cpu", FACTS, workers=0)
    sections = text.split("###")[1:]
    assert [s.splitlines()[0].split(",")[0] for s in sections] == [
        " Training step", " Sampling", " The loop of libs/train/loop.py",
    ]  # fmt: skip
    assert all("| matrix products |" in section for section in sections)
    assert "optimizer, clipping" not in sections[1] and "| optimizer, clipping" in sections[2]
    lines = [line.strip("| ") for line in sections[2].splitlines() if "| " in line]
    rows = dict(line.split(" | ", 1) for line in lines)
    assert rows["data loader"].startswith("1.0 |")  # one batch a step
    assert float(rows["aten::item"].split(" | ")[0]) >= 1  # the loss is looked at once


def test_loop_is_profiled_in_pixel_space(tiny_networks, monkeypatch):
    monkeypatch.setitem(
        workloads.NETWORKS, "DiM-S",
        lambda pixels: DiM(input_size=8, in_channels=3, dim=16, depth=3, num_classes=10),
    )  # fmt: skip
    target = profile_step.target("DiM-S:8:2")
    recording, ms = profile_step.profiled_loop(target, "cpu", workers=0)
    assert ms > 0 and recording.seconds > 0
    assert len(recording.host_calls()["aten::convolution"]) >= profile_step.STEPS


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replay_equals_the_eager_forward(tiny_networks):
    network = workloads.make_network("DiM-H", 64, "cuda", "bf16")
    evaluate = workloads.prepare_for_sampling(network, "cuda", "bf16")
    x, t, y = workloads.random_inputs(network, 64, 2, "cuda")
    replay = workloads.replayed(evaluate, torch.zeros_like(x), t, y)
    torch.testing.assert_close(replay(x, t, y), evaluate(x, t, y), rtol=0, atol=0)
