"""Frechet distance and its files, the feature networks and the two scripts that make them."""

import os
import shutil
import subprocess
import sys
import urllib.error
from types import SimpleNamespace

import numpy as np
import pytest
import runs
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors.torch import save_file

from datasets import get_dataset
from libs.evaluate import features as features_module
from libs.evaluate import inception
from libs.evaluate.features import Classifier, DigitsClassifierFeatures, make_features
from libs.evaluate.metrics import Moments, frechet_distance
from libs.evaluate.real import Statistics
from libs.evaluate.real import load_statistics as load_kinds
from libs.files import hash_file
from scripts import compute_fid_stats, train_classifier
from utils import UserError


def random_covariance(dim, rank, seed):
    rng = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank, generator=rng, dtype=torch.float64)
    return factor @ factor.T / rank


# ------------------------------------------------------------ distance


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
    forth = frechet_distance(mu, sigma, 0 * mu, other)
    assert forth == pytest.approx(frechet_distance(0 * mu, other, mu, sigma), rel=1e-12)


def test_moments_are_numpys_for_any_batches_and_ranks():
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(101, 7, generator=rng) * 3 + 50  # float32, far from zero
    ranks, total = [Moments(7), Moments(7)], Moments(7)
    for i, batch in enumerate(features.split(10)):
        ranks[i % 2].update(batch)
    for rank in ranks:
        total.count += rank.count
        total.sum += rank.sum
        total.outer += rank.outer
    mu, sigma = total.mean_and_covariance()
    assert mu.dtype == sigma.dtype == torch.float64 and total.count == 101
    exact = features.double().numpy()
    np.testing.assert_allclose(mu, exact.mean(0), rtol=1e-13)
    np.testing.assert_allclose(sigma, np.cov(exact.T), rtol=1e-9, atol=1e-10)


def test_moments_that_are_not_finite_are_refused():
    moments = Moments(2)
    for row in ([1.0, 1.0], [1.0, float("nan")]):
        moments.update(torch.tensor([row]))
        with pytest.raises(UserError, match="no finite covariance"):
            moments.mean_and_covariance()


# ------------------------------------------------------------ statistics files

EXPECT = {"extractor": "net-1", "resolution": 32, "dim": 3}


def load_statistics(path, *, extractor, resolution, dim, kind="features"):
    extractors = SimpleNamespace(dims={kind: dim}, names={kind: extractor})
    return load_kinds(path, extractors, [kind], metrics=(), side=resolution)[kind]


def test_statistics_come_back_as_written(tmp_path):
    """Of each kind that real images need; the features of the chosen ones."""
    path, rng = tmp_path / "stats.npz", torch.Generator().manual_seed(0)
    names = {"features": "net-1", "spatial": "net-1", "logits": "net-1", "dinov2": "net-2"}
    extractors = SimpleNamespace(dims=dict.fromkeys(names, 3), names=names)
    rows = {kind: torch.randn(9, 3, generator=rng) for kind in names}
    chosen, statistics = torch.arange(9) % 2 == 0, Statistics(extractors)
    for part in torch.arange(9).split(4):
        statistics.update({kind: x[part] for kind, x in rows.items()}, chosen[part])
    statistics.save(path, count=9, resolution=32, preprocessing="none")
    assert os.listdir(path.parent) == ["stats.npz"]
    for kind in ("features", "spatial", "dinov2"):
        found = load_statistics(path, **{**EXPECT, "extractor": names[kind]}, kind=kind)
        np.testing.assert_allclose(found.mu, rows[kind].double().mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.sigma, np.cov(rows[kind].double().T), rtol=1e-12)
        assert (found.features == rows[kind][chosen].numpy()).all()
    assert found.features.dtype == np.float32 and found.source == {
        "file": str(path), "sha256": hash_file(path), "count": 9, "origin": "ours: none",
    }  # fmt: skip
    with pytest.raises(UserError, match="made with extractor_dinov2 net-2, expected net-1"):
        load_statistics(path, **EXPECT, kind="dinov2")
    with np.load(path) as file:  # as pytorch-fid reads it
        assert file["mu"].shape == (3,) and file["sigma"].dtype == np.float64
        assert {"mu_s", "sigma_s"} <= set(file.files) and "mu_logits" not in file.files


