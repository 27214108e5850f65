"""The benchmarks run, on tiny networks on the CPU, and count the products that there are."""

import json
import math
import subprocess
import sys
from argparse import Namespace

import numpy as np
import pytest
import runs
import torch
from writers import write_fashion_mnist

sys.path.insert(0, str(runs.ROOT / "benchmarks"))

import bench_data  # noqa: E402
import bench_model  # noqa: E402
import bench_ops  # noqa: E402
import bench_scaling  # noqa: E402
import harness  # noqa: E402
import networks  # noqa: E402
import recipes  # noqa: E402
from bench_model import Case  # noqa: E402

from libs.evaluate import Classifier  # noqa: E402
from libs.model import DiM, UViT  # noqa: E402
from libs.parts import make_parts  # noqa: E402

TINY = {
    "DiM-H": lambda pixels: DiM(
        input_size=pixels // 8, in_channels=4, dim=16, depth=3, num_classes=10
    ),
    "U-ViT-H": lambda pixels: UViT(
        input_size=pixels // 8, in_channels=4, dim=32, depth=4, heads=2, num_classes=10,
        final_conv=False,
    ),
    "DiT-XL/2": lambda pixels: networks.DiT(
        pixels // 8, num_classes=10, layers=3, heads=2, width=16
    ),
}  # fmt: skip
SETTING = {"gpu": "Some GPU 1", "torch": "2.0", "commit": "abc"}


@pytest.fixture
def tiny_networks(monkeypatch):
    monkeypatch.setattr(bench_model, "NETWORKS", TINY)
    monkeypatch.setattr(bench_model, "SECONDS", 0.01)


def test_published_networks_have_the_flops_of_the_literature():
    """DiT-XL/2: 118.6 GFLOPs a multiply-add counted once (arXiv 2212.09748, table 4), where
    attention's products and the conditioning of diffusers are extra; DiM-H: 1.69 a token."""
    with torch.device("meta"):
        dit, dim = networks.NETWORKS["DiT-XL/2"](256), networks.NETWORKS["DiM-H"](256)
    assert networks.count_flops(dit, 256) / 2e9 == pytest.approx(118.6, rel=0.02)
    assert networks.count_flops(dim, 256) / 366e9 == pytest.approx(1.69, rel=0.01)


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("task", bench_model.SHAPES)
def test_every_task_is_measured(model, task, tiny_networks):
    r = bench_model.measure(Case(model, task, 64, 2), "cpu", peak=1e8)
    assert all(math.isfinite(r[k]) and r[k] > 0 for k in ("ms", "img_s", "mfu", "limit_ms"))
    with torch.device("meta"):
        flops = networks.count_flops(TINY[model](64), 64)
    factor, steps = {"train": (3, 1), "forward": (1, 1), "sample": (2, 50)}[task]
    assert r["limit_ms"] == pytest.approx(1e3 * 2 * factor * flops / 1e8, abs=1e-3)
    assert r["img_s"] == pytest.approx(2e3 / r["ms"] / steps, rel=1e-2)


def test_training_step_trains(tiny_networks):
    torch.manual_seed(0)
    case = Case("DiM-H", "train", 64, 8)
    network = bench_model.make_network(case, "cpu")
    step, _ = bench_model.make_training_step(case, network, "cpu", None)
    losses = [step().item() for _ in range(60)]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert {p.dtype for p in network.parameters()} == {torch.float32}


