"""Evaluations that are interrupted, what they refuse, and what they write."""

import contextlib
import importlib
import json
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import runs
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import save_file

from datasets import dataset_of
from libs.data.codec import PixelCodec
from libs.evaluate import generate, metrics, run
from libs.evaluate.image_store import ImageStore, compared, create, pending
from libs.evaluate.metrics import DigitsClassifier, DigitsClassifierFeatures, save_statistics
from libs.evaluate.real_images import dataset_features, images_to_measure, real_images
from libs.model.build import build_model
from libs.runtime import flags
from libs.runtime.launch import Precision, make_accelerator
from sde import VPSDE
from utils import UserError, read_json

N, BATCH = 40, 5


pytestmark = pytest.mark.usefixtures("one_thread")


class Named(DigitsClassifierFeatures):
    """Features whose name does not depend on their weights."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.name = "digits_classifier-" + "0" * 8


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
    save_file(DigitsClassifier().state_dict(), folder / "classifier.safetensors")
    return folder


def words(folder, files=None, weights="a", **changes):
    """The command line of an evaluation that keeps all it can in `folder`."""
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
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    importlib.import_module("eval").main(parse(folder, files, **changes))
    return read_json(folder / "result.json")


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def figures(result):
    return {key: result[key] for key in ("frechet_distance", "class_agreement", "precision_recall")}


def pictures(folder, n=N):
    return np.stack([np.asarray(Image.open(folder / "png" / f"{i}.png")) for i in range(n)])


def interrupted(folder, files, monkeypatch, after, **changes):
    """An evaluation that ends with the disk, after so many batches."""
    write, left = ImageStore.write, iter(range(after))

    def fail(self, *arguments):
        if next(left, None) is None:
            raise OSError("disk full")
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "write", fail)
        with pytest.raises(OSError, match="disk full"):
            evaluate(folder, files, **changes)


@pytest.fixture(scope="module")
def undisturbed(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, evaluate(folder, files, sample__sample_steps=20)


# ---------------------------------------------------------------------------------------------
# Interruptions


def test_pictures_that_are_gone_are_made_again(files, undisturbed, tmp_path, monkeypatch):
    """The images' rows were kept, but the folder of pictures was cleaned meanwhile."""
    changes = dict(sample__sample_steps=20, sample__path=str(tmp_path / "png"))
    interrupted(tmp_path, files, monkeypatch, 3, **changes)
    shutil.rmtree(tmp_path / "png")
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / ".4.png.123.tmp").touch()  # of a kill
    found = evaluate(tmp_path, files, **changes)
    assert figures(found) == figures(undisturbed[1]) and found["images_made_now"] == N
    assert pictures(tmp_path).any() and not list((tmp_path / "png").glob(".*"))


def test_images_that_were_lost_meanwhile_are_told(files, tmp_path, monkeypatch):
    """As another machine can on a network file system: their zeros are no features."""
    write = ImageStore.write

    def losing(self, indices, *arguments):
        write(self, indices, *arguments)
        self.done.write(0, np.zeros(1))

    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "write", losing)
        with pytest.raises(UserError, match=f"{BATCH} images that were made are not in .*again"):
            evaluate(tmp_path, files)
    assert not (tmp_path / "result.json").exists()
    assert evaluate(tmp_path, files)["images_made_now"] == BATCH


