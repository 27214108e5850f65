"""Token routing: which tokens go through the middle blocks, and what comes back."""

import pytest
import torch

from libs.model import build_model
from libs.model.routing import route_index
from libs.train.losses import make_draws
from utils import UserError

FRONT, PAD, (H, W) = 5, 3, (8, 12)  # of a sequence and its grid
FULL = FRONT + (H + PAD) * (W + PAD)
RNG = torch.Generator().manual_seed(0)
ROUTE = torch.randint(4, (2, H // 2, W // 2), generator=RNG)
INPUTS = torch.randn(2, 3, 2 * H, 2 * W, generator=RNG), torch.tensor([9.0, 800]), None


def make_dim(first):
    """Of 7 blocks; the merge, if there is one, is the identity of the routed tokens."""
    nnet = dict(name="dim", input_size=(2 * H, 2 * W), in_channels=3, dim=32, depth=7)
    model = build_model(nnet | dict(num_classes=10, routing=dict(first=first)), seed=0)
    if first:
        model.routing.merge.linear.weight.data.copy_(torch.eye(32, 64))
        model.routing.merge.linear.bias.data.zero_()
    return model


@torch.no_grad()
def test_all_tokens_through_a_merge_that_keeps_them_are_the_network_without_routing():
    (out, tokens), (expected, whole) = (make_dim(k)(*INPUTS, hidden=range(7)) for k in (2, None))
    assert torch.equal(out, expected) and all(torch.equal(tokens[k], whole[k]) for k in range(7))
    with pytest.raises(UserError, match="routing.first is 4, expected 1 to 3"):
        make_dim(4)


def test_one_token_of_each_group_and_the_pads_of_its_rows_and_columns():
    index = route_index(ROUTE, (H, W), PAD)
    assert torch.equal(index[:, :FRONT], torch.arange(FRONT).expand(2, -1))
    places = (index[:, FRONT:] - FRONT).unflatten(1, (H // 2 + PAD, W // 2 + PAD))
    for found, n, draw in (
        (places // (W + PAD), H, ROUTE // 2), ((places % (W + PAD)).mT, W, (ROUTE % 2).mT),
    ):  # fmt: skip
        groups, side = torch.arange(0, n, 2)[:, None], draw.shape[2]
        assert torch.equal(found[:, : n // 2, :side], groups + draw)
        assert torch.equal(found[:, : n // 2, side:], groups.expand(2, -1, PAD))
        pads = torch.arange(n, n + PAD)[:, None]
        assert torch.equal(found[:, n // 2 :], pads.expand(2, -1, side + PAD))


def test_routed_blocks_walk_the_small_grid_and_the_tokens_come_back():
    """A mask token stands for the missing ones; every parameter has a gradient in every step."""
    model, lengths = make_dim(2).train(), []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    out, tokens = model(*INPUTS, hidden=(1, 3, 5), route=ROUTE)
    index = route_index(ROUTE, (H, W), PAD)
    assert lengths == [FULL] * 2 + [index.shape[1]] * 4 + [FULL]
    missing = torch.ones(2, FULL, dtype=bool).scatter(1, index, False)
    for k in 3, 5:
        assert (tokens[k][missing] == model.routing.mask).all()
        assert (tokens[k][~missing] != model.routing.mask).all()
    for result, moved in (out, True), (model(*INPUTS), False):
        model.zero_grad()
        result.square().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        assert model.routing.mask.grad.any() == moved


def test_routes_are_drawn_after_the_other_draws():
    given = dict(size=8, shape=(3, 16, 24), depth=5, encoding=True, device="cpu")
    plain, routed, later = (make_draws(1, 7, routing=r, **given) for r in ((0,), (8, H, W), (7,)))
    assert all(torch.equal(a, b) for a, b in zip(routed[:-1], plain[:-1], strict=True))
    assert plain.route is None and later.route is None and routed.route.shape == (8, H, W)
    assert torch.equal(routed.route.unique(), torch.arange(4))
