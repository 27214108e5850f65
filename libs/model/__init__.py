"""Networks: DiM, the U-ViT baseline, and how a config builds and loads them.

DiM, UViT      the networks
MIXERS         the mixers of DiM by name: add one here
PRESETS        width and depth of the paper's models
build_model    the network of a config's `nnet` section
HEADS          the heads by the names of loss terms: add one here
add_heads      the heads that the terms of a loss need, onto a network
split_weight   (weight, keywords) of a term in a config's `loss` section
load_into      weights of a file into a network
model_from_official, uvit_from_official, to_official   official configurations and weights <-> ours
"""

from libs.model.build import build_model, load_into
from libs.model.dim import MIXERS, PRESETS, DiM
from libs.model.heads import HEADS, add_heads, split_weight
from libs.model.published import model_from_official, to_official, uvit_from_official
from libs.model.uvit import UViT
