"""Evaluations that are interrupted, the files they claim, and what they write."""

import importlib
import json
import shutil
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import runs
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import utils
from configs.common import d
from libs.data.codec import PixelCodec
from libs.evaluate import features as features_module
from libs.evaluate import generate, metrics
from libs.evaluate.features import Classifier, DigitsClassifierFeatures, Extractors
from libs.evaluate.real import load_real
from libs.evaluate.run import run_evaluation
from libs.files import hash_file
from libs.model.build import build_model
from libs.parts import open_dataset
from libs.runtime import flags
from libs.runtime.launch import make_accelerator
from sde import VPSDE
from utils import UserError, read_json

N, BATCH = 40, 5
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def random_weights(path, seed, nnet):
    """A network whose every weight matters, without training one."""
    torch.manual_seed(seed)
    model = build_model(nnet)
    for tensor in model.parameters():
        if tensor.ndim > 1:
            torch.nn.init.normal_(tensor, std=0.1)
    save_file(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights, and an untrained classifier for features."""
    folder = tmp_path_factory.mktemp("files")
    config = parse(folder / "none").config
    random_weights(folder / "a.safetensors", 0, config.nnet)
    random_weights(folder / "b.safetensors", 1, config.nnet)
    torch.manual_seed(0)
    save_file(
        Classifier(channels=1, num_classes=10).state_dict(), folder / "classifier.safetensors"
    )
    return folder


def words(folder, files=None, weights="a", **changes):
    """The command line of an evaluation that writes all it can into `folder`."""
    changes = {
        "sample__n_samples": N, "sample__mini_batch_size": BATCH, "sample__sample_steps": 3,
        "sample__path": folder / "png", "sample__adm_npz": folder / "images.npz", **changes,
    }  # fmt: skip
    if files:
        changes["sample__fid_weights_path"] = files / "classifier.safetensors"
    weights = f"--nnet_path={files}/{weights}.safetensors"
    where = f"--output_path={folder / 'result.json'}"
    return [*runs.arguments(folder / "run", **changes), weights, where]


def parse(folder, files=None, **changes):
    script = importlib.import_module("eval")
    return flags.parse_flags(["eval.py", *words(folder, files, **changes)], script.FLAGS)


def evaluate(folder, files, **changes):
    """eval.py in this process; UserErrors are raised."""
    runs.fresh_state()
    importlib.import_module("eval").main(parse(folder, files, **changes))
    return read_json(folder / "result.json")


def figures(result):
    return {key: result[key] for key in ("frechet_distance", "class_agreement", "precision_recall")}


def pictures(folder, n=N):
    return np.stack([np.asarray(Image.open(folder / "png" / f"{i}.png")) for i in range(n)])


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, evaluate(folder, files, sample__sample_steps=20)


# ---------------------------------------------------------------------------------------------
# Interruptions


def kill(process):
    """kill -9 a launcher and its processes, which are no longer of its group."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone[:-1], timeout=10)
    process.wait()


def test_kill_9_of_two_processes_then_one(files, undisturbed, tmp_path):
    """The same files and figures, bit for bit, as of one process that was not killed; batches that
    were done are not made again.
    """
    steps, partial = dict(sample__sample_steps=20), tmp_path / "result.partial"
    process = runs.start("eval.py", *words(tmp_path, files, **steps), num_processes=2)
    deadline = time.monotonic() + 120
    while not list(partial.glob("*.npz")) and time.monotonic() < deadline:
        assert process.poll() is None, runs.finish(process)
        time.sleep(0.01)
    kill(process)
    done = [int(path.stem) for path in partial.glob("0*.npz")]
    assert 0 < len(done) < N // BATCH and not (tmp_path / "result.json").exists()
    pngs = [tmp_path / "png" / f"{BATCH * k}.png" for k in done]
    before = [png.stat().st_mtime_ns for png in pngs]
    result = evaluate(tmp_path, files, **steps)
    assert [png.stat().st_mtime_ns for png in pngs] == before and result["ranks"] == (0,)
    assert result["images_made_now"] == N - BATCH * len(done)
    folder, expected = undisturbed
    assert figures(result) == figures(expected)
    for name in ("images.npz", *(f"png/{i}.png" for i in range(N))):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert not partial.exists() and pictures(tmp_path).std() > 10


@pytest.fixture
def interrupt(files, monkeypatch):
    """interrupt(folder, after): an evaluation that ends with the disk, after so many batches."""

    def call(folder, after, **changes):
        replacing, left = utils.replacing, iter(range(after))

        def fail(path):
            if str(path).endswith(".npz") and next(left, None) is None:
                raise OSError("disk full")
            return replacing(path)

        with monkeypatch.context() as patch:
            patch.setattr(utils, "replacing", fail)
            with pytest.raises(OSError, match="disk full"):
                evaluate(folder, files, **changes)

    return call


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(sample__sample_steps=4), "steps: 3 -> 4"),
        (dict(sample__scale=0.5), "guidance_scale: 0.4 -> 0.5"),
        (dict(sample__mini_batch_size=4), "mini_batch_size: 5 -> 4"),
        (dict(weights="b"), "weights.sha256: "),
        (dict(nnet__skip_tuning="(0.8,1)"), "nnet.skip_tuning: None -> (0.8, 1)"),
        (dict(sample__path=""), "pictures.path: "),
    ],
)
def test_another_setting_is_refused(files, interrupt, tmp_path, changes, says):
    """Nothing is overwritten or deleted, and the first setting goes on afterwards."""
    interrupt(tmp_path, 2)
    before = runs.snapshot(tmp_path)
    with pytest.raises(UserError, match="is of another evaluation") as caught:
        evaluate(tmp_path, files, **changes)
    assert says in str(caught.value) and "another --output_path" in str(caught.value)
    assert runs.snapshot(tmp_path) == before
    if "weights" in changes:
        (files / "copy.safetensors").write_bytes((files / "a.safetensors").read_bytes())
        result = evaluate(tmp_path, files, weights="copy")
        assert result["images_made_now"] == N - 2 * BATCH, "the same weights in another place"


