"""The documentation: its examples run, its links lead somewhere, its table of environment variables
is complete."""

import re

import pytest
import runs
import torch
from PIL import Image

from libs.diffusion import choose_sampler
from libs.model import add_heads, build_model
from libs.runtime import load_config
from sde import make_process

DOCS = runs.ROOT / "docs"
PAGES = [*runs.ROOT.glob("*.md"), *DOCS.glob("*.md"), runs.ROOT / "benchmarks" / "NOTES.md"]
PAGES += runs.ROOT.glob("pretrained/*.md")
README_WORDS, EXAMPLE_LINES = 1000, 40
SHORT = {
    "nnet.dim": 16, "train.n_steps": 2, "train.batch_size": 4, "train.grid_samples": 0,
    "train.log_interval": 1, "sample.sample_steps": 2,
}  # fmt: skip


def read_blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


EXAMPLES = read_blocks(DOCS / "extending.md", "python")


def test_there_are_four_short_examples():
    assert len(EXAMPLES) == 4
    for example in EXAMPLES:
        assert "def get_config()" in example and example.count("\n") < EXAMPLE_LINES


@pytest.mark.parametrize("number", range(4))
def test_examples_train_and_sample(number, tmp_path, in_process):
    config = tmp_path / "example.py"
    config.write_text(EXAMPLES[number])
    run, picture = tmp_path / "run", tmp_path / "grid.png"
    words = [f"--config={config}", *(f"--config.{k}={v}" for k, v in SHORT.items())]
    assert in_process("train", [*words, f"--workdir={run}"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    weights = [f"--nnet_path={run}/ckpts/2.ckpt", f"--out={picture}", "--n=1"]
    assert in_process("sample", [*words, *weights]) == 0
    assert picture.is_file()


def test_the_snippet_of_the_readme_draws(in_process, monkeypatch, tmp_path):
    words = [f"--nnet_path={runs.ROOT}/pretrained/emoji64.ckpt", f"--out={tmp_path}/emoji_pipeline"]
    words.append("--config.sample.sample_steps=2")
    assert in_process("scripts.export_diffusers", words) == 0
    monkeypatch.chdir(tmp_path)
    (snippet,) = read_blocks(runs.ROOT / "README.md", "python")
    exec(snippet, {})
    assert Image.open("emoji.png").size == (64, 64)


def test_the_readme_is_short():
    assert len((runs.ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("path", sorted(runs.ROOT.glob("configs/*_flow*.py")), ids=lambda p: p.stem)
def test_the_parts_and_hours_of_a_flow(path):
    """Eight GPUs are counted as 95% of eight times the measured speed."""
    config = load_config(str(path))
    with torch.device("meta"):
        add_heads(build_model(config.nnet), config.loss, training=True, repa={"feature_dim": 128})
    process = make_process(**config.process)
    assert config.pred in process.predictions and choose_sampler(config.sample.algorithm, process)
    text = " ".join(path.read_text().split())
    found = re.search(r"([\d.]+) hours of (one|eight) H200s? by the measured ([\d.,]+)", text)
    if found or "hours" in text:
        gpus = {"one": 1, "eight": 0.95 * 8}[found[2]]
        seconds = config.train.n_steps * config.train.batch_size / float(found[3].replace(",", ""))
        assert f"{seconds / gpus / 3600:.1f}" == found[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        assert not path or (page.parent / path).exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", (page.parent / (path or page)).read_text(), re.M)
            assert anchor in [heading.lower().replace(" ", "-") for heading in headings], target


def test_every_environment_variable_is_in_the_table():
    """DIM_* of the product and of the tests, no more and no less."""
    rows = re.findall(r"^\| `(DIM_\w+)` \|", (DOCS / "kernels.md").read_text(), re.M)
    files = [*runs.ROOT.glob("*.py"), *runs.ROOT.glob("libs/**/*.py"), runs.ROOT / "Makefile"]
    files += [*runs.ROOT.glob("scripts/*.py"), runs.ROOT / "tests" / "golden_cases.py"]
    found = {name for path in files for name in re.findall(r"\"(DIM_\w+)\"", path.read_text())}
    assert sorted(found) == sorted(rows)
