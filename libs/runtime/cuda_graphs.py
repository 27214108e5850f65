"""A network whose kernels the GPU replays from CUDA graphs, in training and in sampling: the host
launches one graph instead of thousands of kernels.
"""

import contextlib
import functools
import gc
import os

import torch
from torch import nn

# Signatures that are captured: two of classifier-free times two of internal guidance times two of
# upsampling, full and last batch.
MAX_GRAPHS = 16

# From this many numbers in a prediction on cuBLAS has no workspace: products of large calls count
# their tiles there, after a memset before each (DiM-H, batch 64: 0.6% of a call, H200); those of
# small calls add up split sums there (batch 2, 256 px: 1.8% slower without).
LARGE = 100_000

_get_stream = functools.cache(torch.cuda.Stream)  # cuBLAS has a workspace for each stream


@contextlib.contextmanager
def _without_workspace():
    """cuBLAS has no workspace in this context, unless the user has chosen its size."""
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":0:0", "CUBLASLT_WORKSPACE_SIZE": "0"}
    if not variables.keys().isdisjoint(os.environ):
        yield
        return
    # From 2.12 on torch reads the variables once and has these functions.
    names = "cublas_workspace_size", "cublaslt_workspace_size"
    setters = [getattr(torch.backends.cuda, name, lambda size=0: size) for name in names]
    sizes = [size() for size in setters]
    os.environ.update(variables)
    try:
        for change in setters:
            change(0)
        yield
    finally:
        for name in variables:
            del os.environ[name]
        for change, size in zip(setters, sizes, strict=True):
            change(size)


class CudaCapture:
    """Captures calls that have run once before into graphs that share a memory pool: the graphs are
    replayed one after another, their outputs copied out before the next replay. A call returns a
    tuple of tensors.
    """

    def __init__(self, device):
        self.device, self.stream = device, _get_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def forward(self, call):
        """(replay, outputs) of call(), whose first output is the prediction."""
        size = self._warm_up(call)[0].numel()
        with _without_workspace() if size >= LARGE else contextlib.nullcontext():
            return self._record(call)

    def both_ways(self, call, leaves):
        """(replay of call(), its outputs, replay of the backward, the outputs' gradients that the
        backward reads, the gradients of `leaves` that it writes: None for unused leaves).
        """

        def differentiate(outputs, g_outputs):
            with torch.autocast(self.device.type, enabled=False):  # as around an eager backward
                return torch.autograd.grad(outputs, leaves, g_outputs, allow_unused=True)

        def rehearse():
            outputs = call()
            differentiate(outputs, [torch.zeros_like(x) for x in outputs])

        self._warm_up(rehearse)
        forward, outputs = self._record(call)
        g_outputs = [torch.zeros_like(x) for x in outputs]
        backward, gradients = self._record(lambda: differentiate(outputs, g_outputs))
        return forward, [x.detach() for x in outputs], backward, g_outputs, gradients

    def _warm_up(self, call):
        """The outputs of call(), run once to allocate what belongs to the stream, such as
        workspaces, outside of the pool.
        """
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            outputs = call()
        here.wait_stream(self.stream)
        return outputs

    def _record(self, call):
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # only this thread's calls count: data loaders pin memory in others
        was_enabled = gc.isenabled()
        gc.disable()  # a collection may free an older graph, which ends a capture
        try:
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
                outputs = call()
        finally:
            if was_enabled:
                gc.enable()
        return graph.replay, outputs


def _pack(outputs, hidden):
    """(out, *inner) as a network returns them: out, or with `hidden` (out, {key: inner})."""
    out, *inner = outputs
    return (out, dict(zip(hidden, inner, strict=True))) if hidden else out


class _Graphs(dict):
    """What `capture(call)` returned, by the signature of network(x, t, y, **options): `hidden`, the
    names, shapes and dtypes of the tensors, and the autocast state. The call gives (out, *inner),
    the inner outputs as `hidden` names them.

    The first call of a signature is eager, as it compiles and plans; the second is captured. Each
    graph holds memory: signatures beyond MAX_GRAPHS stay eager.
    """

    def __init__(self, network, capture):
        super().__init__()
        self.network, self.capture, self._seen = network, capture, set()

    def find(self, x, t, y, hidden=(), **options):
        """The captured parts, the tensors copied in, or None where the call is to be eager."""
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        inputs = {k: v for k, v in dict(x=x, t=t, y=y, **options).items() if v is not None}
        tensors = ((name, x.shape, x.dtype) for name, x in inputs.items())
        signature = (hidden, *tensors, autocast)
        if signature not in self:
            if signature not in self._seen or len(self) >= MAX_GRAPHS:
                self._seen.add(signature)
                return None
            self[signature] = self._capture(hidden, inputs, kind, autocast)
        static, parts = self[signature]
        for name, given in inputs.items():
            static[name].copy_(given)
        return parts

    def _capture(self, hidden, inputs, kind, autocast):
        with torch.inference_mode(False):  # inference tensors could not be written in other modes
            static = {name: x.clone() for name, x in inputs.items()}

        def call():
            # Casts that autocast caches until its context ends would be gone at a later replay.
            with torch.autocast(kind, autocast or None, bool(autocast), cache_enabled=False):
                if not hidden:
                    return (self.network(**static),)
                out, inner = self.network(**static, hidden=hidden)
                return (out, *(inner[key] for key in hidden))

        return static, self.capture(call)


