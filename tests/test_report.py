"""report.html: what a run was, on one page that asks nobody."""

import html
import re
import shlex

import pytest
import runs

from libs.evaluate import write_report
from utils import write_json

RUN = {
    "nnet.dim": 16, "train.n_steps": 4, "train.batch_size": 4, "train.grid_samples": 4,
    "train.log_interval": 1, "train.eval_interval": 2, "sample.sample_steps": 2,
}  # fmt: skip
EVALUATION = {
    "frechet_distance": 12.345678, "n": 20, "repeats": 1, "metrics": ["frechet_distance"],
    "images": {"file": "a", "preprocessing": "<b>"}, "statistics": None, "extractors": {},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory, in_process):
    """A run whose training wrote its report."""
    run = tmp_path_factory.mktemp("a run")
    words = ["--config=configs/digits_T_flow.py", f"--workdir={run}"]
    assert in_process("train", [*words, *(f"--config.{k}={v}" for k, v in RUN.items())]) == 0
    return run


def test_the_page_holds_the_run_and_asks_nobody(run):
    text, lines = (run / "report.html").read_text(), runs.steps_logged(run)
    for key, title in {"loss": "Loss", "grad_norm": "Gradient norm"}.items():
        values = [line[key] for line in lines]
        places = re.search(rf'>{title}<b>.*?class="curve" d="M\S+?L(.*?)"', text)[1].split("L")
        heights = [(x - min(values)) / (max(values) - min(values)) for x in values]
        found = [(158 - float(place.split(",")[1])) / 150 for place in places]
        assert found == pytest.approx(heights, abs=4e-4)  # 0.1 of 150 printed
        assert f">{title}<b>{values[-1]:.4g}</b>" in text
    assert "Step 4 of 4" in text and text.count("data:image/jpeg;base64,") == 2
    assert "<td>train.n_steps</td><td>1000</td><td>4</td>" in text
    assert "<td>digits_T_flow.py</td>" in text and "<td>packages.torch</td>" in text


def test_evaluations_and_what_is_not_finite(run):
    write_json(run / "evaluation_a.json", EVALUATION)
    write_json(run / "evaluation_b.json", EVALUATION | {"frechet_distance": 0.5})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": "NaN", "grad_norm": "NaN", "outcome": "bad"}\n')
    text = write_report(run).read_text()
    assert "<td>frechet_distance</td><td>12.346</td><td>0.5</td>" in text
    assert "not finite: 1." in text and "preprocessing &lt;b&gt;" in text and "nan" not in text


def test_the_commands_go_on_and_a_report_that_fails_ends_nothing(run, in_process):
    text = html.unescape((run / "report.html").read_text())
    commands = [shlex.split(line) for line in re.findall(r"python .*?\.py .*", text)]
    assert [words[1] for words in commands] == ["train.py", "sample.py", "eval.py"]
    (run / "report.html").unlink()
    (run / "report.html").mkdir()
    assert in_process("train", [*commands[0][2:], "--config.train.n_steps=6"]) == 0
    assert [line["step"] for line in runs.steps_logged(run)][-1] == 6
    assert "could not write report.html" in (run / "output.log").read_text()
    assert in_process("sample", [commands[1][2], "--n=1", f"--out={run}/grid.png"]) == 0