class NaN(PixelCodec):
    """Its image of index 1 in a batch contains NaN."""

    def decode(self, z):
        images = super().decode(z)
        images[1, 0, 0, 0] = float("nan")
        return images


def test_images_that_are_not_finite_are_told_and_never_done(latent, tmp_path):
    """By sample.py and, before a batch is written, by an evaluation."""
    image_sampler = make_image_sampler(tmp_path, codec=NaN(), sample__mini_batch_size=4)
    with pytest.raises(UserError, match="images that are not finite: image 1 .*sample.scale"):
        image_sampler.draw_rows(None, 1)
    with pytest.raises(UserError, match="images that are not finite: image 1 "):
        latent(NaN(), sample__features="none")
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.npz"))


# ---------------------------------------------------------------------------------------------
# Files of others


@pytest.mark.parametrize(
    "name, flag",
    [
        ("png/0.png", "--config.sample.path"),
        ("result.partial/notes.txt", "--output_path"),
        ("result.json", "result.json"),
        ("images.npz", "images.npz"),
    ],
)
def test_files_of_others_stay(files, tmp_path, name, flag):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=flag):
        evaluate(tmp_path, files)
    assert (tmp_path / name).read_text() == "mine"
    found = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert found - {"evaluation.json"} == {name.split("/")[-1]}


def test_a_finished_evaluation_may_be_repeated(files, tmp_path):
    first = evaluate(tmp_path, files, sample__n_samples=8)
    again = evaluate(tmp_path, files, sample__n_samples=8)
    assert figures(again) == figures(first) and again["images_made_now"] == 8
    with pytest.raises(UserError, match="result.json is of another evaluation .n: 8 -> 9."):
        evaluate(tmp_path, files, sample__n_samples=9)


# ---------------------------------------------------------------------------------------------
# What is written


def test_the_npz_of_adm_has_the_pictures(undisturbed):
    folder, _ = undisturbed
    with zipfile.ZipFile(folder / "images.npz") as archive:
        assert [entry.compress_type for entry in archive.infolist()] == [zipfile.ZIP_STORED]
    with np.load(folder / "images.npz") as file:
        images = file["arr_0"]
    assert images.shape == (N, 8, 8, 3) and images.dtype == np.uint8
    assert all((images[..., c] == pictures(folder)).all() for c in range(3)), "grey, three times"