def test_what_cannot_run_leaves_a_line_and_a_case_has_one_record(
    tiny_networks, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(TINY, "DiT-XL/2", lambda pixels: 1 / 0)
    monkeypatch.setattr(bench_model, "measure_peak", lambda device: 1e12)
    case, path = Case("U-ViT-H", "forward", 64, 2), tmp_path / "model_some_gpu_1.json"
    for commit in ("abc", "def"):
        cases = [Case("DiT-XL/2", "forward", 64, 2), case]
        assert bench_model.run(cases, path, {**SETTING, "commit": commit}, "cpu") == []
    assert "DiT-XL/2 forward 64 2 bf16 eager: ZeroDivisionError" in capsys.readouterr().out
    assert [r["commit"] for r in json.loads(path.read_text())] == ["def"]
    (row,) = path.with_suffix(".md").read_text().splitlines()[4:]
    assert row.startswith("| U-ViT-H | forward | 64 | 2 | bf16 | eager |") and "| def |" in row


def test_the_short_subset_names_cases_that_there_are():
    assert bench_model.HOLD <= set(map(str, bench_model.list_cases()))
    shapes = {f"bf16 {B} {L}" for B, L, _ in bench_ops.SHAPES}
    assert {case.split(" ", 1)[1] for case in bench_ops.HOLD} <= shapes


def test_records_of_the_repository_are_readable():
    records = harness.load(harness.RESULTS / "model_nvidia_h200.json")
    assert "| DiM-H | train | 256 | 64 | bf16 | eager |" in bench_model.make_table(records)
    records = harness.load(harness.RESULTS / "ops_nvidia_h200.json")
    assert bench_ops.make_cells(records[0])[:3] == ["selective_scan", "fwd", "bf16"]


def test_operators_on_the_cpu(tmp_path, capsys):
    bench_ops.main(["--device=cpu", "--only=cpu float32 1 ", "--repeats=2", f"--out={tmp_path}"])
    assert "| selective_scan (cpu, raster) | backward | float32 | 1 | 366 |" in (
        capsys.readouterr().out
    )
    passes = {r["pass"] for r in json.loads((tmp_path / "ops_cpu.json").read_text())}
    assert passes == {"forward", "backward", "forward+backward"}  # the last of the old records


@pytest.mark.slow
def test_scaling_of_two_processes(tmp_path):
    words = ["--models=tiny", "--gpus=1,2", "--engines=ddp", "--steps=2", f"--out={tmp_path}"]
    script = runs.ROOT / "benchmarks" / "bench_scaling.py"
    subprocess.run([sys.executable, script, *words], env=runs.environment(), check=True)
    records = json.loads((tmp_path / "scaling_cpu.json").read_text())
    assert [(r["mode"], r["gpus"], r["batch"]) for r in records] == [
        ("weak", 1, 8), ("weak", 2, 16), ("strong", 1, 16), ("strong", 2, 16),
    ]  # fmt: skip
    for r in records:
        assert r["step_s"] == pytest.approx(r["batch"] / r["img_s"])
        assert r["step_s"] == pytest.approx(r["compute_s"] + r["communication_s"])


SMALL = "nnet.dim=16 train.batch_size=4 train.num_workers=0 train.grid_samples=0"


def compose(recipe, changes=SMALL):
    """The config of a recipe with the defaults of the other flags."""
    flags = {**recipes.RUN, **recipes.SAMPLING, **recipes.PLACES, "recipe": recipe, "set": changes}
    return recipes.make_config(Namespace(**flags), 7)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_every_recipe_is_a_config(recipe):
    config = compose(recipe)
    assert make_parts(config).model.in_channels == 1 and config.train.n_steps == 7


def test_recipes_compose_and_stay_as_they_are():
    official, published = compose("official"), recipes.cifar10_S_DiM.get_config()
    for key in ("pred", "optimizer", "lr_scheduler", "max_grad_norm"):
        assert official[key] == published[key], key
    assert (official.process.to_dict(), official.loss.to_dict()) == ({"name": "vpsde"}, {"mse": 1})
    both = compose("internal,direction", SMALL + " loss.internal.block=3 loss.direction=0.25")
    terms = {"mse": 1, "internal": {"weight": 0.5, "block": 3}, "direction": 0.25}
    assert (both.loss.to_dict(), both.process.name) == (terms, "flow")
    assert compose("internal").loss.internal.block == 8


def test_a_step_of_a_routed_recipe_is_the_mean_of_both_kinds():
    rates = {step: 40.0 for step in range(60, 181, 10)} | {50: 1.0, 190: 2.0, 200: 20.0}
    assert recipes.find_step_ms(rates, 200, compose("routing")) == pytest.approx(90 + 20)
    assert recipes.find_step_ms(rates, 200, compose("flow")) == pytest.approx(100)


def test_a_row_is_trained_measured_recorded_and_not_made_again(tmp_path, in_process, monkeypatch):
    scripts, data, features = [], tmp_path / "data", tmp_path / "classifier.npz"

    def run(words, check):
        scripts.append(recipes.Path(words[1]).stem)
        assert in_process(scripts[-1], words[2:]) == 0

    monkeypatch.setattr(recipes, "subprocess", Namespace(run=run))
    monkeypatch.setattr(recipes, "DEVICE", "cpu")
    monkeypatch.setattr(harness, "describe_setting", lambda device, commit: SETTING)
    for part in ("train", "t10k"):
        write_fashion_mnist(data, part, gz=True)
    np.savez(features, **Classifier(channels=1, num_classes=10).state_dict())
    words = ["--recipe=flow,internal", "--seconds=0.2", "--step_ms=100", "--n=20", "--steps=2"]
    words += [f"--{k}={v}" for k, v in dict(data=data, features=features, out=tmp_path).items()]
    words += [f"--workdir={tmp_path}/runs", f"--set={SMALL} nnet.depth=9", "--sampler=heun"]
    words.append("--internal_scale=0.5")
    for more in ["--scale=0"], ["--scale=0"], ["--scale", "0", "0.4"]:
        recipes.main([*words, *more])
    assert scripts == ["train", "eval", "eval"]
    first, second = json.loads((tmp_path / "recipes_cpu.json").read_text())
    assert (first["network_calls"], second["network_calls"]) == (3, 6)  # Heun ends with Euler
    assert (first["guidance"], second["guidance"], second["internal_guidance"]) == (0, 0.4, 0.5)
    assert first.items() >= {**SETTING, "steps": 2, "n": 20, "sampler": "heun", "seed": 0}.items()
    assert (first["seconds"], first["step_ms"]) == (0.2, 100)
    assert math.isfinite(first["frechet_distance"]) and len(first["features_sha256"]) == 64
    assert (tmp_path / "recipes_cpu.md").read_text().count("| flow,internal |") == 2


def test_pictures_and_tables_show_the_best_evaluation_and_all_of_the_longest(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(recipes, "DOCS", tmp_path)
    made = {**dict.fromkeys([*recipes.COLUMNS, *recipes.OF_SAMPLING], 0), **SETTING, "set": ""}
    made |= {"recipe": "flow", "seconds": 89.96, "seconds_asked": 90, "img_s": 117.25}
    figures = (0.0, 3.25), (0.4, 1.125), (0.8, 2.5)
    records = [{**made, "guidance": scale, "frechet_distance": x} for scale, x in figures]
    (tmp_path / "records.json").write_text(json.dumps(records))
    documents = [tmp_path / name for name in ("training.md", "performance.md")]
    for path in documents:
        path.write_text(f"before\n{recipes.MARK}old\n{recipes.MARK}after\n")
    recipes.main([f"--draw={tmp_path}/records.json"])
    found = [path.read_text().split(recipes.MARK) for path in documents]
    assert all((before, after) == ("before\n", "after\n") for before, _, after in found)
    assert all((tmp_path / name).stat().st_size for name in ("recipes.png", "sampling.png"))
    best, every = (table.splitlines()[4:] for _, table, _ in found)
    assert best[-1].startswith("| 89.96 | flow | 0 | 0.4 |") and "| 1.125 |" in best[-1]
    assert [line.count("| 117.2 |") for line in every[-3:]] == [1, 1, 1]


def test_latents_of_the_scaling_benchmark_need_no_autoencoder(tmp_path):
    bench_data.write_packed(tmp_path / "latents", 256, flips=False, size=1 << 19)
    job = dict(model="L", steps=2, batch=8, saves=True, accumulation=1, folder=tmp_path)
    config = bench_scaling.make_config(job)
    config.nnet.update(dim=16, depth=3)
    found = make_parts(config, data="training")
    assert len(found.dataset) == 32 and found.codec.latent_shape((8, 32, 32)) == (4, 32, 32)
