"""Frechet distance and its files, the feature networks and the two scripts that make them."""

import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import urllib.error
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from PIL import Image

import libs.evaluate.metrics
from datasets import get_dataset
from libs.evaluate.metrics import (
    DigitsClassifier,
    DigitsClassifierFeatures,
    InceptionFeatures,
    Moments,
    frechet_distance,
    load_statistics,
    make_features,
    save_statistics,
)
from utils import UserError

SCRIPTS = Path(libs.evaluate.metrics.__file__).parents[2] / "scripts"


def random_covariance(dim, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank, generator=generator, dtype=torch.float64)
    return factor @ factor.T / rank


# ------------------------------------------------------------ distance


def test_distance_in_one_dimension():
    """(m1 - m2)^2 + (s1 - s2)^2, by hand."""
    assert frechet_distance([3.0], [[4.0]], [1.0], [[25.0]]) == pytest.approx(4 + 9, rel=1e-14)


def test_distance_of_diagonal_covariances():
    variances1, variances2 = np.array([1.0, 4.0, 0.0]), np.array([9.0, 0.25, 16.0])
    distance = frechet_distance(np.zeros(3), np.diag(variances1), np.ones(3), np.diag(variances2))
    assert distance == pytest.approx(3 + 2**2 + 1.5**2 + 4**2, rel=1e-14)


@pytest.mark.parametrize("dim", [2, 20, 100])
def test_distance_equals_scipys_sqrtm(dim):
    linalg = pytest.importorskip("scipy.linalg")
    sigma1, sigma2 = random_covariance(dim, 2 * dim, 1), random_covariance(dim, 3 * dim, 2)
    root = linalg.sqrtm((sigma1 @ sigma2).numpy())
    expected = 4 * dim + np.trace(sigma1 + sigma2) - 2 * np.trace(root.real)
    distance = frechet_distance(torch.zeros(dim), sigma1, torch.full((dim,), 2.0), sigma2)
    assert distance == pytest.approx(expected, rel=1e-9)  # sqrtm's own error


def test_distance_of_singular_covariances():
    """Rank one: the root of a a^T b b^T has trace |a . b|."""
    a, b = torch.randn(2, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (a @ a + b @ b - 2 * (a @ b).abs()).item()
    zero = torch.zeros(30)
    distance = frechet_distance(zero, torch.outer(a, a), zero, torch.outer(b, b))
    # Eigenvalues of rounding, 1e-16 of the largest, stay in the factors as their roots, 1e-8.
    assert distance == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("rank", [20, 150, 300])
def test_distance_to_itself_is_zero_and_symmetric(rank):
    sigma, other = random_covariance(200, rank, 1), random_covariance(200, 250, 2)
    mu = torch.arange(200.0)
    assert frechet_distance(mu, sigma, mu, sigma) < 1e-10 * sigma.trace()
    forth, back = (
        frechet_distance(mu, sigma, 0 * mu, other),
        frechet_distance(0 * mu, other, mu, sigma),
    )
    assert forth == pytest.approx(back, rel=1e-12)


def test_distance_of_unlike_dimensions_is_refused():
    with pytest.raises(UserError, match="3 and 2 features"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))


# ------------------------------------------------------------ moments


def test_moments_are_numpys_whatever_the_batches_and_ranks():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(101, 7, generator=generator) * 3 + 50  # float32, far from zero
    ranks = [Moments(7), Moments(7)]
    for i, batch in enumerate(features.split(10)):
        ranks[i % 2].update(batch)
    total = Moments(7)
    for rank in ranks:
        total.count += rank.count
        total.sum += rank.sum
        total.outer += rank.outer
    mu, sigma = total.mean_and_covariance()
    assert mu.dtype == sigma.dtype == torch.float64 and total.count == 101
    exact = features.double().numpy()
    np.testing.assert_allclose(mu, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(exact.T), rtol=1e-9, atol=1e-10)


def test_moments_refuse_nan_and_a_single_image():
    moments = Moments(2)
    moments.update(torch.ones(1, 2))
    with pytest.raises(UserError, match="2 images or more, not 1"):
        moments.mean_and_covariance()
    moments.update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(UserError, match="not finite"):
        moments.mean_and_covariance()


# ------------------------------------------------------------ statistics files

RECORD = {"count": 9, "extractor": "net-1", "resolution": 32, "preprocessing": "none"}
EXPECT = {"extractor": "net-1", "resolution": 32}