def test_the_record_is_whole(undisturbed, files):
    folder, result = undisturbed
    assert result["weights"]["sha256"] == hash_file(files / "a.safetensors")
    images = result["statistics"]["images"]
    assert images["dataset"] == "digits" and len(images["list_sha256"]) == 64
    assert result["statistics"]["file"] is None and result["statistics"]["count"] == 1797
    assert result["features"].startswith("digits_classifier-") and result["img_s"] > 0
    assert result["n"] == N and result["nnet"]["dim"] == 16 and result["labels"] == "balanced"
    assert result["precision_recall"]["real"] == 1797 and result["fp8"] is False
    assert result["precision_recall"]["generated"] == N
    halves = result["real_halves"]
    assert halves["pairs"] == 20 and 1 < halves["ratio"]
    assert halves["ratio"] * halves["frechet_distance"] == pytest.approx(result["frechet_distance"])
    assert read_json(folder / "png" / "evaluation.json")["weights"] == result["weights"]


def test_repeats_are_evaluations_by_other_seeds(files, tmp_path):
    """Mean and spread of the figures; PNG files of the first seed alone."""
    changes = dict(sample__n_samples=8, sample__mini_batch_size=4)
    both = evaluate(tmp_path / "both", files, **changes, sample__repeats=2)
    found = [
        evaluate(tmp_path / name, files, **changes, seed=seed)
        for name, seed in (("first", 1234), ("second", 1235))
    ]
    distances = [result["frechet_distance"] for result in found]
    assert [figures["frechet_distance"] for figures in both["each"]] == distances
    assert both["frechet_distance"] == pytest.approx(np.mean(distances))
    assert both["spread"]["frechet_distance"] == pytest.approx(np.std(distances, ddof=1)) != 0
    assert both["precision_recall.k"] == 3 and both["repeats"] == 2
    assert (pictures(tmp_path / "both", 8) == pictures(tmp_path / "first", 8)).all()


def test_features_and_metrics_by_name(files, tmp_path, monkeypatch):
    """A feature network and a metric of one's own are a class in a table and a function."""

    class Means:
        name, dim = "means", 1

        def __init__(self, path, device):
            pass

        def __call__(self, images):
            return images.mean((1, 2, 3))[:, None]

    def gap(generated, real):
        return float(abs(generated.features.mean() - real.features.mean()))

    monkeypatch.setitem(features_module.FEATURES, "means", Means)
    monkeypatch.setitem(metrics.METRICS, "gap", None)
    metrics.metric("gap")(gap)
    result = evaluate(tmp_path, files, sample__features="means", sample__metrics="standard,gap")
    digits = open_dataset(parse(tmp_path).config)
    real = np.mean([digits[0, i][0].numpy() / 2 + 0.5 for i in range(len(digits))])
    # Real images are rounded to 8 bits.
    assert result["gap"] == pytest.approx(abs(pictures(tmp_path).mean() / 255 - real), abs=1e-3)
    assert result["class_agreement"] is None and result["features"] == "means"


def make_image_sampler(tmp_path, codec=None, **changes):
    config = parse(tmp_path, **changes).config
    torch.manual_seed(0)
    model = build_model(config.nnet).eval()
    return generate.ImageSampler(config, model, VPSDE(), codec or PixelCodec(), seed=1)


def test_labels(tmp_path):
    balanced = make_image_sampler(tmp_path)
    for n in (10, 40, 47):
        counts = torch.bincount(balanced.get_labels(range(n)), minlength=10)
        assert counts.max() - counts.min() <= (n % 10 > 0)
    random = make_image_sampler(tmp_path, sample__labels="random")
    labels = random.get_labels(range(1000))
    assert torch.equal(random.get_labels([999, 5]), labels[[999, 5]])
    counts = torch.bincount(labels, minlength=10)
    assert counts.min() > 60 and counts.max() > counts.min() + 1
    one = make_image_sampler(tmp_path, sample__vis_label=9)
    assert one.get_labels(range(4)).tolist() == [9] * 4
    for changes, classes in ((dict(sample__vis_label=10), 10), (dict(train__mode="uncond"), 0)):
        with pytest.raises(UserError, match=f"vis_label asks for class .* has {classes} classes"):
            make_image_sampler(tmp_path, **{"sample__vis_label": 3, **changes})


