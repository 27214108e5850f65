"""`python -m libs.ops`: which backend each operator would use on this machine, and why."""

import sys

import torch

from libs.ops import describe_backends
from libs.ops.cuda import compiler
from libs.ops.cuda.prebuild import REPORT
from utils import UserError


def main():
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    try:
        for device in devices:
            print(f"{device} tensors:")
            for line in describe_backends(device):
                print(f"  {line}")
    except UserError as error:
        sys.exit(f"error: {error}")
    if "cuda" not in devices:
        print("cuda tensors: PyTorch finds no CUDA device here")
        reason = compiler.missing(torch.version.cuda)
        print(f"  CUDA kernels: {reason or 'can be compiled here'}")
    if REPORT.exists():
        print("prebuilt CUDA kernels:")
        for line in REPORT.read_text(encoding="utf-8").splitlines():
            print(f"  {line}")


if __name__ == "__main__":
    main()
