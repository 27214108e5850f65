"""Metrics beyond FID: against torch-fidelity and ADM's formulas, of pictures in files, compared."""

import json
import sys

import numpy as np
import pytest
import runs
import torch
import torchvision
from PIL import Image

from configs.common import d
from libs.evaluate import compare, inception, metrics
from libs.evaluate import features as features_module
from libs.evaluate.features import Extractors
from libs.evaluate.metrics import choose_metrics, compute_metrics, make_feature_set
from libs.evaluate.real import load_real
from libs.evaluate.report import describe_setting
from libs.files import hash_file, map_array
from libs.runtime.flags import load_config
from utils import UserError, read_json

SIDE = 299
TINY = d(features="tiny", fid_weights_path=None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the names and shapes of pytorch-fid's, and random weights that tell pictures
    apart.
    """
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(
        num_classes=1008, aux_logits=False, weights=None, init_weights=False
    )
    for tensor in network.parameters():
        if tensor.ndim == 4:
            torch.nn.init.kaiming_normal_(tensor)
    network.fc.weight.data.normal_(std=0.3)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(network.state_dict(), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "INCEPTION_SHA256_PREFIX", hash_file(path)[:8])
        yield path
    path.unlink()


def draw_pictures(seed, n, side):
    """uint8 (n, 3, side, side): smooth colours, with noise that differs from picture to picture."""
    rng = torch.Generator().manual_seed(seed)
    colours = torch.randint(256, (n, 3, 5, 5), generator=rng).float()
    share = 60 * (1 + seed) * torch.rand(n, 1, 1, 1, generator=rng)
    noise = share * torch.randn(n, 3, side, side, generator=rng)
    smooth = torch.nn.functional.interpolate(colours, (side, side), mode="bicubic")
    return (smooth + noise).clamp(0, 255).byte()


# ------------------------------------------------------------ agreement


def test_inception_tf_is_torch_fidelitys_at_any_size(weights):
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = fidelity.FeatureExtractorInceptionV3(
        "random", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights)
    )
    ours = features_module.make_features("inception_tf", weights, "cpu")
    for side in SIDE, 32, 320:
        pictures = draw_pictures(1, 2, side)
        found, (pool3, logits) = ours.extract(pictures / 255), theirs(pictures)
        assert pool3.std(0).mean() > 3e-3
        # Where nothing is resized bit for bit; else the order of interpolating differs.
        rounding = 0 if side == SIDE else 1e-5
        for own, other in ((found["features"], pool3), (found["logits"], logits)):
            torch.testing.assert_close(own, other, rtol=0, atol=rounding * other.abs().max())


def test_spatial_features_are_adms(weights):
    """mixed_6/conv[..., :7] of TensorFlow's graph, whose mixed_6 is Mixed_6d, rows first."""
    ours = features_module.make_features("inception", weights, "cpu")
    pictures, blocks = draw_pictures(1, 2, SIDE) / 255, ours.network.blocks
    with torch.inference_mode():
        x = blocks[2][:6](blocks[1](blocks[0](2 * pictures - 1)))  # Mixed_5b to Mixed_6c
        expected = blocks[2][6].branch1x1(x)[:, :7]
    spatial = ours.extract(pictures)["spatial"].reshape(2, 17, 17, 7)
    assert torch.equal(spatial, expected.permute(0, 2, 3, 1)) and spatial.std() > 0.1


def test_figures_are_those_of_torch_fidelitys_pipeline(weights, monkeypatch):
    """At 299 px, from pictures to figures, with the same subsets. Where fewer images than features
    leave a singular covariance, its FID carries 1e-6 of roots of rounding.
    """
    fidelity = pytest.importorskip("torch_fidelity")
    pictures = [draw_pictures(seed, n, SIDE) for seed, n in ((0, 20), (1, 24))]
    first, second = (torch.utils.data.Subset(x, range(len(x))) for x in pictures)
    expected = fidelity.calculate_metrics(
        input1=first, input2=second,
        isc=True, fid=True, kid=True, prc=True, isc_splits=3, kid_subsets=10, kid_subset_size=8,
        feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(weights),
        cuda=False, cache=False, verbose=False,
    )  # fmt: skip
    for name, value in {"SPLITS": 3, "SUBSETS": 10, "SUBSET_SIZE": 8}.items():
        monkeypatch.setattr(metrics, name, value)
    names = choose_metrics("frechet_distance,inception_score,kid,precision_recall")
    extractors = Extractors(d(features="inception_tf", fid_weights_path=weights), names, "cpu")
    sets = (extractors(x / 255).items() for x in pictures)
    sets = [{kind: make_feature_set(x.numpy(), "cpu") for kind, x in found} for found in sets]
    figures = compute_metrics(*sets, names)
    found = {
        "frechet_inception_distance": figures["frechet_distance"],
        **{f"inception_score_{key}": figures["inception_score"][key] for key in ("mean", "std")},
        **{f"kernel_inception_distance_{key}": figures["kid"][key] for key in ("mean", "std")},
        **{key: figures["precision_recall"][key] for key in ("precision", "recall")},
    }
    assert found == pytest.approx({key: expected[key] for key in found}, rel=1e-5)
    assert found["inception_score_mean"] > 1.05 and 0 < found["recall"] < 1


def sets_of(kind, seed, *shapes):
    rng = np.random.default_rng(seed)
    rows = [(i + 1) * rng.normal(size=x).astype(np.float32) + i for i, x in enumerate(shapes)]
    return [{kind: make_feature_set(x, "cpu")} for x in rows]


def test_sfid_and_inception_score_are_adms_formulas():
    """Of its evaluator.py; the score takes torch-fidelity's order of the images."""
    linalg = pytest.importorskip("scipy.linalg")
    made, real = sets_of("spatial", 0, (90, 12), (70, 12))
    x, y = (found["spatial"].features for found in (made, real))
    sigma1, sigma2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = np.trace(linalg.sqrtm(sigma1.dot(sigma2)).real)
    gap = x.mean(0, dtype=np.float64) - y.mean(0, dtype=np.float64)
    expected = gap.dot(gap) + np.trace(sigma1) + np.trace(sigma2) - 2 * root
    assert compute_metrics(made, real, ["sfid"])["sfid"] == pytest.approx(expected, rel=1e-9)

    pytest.importorskip("torch_fidelity")
    (made,) = sets_of("logits", 1, (200, 30))
    rows = made["logits"].features[np.random.RandomState(2020).permutation(200)].astype(np.float64)
    preds = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
    scores = []
    for part in np.split(preds, 10):
        kl = part * (np.log(part) - np.log(np.expand_dims(np.mean(part, 0), 0)))
        scores.append(np.exp(np.mean(np.sum(kl, 1))))
    found = compute_metrics(made, None, ["inception_score"])["inception_score"]
    assert (found["mean"], found["std"]) == pytest.approx((np.mean(scores), np.std(scores)))
    assert found["mean"] > 1.3


def test_kid_takes_as_many_as_there_are():
    """The unbiased estimate with the cubic kernel, of all images where there are few."""
    pytest.importorskip("torch_fidelity")
    made, real = sets_of("features", 2, (40, 6), (40, 6))
    x, y = (found["features"].features.astype(np.float64) for found in (made, real))
    xx, yy, xy = ((a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    inside = sum((k.sum() - k.trace()) / (40 * 39) for k in (xx, yy))
    found = compute_metrics(made, real, ["kid"])["kid"]
    assert found["mean"] == pytest.approx(inside - 2 * xy.mean(), rel=1e-4)  # in float32
    assert found["subset_size"] == 40 and found["std"] < 1e-3 * found["mean"]


def test_metrics_beside_one_another_import_once(monkeypatch):
    """Two threads at once would find one of torch-fidelity's modules half made."""
    pytest.importorskip("torch_fidelity")
    for name in [name for name in sys.modules if name.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    made, real = sets_of("features", 4, (40, 6), (40, 6))
    found = compute_metrics(made, real, ["precision_recall", "kid", "precision_recall"])
    assert found["kid"] and 0 <= found["precision_recall"]["recall"] <= 1


def test_metrics_that_cannot_be_are_told_at_the_start(monkeypatch):
    with pytest.raises(UserError, match="sample.metrics is 'fid', expected one of frechet_dist"):
        choose_metrics("standard,fid")
    assert choose_metrics("adm, kid,sfid")[-1] == "kid" and len(choose_metrics("adm,sfid")) == 4
    monkeypatch.setitem(features_module.FEATURES, "tiny", Tiny)
    with pytest.raises(UserError, match="inception_score needs Inception: .*features=inception"):
        Extractors(TINY, ["sfid", "inception_score"], "cpu")
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="kid needs torch-fidelity: pip install torch-fidelity"):
        choose_metrics("standard,kid")
    sets = sets_of("features", 3, (9, 2), (9, 2))
    assert compute_metrics(*sets, ["precision_recall"]) == {"precision_recall": None}


# ------------------------------------------------------------ pictures and statistics in files


class Tiny:
    """Means of colours, and of the corners' as spatial features, without the network's weights."""

    name, dim, kinds, sha256 = "tiny", 3, {"spatial": 6}, "0" * 64

    def __init__(self, path=None, device="cpu"):
        pass

    def extract(self, images):
        corners = torch.cat([images[:, :, 0, 0], images[:, :, -1, -1]], 1)
        return {"features": images.mean((2, 3)), "spatial": corners}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(features_module.FEATURES, "tiny", Tiny)


def write_adm(path, pictures, **more):
    """A file as ADM's VIRTUAL_*.npz, of float32 moments that are not those of its pictures."""
    rng = np.random.default_rng(1)
    for name, dim in (("", 3), ("_s", 6)):
        rows = rng.random((50, dim))
        more |= {f"mu{name}": rows.mean(0), f"sigma{name}": np.cov(rows.T)}
    more = {key: x.astype(np.float32) for key, x in more.items()}
    np.savez(path, arr_0=pictures.permute(0, 2, 3, 1).numpy(), **more)
    return more


def test_adms_statistics_are_recognized(tiny, tmp_path):
    """Moments for the distances, pictures for what needs features, at their resolution."""
    path, pictures = tmp_path / "VIRTUAL_imagenet8_labeled.npz", draw_pictures(0, 150, 8)
    written = write_adm(path, pictures)
    names = choose_metrics("frechet_distance,sfid,precision_recall")
    extractors = Extractors(TINY, names, "cpu")
    settings = load_config("configs/common.py").dataset
    settings.fid_stats = str(path)
    given = dict(metrics=names, device="cpu")
    real = load_real(settings, extractors, None, side=8, **given)
    for kind, suffix in (("features", ""), ("spatial", "_s")):
        assert (real[kind].mu.numpy() == written[f"mu{suffix}"]).all()
        assert (real[kind].sigma.numpy() == written[f"sigma{suffix}"]).all()
    means = (pictures / 255).mean((2, 3)).numpy()
    np.testing.assert_allclose(real["features"].features, means, rtol=1e-5)
    assert "ADM's" in real["features"].source["origin"]
    assert "150 pictures" in real["features"].source["origin"]
    with pytest.raises(UserError, match="labeled.npz was made with resolution 8, expected 16"):
        load_real(settings, extractors, None, side=16, **given)
    np.savez(path, mu=written["mu"], sigma=written["sigma"])  # pytorch-fid's, U-ViT's, JiT's
    with pytest.raises(UserError, match="mu_s and sigma_s have shapes .*compute_fid_stats"):
        load_real(settings, extractors, None, side=8, **given)
    given["metrics"] = ["density_coverage"]
    with pytest.raises(UserError, match="no features of real images, which density_coverage"):
        load_real(settings, extractors, None, side=8, **given)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_is_mapped_or_read(tmp_path, save, order):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).copy(order)
    save(tmp_path / "x.npz", other=np.ones(5), arr_0=array)
    found = map_array(tmp_path / "x.npz", "arr_0")
    assert (found == array).all() and isinstance(found, np.memmap) == (save is np.savez)
    assert map_array(tmp_path / "x.npz", "arr_1") is None


@pytest.fixture
def measure(tiny, in_process, tmp_path):
    """measure(path, words): the result of eval.py --images without a config."""

    def call(path, *words):
        status = in_process("eval", [
            f"--images={path}", "--config.sample.features=tiny",
            f"--config.dataset.fid_stats={tmp_path / 'adm.npz'}", *words,
        ])  # fmt: skip
        return read_json(f"{path}.json") if status == 0 else status

    return call


def test_pictures_in_files_are_measured_without_a_network(measure, tmp_path, capsys):
    """A folder and the same pictures as ADM's npz give the same figures, batch by batch."""
    pictures, folder = draw_pictures(1, 23, 8), tmp_path / "png"
    folder.mkdir()
    for i, image in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    np.savez(tmp_path / "x.npz", arr_0=pictures.permute(0, 2, 3, 1).numpy())
    write_adm(tmp_path / "adm.npz", draw_pictures(0, 30, 8))
    words = ["--config.sample.metrics=standard,sfid,density_coverage"]
    words += ["--config.sample.mini_batch_size=5", "--config.sample.repeats=3"]
    result, other = measure(folder, *words), measure(tmp_path / "x.npz", *words)
    means = (pictures / 255).mean((2, 3)).double()
    with np.load(tmp_path / "adm.npz") as file:
        moments = (torch.from_numpy(file[name]) for name in ("mu", "sigma"))
        expected = metrics.frechet_distance(means.mean(0), means.T.cov(), *moments)
    assert result["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    for name in ("frechet_distance", "sfid", "precision_recall", "density_coverage"):
        assert result[name] == pytest.approx(other[name], rel=1e-5)  # float32 in another layout
    assert result["repeats"] == 1, "they have no other seeds"
    assert result["n"] == 23 and result["images"]["preprocessing"].startswith("RGB, centre crop")
    assert other["images"]["sha256"] == hash_file(tmp_path / "x.npz")
    assert result["extractors"] == {"tiny": "0" * 64}
    said = capsys.readouterr().out
    assert f"n = 23; pictures of {folder}; preprocessing RGB, centre crop to 8" in said

    Image.new("RGB", (40, 20)).save(folder / "a.png")  # sorts last, is cropped and resized
    (tmp_path / "png.json").unlink()
    assert measure(folder, *words)["n"] == 24
    (folder / "b.png").write_bytes(b"no picture")
    (tmp_path / "png.json").unlink()
    assert measure(folder, *words) == 1
    runs.assert_one_sentence(1, capsys.readouterr().err, "b.png is damaged or no image (cannot")


# ------------------------------------------------------------ results


SPEC = {
    "n": 50_000, "repeats": 1, "labels": "balanced", "vis_label": None, "algorithm": "heun",
    "steps": 25, "network_calls": 98, "guidance_scale": 0.35, "guidance_interval": (0.1, 1.0),
    "internal_scale": 0.0, "internal_interval": None, "precision": "bf16",
    "weights": {"file": "run/8.ckpt/nnet_ema.safetensors", "sha256": "12345678ab"},
    "statistics": {"file": "stats.npz", "sha256": "abcdef0123", "origin": "ours: imagenet"},
    "extractors": {"inception_v3_fid-6726825d": "6726825dff"},
}  # fmt: skip


def test_the_setting_in_one_line():
    assert describe_setting(SPEC) == (
        "n = 50,000; balanced labels; heun, 25 steps, 98 network calls; guidance 0.35 (w = 1.35) "
        "in (0.1, 1.0); no internal guidance; average nnet_ema 12345678; precision bf16; against "
        "stats.npz abcdef01 (ours: imagenet); features inception_v3_fid-6726825d"
    )
    changes = {"repeats": 3, "guidance_scale": 0.0, "internal_scale": 0.7, "vis_label": 3}
    line = describe_setting(SPEC | changes | {"statistics": None, "extractors": {}})
    assert line.startswith("n = 50,000 x 3 seeds; one label;") and "; no guidance; " in line
    assert "; internal guidance 0.7 (w = 1.7); " in line and line.endswith("; features none")


def test_results_are_compared_with_what_differs(tmp_path):
    figures = {"frechet_distance": 2.3456789, "kid": {"mean": 0.25}}
    figures |= {"mine": 1.0, "metrics": ["mine"]}
    first = {**figures, **SPEC, "img_s": 9.0, "config": {"seed": 1}}
    second = {**first, "frechet_distance": 2.0, "steps": 50, "img_s": 8.0, "config": {"seed": 2}}
    second["weights"] = {**SPEC["weights"], "file": "elsewhere/nnet_ema.safetensors"}
    for name, result in (("a", first), ("b", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    paths = [str(tmp_path / f"{name}.json") for name in "ab"]
    status, said = runs.run("scripts/compare_results.py", *paths)
    lines = [line for line in said.splitlines() if line]
    assert status == 0 and lines == [
        f"| figure | {' | '.join(paths)} |", "| --- | --- | --- |",
        "| frechet_distance | 2.3457 | 2 |", "| kid.mean | 0.25 | 0.25 |", "| mine | 1 | 1 |",
        "| steps | 25 | 50 |", "The settings differ: steps.",
    ]  # fmt: skip
    assert list(compare({"a": first, "b": first}))[-1] == "\nThe settings are the same."