@pytest.mark.parametrize("every", [1, 2, 3])
def test_inner_blocks_are_reused(tmp_path, every):
    """As if the last gave what it gave in the last whole call; where the batch grows, calls are."""
    given = dict(nnet__depth=7, sample__sample_steps=11, sample__guidance_interval=(0.2, 0.8))
    given |= dict(sample__algorithm="dpm_solver_pp_2m", sample__scale=0.7, sample__cfg=True)
    plain, calls, ran, kept = make_image_sampler(tmp_path, **given), 0, [], torch.zeros(0)

    def stand_in(block, inputs, out):
        nonlocal calls, kept
        out, x = out
        calls = calls + 1 if len(out) == len(kept) else 0
        kept = kept if calls % every else out
        return kept, x

    whole = plain([0, 1, 2])
    plain.model.blocks[5].register_forward_hook(stand_in)
    given |= dict(sample__reuse=every)  # from depth // 3, 2
    sampler = make_image_sampler(tmp_path, **given)
    sampler.model.blocks[2].register_forward_hook(lambda _, inputs, out: ran.append(len(out[0])))
    images = sampler([0, 1, 2])
    assert torch.equal(images, plain([0, 1, 2])) and torch.equal(images, whole) == (every == 1)
    spec = sampler.sampling_spec()
    cost = (3 * spec["network_calls"] + 4 * sum(ran) / 3) / 7
    assert spec["network_cost"] == pytest.approx(cost, abs=1e-3)
    parts = torch.cat([sampler([0]), sampler([1, 2])])
    torch.testing.assert_close(parts, images, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="reuse_from is 4, expected 1 to 3"):
        make_image_sampler(tmp_path, **given, sample__reuse_from=4)


def test_rows_of_classes(tmp_path):
    few = generate.choose_classes
    chosen = [*map(list, (few(1000), few(11), few(3, 4)))]
    assert chosen == [list(range(0, 1000, 100)), [0, 2, 4, 6, 8, 10], [0, 1, 2]]
    image_sampler = make_image_sampler(tmp_path, sample__mini_batch_size=3)
    images = image_sampler.draw_rows((3, 7), 2)
    expected = image_sampler([0, 1, 2, 3], torch.tensor([3, 3, 7, 7]))
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="--classes asks for class 10, but the model has 10"):
        image_sampler.draw_rows((10,), 2)
    unconditional = make_image_sampler(tmp_path, train__mode="uncond", sample__cfg=False)
    assert unconditional.draw_rows(None, 2).shape == (2, 1, 8, 8)
    with pytest.raises(UserError, match="--classes asks for class 3, but the model has 0"):
        unconditional.draw_rows((3,), 2)


def test_measuring_in_training_gives_the_figures_of_an_evaluation(files, tmp_path):
    """And nothing once a stop is asked for."""
    result = evaluate(tmp_path, files, seed=1, sample__n_samples=8)
    image_sampler = make_image_sampler(tmp_path, seed=1)
    image_sampler.model.load_state_dict(load_file(files / "a.safetensors"))
    given = d(features="digits_classifier", fid_weights_path=files / "classifier.safetensors")
    extractors = Extractors(given, [], CPU)
    config, names = parse(tmp_path).config, metrics.GROUPS["training"]
    given = dict(metrics=names, side=8, device=CPU)
    real = load_real(config.dataset, extractors, open_dataset(config), **given)
    accelerator = SimpleNamespace(
        device=CPU, process_index=0, num_processes=1, is_main_process=True,
        reduce=lambda tensor, how: tensor,
    )  # fmt: skip
    measured = (image_sampler, extractors, accelerator)
    found = metrics.compute_metrics(generate.collect_features(*measured, n=8), real, names)
    # Batches of other sizes sum in another order.
    assert found["frechet_distance"] == pytest.approx(result["frechet_distance"], rel=1e-4)
    assert found["class_agreement"] == result["class_agreement"]
    assert generate.collect_features(*measured, n=8, stop=lambda: True) is None


# ---------------------------------------------------------------------------------------------
# The real side


class FirstDigits:
    """The first images of the digits."""

    def __init__(self, length, whole):
        self.length, self.whole = length, whole
        self.shape, self.num_classes = whole.shape, whole.num_classes
        self.list_sha256, self.sizes, self.latent = whole.list_sha256, whole.sizes, False

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        return self.whole[key]


class FirstPixels:
    """Two features of an image, which it classifies as a 0."""

    name, dim = "first_pixels", 2

    def __call__(self, images):
        return images[:, 0, 4, :2]

    def classify(self, features):
        return torch.zeros(len(features), dtype=torch.int64)