def save_example(path, **changes):
    sigma = random_covariance(3, 5, 0)
    save_statistics(path, mu=torch.arange(3.0), sigma=sigma, **{**RECORD, **changes})
    return sigma


def test_statistics_come_back_as_written(tmp_path):
    path = tmp_path / "new" / "stats.npz"
    sigma = save_example(path)
    assert os.listdir(path.parent) == ["stats.npz"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_statistics(path, **EXPECT, dim=3)
    assert found.known and found.mu.tolist() == [0, 1, 2] and torch.equal(found.sigma, sigma)
    assert {name: getattr(found, name) for name in RECORD} == RECORD
    with np.load(path) as file:  # as pytorch-fid reads it
        assert file["mu"].shape == (3,) and file["sigma"].dtype == np.float64


def test_features_of_real_images_come_back(tmp_path):
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    save_example(tmp_path / "with.npz", features=rows)
    found = load_statistics(tmp_path / "with.npz", **EXPECT).features
    assert found.dtype == np.float32 and (found == rows.numpy()).all()
    save_example(tmp_path / "without.npz")
    assert load_statistics(tmp_path / "without.npz", **EXPECT).features is None


@pytest.mark.parametrize(
    "features, says",
    [
        (np.ones((4, 2)), r"'features' are float64 of shape \(4, 2\), expected .*\(m, 3\)"),
        (np.ones(3), r"of shape \(3,\)"),
        (np.ones((4, 3), np.int64), "int64"),
        (np.full((4, 3), np.inf), "'features' are not finite"),
    ],
)
def test_features_of_another_kind_are_refused(tmp_path, features, says):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(3), sigma=np.eye(3), features=features)
    with pytest.raises(UserError, match=f"stats.npz: .*{says}"):
        load_statistics(tmp_path / "stats.npz", **EXPECT, dim=3)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "stats.npz"
    save_example(path)
    before = path.read_bytes()

    def interrupted(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(OSError, match="disk full"):
        save_example(path, count=10)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["stats.npz"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_file_with_moments_only_is_taken_with_one_warning(tmp_path, dtype):
    path = tmp_path / "uvit.npz"
    np.savez(path, mu=np.ones(3, dtype), sigma=np.eye(3, dtype=dtype))
    with pytest.warns(UserWarning, match="does not record its count, extractor, .*") as warned:
        found = load_statistics(path, **EXPECT)
    assert len(warned) == 1 and not found.known
    assert found.mu.dtype == torch.float64 and found.extractor is None and found.count is None


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"extractor": "net-2"}, "made with extractor net-2, expected net-1"),
        ({"resolution": 64}, "made with resolution 64, expected 32"),
    ],
)
def test_statistics_made_otherwise_are_refused(tmp_path, changes, says):
    save_example(tmp_path / "stats.npz", **changes)
    with pytest.raises(UserError, match=f"stats.npz was {says}"):
        load_statistics(tmp_path / "stats.npz", **EXPECT)


def test_a_partly_silent_file_is_still_checked(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2), resolution=np.int64(64))
    with pytest.raises(UserError, match="resolution 64"):
        load_statistics(tmp_path / "stats.npz", **EXPECT)


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"sigma": np.eye(3)}, "has no 'mu'"),
        ({"mu": np.zeros(3)}, "has no 'sigma'"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"sigma \(2, 2\), expected \(3,\) and \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, r"mu has shape \(2,\)"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"mu has shape \(1, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(3) * np.nan}, "not finite"),
        ({"mu": np.array(["a", "b", "c"]), "sigma": np.eye(3)}, "not finite floating-point"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "count": np.ones(2)}, "'count'.*one int"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "extractor": np.int64(1)}, "'extractor' is 1"),
    ],
)
def test_statistics_of_a_wrong_shape_or_kind_are_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(UserError, match=f"stats.npz.*{says}"):
        load_statistics(tmp_path / "stats.npz", **EXPECT, dim=3)


def test_missing_and_broken_statistics_are_named(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(UserError, match="stats.npz do not exist: scripts/compute_fid_stats.py"):
        load_statistics(path, **EXPECT)
    save_example(path)
    whole = path.read_bytes()
    for stop in range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:stop])
        with pytest.raises(UserError, match="stats.npz is damaged or no .npz file"):
            load_statistics(path, **EXPECT)
    np.save(tmp_path / "stats.npy", np.zeros(3))
    with pytest.raises(UserError, match="stats.npy is damaged or no .npz file"):
        load_statistics(tmp_path / "stats.npy", **EXPECT)


