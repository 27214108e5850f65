"""Inner blocks that run in some calls of a sampler alone: neighbouring calls are much the same."""


def reuse_inner(network, every, last):
    """network(x, t, y, hidden=()) for the calls of one batch in their order; only every `every`-th
    is whole. In the others the tokens after block `last` are those of the last whole call, and the
    inner blocks that end with it are left out, which DiM's long skips make natural (Ma et al.,
    DeepCache, arXiv 2312.00858, for U-Nets). A call on inputs of another shape than the call before
    is whole, as at the ends of a guidance interval.
    """
    shape, calls, tokens = None, 0, None

    def call(x, t, y=None, hidden=()):
        nonlocal shape, calls, tokens
        calls = calls + 1 if x.shape == shape else 0
        shape = x.shape
        if calls % every:
            return network(x, t, y, reused=tokens, **({"hidden": hidden} if hidden else {}))
        out, inner = network(x, t, y, hidden=(*hidden, last))
        tokens = inner.pop(last)
        return (out, inner) if hidden else out

    return call