@pytest.mark.parametrize("mode", ["cond", "uncond"])
def test_real_images_are_measured_as_they_are(tmp_path, mode, monkeypatch):
    config = parse(tmp_path, train__mode=mode).config
    whole = open_dataset(config)
    monkeypatch.setitem(features_module.FEATURES, "first_pixels", lambda *_: FirstPixels())
    given, first = d(features="first_pixels", fid_weights_path=None), FirstDigits(70, whole)
    features = Extractors(given, [], CPU)
    given = dict(metrics=["frechet_distance"], device=CPU)
    real = load_real(config.dataset, features, first, side=8, **given)["features"]
    images = np.stack([whole[0, i][0].numpy() / 2 + 0.5 for i in range(70)])
    np.testing.assert_allclose(real.features, np.round(images[:, 0, 4, :2] * 255) / 255, atol=1e-6)
    zeros = np.mean([whole[0, i][1] == 0 for i in range(70)])
    assert real.agreement == (pytest.approx(zeros) if mode == "cond" else None)
    with pytest.raises(UserError, match="digits are 8 pixels wide, but the generated images 16"):
        load_real(config.dataset, features, first, side=16, **given)
    with pytest.raises(UserError, match="dataset.fid_stats names no statistics file"):
        load_real(config.dataset, features, FirstDigits(10_001, whole), side=8, **given)
    config.dataset.fid_stats = str(tmp_path / "absent.npz")
    with pytest.raises(UserError, match="there is no .*absent.npz: scripts/compute_fid_stats.py"):
        load_real(config.dataset, features, first, side=8, **given)


class Enlarging(PixelCodec):
    """Stands for an autoencoder: z is half as large as the image."""

    def latent_shape(self, shape):
        return shape[0], shape[1] // 2, shape[2] // 2

    def image_shape(self, z_shape):
        return z_shape[0], 2 * z_shape[1], 2 * z_shape[2]

    def decode(self, z):
        return super().decode(z).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def describe(self):
        return {"autoencoder_sha256": "abc", "scale_factor": 0.5}


@pytest.fixture
def latent(files, tmp_path):
    """latent(codec, changes): an evaluation of a latent model, without a data set."""

    def call(codec, **changes):
        runs.fresh_state()
        args = parse(tmp_path, files, nnet__input_size=4, **changes)
        args.nnet_path = random_weights(tmp_path / "latent.safetensors", 0, args.config.nnet)
        model = build_model(args.config.nnet)
        run_evaluation(
            args, args.config, make_accelerator(), model=model, process=VPSDE(), codec=codec
        )
        return json.loads((tmp_path / "result.json").read_text())

    return call


def write_statistics(files, path, resolution, m):
    """Changes of the config for a statistics file with the features of m images."""
    rows = np.random.default_rng(0).normal(size=(200, 128)).astype(np.float32)
    name = DigitsClassifierFeatures(files / "classifier.safetensors").name
    np.savez(
        path, mu=rows.mean(0), sigma=np.cov(rows.T), count=200, extractor=name,
        resolution=resolution, preprocessing="none", **({"features": rows[:m]} if m else {}),
    )  # fmt: skip
    return dict(dataset__fid_stats=path)


def test_a_latent_model_needs_only_statistics(latent, files, tmp_path):
    """Of the resolution of the images, not of what the network sees."""
    with pytest.raises(UserError, match="stats4.npz was made with resolution 4, expected 8"):
        latent(Enlarging(), **write_statistics(files, tmp_path / "stats4.npz", 4, 20))
    changes = write_statistics(files, tmp_path / "stats8.npz", 8, 20)
    result = latent(Enlarging(), **changes)
    assert result["z_shape"] == [1, 4, 4] and result["image_shape"] == [1, 8, 8]
    expected = {"name": "Enlarging", "autoencoder_sha256": "abc", "scale_factor": 0.5}
    assert result["codec"] == expected and result["statistics"]["count"] == 200
    assert result["precision_recall"]["real"] == 20 and result["real_halves"] is None
    images = pictures(tmp_path)
    assert images.shape == (N, 8, 8) and (images[:, ::2, ::2] == images[:, 1::2, 1::2]).all()
    write_statistics(files, tmp_path / "stats8.npz", 8, 0)
    with pytest.raises(UserError, match="another evaluation .*statistics.sha256"):
        latent(Enlarging(), **changes)
    for name in ("result.json", "images.npz"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "png")
    result = latent(Enlarging(), **changes)
    assert result["precision_recall"] is None
