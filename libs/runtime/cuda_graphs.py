"""A network at the speed of the GPU where nothing changes between calls but its inputs: its
kernels replayed from CUDA graphs, in sampling and in training, and in sampling its matrices in half
precision, cast once.
"""

import contextlib
import logging
from typing import NamedTuple

import torch
from torch import nn

from utils import UserError

log = logging.getLogger("dim")

# Signatures that are captured: two of guidance times two of upsampling, full and last batch.
MAX_GRAPHS = 8


class HalfMatrices:
    """The weights of a network's linear layers and convolutions in the dtype that autocast would
    cast them to in every call, and takes unchanged: the numbers stay the same, bit for bit.

    Everything else stays float32: vectors, embeddings, positions, A_log and the scan's parameters.
    The network's own weights are never written. The copies keep their addresses, so that CUDA
    graphs which read them follow the network. dtype None: there are none.
    """

    def __init__(self, network, dtype):
        self.network, self.dtype = network, dtype
        self._copies = {}  # module -> its weight in `dtype`

    def _modules(self):
        return [
            module
            for module in self.network.modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.dtype == torch.float32
        ]

    @torch.inference_mode(False)  # else its tensors could not be written outside of that
    @torch.no_grad()
    def refresh(self):
        """Copy the network's present weights; 1.7 GB in a DiM-H."""
        modules = [] if self.dtype is None else self._modules()
        for module in modules:
            if module not in self._copies:
                empty = torch.empty_like(module.weight, dtype=self.dtype)
                self._copies[module] = nn.Parameter(empty, requires_grad=False)
        copies = [self._copies[module] for module in modules]
        if copies:
            torch._foreach_copy_(copies, [module.weight for module in modules])

    @contextlib.contextmanager
    def installed(self):
        """A context in which the network computes with fresh copies."""
        self.refresh()
        own = {module: module.weight for module in self._copies}
        try:
            for module, copy in self._copies.items():
                module.weight = copy
            yield
        finally:
            for module, weight in own.items():
                module.weight = weight

    def release(self):
        """Give the memory back."""
        self._copies.clear()


@contextlib.contextmanager
def _synchronisation_is_an_error():
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class CudaCapture:
    """Captures calls into graphs that share one memory pool: they are replayed one after another,
    and what they return is copied out before the next.
    """

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.start_pool()

    def start_pool(self):
        """Further graphs share a new pool; to be called once the others are gone."""
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, call):
        """(replay, its output) of call(), which must have run once before.

        Raises:
            RuntimeError: it cannot be captured; the device goes on as if nothing had been.
        """
        with self._here():
            self._rehearse(call)
            return self._record(call)

    def both_ways(self, call, parameters):
        """The same of call() and of its gradients: (replay, its output, replay of the backward, the
        output's gradient that it reads, the gradients that it writes, None where there is none).
        """

        def gradients_of(output, g_output):
            with torch.autocast(self.device.type, enabled=False):  # as outside the forward
                return torch.autograd.grad(output, parameters, g_output, allow_unused=True)

        def rehearsal():
            output = call()
            gradients_of(output, torch.zeros_like(output))

        with self._here():
            self._rehearse(rehearsal)
            forward, output = self._record(call)
            g_output = torch.zeros_like(output)
            backward, gradients = self._record(lambda: gradients_of(output, g_output))
        return forward, output.detach(), backward, g_output, gradients

    @contextlib.contextmanager
    def _here(self):
        """The caller's device and stream, which a failed capture would leave."""
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(here):
            self.stream.wait_stream(here)
            yield
            here.wait_stream(self.stream)

    def _rehearse(self, call):
        """A capture that breaks half-way leaves torch's allocator in it, so the usual reason to
        break is looked for before."""
        try:
            with torch.cuda.stream(self.stream), _synchronisation_is_an_error():
                call()
        finally:  # the caller's memory that it read is given back, and used again, after it
            torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def _record(self, call):
        graph = torch.cuda.CUDAGraph()
        try:
            # Only this thread's calls count: data loaders pin memory in others.
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
            ):
                output = call()
        except Exception:
            index = self.device.index or 0
            with contextlib.suppress(RuntimeError):  # if the capture did end, there is no need
                torch._C._cuda_endAllocateToPool(index, self.pool)
            # The random numbers' state believes itself in the capture; its copy does not.
            generator = torch.cuda.default_generators[index]
            generator.graphsafe_set_state(generator.clone_state())
            raise
        return graph.replay, output


class Graph(NamedTuple):
    inputs: tuple  # the tensors it reads, or None
    parts: tuple  # what the capture gave

    def write(self, inputs):
        for static, given in zip(self.inputs, inputs, strict=True):
            if given is not None:
                static.copy_(given)


def _like(tensor):
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


