"""A network whose kernels the GPU replays from CUDA graphs, in training and in sampling: the host
launches one graph instead of thousands of kernels.
"""

import contextlib
import functools

import torch
from torch import nn

# Signatures that are captured: two of guidance times two of upsampling, full and last batch.
MAX_GRAPHS = 8

_get_stream = functools.cache(torch.cuda.Stream)  # cuBLAS has a workspace for each stream


class CudaCapture:
    """Captures calls that have run once before into graphs that share a memory pool: the graphs are
    replayed one after another, their outputs copied out before the next replay.
    """

    def __init__(self, device):
        self.device, self.stream = device, _get_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def forward(self, call):
        """(replay, output) of call()."""
        self._warm_up(call)
        return self._record(call)

    def both_ways(self, call, leaves):
        """(replay of call(), its output, replay of the backward, the output's gradient that the
        backward reads, the gradients of `leaves` that it writes: None for unused leaves).
        """

        def differentiate(output, g_output):
            with torch.autocast(self.device.type, enabled=False):  # as around an eager backward
                return torch.autograd.grad(output, leaves, g_output, allow_unused=True)

        def rehearse():
            output = call()
            differentiate(output, torch.zeros_like(output))

        self._warm_up(rehearse)
        forward, output = self._record(call)
        g_output = torch.zeros_like(output)
        backward, gradients = self._record(lambda: differentiate(output, g_output))
        return forward, output.detach(), backward, g_output, gradients

    def _warm_up(self, call):
        """Allocates what belongs to the stream, such as workspaces, outside of the pool."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            call()
        here.wait_stream(self.stream)

    def _record(self, call):
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # only this thread's calls count: data loaders pin memory in others
        with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode=mode):
            output = call()
        return graph.replay, output


class _Graphs(dict):
    """What `capture(call)` returned, by the signature of the inputs of network(*inputs): shapes and
    dtypes, which inputs are None, and the autocast state.

    The first call of a signature is eager, as it compiles and plans; the second is captured. Each
    graph holds memory: signatures beyond MAX_GRAPHS stay eager.
    """

    def __init__(self, network, capture):
        super().__init__()
        self.network, self.capture, self._seen = network, capture, set()

    def find(self, *inputs):
        """The captured parts, with `inputs` copied in, or None where the call is to be eager."""
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        signature = (*(None if x is None else (tuple(x.shape), x.dtype) for x in inputs), autocast)
        if signature not in self:
            if signature not in self._seen or len(self) >= MAX_GRAPHS:
                self._seen.add(signature)
                return None
            self[signature] = self._capture(inputs, kind, autocast)
        static, parts = self[signature]
        for x, given in zip(static, inputs, strict=True):
            if given is not None:
                x.copy_(given)
        return parts

    def _capture(self, inputs, kind, autocast):
        with torch.inference_mode(False):  # inference tensors could not be written in other modes
            static = tuple(None if x is None else x.clone() for x in inputs)

        def call():
            # Casts that autocast caches until its context ends would be gone at a later replay.
            with torch.autocast(kind, autocast or None, bool(autocast), cache_enabled=False):
                return self.network(*static)

        return static, self.capture(call)


class _Replay(torch.autograd.Function):
    """The output of a graph and, in the backward, the parameters' gradients; all are copies."""

    @staticmethod
    def forward(ctx, owner, parts, *parameters):
        owner.replays += 1
        ctx.owner, ctx.parts, ctx.number = owner, parts, owner.replays
        forward, output, *_ = parts
        forward()
        return output.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if ctx.number != ctx.owner.replays:
            raise RuntimeError("CUDA graphs: a backward must come before the next forward")
        _, _, backward, g_output, gradients = ctx.parts
        g_output.copy_(g)
        backward()
        copies = iter(torch._foreach_mul([x for x in gradients if x is not None], 1))
        return None, None, *(None if x is None else next(copies) for x in gradients)


class GraphedTraining(nn.Module):
    """network(x, t, y, drop_path_draw=) in training, forward and backward a graph each.

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

    def _call_leaves(self, x, t, y, draw):
        options = {} if draw is None else {"drop_path_draw": draw}
        return torch.func.functional_call(self.network, self._leaves, (x, t, y), options)

    def forward(self, x, t, y=None, **options):
        """network(x, t, y, drop_path_draw=); another option, as `hidden`, makes the call eager."""
        if options.keys() <= {"drop_path_draw"}:
            parts = self._graphs.find(x, t, y, options.get("drop_path_draw"))
            if parts is not None:
                return _Replay.apply(self, parts, *self._named.values())
        return self.network(x, t, y, **options)


class SamplingNetwork:
    """A network for sampling, which follows its weights from one `ready` to the next.

    The weights of linear layers and convolutions are cast once, to the dtype to which autocast
    would cast them in every call: the outputs stay the same, bit for bit. Everything else stays
    float32. The casts keep their addresses, which CUDA graphs read.
    dtype: of autocast, or None; graphs: whether to capture, on a GPU; capture: call -> (replay,
    output), CudaCapture.forward by default.
    """

    def __init__(self, network, dtype, *, graphs, capture=None):
        self.network, self.dtype, self.capture = network, dtype, capture
        self.device = next(network.parameters()).device
        self._graphed = graphs and (capture is not None or self.device.type == "cuda")
        self._halves, self._graphs = {}, None  # module -> its weight in `dtype`

    @contextlib.contextmanager
    def ready(self):
        """A context that gives the network to call, with the weights it has on entry."""
        self._refresh_halves()
        own = {module: module.weight for module in self._halves}
        try:
            for module, half in self._halves.items():
                module.weight = half
            yield self._replay if self._graphed else self.network
        finally:
            for module, weight in own.items():
                module.weight = weight

    @torch.inference_mode(False)  # inference tensors could not be written in other modes
    @torch.no_grad()
    def _refresh_halves(self):
        """Cast the network's present weights; 1.7 GB in a DiM-H."""
        modules = [m for m in self.network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        for module in modules if self.dtype else ():
            if module not in self._halves and module.weight.dtype == torch.float32:
                half = torch.empty_like(module.weight, dtype=self.dtype)
                self._halves[module] = nn.Parameter(half, requires_grad=False)
        if self._halves:
            torch._foreach_copy_(list(self._halves.values()), [m.weight for m in self._halves])

    @torch.no_grad()
    def _replay(self, x, t, y=None, **options):
        """network(x, t, y); an option, as `hidden`, makes the call eager."""
        if self._graphs is None:
            self._graphs = _Graphs(self.network, self.capture or CudaCapture(self.device).forward)
        parts = None if options else self._graphs.find(x, t, y)
        if parts is None:
            return self.network(x, t, y, **options)
        replay, output = parts
        replay()
        return output.clone()  # the next replay writes it again

    def release(self):
        """Give graphs and casts back; the next `ready` makes them again."""
        self._halves.clear()
        if self._graphs is not None:
            self._graphs = None
            torch.cuda.empty_cache()  # nothing else could use a graph's memory until then