def test_a_file_with_moments_only_is_taken(tmp_path):
    """As U-ViT and pytorch-fid write them."""
    np.savez(tmp_path / "uvit.npz", mu=np.ones(3, np.float32), sigma=np.eye(3, dtype=np.float32))
    found = load_statistics(tmp_path / "uvit.npz", **EXPECT)
    assert found.mu.dtype == torch.float64 and found.features is None
    assert "mu and sigma alone" in found.source["origin"] and found.source["count"] is None


@pytest.mark.parametrize(
    "arrays, says",
    [
        ({"mu": np.zeros(3), "extractor": "net-2"}, "was made with extractor net-2, expected net-"),
        ({"mu": np.zeros(3), "resolution": 64}, "was made with resolution 64, expected 32"),
        ({"mu": np.zeros(2)}, "mu and sigma have shapes"),
        ({"other": np.zeros(3)}, "mu and sigma have shapes"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(tmp_path, arrays, says):
    np.savez(tmp_path / "stats.npz", sigma=np.eye(3), **arrays)
    with pytest.raises(UserError, match=f"stats.npz.*{says}"):
        load_statistics(tmp_path / "stats.npz", **EXPECT)


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
    shutil.copy(inception_weights, tmp_path / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[-1])
    images = torch.rand(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = InceptionV3([3]).eval()(images)[0][:, :, 0, 0]  # its own reading of the cache
    with pytest.raises(UserError, match="sha256 starts with .*, expected 6726825d"):
        make_features("inception", None, "cpu")
    digest = hash_file(inception_weights)[:8]
    monkeypatch.setattr(inception, "INCEPTION_SHA256_PREFIX", digest)
    features = make_features("inception", inception_weights, "cpu")
    found = features(images)
    assert features.name == f"inception_v3_fid-{digest}"
    assert found.shape == (2, features.dim) and found.dtype == torch.float32
    assert torch.equal(found, expected) and expected.std(0).max() > 0


def test_a_failed_download_says_where_the_weights_go(tmp_path, monkeypatch):
    def fail(url, path, hash_prefix):
        assert hash_prefix == "6726825d" and url.endswith("-6726825d.pth")
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    says = "no network.*put pt_inception-2015-12-05-6726825d.pth into .*sample.fid_weights_path"
    with pytest.raises(UserError, match=says):
        make_features("inception", None, "cpu")


# ------------------------------------------------------------ our own classifier, DINOv2


def test_classifier_features_are_those_of_its_tensors(tmp_path):
    """Channels and classes come from the file, .safetensors or .npz."""
    rng = torch.Generator().manual_seed(0)
    shapes = {k: v.shape for k, v in Classifier(channels=2, num_classes=3).state_dict().items()}
    tensors = {k: 0.1 * torch.rand(shape, generator=rng) + 0.01 for k, shape in shapes.items()}
    tensors |= {k: x - 0.06 for k, x in tensors.items() if x.ndim > 1}
    save_file(tensors, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **{k: x.numpy() for k, x in tensors.items()})
    features = make_features("classifier", tmp_path / "a.safetensors", "cpu")
    assert features.name == make_features("classifier", tmp_path / "a.npz", "cpu").name
    images = torch.rand(6, 2, 8, 12, generator=rng)
    x = 2 * images - 1
    for i, stride in enumerate((1, 2, 1, 2, 1)):
        x = F.conv2d(x, tensors[f"f.{i}.0.weight"], tensors[f"f.{i}.0.bias"], stride, padding=1)
        names = ("running_mean", "running_var", "weight", "bias")
        x = F.batch_norm(x, *(tensors[f"f.{i}.1.{name}"] for name in names)).relu()
    with torch.autocast("cpu", torch.bfloat16):  # float32 all the same: rounding of 1e-6
        tokens = features.tokens(images)
    torch.testing.assert_close(tokens, x.permute(0, 2, 3, 1).flatten(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features(images), x.mean((2, 3)), rtol=1e-5, atol=1e-5)
    logits = x.mean((2, 3)) @ tensors["h.weight"].T + tensors["h.bias"]
    assert torch.equal(features.classify(features(images)), logits.argmax(1)) and x.std() > 0.01
    del tensors["h.bias"]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="b.safetensors is .* no file of scripts/train_classifier"):
        make_features("classifier", tmp_path / "b.safetensors", "cpu")


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_timms_from_metas_file(tmp_path, registers):
    """Meta's file has a mask token and, with registers, the class token's position apart."""
    timm = pytest.importorskip("timm")
    name = f"vit_base_patch14{'_reg4' if registers else ''}_dinov2"
    sizes = dict(embed_dim=128, depth=2, num_heads=2, img_size=70, num_classes=0)
    model, rng = timm.create_model(name, **sizes, dynamic_img_size=True), torch.Generator()
    for tensor in model.eval().parameters():
        tensor.data = 0.2 * torch.randn(tensor.shape, generator=rng) + 0.5 * (tensor.ndim == 1)
    tensors = {"mask_token": torch.zeros(1, 128), **model.state_dict()}
    if registers:
        place = torch.randn(1, 1, 128, generator=rng)
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = torch.cat([place, tensors["pos_embed"]], 1)
        tensors["cls_token"] = tensors["cls_token"] - place
    torch.save(tensors, tmp_path / "meta.pth")
    save_file(model.state_dict(), tmp_path / "timm.safetensors")
    images = torch.rand(2, 3, 80, 48, generator=rng)
    v = torchvision.transforms.functional

    @torch.no_grad()
    def run(size):
        small = v.resize(images, size, v.InterpolationMode.BICUBIC, antialias=True)
        small = v.normalize(small, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        return model.forward_features(small)

    for file in ("meta.pth", "timm.safetensors"):
        features = make_features("dinov2", tmp_path / file, "cpu")
        close = dict(rtol=1e-5, atol=1e-5)  # of rounding
        tokens = run([70, 42])[:, 1 + registers :]
        torch.testing.assert_close(features.tokens(images), tokens, **close)
        torch.testing.assert_close(features(images), run([224, 224])[:, 0], **close)
    assert features.name == f"dinov2-{hash_file(tmp_path / file)[:8]}" and features.dim == 128


# ------------------------------------------------------------ scripts


def run_script(name, directory, *flags):
    """Run from elsewhere, with another package named `datasets` on the path, as users have it."""
    (directory / "datasets").mkdir(exist_ok=True)
    (directory / "datasets" / "__init__.py").write_text("raise ImportError('the wrong datasets')")
    done = subprocess.run(
        [sys.executable, runs.ROOT / "scripts" / f"{name}.py", *flags],
        cwd=directory, env={**os.environ, "PYTHONPATH": str(directory)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def digits_classifier(tmp_path_factory):
    """The file as the shipped command writes it."""
    directory = tmp_path_factory.mktemp("classifier")
    words = ["--dataset=digits", "--epochs=10", "--out=new/digits.safetensors"]
    assert "held-out accuracy" in run_script("train_classifier", directory, *words)
    return directory / "new" / "digits.safetensors"


def test_a_classifier_holds_out_a_fifth_and_knows_it(digits_classifier):
    features = make_features("digits_classifier", digits_classifier, "cpu")
    split = train_classifier.load_split(get_dataset("digits"), 0)
    images, held_out_images, _, held_out_labels = split
    assert len(held_out_images) == 360 and len(images) == 1437
    assert set(torch.bincount(held_out_labels).tolist()) <= {34, 35, 36, 37}  # stratified
    found = features.classify(features(held_out_images / 2 + 0.5))
    accuracy = (found == held_out_labels).double().mean().item()
    assert accuracy >= 0.98


def test_augmentation_moves_whole_images():
    """Each result is the image, moved by up to two pixels; all occur."""
    rng = torch.Generator().manual_seed(0)
    image = torch.arange(24.0).reshape(2, 3, 4)
    padded = F.pad(image, (2, 2, 2, 2), value=-1)
    windows = padded.unfold(1, 3, 1).unfold(2, 4, 1).movedim(0, 2)  # (row, column, C, H, W)
    found = train_classifier.augment(image.expand(1000, -1, -1, -1), 2, rng)
    assert torch.equal(found.unique(dim=0), windows.flatten(0, 1).unique(dim=0))


def test_names_and_files_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no .*absent: .*scripts/train_classifier"):
        make_features("digits_classifier", tmp_path / "absent", "cpu")
    with pytest.raises(UserError, match="'vgg', expected one of inception, inception_tf, digits"):
        make_features("vgg", None, "cpu")
    assert make_features("none", None, "cpu") is None


def test_compute_fid_stats_command(digits_classifier, tmp_path):
    flags = ["--dataset=digits", "--resolution=9", "--features=digits_classifier"]  # they are 8
    flags += [f"--weights={digits_classifier}", "--out=stats/digits.npz"]
    run_script("compute_fid_stats", tmp_path, *flags)
    features, path = DigitsClassifierFeatures(digits_classifier), tmp_path / "stats/digits.npz"
    found = load_statistics(path, extractor=features.name, resolution=8, dim=128)
    digits = get_dataset("digits")
    images = torch.stack([digits[0, i][0] for i in range(1797)]) / 2 + 0.5
    values = features((images * 255).round() / 255).double().numpy()
    np.testing.assert_allclose(found.mu, values.mean(0), rtol=1e-4, atol=1e-5)  # float32 features
    np.testing.assert_allclose(found.sigma, np.cov(values.T), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.features, values, rtol=1e-4, atol=1e-4)  # all of them
    assert found.source["origin"][:4] == "ours" and found.source["count"] == 1797
    right = features.classify(features(images)).numpy() == digits.labels
    assert found.source["class_agreement"] == right.mean() > 0.95
    with np.load(path) as file:
        assert "1797 images" in str(file["preprocessing"])


def compute(**given):
    defaults = {name: default for name, (_, default, _) in compute_fid_stats.FLAGS.items()}
    given = {**defaults, "num_workers": 0, "device": "cpu", **given}
    compute_fid_stats.main(SimpleNamespace(**given))


class ChannelMeans:
    """Features simple enough to be right by sight; stores what it was given."""

    name = "channel_means"

    def __init__(self, dim):
        self.seen, self.dim = [], dim

    def __call__(self, images):
        self.seen.append(images)
        return images.mean((2, 3))


def test_compute_fid_stats_sees_the_values_of_pytorch_fid(tmp_path, monkeypatch):
    """A folder of PNG: uint8 / 255, as pytorch-fid's ToTensor has it, to the last bit."""
    features = ChannelMeans(3)
    monkeypatch.setattr(features_module, "make_features", lambda *_: features)
    pixels = np.random.default_rng(0).integers(256, size=(6, 16, 16, 3), dtype=np.uint8)
    (tmp_path / "png").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "png" / f"{i}.png")
    out, path = tmp_path / "stats.npz", str(tmp_path / "png")
    given = {"dataset": "folder", "path": path, "resolution": 16, "batch_size": 4}
    compute(**given, out=str(out))
    seen = torch.cat(features.seen)
    assert torch.equal(seen, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert [len(images) for images in features.seen] == [4, 2]
    found = load_statistics(out, extractor="channel_means", resolution=16, dim=3)
    means = pixels.mean((1, 2)) / 255
    np.testing.assert_allclose(found.mu, means.mean(0), rtol=1e-6)  # means are in float32
    np.testing.assert_allclose(found.sigma, np.cov(means.T), rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(found.features, means, rtol=1e-6)


@pytest.mark.parametrize("stored", [0, 3])
def test_compute_fid_stats_stores_a_subset(tmp_path, monkeypatch, stored):
    """The same images for any batch size, and not the first ones."""
    found = []
    for batch_size in (7, 50):
        features = ChannelMeans(1)
        monkeypatch.setattr(features_module, "make_features", lambda *_, f=features: f)
        given = {"dataset": "digits", "resolution": 8, "kept_features": stored}
        out = tmp_path / f"{batch_size}.npz"
        compute(**given, batch_size=batch_size, out=str(out))
        everything = torch.cat(features.seen).mean((2, 3)).numpy()
        found.append(load_statistics(out, extractor="channel_means", resolution=8, dim=1).features)
    if not stored:
        assert found == [None, None]
        return
    assert found[0].shape == (3, 1) and (found[0] == found[1]).all()
    assert np.isin(found[0], everything).all() and (found[0] != everything[:3]).any()
