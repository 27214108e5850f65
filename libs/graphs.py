"""A network at the speed of the GPU where nothing changes between calls but its inputs: its
matrices in half precision, cast once, and its kernels replayed from a CUDA graph.
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
        here = torch.cuda.current_stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(here):  # which a failed capture left
            self.stream.wait_stream(here)
            # A capture that breaks half-way leaves torch's allocator in it, so the usual reason to
            # break is looked for before.
            with torch.cuda.stream(self.stream), _synchronisation_is_an_error():
                call()
            here.wait_stream(self.stream)
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
    replay: object  # to call
    inputs: tuple  # the tensors it reads
    output: torch.Tensor  # the one it writes


def _like(tensor):
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


class GraphedNetwork:
    """network(x, t, y) for sampling, without gradients: eager in the first call of a signature,
    captured in the second, replayed from then on.

    A signature is shapes and dtypes of x, t and y, whether there is a y, and the autocast state. At
    most MAX_GRAPHS are captured, as each holds memory; further ones stay eager. If a capture fails,
    the log says why, once, and everything is eager from then on.
    capture: call -> (replay, output), CudaCapture's.
    """

    def __init__(self, network, capture):
        self.network, self.capture = network, capture
        self.graphs, self._seen, self.failed = {}, set(), False

    def signature(self, x, t, y):
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return _like(x), _like(t), _like(y), autocast

    @torch.no_grad()
    def __call__(self, x, t, y=None):
        """x (B, C, H, W), t (B,), y (B,) or None -> the network's output, the caller's own."""
        key = self.signature(x, t, y)
        if key not in self.graphs:
            full = len(self.graphs) >= MAX_GRAPHS
            if self.failed or full or key not in self._seen:
                self._seen.add(key)
                return self.network(x, t, y)
            if not self._add(key, (x, t, y)):
                return self.network(x, t, y)
        graph = self.graphs[key]
        for static, given in zip(graph.inputs, (x, t, y), strict=True):
            if given is not None:
                static.copy_(given)
        graph.replay()
        return graph.output.clone()  # the next replay writes it again

    def _add(self, key, inputs):
        """Capture the signature of these inputs; whether it could be."""
        static = tuple(None if tensor is None else tensor.clone() for tensor in inputs)
        kind, autocast = inputs[0].device.type, key[-1]

        def call():
            # Weights that autocast keeps until its context ends would be gone at a later replay.
            with torch.autocast(kind, autocast or None, bool(autocast), cache_enabled=False):
                return self.network(*static)

        try:
            replay, output = self.capture(call)
        except (RuntimeError, UserError) as error:  # the latter of our kernels
            self.failed = True
            self.release()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            log.warning("sampling without CUDA graphs, as a capture failed: %s", reason)
            return False
        self.graphs[key] = Graph(replay, static, output)
        return True

    def release(self):
        """Drop the graphs and their memory."""
        self.graphs.clear()
        self._seen.clear()


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