class MakesDirectory:
    """Pickles as a call that makes the directory `path`."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ------------------------------------------------------------ Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file with the names and shapes of pytorch-fid's, and random weights."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, weights=None, init_weights=False
    )
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    yield path
    path.unlink()


def test_inception_features_are_pytorch_fids(inception_weights, tmp_path, monkeypatch):
    from pytorch_fid.inception import FID_WEIGHTS_URL, InceptionV3

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    cached = tmp_path / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[-1]
    shutil.move(shutil.copy(inception_weights, tmp_path / "copy"), cached)
    images = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = InceptionV3([3]).eval()(images)[0][:, :, 0, 0]  # its own reading of the cache
    features = InceptionFeatures(sha256_prefix=None)
    found = features(images)
    assert found.shape == (2, features.dim) and found.dtype == torch.float32
    assert torch.equal(found, expected) and expected.std(0).max() > 0
    with pytest.raises(UserError, match=r"\(3, 1, 8, 8\)"):
        features(torch.zeros(3, 1, 8, 8))


def test_inception_weights_are_checksummed(inception_weights, tmp_path):
    digest = libs.evaluate.metrics.sha256_of(inception_weights)[:8]
    with pytest.raises(UserError, match=f"sha256 starts with {digest}, expected 6726825d"):
        make_features("inception", inception_weights, "cpu")
    features = InceptionFeatures(inception_weights, sha256_prefix=digest)
    assert features.name == f"inception_v3_fid-{digest}"
    with pytest.raises(UserError, match="none.pth does not exist"):
        InceptionFeatures(tmp_path / "none.pth")


def test_files_that_are_not_inception_weights_are_refused(tmp_path):
    path, victim = tmp_path / "weights.pth", tmp_path / "executed"
    contents = {
        "weights.pth does not hold pytorch-fid's Inception": [{"conv.weight": torch.zeros(3)}, [1]],
        "weights.pth is damaged or no torch file .*mkdir": [MakesDirectory(victim)],
    }
    for says, values in contents.items():
        for value in values:
            torch.save(value, path)
            with pytest.raises(UserError, match=says):
                InceptionFeatures(path, sha256_prefix=None)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="weights.pth is damaged or no torch file"):
        InceptionFeatures(path, sha256_prefix=None)
    assert not victim.exists()


def test_a_failed_download_says_where_the_weights_go(tmp_path, monkeypatch):
    def fail(url, path, hash_prefix):
        assert hash_prefix == "6726825d" and url.endswith("-6726825d.pth")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    says = "no network.*put pt_inception-2015-12-05-6726825d.pth into .*sample.fid_weights_path"
    with pytest.raises(UserError, match=says):
        make_features("inception", None, "cpu")


def test_unknown_features_are_named():
    with pytest.raises(UserError, match="'vgg'.* one of inception, digits_classifier, none"):
        make_features("vgg", None, "cpu")


# ------------------------------------------------------------ scripts and the digits classifier


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, directory, *flags):
    """Run from elsewhere, with another package named `datasets` on the path, as users have it."""
    (directory / "datasets").mkdir(exist_ok=True)
    (directory / "datasets" / "__init__.py").write_text("raise ImportError('the wrong datasets')")
    environment = {**os.environ, "PYTHONPATH": str(directory)}
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *flags]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def digits_classifier(tmp_path_factory):
    """The file as the shipped command writes it."""
    directory = tmp_path_factory.mktemp("classifier")
    run = run_script("train_digits_classifier", directory, "--out=new/digits.safetensors")
    assert run.returncode == 0, run.stderr
    assert "held-out accuracy" in run.stdout
    return directory / "new" / "digits.safetensors"


def test_the_digits_classifier_holds_out_a_fifth_and_knows_it(digits_classifier):
    features = DigitsClassifierFeatures(digits_classifier)
    script = load_script("train_digits_classifier")
    images, _, held_out_images, held_out_labels = script.load_split(0)
    assert len(held_out_images) == 360 and len(images) == 1437
    assert set(torch.bincount(held_out_labels).tolist()) <= {34, 35, 36, 37}  # stratified
    accuracy = (features.classify(held_out_images) == held_out_labels).double().mean().item()
    assert accuracy >= 0.985
    assert features.metadata["held_out_accuracy"] == f"{accuracy:.4f}"
    assert features.metadata["seed"] == "0" and "held-out fifth" in features.metadata["split"]


def test_digits_features_tell_digits_from_noise(digits_classifier):
    features = make_features("digits_classifier", digits_classifier, "cpu")
    digits = get_dataset("digits")
    images = torch.stack([digits[0, i][0] for i in range(1797)]) / 2 + 0.5

    def moments(images):
        total = Moments(features.dim)
        total.update(features(images))
        return total.mean_and_covariance()

    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    halves = frechet_distance(*moments(images[order[:898]]), *moments(images[order[898:]]))
    one_class_lost = frechet_distance(*moments(images[digits.labels != 3]), *moments(images))
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    to_noise = frechet_distance(*moments(noise), *moments(images))
    assert features(images).shape == (1797, features.dim)
    assert features.classify(images).dtype == torch.int64
    assert 0 < halves < one_class_lost < to_noise / 5


def test_other_files_are_no_digits_classifier(digits_classifier, tmp_path):
    with pytest.raises(
        UserError, match="no digits classifier .*none: run scripts/train_digits_classifier.py"
    ):
        make_features("digits_classifier", tmp_path / "none", "cpu")
    path = tmp_path / "x.safetensors"
    state = safetensors.torch.load_file(digits_classifier)
    wrong_shape = {**state, "head.bias": torch.zeros(9)}
    missing = {name: value for name, value in state.items() if name != "head.bias"}
    for contents in (wrong_shape, missing):
        safetensors.torch.save_file(contents, path)
        with pytest.raises(UserError, match="x.safetensors is not a digits classifier"):
            DigitsClassifierFeatures(path)
    whole = digits_classifier.read_bytes()
    victim = MakesDirectory(tmp_path / "executed")
    for contents in (whole[:1000], whole[:4], b"", pickle.dumps(victim)):
        path.write_bytes(contents)
        with pytest.raises(UserError, match="x.safetensors is not a digits classifier"):
            DigitsClassifierFeatures(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(UserError, match=r"needs \(B, 1, 8, 8\), not \(2, 3, 8, 8\)"):
        DigitsClassifierFeatures(digits_classifier)(torch.zeros(2, 3, 8, 8))


def test_training_the_classifier_is_deterministic(monkeypatch, tmp_path):
    script = load_script("train_digits_classifier")
    monkeypatch.setattr(script, "EPOCHS", 1)
    images, labels, *_ = script.load_split(0)
    first, second, other = (script.train(images[:300], labels[:300], seed) for seed in (0, 0, 1))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    assert not torch.equal(first.head.weight, other.head.weight)


def test_a_poor_classifier_is_not_written(monkeypatch, tmp_path):
    script = load_script("train_digits_classifier")
    monkeypatch.setattr(script, "train", lambda *_: DigitsClassifier())
    threads = torch.get_num_threads()
    try:
        with pytest.raises(UserError, match="below 0.97: .* is not written"):
            script.main(SimpleNamespace(seed=0, out=str(tmp_path / "x.safetensors")))
    finally:
        torch.set_num_threads(threads)
    assert os.listdir(tmp_path) == []


def test_random_shift_moves_by_at_most_one_pixel():
    script = load_script("train_digits_classifier")
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shifted = script.random_shift(image.expand(500, 1, 8, 8), torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    allowed = [padded[0, 0, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    seen = [[torch.equal(x[0], a) for a in allowed] for x in shifted]
    assert all(sum(row) == 1 for row in seen)
    assert all(any(column) for column in zip(*seen, strict=True))


def test_compute_fid_stats_command(digits_classifier, tmp_path):
    flags = ["--dataset=digits", "--resolution=8", "--features=digits_classifier"]
    flags += [f"--weights={digits_classifier}", "--out=stats/digits.npz", "--max_images=100"]
    run = run_script("compute_fid_stats", tmp_path, *flags)
    assert run.returncode == 0, run.stderr
    features = DigitsClassifierFeatures(digits_classifier)
    found = load_statistics(tmp_path / "stats/digits.npz", extractor=features.name, resolution=8)
    digits = get_dataset("digits")
    images = torch.stack([digits[0, i * 1797 // 100][0] for i in range(100)]) / 2 + 0.5
    values = features((images * 255).round() / 255).double().numpy()
    np.testing.assert_allclose(found.mu, values.mean(0), rtol=1e-4, atol=1e-5)  # float32 features
    np.testing.assert_allclose(found.sigma, np.cov(values.T), rtol=1e-3, atol=1e-4)
    assert found.known and found.count == 100 and "100 of 1797" in found.preprocessing
    np.testing.assert_allclose(found.features, values, rtol=1e-4, atol=1e-4)  # all of them


def test_compute_fid_stats_errors_are_one_line(digits_classifier, tmp_path):
    flags = ["--dataset=folder", "--path=nowhere", "--resolution=8", "--out=stats.npz"]
    run = run_script("compute_fid_stats", tmp_path, *flags)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr.startswith("error: the data set directory nowhere does not exist")
    assert run.stderr.count("\n") == 1 and not (tmp_path / "stats.npz").exists()


def flags_for(script, **given):
    defaults = {name: default for name, (_, default, _) in script.FLAGS.items()}
    return SimpleNamespace(**{**defaults, "num_workers": 0, "device": "cpu", **given})


class ChannelMeans:
    """Features simple enough to be right by sight; keeps what it was given."""

    name, dim = "channel_means", 3

    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen.append(images)
        return images.mean((2, 3))


def test_compute_fid_stats_sees_the_values_of_pytorch_fid(tmp_path, monkeypatch):
    """A folder of PNG: uint8 / 255, as pytorch-fid's ToTensor has it, to the last bit."""
    script, features = load_script("compute_fid_stats"), ChannelMeans()
    monkeypatch.setattr(script, "make_features", lambda *_: features)
    pixels = np.random.default_rng(0).integers(256, size=(6, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "png").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "png" / f"{i}.png")
    out, path = tmp_path / "stats.npz", str(tmp_path / "png")
    given = {"dataset": "folder", "path": path, "resolution": 16, "batch_size": 4}
    script.main(flags_for(script, **given, out=str(out)))
    seen = torch.cat(features.seen)
    assert torch.equal(seen, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert [len(images) for images in features.seen] == [4, 2]
    found = load_statistics(out, extractor="channel_means", resolution=16, dim=3)
    means = pixels.mean((1, 2)) / 255
    np.testing.assert_allclose(found.mu, means.mean(0), rtol=1e-6)  # means are in float32
    np.testing.assert_allclose(found.sigma, np.cov(means.T), rtol=1e-4, atol=1e-8)
    assert "6 of 6 images; RGB, centre crop to 16" in found.preprocessing
    np.testing.assert_allclose(found.features, means, rtol=1e-6)


@pytest.mark.parametrize("kept", [0, 3])
def test_compute_fid_stats_keeps_a_random_subset(tmp_path, monkeypatch, kept):
    """The same images for any batch size, and not the first ones."""
    script, found = load_script("compute_fid_stats"), []
    for batch_size in (7, 50):
        features = ChannelMeans()
        features.dim = 1
        monkeypatch.setattr(script, "make_features", lambda *_, features=features: features)
        given = {"dataset": "digits", "resolution": 8, "max_images": 60, "kept_features": kept}
        out = tmp_path / f"{batch_size}.npz"
        script.main(flags_for(script, **given, batch_size=batch_size, out=str(out)))
        everything = torch.cat(features.seen).mean((2, 3)).numpy()
        found.append(load_statistics(out, extractor="channel_means", resolution=8).features)
    if not kept:
        assert found == [None, None]
        return
    assert found[0].shape == (3, 1) and (found[0] == found[1]).all()
    assert np.isin(found[0], everything).all() and (found[0] != everything[:3]).any()


@pytest.mark.parametrize(
    "given, says",
    [
        ({"batch_size": 0}, "--batch_size is 0, it must be 1 or more"),
        ({"max_images": 1}, "--max_images is 1, it must be 2 or more"),
        ({"resolution": 0}, "--resolution is 0"),
        ({"num_workers": -1}, "--num_workers is -1"),
        ({"kept_features": -1}, "--kept_features is -1, it must be 0 or more"),
    ],
)
def test_compute_fid_stats_refuses_numbers_out_of_range(given, says):
    script = load_script("compute_fid_stats")
    with pytest.raises(UserError, match=says):
        script.main(flags_for(script, **{"dataset": "digits", "resolution": 8, **given}))