class _Graphs:
    """The graphs of a network by the signature of its inputs: eager in the first call of a
    signature, captured in the second, replayed from then on.

    A signature is shapes and dtypes of the inputs, which of them are None, and the autocast state.
    At most MAX_GRAPHS are captured, as each holds memory; further ones stay eager. If a capture
    fails, the log says why, once, and everything is eager from then on.
    work: 'sampling' or 'training', for the log; capture: call -> parts of a Graph.
    """

    def __init__(self, network, work, capture):
        self.network, self.work, self.capture = network, work, capture
        self.graphs, self._seen, self.failed = {}, set(), False

    def of(self, *inputs):
        """The graph that holds these inputs now; None where the network itself is to be called."""
        kind = inputs[0].device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        key = (*map(_like, inputs), autocast)
        if key not in self.graphs:
            full = len(self.graphs) >= MAX_GRAPHS
            if self.failed or full or key not in self._seen:
                self._seen.add(key)
                return None
            if not self._add(key, inputs):
                return None
        graph = self.graphs[key]
        graph.write(inputs)
        return graph

    def _add(self, key, inputs):
        """Capture the signature of these inputs; whether it could be."""
        with torch.inference_mode(False):  # else it could not be written outside of that
            static = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        kind, autocast = inputs[0].device.type, key[-1]

        def call():
            # Weights that autocast keeps until its context ends would be gone at a later replay.
            with torch.autocast(kind, autocast or None, bool(autocast), cache_enabled=False):
                return self.network(*static)

        try:
            parts = self.capture(call)
        except (RuntimeError, UserError) as error:  # the latter of our kernels
            self.failed = True
            self.release()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("%s without CUDA graphs, as a capture failed: %s", self.work, reason)
            return False
        self.graphs[key] = Graph(static, parts)
        return True

    def release(self):
        """Drop the graphs and their memory."""
        self.graphs.clear()
        self._seen.clear()


class GraphedNetwork(_Graphs):
    """network(x, t, y) for sampling, without gradients. capture: call -> (replay, output),
    CudaCapture's.
    """

    def __init__(self, network, capture):
        super().__init__(network, "sampling", capture)

    @torch.no_grad()
    def __call__(self, x, t, y=None):
        """x (B, C, H, W), t (B,), y (B,) or None -> the network's output, the caller's own."""
        graph = self.of(x, t, y)
        if graph is None:
            return self.network(x, t, y)
        replay, output = graph.parts
        replay()
        return output.clone()  # the next replay writes it again


class _Replay(torch.autograd.Function):
    """The output and, in the backward, the parameters' gradients of a graph, the caller's own."""

    @staticmethod
    def forward(ctx, owner, graph, *parameters):
        owner.replays += 1
        ctx.owner, ctx.graph, ctx.number = owner, graph, owner.replays
        forward, output, *_ = graph.parts
        forward()
        return output.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        if ctx.number != ctx.owner.replays:
            raise RuntimeError(
                "training by CUDA graphs: a backward came after the next forward, which has "
                "written over what it needs"
            )
        _, _, backward, g_output, gradients = ctx.graph.parts
        g_output.copy_(g)
        backward()
        own = iter(torch._foreach_mul([x for x in gradients if x is not None], 1))
        return None, None, *(None if x is None else next(own) for x in gradients)


class GraphedTraining(nn.Module):
    """network(x, t, y, drop_path_draw) in training: the host launches two graphs instead of some
    two thousand kernels. Gradients reach the parameters as usual, so that DistributedDataParallel
    around this sees them, all at once.

    No gradient reaches x. The backward of a call must come before the next call; RuntimeError else.
    capture: (call, parameters) -> what CudaCapture.both_ways returns.
    """

    def __init__(self, network, capture):
        super().__init__()
        self.network, self._named, self.replays = network, dict(network.named_parameters()), 0
        # What is captured differentiates leaves of its own over the same memory: autograd's nodes
        # of the parameters themselves belong to the stream of the step, or to DDP, and would draw
        # that stream into the capture.
        self._leaves = {n: p.detach().requires_grad_() for n, p in self._named.items()}
        leaves = tuple(self._leaves.values())
        self._graphs = _Graphs(
            self._of_leaves, "training", lambda call: capture(call, leaves)
        )

    def _of_leaves(self, *inputs):
        return torch.func.functional_call(self.network, self._leaves, *_arguments(*inputs))

    def forward(self, x, t, y=None, drop_path_draw=None):
        """x (B, C, H, W), t (B,), y (B,) int64 or None, drop_path_draw (B, depth) or None -> the
        network's output, the caller's own.
        """
        graph = self._graphs.of(x, t, y, drop_path_draw)
        if graph is None:
            positional, named = _arguments(x, t, y, drop_path_draw)
            return self.network(*positional, **named)
        return _Replay.apply(self, graph, *self._named.values())


def _arguments(x, t, y, draw):
    """(positional, named) ones; a network without stochastic depth takes no draw."""
    return (x, t, y), {} if draw is None else {"drop_path_draw": draw}


class SamplingNetwork:
    """What samples are made with: a network under its precision, with half matrices and CUDA
    graphs, which follow its weights from one `ready` to the next.

    dtype: of autocast, or None; graphs: whether to capture them, on a GPU.
    """

    def __init__(self, network, dtype, *, graphs):
        self.network, self.graphs = network, graphs
        self.matrices, self._graphed = HalfMatrices(network, dtype), None

    @contextlib.contextmanager
    def ready(self):
        """A context that gives the network to call, with the weights it has on entry."""
        with self.matrices.installed():
            yield self._callable()

    def _callable(self):
        device = next(self.network.parameters()).device
        if not self.graphs or device.type != "cuda":
            return self.network
        if self._graphed is None:
            self._graphed = GraphedNetwork(self.network, CudaCapture(device))
        return self._graphed

    def release(self):
        """Give graphs and copies back; the next `ready` makes them again."""
        self.matrices.release()
        if self._graphed is not None:
            self._graphed.release()
            self._graphed.capture.start_pool()
            torch.cuda.empty_cache()  # a graph's memory is of no use to anything else until then
