"""Inputs that once failed, by kind, and what is right."""

import shutil

import pytest
import runs

import utils
from libs.runtime import flags
from utils import flatten, read_json

# ---------------------------------------- files, folders and autoencoders


# ---------------------------------------- command lines, configs, launchers, signals, output

RELEASE = runs.ROOT / "tests" / "data" / "release_0_1"
CONFIG = """from configs import common, digits_T_DiM


def get_config():
    config = digits_T_DiM.get_config()
    {}
    return config
"""


def parse(*words):
    return flags.parse_flags(["eval.py", *map(str, words)], flags.EVALUATION)


@pytest.fixture
def write_config(tmp_path):
    """write_config(line): the path of a config file with this line in get_config."""

    def write(line):
        path = tmp_path / "mine.py"
        path.write_text(CONFIG.format(line))
        return path

    return write


@pytest.mark.parametrize("line, says", [
    ("config.train.batchsize = 4", 'Did you mean "batch_size"'),
    ("config.optimizer.weigth_decay = 0.1", 'Did you mean "weight_decay"'),
    ("config.trian.n_steps = 3", 'Did you mean "train"'), ("config.steps = 3", '"steps"'),
    ("config.nnet.dims = 16", 'Did you mean "dim"'),
    ("config.nnet = common.dim_nnet(depht=3)", 'Did you mean "depth"'),
    ("config.sample.update(scal=2.0)", 'Did you mean "scale"'),
])  # fmt: skip
def test_a_misspelt_key_in_a_config_file(write_config, line, says):
    path = write_config(line)
    with pytest.raises(flags.FlagError) as error:
        parse(f"--config={path}", "--nnet_path=x")
    assert str(error.value).startswith(f"{path}, line 6: ") and says in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 120


@pytest.mark.parametrize("line", [
    "config.loss.mine = 0.1", "config.process.shift = 3.0", "config.nnet.mixer.heads = 3",
    'config.nnet = common.dim_nnet(mixer=common.d(name="attention", heads=3))',
    'config.optimizer = common.d(name="sgd", lr=0.1, momentum=0.9)',
])  # fmt: skip
def test_sections_that_take_more_keys(write_config, line):
    assert parse(f"--config={write_config(line)}", "--nnet_path=x").config.is_locked


def test_config_files_from_elsewhere(write_config, tmp_path, monkeypatch):
    """An older file still loads, a module beside a file is found, a message names what exists."""
    old = parse(f"--config={RELEASE / 'digits_T_DiM.py'}", "--nnet_path=x").config
    new = parse("--config=configs/digits_T_DiM.py", "--nnet_path=x").config
    assert flatten(old).items() <= flatten(new).items()
    (tmp_path / "sizes_beside.py").write_text("DEPTH = 7\n")
    path = write_config("import sizes_beside; config.nnet.depth = sizes_beside.DEPTH")
    assert parse(f"--config={path}", "--nnet_path=x").config.nnet.depth == 7
    monkeypatch.chdir(tmp_path)
    with pytest.raises(flags.FlagError, match="did you mean (.*)[?]") as error:
        parse("--config=configs/digits_T_DiM.py", "--nnet_path=x")
    said = str(error.value).rpartition("mean ")[2].rstrip("?")
    assert (tmp_path / said).is_file()


def test_the_last_of_two_tuples_counts():
    twice = ["--config.optimizer.betas=(0.9,0.99)", "--config.optimizer.betas=(0.8,0.95)"]
    args = parse("--config=configs/digits_T_DiM.py", "--nnet_path=x", *twice)
    assert args.config.optimizer.betas == args.overrides["optimizer.betas"] == (0.8, 0.95)


def test_the_config_beside_weights_takes_changes(tmp_path):
    weights = shutil.copytree(RELEASE / "latent.ckpt", tmp_path / "8.ckpt")
    words = ["--config.autoencoder.pretrained_path=/other/machine", "--config.sample.scale=2"]
    expected = flatten(read_json(weights / "config.json"))
    expected |= {"autoencoder.pretrained_path": "/other/machine", "sample.scale": 2.0}
    for path in weights, weights / "nnet_ema.safetensors":
        for config in [], [f"--config={weights / 'config.json'}"]:
            args = parse(f"--nnet_path={path}", *config, *words)
            found = flatten(args.config)
            assert {key: found[key] for key in expected} == expected and args.config.is_locked
    with pytest.raises(flags.FlagError, match="expected 1 to inf"):
        parse(f"--nnet_path={weights}", "--config.sample.sample_steps=0")
    names = {utils.run_directory(str(tmp_path / n / "config.json"), {}, None) for n in "ab"}
    assert len(names) == 2


# ---------------------------------------- weights, classes, loaders, training and evaluation
