"""FSDP2: a network, its average and its optimizer's state in parts, one on each process, and whole
again for a checkpoint or for sampling.

What it needs of torch is imported late: most runs do without, and it would cost them 0.7 s.
"""

import contextlib

from torch import nn


def _is_part(tensor):
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def shard(network, blocks, mesh, reshard_after_forward):
    """Make the parameters of `network` DTensors, in place; each of its `blocks` gathers its own
    weights while it computes, the network the others.
    """
    from torch.distributed.fsdp import fully_shard  # torch 2.6 and newer

    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward)
    fully_shard(network, mesh=mesh)


def _part_of(tensor, parameter):
    """`tensor`, whole on every process, in parts as `parameter` is."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def shard_average(average, network):
    """Make the parameters of `average`, a copy of `network` that computes nothing while it is in
    parts, DTensors laid out as those of `network`.
    """
    for name, parameter in network.named_parameters():
        path, _, leaf = name.rpartition(".")
        owner = average.get_submodule(path)
        part = _part_of(getattr(owner, leaf).data, parameter)
        owner.register_parameter(leaf, nn.Parameter(part, requires_grad=False))


def shard_optimizer(optimizer, parameters):
    """Let `optimizer`, of one group, step `parameters` instead of the whole ones in the same order
    that it was made for; its state goes with them.
    """
    (group,) = optimizer.param_groups
    states = [optimizer.state.get(whole, {}) for whole in group["params"]]
    optimizer.state.clear()
    group["params"] = list(parameters)
    for parameter, state in zip(group["params"], states, strict=True):
        if state:
            optimizer.state[parameter] = {
                key: _part_of(value, parameter) if value.shape == parameter.shape else value
                for key, value in state.items()
            }


def whole(state, keep):
    """Nested dicts and lists with every DTensor gathered, one at a time, to the CPU; all processes
    must ask, and those that do not `keep` the result have None in the tensors' places.
    """
    if _is_part(state):
        tensor = state.full_tensor().detach()
        return tensor.cpu() if keep else None
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


@contextlib.contextmanager
def whole_weights(model):
    """A context in which the parameters of `model` are whole on every process; all must enter.

    For a model that computes on its own, as the average does in sampling. Does nothing where the
    parameters are whole.
    """
    parts = {
        (module, name): parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if _is_part(parameter)
    }
    for (module, name), part in parts.items():
        full = nn.Parameter(part.full_tensor(), requires_grad=False)
        module.register_parameter(name, full)
    try:
        yield
    finally:
        for (module, name), part in parts.items():
            module.register_parameter(name, part)


def is_sharded(model):
    """Whether every parameter of `model` is a DTensor."""
    return all(map(_is_part, model.parameters()))


def make_mesh(device, num_processes):
    """All processes in one row."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (num_processes,))