class _Replay(torch.autograd.Function):
    """The outputs of a graph and, in the backward, the parameters' gradients; all are copies. The
    gradient of an output that the loss leaves out is zero.
    """

    @staticmethod
    def forward(ctx, owner, parts, *parameters):
        owner.replays += 1
        ctx.owner, ctx.parts, ctx.number = owner, parts, owner.replays
        forward, outputs, *_ = parts
        forward()
        return tuple(x.clone() for x in outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *given):
        if ctx.number != ctx.owner.replays:
            raise RuntimeError("CUDA graphs: a backward must come before the next forward")
        _, _, backward, g_outputs, gradients = ctx.parts
        torch._foreach_copy_(g_outputs, given)
        backward()
        copies = iter(torch._foreach_mul([x for x in gradients if x is not None], 1))
        return None, None, *(None if x is None else next(copies) for x in gradients)


class GraphedTraining(nn.Module):
    """network(x, t, y, **options) in training, forward and backward a graph each.

    Gradients reach the parameters as usual, all at once, so that DistributedDataParallel around
    this sees them; no gradient reaches x. The backward of a call must come before the next call.
    capture: (call, leaves) -> what CudaCapture.both_ways returns, the default.
    """

    def __init__(self, network, capture=None):
        super().__init__()
        self.network, self._named, self.replays = network, dict(network.named_parameters()), 0
        if capture is None:
            capture = CudaCapture(next(network.parameters()).device).both_ways
        # What is captured differentiates leaves of its own over the same memory: autograd's nodes
        # of the parameters themselves belong to the stream of the step, or to DDP, and would draw
        # that stream into the capture.
        self._leaves = {n: p.detach().requires_grad_() for n, p in self._named.items()}
        leaves = tuple(self._leaves.values())
        self._graphs = _Graphs(self._call_leaves, lambda call: capture(call, leaves))

    def _call_leaves(self, **inputs):
        return torch.func.functional_call(self.network, self._leaves, (), inputs)

    def forward(self, x, t, y=None, **options):
        """As the network's; options: hidden, and tensors such as route."""
        parts = self._graphs.find(x, t, y, **options)
        if parts is None:
            return self.network(x, t, y, **options)
        return _pack(_Replay.apply(self, parts, *self._named.values()), options.get("hidden"))


class SamplingNetwork:
    """A network for sampling, which follows its weights from one `ready` to the next.

    What every call would make of weights alone is made once, with the same bits: the weights of
    linear layers and convolutions, cast as autocast casts them, and `make_constants(dtype)` of the
    modules that have it, {attribute, else None: tensor}. CUDA graphs read these tensors, so they
    keep their addresses. Other weights stay float32.
    dtype: of autocast, or None; graphs: whether to capture, on a GPU; capture: call -> (replay,
    outputs), CudaCapture.forward by default.
    """

    def __init__(self, network, dtype, *, graphs, capture=None):
        self.network, self.dtype, self.capture = network, dtype, capture
        self.device = next(network.parameters()).device
        self._graphed = graphs and (capture is not None or self.device.type == "cuda")
        self._made, self._graphs = {}, None  # (module, attribute) -> what it is while sampling

    @contextlib.contextmanager
    def ready(self):
        """A context that gives the network to call, with the weights it has on entry."""
        self._refresh()
        own = [(*key, getattr(*key)) for key in self._made]
        try:
            for key, parameter in self._made.items():
                setattr(*key, parameter)
            yield self._replay if self._graphed else self.network
        finally:
            for attribute in own:
                setattr(*attribute)

    @torch.inference_mode(False)  # inference tensors could not be written in other modes
    @torch.no_grad()
    def _refresh(self):
        """Make the tensors again, of the present weights; 1.7 GB in a DiM-H."""
        for module in self.network.modules():
            given = {}
            if hasattr(module, "make_constants"):
                given = module.make_constants(self.dtype)
            elif self.dtype and isinstance(module, (nn.Linear, nn.Conv2d)):
                given = {"weight": module.weight.to(self.dtype)}
            for name, x in given.items():
                made = nn.Parameter(torch.empty_like(x), requires_grad=False)
                self._made.setdefault((module, name), made).copy_(x)

    @torch.no_grad()
    def _replay(self, x, t, y=None, **options):
        """As the network's; options: hidden, and tensors such as reused."""
        if self._graphs is None:
            self._graphs = _Graphs(self.network, self.capture or CudaCapture(self.device).forward)
        parts = self._graphs.find(x, t, y, **options)
        if parts is None:
            return self.network(x, t, y, **options)
        replay, outputs = parts
        replay()
        copies = [x.clone() for x in outputs]  # the next replay writes them again
        return _pack(copies, options.get("hidden"))

    def release(self):
        """Give graphs and what was made back; the next `ready` makes them again."""
        self._made.clear()
        if self._graphs is not None:
            self._graphs = None
            torch.cuda.empty_cache()  # nothing else could use a graph's memory until then
