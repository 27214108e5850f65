"""The parts of a config fit together, or a sentence says which of them does not."""

import pytest
import torch

from configs import digits_T_DiM
from libs.data import PixelCodec
from libs.parts import load_weights, make_parts
from sde import VPSDE
from utils import UserError, write_json


@pytest.fixture
def config():
    return digits_T_DiM.get_config().lock()


def test_the_parts_of_pixels(config):
    process, codec, dataset, model = make_parts(config, data="training")
    assert isinstance(process, VPSDE) and isinstance(codec, PixelCodec)
    assert len(dataset) == len(make_parts(config, data="real").dataset) == 1797
    assert config.process.name == "vpsde" and make_parts(config).dataset is None
    torch.manual_seed(config.seed)
    again = make_parts(config, data="training").model
    assert all(map(torch.equal, model.parameters(), again.parameters()))


def test_upsampling_is_of_no_concern_in_training(config):
    config.ug_m = 2
    make_parts(config, data="training")


@pytest.mark.parametrize("trained, asked, says", [
    ({}, {"sample.cfg": False}, None),
    ({}, {"sample.scale": 2.0, "nnet.drop_path": 0.5}, None),
    ({}, {"train.mode": "uncond"}, None),  # the null label is trained
    ({}, {"nnet.scan_directions": 1}, "nnet.scan_directions is 1, .* trained with 3"),
    ({}, {"pred": "x0_pred"}, "--config.pred=noise_pred"),
    ({}, {"process.name": "discrete"}, "--config.process.name=vpsde"),
    ({"train.mode": "uncond"}, {}, "trained without classes"),
    ({"dataset.cfg": False}, {}, "guidance is asked for"),
    ({"dataset.cfg": False}, {"sample.scale": 0.0}, None),
    ({"dataset.cfg": False}, {"train.mode": "uncond"}, "images without classes are asked for"),
    ({"dataset.cfg": False, "nnet.pretrained_path": "nnet_ema.pth"}, {}, None),
])  # fmt: skip
def test_what_weights_do_not_show(config, tmp_path, monkeypatch, trained, asked, says):
    """Other directions or labels that were never trained fit every tensor and draw other pictures.
    The run's config.json is one without process.name, as older runs wrote it.
    """
    monkeypatch.setattr("libs.parts.load_into", lambda model, path: ["loaded"])
    saved = config.copy_and_resolve_references().unlock()
    saved.update_from_flattened_dict(trained)
    del saved.process
    write_json(tmp_path / "config.json", saved.to_dict())
    config.update_from_flattened_dict(asked)
    if says is None:
        assert load_weights(config, None, tmp_path) == ["loaded"]
        return
    with pytest.raises(UserError, match=says):
        load_weights(config, None, tmp_path)


def test_a_config_of_another_library_says_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr("libs.parts.load_into", lambda model, path: ["loaded"])
    write_json(tmp_path / "config.json", {"_class_name": "AutoencoderKL"})
    config.process.name = "flow"
    assert load_weights(config, None, tmp_path) == ["loaded"]
