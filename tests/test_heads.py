"""Flow matching with every loss term, heads and routing: one run as the official recipe's are
tested. Of its 6 steps 3 route: the head internal is before the routed blocks, repa's among them.
"""

import re

import pytest
import runs
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from configs import digits_T_DiM
from configs.common import d
from libs.evaluate.features import Classifier
from libs.model import UViT, add_heads
from libs.parts import make_parts
from libs.train import losses
from utils import UserError

CONFIG = """
from configs import digits_T_DiM
from configs.common import d


def get_config():
    config = digits_T_DiM.get_config()
    config.process, config.pred = d(name="flow", times="logit_normal"), "velocity_pred"
    repa = d(weight=0.5, block=2, kind="irepa", features="classifier", path="{}")
    config.loss = d(mse=1.0, direction=0.5, internal=d(weight=0.5, block=1), repa=repa)
    config.sample.algorithm, config.nnet.routing.first = "euler", 2
    return config
"""
TINY = dict(train__num_workers=0, train__grid_samples=0, train__n_steps=6, train__save_interval=3)
TINY |= dict(train__routed_share=0.5)
HALF = dict(train__n_steps=3, train__routed_share=1.0)  # the same first 3 steps


@pytest.fixture(scope="module")
def run(in_process, tmp_path_factory):
    """(the directory of a run with all terms, words(workdir, **changes): its command line)."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    classifier = Classifier(channels=1, num_classes=10)
    save_file(classifier.state_dict(), folder / "classifier.safetensors")
    config = folder / "all_terms.py"
    config.write_text(CONFIG.format(folder / "classifier.safetensors"))

    def words(workdir, **changes):
        return [*runs.arguments(workdir, **{**TINY, **changes}), f"--config={config}"]

    assert in_process("train", words(folder)) == 0
    return folder, words


def test_terms_by_their_formulas():
    """repa with features on a grid of 2 x 2 for tokens on one of 4 x 4."""
    rng = torch.Generator().manual_seed(0)
    out, target = torch.randn(2, 2, 3, 4, 4, generator=rng)
    for a, b in (out, target), (out[:, :1], target[:, :1]):
        dims = 1 if a.shape[1] > 1 else (1, 2, 3)  # of one channel, the whole image
        cos = (a * b).sum(dims) / (a.square().sum(dims) * b.square().sum(dims)).sqrt()
        found = losses.direction(a, b, {}, None)
        torch.testing.assert_close(found, 1 - cos.reshape(2, -1).mean(1))
    features, tokens = torch.randn(2, 4, 5, generator=rng), torch.randn(2, 4, 4, 5, generator=rng)
    standardised = (features - features.mean(1, keepdim=True)) / features.std(1, keepdim=True)
    # Bilinear from 2 to 4, corners not aligned: 0.75 and 0.25, the edges repeated.
    up = torch.tensor([[1.0, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    for kind, y in ("repa", features), ("irepa", standardised):
        y = torch.einsum("ip,jq,bpqd->bijd", up, up, y.unflatten(1, (2, 2)))
        cos = (F.normalize(tokens, dim=-1) * F.normalize(y, dim=-1)).sum(-1)
        batch = losses.Batch(*[None] * 6, features=features)
        found = losses.repa(out, target, {"repa": tokens}, batch, kind=kind, block=2)
        torch.testing.assert_close(found, -cos.mean((1, 2)), rtol=1e-5, atol=1e-5)  # and 1e-6


def test_heads_of_u_vit():
    """Of the tokens after a block, time and class; the image is the same."""
    torch.manual_seed(0)
    model = UViT(input_size=8, in_channels=1, dim=32, depth=2, heads=2, num_classes=3)
    add_heads(model, {"internal": d(weight=0.5, block=1)}, training=True)
    head, after = model.heads["internal"], []
    for parameter in head.parameters():
        parameter.data.normal_()
    model.mid_block.register_forward_hook(lambda block, inputs, tokens: after.append(tokens))
    x, t, y = torch.randn(2, 1, 8, 8), torch.rand(2), torch.tensor([0, 2])
    out, inner = model(x, t, y, hidden=("internal",))
    assert torch.equal(out, model(x, t, y))
    condition = F.silu(model.embed(x, t, y, (4, 4))[:, :2].sum(1))
    expected = head(after[0][:, 2:].unflatten(1, (4, 4)), condition)
    assert torch.equal(inner["internal"], expected) and expected.std() > 0.1


def test_resume_and_which_heads_the_averages_have(run, in_process, tmp_path):
    whole, words = run
    assert in_process("train", words(tmp_path, **HALF)) == 0
    assert in_process("train", words(tmp_path)) == 0
    assert runs.numbers(tmp_path) == runs.numbers(whole)
    pairs = list(zip(runs.weights(tmp_path, 6), runs.weights(whole, 6), strict=True))
    assert all(torch.equal(found[name], x[name]) for found, x in pairs for name in x | found)
    heads = [{name.split(".")[1] for name in x if name.startswith("heads.")} for _, x in pairs]
    assert heads[0] == {"internal", "repa"} and {*map(tuple, heads[1:])} == {("internal",)}
    # Each head is trained, and both move the blocks before them.
    before = runs.weights(whole, 3)[0]
    assert not any(torch.equal(x, before[name]) for name, x in pairs[0][1].items())


def test_draws_by_position_and_half_precision(run, in_process, tmp_path):
    """Whole batches in place of two halves, then autocast; an overflow would take the next batch.
    The tolerances are those of the official recipe's tests.
    """
    whole, words = run
    changes = {"one": {"gradient_accumulation_steps": 1}}
    changes |= {name: {"train__mixed_precision": name} for name in ("bf16", "fp16")}
    for name, change in changes.items():
        assert in_process("train", words(tmp_path / name, **HALF, **change)) == 0
        steps = [line for line in runs.steps_logged(tmp_path / name) if line["outcome"] == "ok"]
        count, rel = (1 if name == "fp16" else 3), 1e-4 if name == "one" else 0.03
        expected = [line[1] for line in runs.numbers(whole)[:count]]
        assert [line["loss"] for line in steps[:count]] == pytest.approx(expected, rel=rel)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes(run, engine, tmp_path):
    whole, words = run
    launch = ["--config_file", f"configs/accelerate/{engine}.yaml", "--num_processes", "2"]
    launch += ["--mixed_precision", "no", "--main_process_port", "0"]
    status, output = runs.finish(runs.start_words(launch, "train.py", *words(tmp_path)))
    assert status == 0, output
    # The gradients of two processes are summed in another order than those of one.
    for found, line in zip(runs.numbers(tmp_path), runs.numbers(whole), strict=True):
        assert found == pytest.approx(line, rel=1e-4)


def test_pictures_and_weights_with_and_without_heads(run, in_process, tmp_path, capfd):
    """Under guidance by the internal head; with a config that has no heads; of another process."""
    (whole, words), pictures = run, []
    weights = whole / "ckpts" / "6.ckpt"

    def draw(*more):
        picture = tmp_path / f"{len(pictures)}.png"
        pictures.append(picture)
        drawn = [f"--nnet_path={weights}", "--n=1", f"--out={picture}", *more]
        return in_process("sample", drawn), capfd.readouterr()

    plain = ["--config=configs/digits_T_DiM.py", "--config.nnet.dim=16", "--config.nnet.depth=5"]
    plain += ["--config.process.name=flow", "--config.pred=velocity_pred", "--algorithm=euler"]
    plain.append("--config.nnet.routing.first=2")
    assert draw("--steps=2")[0] == draw("--steps=2", "--config.sample.internal_scale=5.0")[0] == 0
    status, said = draw("--steps=2", *plain)
    assert status == 0 and "head internal is left out" in said.out
    # Weights that lack the head, as published ones do.
    tensors = load_file(weights / "nnet_ema.safetensors")
    bare, other = tmp_path / "bare.safetensors", tmp_path / "other.safetensors"
    save_file({k: x for k, x in tensors.items() if "heads." not in k}, bare)
    save_file({k: x for k, x in tensors.items() if "routing." not in k}, other)
    bare = [f"--nnet_path={bare}", f"--config={weights}/config.json"]
    status, said = draw("--steps=2", *bare)
    assert status == 0 and "head internal is left out" in said.out
    without, guided, *others = (picture.read_bytes() for picture in pictures)
    assert others == [without, without] != [guided, guided]
    for change, says in (
        (["--config.process.name=vpsde"], "config.process: .* 'times'; VPSDE takes .beta_min"),
        ([*plain, "--config.process.name=vpsde", "--config.pred=noise_pred"],
         "process.name is 'vpsde', but the weights were trained with 'flow'"),
        (plain[:-1], "nnet.routing.first is None, but the weights were trained with 2"),
        ([*bare, "--config.sample.internal_scale=5.0"], "the network has no head for it"),
        (["--config.loss.internal.block=3"], "loss.internal.block is 3, .* trained with 1"),
    ):
        status, said = draw(*change)
        runs.assert_one_sentence(status, said.err)
        assert re.search(says, said.err), said.err

    start = words(tmp_path / "tuned", nnet__pretrained_path=other, train__n_steps=1)
    assert in_process("train", start) == 0
    log = (tmp_path / "tuned" / "output.log").read_text()
    assert "head repa starts anew" in log and "routing starts anew" in log
    assert "head internal" not in log


@pytest.mark.parametrize("loss, says", [
    (d(repa=0.5), "repa needs .* a loss.repa.features of .*classifier"),
    (d(repa=d(weight=1.0, features="classifier", path="x")), "there is no x"),
    (d(internal=d(weight=0.5, block=5)), "block is 5, expected 0 to 4"),
])  # fmt: skip
def test_terms_that_cannot_be(loss, says):
    config = digits_T_DiM.get_config()
    config.loss = loss
    with pytest.raises(UserError, match=says):
        make_parts(config, data="training")
    with pytest.raises(UserError, match="Linear takes no heads: leave out loss"):
        add_heads(torch.nn.Linear(1, 1), loss, training=True)
