"""Graphs without a GPU, in sampling and training: half matrices, what is captured, and that the
graphs follow the weights. A trace of aten calls, which reads tensors by address, too, stands in
place of a CUDA graph, and in training the call itself.
"""

import os

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from libs.model.mamba import Mamba
from libs.model.skips import SkipProjection
from libs.runtime.cuda_graphs import (
    MAX_GRAPHS,
    GraphedTraining,
    SamplingNetwork,
    _without_workspace,
)


class Network(nn.Module):
    """Counts its calls. It has tokens, those "after block 0", and a head, "internal"."""

    def __init__(self):
        super().__init__()
        self.conv, self.embed, self.calls = nn.Conv2d(1, 1, 3, padding=1), nn.Embedding(11, 1), 0
        self.head = nn.Conv2d(1, 1, 1)

    def forward(self, x, t, y=None, drop_path_draw=None, hidden=(), route=None, reused=None):
        self.calls += 1
        label = 0 if y is None else self.embed(y)[:, :, None, None]
        scale = t if drop_path_draw is None else t * (drop_path_draw < 0.8).sum(1)
        scale = scale if route is None else scale * route.sum((1, 2))
        tokens = self.conv(x) if reused is None else reused.mT.view_as(x)
        out = tokens * scale[:, None, None, None] / 1000 + label
        found = {"internal": self.head(tokens), 0: tokens.flatten(2).mT}
        return (out, {key: x for key, x in found.items() if key in hidden}) if hidden else out


def make_inputs(batch=3, labels=True):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 1, 8, 8, generator=generator)
    t = 999 * torch.rand(batch, generator=generator)
    return x, t, torch.randint(10, (batch,), generator=generator) if labels else None


def make_network():
    torch.manual_seed(0)
    return Network()


# ---------------------------------------- half matrices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_matrices_change_no_bit_of_the_output(dtype):
    model = make_network()
    parameters = dict(model.named_parameters())
    before = {name: p.clone() for name, p in parameters.items()}
    with torch.autocast("cpu", dtype):
        expected = model(*make_inputs())
        with SamplingNetwork(model, dtype, graphs=False).ready() as network:
            found = network(*make_inputs())
            half = {name for name, p in model.named_parameters() if p.dtype == dtype}
    assert network is model and torch.equal(found, expected)
    assert half == {"conv.weight", "head.weight"}
    for name, p in model.named_parameters():
        assert p is parameters[name] and torch.equal(p, before[name])


def test_half_matrices_follow_at_the_same_addresses_and_leave_the_network_as_it_was():
    """Also those made under inference mode, outside of it."""
    model = nn.Linear(4, 3)
    weight, sampling = model.weight, SamplingNetwork(model, torch.bfloat16, graphs=False)
    with torch.inference_mode(), sampling.ready():
        address = model.weight.data_ptr()
    nn.init.normal_(weight)
    with pytest.raises(KeyError), sampling.ready():
        assert model.weight.data_ptr() == address
        half = model.weight.clone()
        raise KeyError
    assert torch.equal(half, weight.bfloat16())
    assert model.weight is weight and weight.requires_grad


CONSTANTS = [(SkipProjection, 8, 2), (SkipProjection, 520, 2), (Mamba, 8, 1)]  # inputs: x, skip


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind, dim, inputs", CONSTANTS)
@torch.no_grad()
def test_constants_follow_at_the_same_addresses_and_change_no_bit(kind, dim, inputs, dtype):
    model, inputs = kind(dim), torch.randn(inputs, 2, 5, dim)
    sampling, addresses = SamplingNetwork(model, dtype, graphs=False), []
    for scale in (1, 1.5):
        for parameter in model.parameters():
            parameter.mul_(scale)
        names = list(model.state_dict())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            expected = model(*inputs)
            with sampling.ready() as network:
                made = model.make_constants
                addresses.append([getattr(model, name).data_ptr() for name in made(dtype)])
                model.make_constants = None
                assert torch.equal(network(*inputs), expected)
                del model.make_constants
        assert all(getattr(model, name) is None for name in made(dtype))
        assert list(model.state_dict()) == names
    assert addresses[0] == addresses[1]
    assert not {p.data_ptr() for p in model.parameters()} & set(addresses[0])


# ---------------------------------------- graphs


def traced(call):
    """(replay, outputs) of a call, as CudaCapture gives them."""
    trace = make_fx(call)()
    outputs = [x.clone() for x in trace()]
    return lambda: torch._foreach_copy_(outputs, trace()), outputs


def graphed(dtype=None):
    """(a network, f(x, t, y) that replays it, its SamplingNetwork)."""
    network = make_network()
    sampling = SamplingNetwork(network, dtype, graphs=True, capture=traced)

    def call(*inputs, **options):
        with sampling.ready() as fast:
            return fast(*inputs, **options)

    return network, call, sampling


def test_without_workspace(monkeypatch):
    """Sizes are 0 in the context, in torch's functions and the environment; the user's stay."""
    sizes, name = {"cublas": 8, "cublaslt": 4}, "CUBLAS_WORKSPACE_CONFIG"
    for library in sizes:

        def change(size=None, library=library):
            sizes[library] = sizes[library] if size is None else size
            return sizes[library]

        monkeypatch.setattr(torch.backends.cuda, f"{library}_workspace_size", change, raising=False)
    monkeypatch.delenv(name, raising=False)
    with _without_workspace():
        assert sizes == {"cublas": 0, "cublaslt": 0} and os.environ[name] == ":0:0"
    assert sizes == {"cublas": 8, "cublaslt": 4} and name not in os.environ
    monkeypatch.setenv(name, ":16:8")
    with _without_workspace():
        assert sizes == {"cublas": 8, "cublaslt": 4} and os.environ[name] == ":16:8"


