"""`python -m libs.ops`: which backend each operator would use on this machine, and why.
`python -m libs.ops --check [bfloat16]`: every CUDA kernel of the shipped configs against the
definition, of one dtype or of all.
"""

import sys

import torch

from libs.ops import describe_backends
from libs.ops.cuda import compiler, launch, self_check
from utils import UserError


def describe():
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"{device} tensors:", *describe_backends(device), sep="\n  ")
    if not torch.cuda.is_available():
        print("CUDA kernels:", compiler.missing() or "can be compiled here")


def check(names):
    if reason := launch.unavailable(0):
        raise UserError(f"the check runs kernels, but {reason}")
    for name in names or self_check.DTYPES:
        print(f"{name}:", *self_check.check(launch.Gpu.of(0), self_check.DTYPES[name]), sep="\n  ")


def main(words):
    try:
        check(words[1:]) if words[:1] == ["--check"] else describe()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