def test_a_kill_while_the_store_is_removed_leaves_none_that_looks_damaged(tmp_path, monkeypatch):
    arrays = {"features": ((4, 2), np.float32), "done": ((4,), np.uint8)}
    for deletions in range(1, 4):
        folder = tmp_path / str(deletions)
        folder.mkdir()
        create(folder, {"n": 4}, arrays)
        left, unlink = iter(range(deletions)), Path.unlink

        def killed(self, *arguments, left=left, unlink=unlink, **keywords):
            if next(left, None) is None:
                raise KeyboardInterrupt
            unlink(self, *arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", killed)
            with contextlib.suppress(KeyboardInterrupt):
                ImageStore(folder).remove()
        folder.mkdir(exist_ok=True)
        create(folder, {"n": 4}, arrays)
        assert len(pending(folder, 2)) == 2


def test_a_store_that_another_process_does_not_see_is_told(tmp_path):
    with pytest.raises(UserError, match="features.npy is not there: every process must see"):
        ImageStore(tmp_path)


def kill(process):
    """kill -9 a launcher and its processes, which are no longer of its group."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        one.kill()
    psutil.wait_procs(everyone[:-1], timeout=10)
    process.wait()


def test_kill_9_of_two_processes_then_one(files, undisturbed, tmp_path):
    """The same files and figures, bit for bit, as of one process that was not killed; what was done
    is not made again.
    """
    steps = dict(sample__sample_steps=20)
    process = runs.start("eval.py", *words(tmp_path, files, **steps), num_processes=2)
    done_file, deadline = tmp_path / "result.partial" / "done.npy", time.monotonic() + 60
    done = np.zeros(N)
    while done.sum() == 0 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
        if done_file.exists() and done_file.stat().st_size > N:
            done = np.load(done_file)
    kill(process)
    done = np.load(done_file).astype(bool)
    assert 0 < done.sum() < N and not (tmp_path / "result.json").exists()
    kept = {i: (tmp_path / "png" / f"{i}.png").stat().st_mtime_ns for i in np.flatnonzero(done)}
    result = evaluate(tmp_path, files, **steps)
    assert {i: (tmp_path / "png" / f"{i}.png").stat().st_mtime_ns for i in kept} == kept
    assert result["images_made_now"] == N - done.sum() and result["ranks"] == (0,)
    folder, expected = undisturbed
    assert figures(result) == figures(expected)
    for name in ("images.npz", *(f"png/{i}.png" for i in range(N))):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert not (tmp_path / "result.partial").exists() and pictures(tmp_path).std() > 10


def test_another_batch_size_may_go_on(files, tmp_path, monkeypatch):
    """It makes what is missing: 10 of 16 images are done, of which batches of 4 lack the last two
    of 8 to 11; images differ in rounding at most.
    """
    whole = dict(sample__n_samples=16)
    interrupted(tmp_path, files, monkeypatch, 2, **whole)
    result = evaluate(tmp_path, files, sample__mini_batch_size=4, **whole)
    assert result["images_made_now"] == 8
    expected = evaluate(tmp_path / "other", files, **whole)
    assert expected["images_made_now"] == 16
    difference = pictures(tmp_path, 16).astype(int) - pictures(tmp_path / "other", 16)
    assert np.abs(difference).max() <= 1
    assert result["class_agreement"] == expected["class_agreement"]


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(sample__sample_steps=4), "steps: 3 -> 4"),
        (dict(sample__scale=0.5), "guidance_scale: 0.4 -> 0.5"),
        (dict(seed=1), "seed: 1234 -> 1"),
        (dict(sample__n_samples=50), "n: 40 -> 50"),
        (dict(sample__vis_label=3), "labels: 'balanced' -> None"),
        (dict(weights="b"), "weights.sha256: "),
        (dict(nnet__skip_tuning="(0.8,1)"), "nnet.skip_tuning: None -> (0.8, 1)"),
        (dict(sample__path=""), "kept.path: "),
    ],
)
def test_another_recipe_is_refused(files, partial, changes, says):
    folder, before = partial
    with pytest.raises(UserError, match="holds images of another recipe") as caught:
        evaluate(folder, files, **changes)
    assert says in str(caught.value)
    assert "delete it" in str(caught.value) or "move it away" in str(caught.value)
    assert snapshot(folder) == before


@pytest.fixture(scope="module")
def partial(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("partial")
    with pytest.MonkeyPatch.context() as patch:
        interrupted(folder, files, patch, 1)
    before = snapshot(folder)
    assert len(before) == 4 + 1 + BATCH, "recipe, features, done, pixels; recipe and PNG files"
    return folder, before


def test_weights_that_moved_are_the_same(files, tmp_path, monkeypatch):
    interrupted(tmp_path, files, monkeypatch, 7)
    (files / "copy.safetensors").write_bytes((files / "a.safetensors").read_bytes())
    assert evaluate(tmp_path, files, weights="copy")["images_made_now"] == BATCH


def test_two_evaluations_do_not_share_a_folder(files, partial):
    folder, before = partial
    code = "import sys, utils; lock = utils.RunLock(sys.argv[1]); print('held'); input()"
    holder = subprocess.Popen(
        [sys.executable, "-u", "-c", code, folder / "result.partial"],
        cwd=runs.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {holder.pid}.*another --output_path"):
        evaluate(folder, files)
    holder.communicate("\n")
    assert snapshot(folder) == before


def test_damaged_files_are_named(files, tmp_path, monkeypatch):
    interrupted(tmp_path, files, monkeypatch, 1)
    with open(tmp_path / "result.partial" / "features.npy", "r+b") as file:
        file.truncate(500)
    with pytest.raises(UserError, match="features.npy is damaged .*delete .*result.partial"):
        evaluate(tmp_path, files)


def test_images_that_are_not_finite_are_never_done(files, tmp_path, monkeypatch):
    class Broken(Named):
        def __call__(self, images):
            rows = super().__call__(images).clone()
            rows[2] = rows[2] / 0
            return rows

    monkeypatch.setitem(metrics.FEATURES, "digits_classifier", Broken)
    with pytest.raises(UserError, match="features of image 2 are not finite"):
        evaluate(tmp_path, files, **statistics(tmp_path, 8))
    assert not np.load(tmp_path / "result.partial" / "done.npy").any()


class NaN(PixelCodec):
    """Its image of index 1 in a batch contains NaN."""

    def decode(self, z):
        images = super().decode(z)
        images[1, 0, 0, 0] = float("nan")
        return images


def test_a_network_that_makes_nan_is_told(files, tmp_path, monkeypatch):
    """By sample.py and, where the features hide it, by an evaluation."""
    image_sampler = make_image_sampler(tmp_path, codec=NaN(), sample__mini_batch_size=4)
    with pytest.raises(UserError, match="images that are not finite: image 1 .*sample.scale"):
        generate.draw_in_batches(image_sampler, None, 6)
    monkeypatch.setattr(importlib.import_module("eval"), "PixelCodec", NaN)
    monkeypatch.setattr(metrics.NoFeatures, "__call__", lambda self, x: torch.zeros(len(x), 1))
    with pytest.raises(UserError, match="images that are not finite: image 1 "):
        evaluate(tmp_path, files, sample__features="none")
    assert not list((tmp_path / "png").glob("*.png"))


def test_fp8_is_another_recipe():
    """Results from before it was noted count as without."""
    old = {"n": 8, "kept": {"path": None, "adm_npz": "/there/images.npz"}}
    new = {"n": 8, "kept": {"path": None, "adm_npz": True}, "fp8": False}
    assert compared(old) == compared(new) != compared({**new, "fp8": True})


def test_fp8_is_in_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr("libs.ops.cuda.fp8.turn_on", lambda *arguments: None)
    assert make_image_sampler(tmp_path).describe()["fp8"] is False
    assert make_image_sampler(tmp_path, sample__fp8=True).describe()["fp8"] is True


# ---------------------------------------------------------------------------------------------
# Files of others


def test_an_npz_of_others_stays(files, tmp_path, monkeypatch):
    """It is refused at once, and a corrected path goes on with the images."""
    few, npz = dict(sample__n_samples=BATCH), tmp_path / "images.npz"
    with monkeypatch.context() as patch:
        patch.setattr(ImageStore, "write_adm_npz", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(tmp_path, files, **few)
    (tmp_path / "other.npz").write_text("mine")
    with pytest.raises(UserError, match="other.npz is there and not of the evaluation"):
        evaluate(tmp_path, files, sample__adm_npz=tmp_path / "other.npz", **few)
    assert (tmp_path / "other.npz").read_text() == "mine"
    result = evaluate(tmp_path, files, sample__adm_npz=tmp_path / "right.npz", **few)
    assert result["images_made_now"] == 0 and (tmp_path / "right.npz").exists()
    npz.write_text("mine")
    with pytest.raises(UserError, match="images.npz is there and not of the evaluation"):
        evaluate(tmp_path, files, **few)
    again = evaluate(tmp_path, files, sample__adm_npz=tmp_path / "right.npz", **few)
    assert again["images_made_now"] == BATCH, "its own may be made again"


@pytest.mark.parametrize("path", ["/proc/images.npz", "n" * 255])
def test_an_npz_that_cannot_be_made_is_refused_at_once(files, tmp_path, monkeypatch, path):
    monkeypatch.setattr(run, "make_images", lambda *arguments, **keywords: 1 / 0)
    with pytest.raises(UserError, match="cannot write .*another --config.sample.adm_npz"):
        evaluate(tmp_path, files, sample__adm_npz=tmp_path / path)


def test_a_partial_folder_of_others_stays(files, tmp_path):
    folder, few = tmp_path / "result.partial", dict(sample__n_samples=BATCH)
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="result.partial, .* holds other files .notes.txt.: move"):
        evaluate(tmp_path, files, **few)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_files_beside_ours_stay(files, tmp_path, monkeypatch):
    interrupted(tmp_path, files, monkeypatch, 1)
    (tmp_path / "result.partial" / "notes.txt").write_text("mine")
    evaluate(tmp_path, files)
    assert [path.name for path in (tmp_path / "result.partial").iterdir()] == ["notes.txt"]


def test_an_output_path_that_is_the_partial_folder_is_refused(files, tmp_path):
    args = parse(tmp_path, files)
    args.output_path = tmp_path / "result.partial"
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    with pytest.raises(UserError, match="result.partial, but .partial is for the folder"):
        run.run_evaluation(
            args, args.config, accelerator, model=None, process=None, codec=None
        )


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


def test_the_recipe_is_whole(undisturbed, files, capsys):
    folder, result = undisturbed
    assert result["weights"]["sha256"] == metrics.sha256_of(files / "a.safetensors")
    images = result["statistics"].pop("images")
    assert images["dataset"] == "digits" and len(images["list_sha256"]) == 64
    assert result["statistics"] == {"file": None, "count": 1797, "known": True}
    assert result["features"].startswith("digits_classifier-") and result["img_s"] > 0
    assert result["n"] == N and result["nnet"]["dim"] == 16 and result["labels"] == "balanced"
    assert result["precision_recall"]["real"] == 1797
    assert result["precision_recall"]["generated"] == N
    assert read_json(folder / "png" / "recipe.json")["weights"] == result["weights"]
    run.report(result, "result.json")
    output = capsys.readouterr().out
    for words_ in ("precision ", "recall ", "steps = 20", "weights.sha256", "commit = ", "img_s"):
        assert words_ in output


def test_all_images_of_one_class(files, tmp_path):
    class_3 = dict(sample__vis_label=3, sample__n_samples=8)
    balanced = dict(sample__n_samples=8)
    result = evaluate(tmp_path / "a", files, **class_3)
    assert result["vis_label"] == 3 and result["labels"] is None
    other = evaluate(tmp_path / "b", files, **balanced)
    assert other["vis_label"] is None
    a, b = pictures(tmp_path / "a", 8), pictures(tmp_path / "b", 8)
    assert (a[3] == b[3]).all(), "image 3 is of class 3 in both"
    assert (a != b).any(), "the others are not"


def make_image_sampler(tmp_path, model=None, codec=None, **changes):
    config = parse(tmp_path, **changes).config
    model, precision = model or build_model(config.nnet), Precision("no", torch.device("cpu"))
    return generate.make_image_sampler(
        config, model.eval(), VPSDE(), codec or PixelCodec(), precision=precision, seed=1
    )


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
    with pytest.raises(UserError, match="vis_label asks for class 3, but this model has 0 classes"):
        make_image_sampler(
            tmp_path, sample__vis_label=3, train__mode="uncond", sample__cfg=False
        )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The real side


class FirstDigits:
    """The first images of the digits."""

    def __init__(self, length, whole):
        self.length, self.whole = length, whole
        self.shape, self.num_classes = whole.shape, whole.num_classes
        self.list_sha256 = whole.list_sha256

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        return self.whole[key]


class FirstPixels:
    """Two features of an image, which it classifies as a 0."""

    name, dim = "first_pixels", 2

    def __call__(self, images):
        return images[:, 0, 4, :2]

    def classify(self, images):
        return torch.zeros(len(images), dtype=torch.int64)


def test_real_images_that_do_not_fit_are_refused(tmp_path):
    config = parse(tmp_path).config
    whole = dataset_of(config)

    def measured(length, resolution):
        dataset, cpu = FirstDigits(length, whole), torch.device("cpu")
        return real_images(config, FirstPixels(), dataset, resolution=resolution, device=cpu)

    with pytest.raises(UserError, match="digits has 1 images, too few .* expected 2 or more"):
        measured(1, 8)
    with pytest.raises(UserError, match="digits are 8 pixels wide, but the generated ones 16"):
        measured(2, 16)
    real = measured(2, 8)
    for length in (3, 4):
        found = generate.figures_of(
            real.mu, real.sigma, None, measured(length, 8), 0
        )
        assert ("real_halves" in found) == (length == 4)


@pytest.mark.parametrize("changes", [
    {"dataset__fid_stats": "stats.npz"}, {"sample__features": "none"},
    {"dataset__name": "imagenet256_features"},
])  # fmt: skip
def test_a_data_set_that_is_not_needed_is_not_opened(tmp_path, changes):
    changes = {"dataset__name": "cifar10", "dataset__path": str(tmp_path / "absent"), **changes}
    assert images_to_measure(parse(tmp_path, **changes).config) is None
    assert len(images_to_measure(parse(tmp_path).config)) == 1797


def test_images_without_classes_have_no_agreement(tmp_path):
    for mode, expected in (("cond", True), ("uncond", False)):
        dataset = FirstDigits(20, dataset_of(parse(tmp_path, train__mode=mode).config))
        rows, right = dataset_features(FirstPixels(), dataset)
        assert rows.shape == (20, 2) and (right is not None) == expected
    labels = [y for _, y in (dataset_of(parse(tmp_path).config)[0, i] for i in range(20))]
    right = dataset_features(FirstPixels(), FirstDigits(20, dataset_of(parse(tmp_path).config)))[1]
    assert right.tolist() == [y == 0 for y in labels]


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


def statistics(folder, resolution, m=20):
    """Changes of the config for a statistics file with the features of m images."""
    folder.mkdir(exist_ok=True)
    path = folder / f"stats{resolution}.npz"
    rows = np.random.default_rng(0).normal(size=(200, 48)).astype(np.float32)
    name = "digits_classifier-" + "0" * 8  # of Named
    save_statistics(
        path, mu=rows.mean(0), sigma=np.cov(rows.T), count=200, extractor=name,
        resolution=resolution, preprocessing="none", features=rows[:m] if m else None,
    )  # fmt: skip
    return dict(dataset__fid_stats=path)


@pytest.fixture
def latent(files, tmp_path, monkeypatch):
    """run(changes): an evaluation of a latent model, without a data set."""

    monkeypatch.setitem(metrics.FEATURES, "digits_classifier", Named)

    def call(**changes):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        args = parse(tmp_path, files, nnet__input_size=4, **changes)
        model = build_model(args.config.nnet)
        args.nnet_path = random_weights(tmp_path / "latent.safetensors", 0, args.config.nnet)
        run.run_evaluation(
            args, args.config, make_accelerator(),
            model=model, process=VPSDE(), codec=Enlarging(),
        )  # fmt: skip
        return json.loads((tmp_path / "result.json").read_text())

    return call


def test_a_latent_model_needs_only_statistics(latent, tmp_path, capsys):
    result = latent(**statistics(tmp_path, 8))
    assert result["z_shape"] == [1, 4, 4] and result["image_shape"] == [1, 8, 8]
    expected = {"name": "Enlarging", "autoencoder_sha256": "abc", "scale_factor": 0.5}
    assert result["codec"] == expected and result["statistics"]["count"] == 200
    assert result["precision_recall"]["real"] == 20 and "real_halves" not in result
    images = pictures(tmp_path)
    assert images.shape == (N, 8, 8) and (images[:, ::2, ::2] == images[:, 1::2, 1::2]).all()
    with pytest.raises(UserError, match="result of another evaluation .*statistics.sha256"):
        latent(**statistics(tmp_path, 8, m=0))
    for name in ("result.json", "images.npz"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "png")
    result = latent(**statistics(tmp_path, 8, m=0))
    assert result["precision_recall"] is None
    assert "no precision and recall: the statistics keep no features" in capsys.readouterr().out


def test_statistics_of_another_resolution(latent, tmp_path):
    """Of the images, not of what the network sees; and none at all. Nothing is overwritten."""
    (tmp_path / "result.json").write_text("mine")
    changes = statistics(tmp_path, 4)
    for given, says in (
        (changes, "stats4.npz was made with resolution 4, expected 8"),
        ({}, "dataset.fid_stats names no statistics file"),
    ):
        with pytest.raises(UserError, match=says):
            latent(**given)
    assert (tmp_path / "result.json").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latent.safetensors", "result.json", "stats4.npz",
    ]  # fmt: skip


def test_pictures_of_others_stay(latent, tmp_path):
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "0.png").write_text("mine")
    with pytest.raises(UserError, match="png holds pictures that are not this evaluation's: move"):
        latent(**statistics(tmp_path, 8))
    assert (tmp_path / "png" / "0.png").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))