@torch.no_grad()
def test_reused_tokens_are_an_input_of_the_graph():
    network, fast, sampling = graphed()
    for seed in range(4):
        tokens = torch.randn(3, 64, 1, generator=torch.Generator().manual_seed(seed))
        expected = network(*make_inputs(), reused=tokens)
        assert torch.equal(fast(*make_inputs(), reused=tokens), expected)
        assert torch.equal(fast(*make_inputs()), network(*make_inputs()))
    assert len(sampling._graphs) == 2


@torch.no_grad()
def test_a_graph_for_each_signature_up_to_a_bound():
    network, fast, sampling = graphed()
    signatures = [(3, False, None), (5, True, None), (3, True, torch.bfloat16)]
    signatures += [(batch, True, None) for batch in range(6, 6 + MAX_GRAPHS)]
    for batch, labels, dtype in signatures * 3:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            found = fast(*make_inputs(batch, labels))
            expected = network(*make_inputs(batch, labels))
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    assert len(sampling._graphs) == MAX_GRAPHS
    sampling.release()
    calls = network.calls
    fast(*make_inputs())
    assert not sampling._graphs and network.calls == calls + 1


@torch.no_grad()
def test_inner_outputs_are_captured_for_each_choice_of_them():
    """And belong to the caller, as the output does."""
    network, fast, sampling = graphed()
    choices = [(), ("internal",), (0, "internal"), ("internal", 0)]
    kept = [fast(*make_inputs(), hidden=hidden) for hidden in choices * 3]
    calls = network.calls
    other = [x + 1 for x in make_inputs()]
    replayed = [fast(*other, hidden=hidden) for hidden in choices]
    assert network.calls == calls and len(sampling._graphs) == len(choices)
    assert torch.equal(replayed[0], network(*other))
    for hidden, found in zip(choices * 3, kept, strict=True):
        out, inner = found if hidden else (found, {})
        expected, expected_inner = network(*make_inputs(), hidden=(0, "internal"))
        assert torch.equal(out, expected) and inner.keys() == set(hidden)
        assert all(torch.equal(inner[key], expected_inner[key]) for key in hidden)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_a_graph_follows_the_weights(dtype):
    """float32 ones in place, halves by their copies."""
    network, fast, _ = graphed(dtype=dtype)

    def both():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            return fast(*make_inputs()), network(*make_inputs())

    for _ in range(3):
        before, _ = both()
    for parameter in network.parameters():
        parameter.data.mul_(1.5)
    found, expected = both()
    assert torch.equal(found, expected) and not torch.equal(found, before)


# ---------------------------------------- in training


def repeated(call, parameters):
    """What CudaCapture.both_ways gives: here a replay computes anew, into the same tensors."""
    outputs = [x.detach().clone() for x in call()]
    g_outputs, gradients, saved = [torch.zeros_like(x) for x in outputs], [], []
    for x in torch.autograd.grad(call(), parameters, g_outputs, allow_unused=True):
        gradients.append(None if x is None else torch.full_like(x, torch.nan))

    def forward():
        with torch.enable_grad():
            saved[:] = [call()]
        torch._foreach_copy_(outputs, [x.detach() for x in saved[0]])

    def backward():
        found = torch.autograd.grad(saved.pop(), parameters, g_outputs, allow_unused=True)
        for static, x in zip(gradients, found, strict=True):
            if x is not None:
                static.copy_(x)

    return forward, outputs, backward, g_outputs, gradients


def trained(capture, hidden=(), used=()):
    """(weights of a Network after some steps, the first half with routes, its GraphedTraining or
    itself). The loss reads the inner outputs `used` of `hidden`.
    """
    network = make_network()
    network.unused = nn.Parameter(torch.ones(3))
    called = GraphedTraining(network, capture) if capture else network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for step in range(4):
        optimizer.zero_grad(set_to_none=True)
        for k in range(2):
            generator = torch.Generator().manual_seed(10 * step + k)
            x, t, y = make_inputs()
            x = x + torch.randn(x.shape, generator=generator)
            draw = torch.rand(3, 5, generator=generator)
            options = {"drop_path_draw": draw} | ({"hidden": hidden} if hidden else {})
            if step < 2:
                options["route"] = torch.randint(4, (3, 2, 2), generator=generator)
            out = called(x, t, y, **options)
            out, inner = out if hidden else (out, {})
            terms = [(out - x).square().mean(), *(inner[key].square().mean() for key in used)]
            sum(terms).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in network.named_parameters()}, called


def test_training_by_graphs_makes_the_eager_steps():
    """With gradients that are the parameters' own: a later replay does not write them."""
    found, called = trained(repeated)
    expected, _ = trained(None)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    _, (_, parts) = called._graphs.values()
    static = {x.data_ptr() for x in parts[4] if x is not None}
    gradients = [p.grad for p in called.network.parameters() if p.grad is not None]
    assert len(gradients) == len(static) and not static & {g.data_ptr() for g in gradients}
    assert called.network.unused.grad is None
    first, second = (called(*make_inputs(), drop_path_draw=torch.ones(3, 5)) for _ in range(2))
    with pytest.raises(RuntimeError, match="before the next forward"):
        first.sum().backward()
    second.sum().backward()


@pytest.mark.parametrize("used", [(0, "internal"), ("internal",), ()])
def test_training_with_inner_outputs_makes_the_eager_steps(used):
    """An inner output that the loss leaves out gives its parameters the gradient zero."""
    hidden = ("internal", 0)
    found, called = trained(repeated, hidden, used)
    expected, _ = trained(None, hidden, used)
    moved = not torch.equal(found["head.weight"], make_network().head.weight)
    assert len(called._graphs) == 2 and moved == ("internal" in used)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
