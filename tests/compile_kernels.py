"""Compiles kernels with NVRTC, without a GPU, and says what ptxas says that they use.

    python tests/compile_kernels.py 75,80,90 [--others]

prints a line a kernel: registers, bytes of stack, spills and shared memory.
"""

import io
import itertools
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda.core  # noqa: F401  not by several threads at once

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from libs.ops.cuda import compiler, launch_plan  # noqa: E402
from libs.ops.cuda.prebuild import kernels_of_configs  # noqa: E402


class Resources(NamedTuple):
    """Per thread, except shared memory, which is per block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


PATTERNS = (
    r"Used (\d+) registers", r"(\d+) bytes stack frame", r"(\d+) bytes spill stores",
    r"(\d+) bytes spill loads", r"(\d+) bytes smem",
)  # fmt: skip


def config_kernels(arch):
    return {k for dtype in launch_plan.CTYPES for k in kernels_of_configs(dtype, arch)}


def other_kernels(arch):
    """Every kernel that any shape of any dtype, number of states and width can want besides."""
    plan, found = launch_plan, set()
    shapes = list(itertools.product((1, 2, 96), (1, 366, 9806), (5, 3072)))
    for dtype, shape in itertools.product(plan.CTYPES, shapes):
        scans = plan.scan_forward, plan.scan_backward, plan.scan_backward_with_output
        for plans, sizes in (
            (scans, range(1, 65)), ((plan.conv_forward, plan.conv_backward), range(2, 9))
        ):  # fmt: skip
            for plan_of, size in itertools.product(plans, sizes):
                found |= plan_of(*shape, size, dtype, 132).kernels()
    return found - config_kernels(arch)


def measure(kernel, arch):
    log = io.StringIO()
    compiler.compile_kernel(kernel, arch, logs=log, ptxas_options=["-v"])
    found = (re.search(pattern, log.getvalue()) for pattern in PATTERNS)
    return Resources(*(int(match.group(1)) if match else 0 for match in found))


def measure_all(kernels, arch):
    """{kernel: Resources}, compiled on as many threads as there are cores."""
    kernels = sorted(kernels)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda kernel: measure(kernel, arch), kernels)
        return dict(zip(kernels, found, strict=True))


def main(archs, which=""):
    for arch in map(int, archs.split(",")):
        kernels = other_kernels(arch) if which == "--others" else config_kernels(arch)
        for kernel, used in measure_all(kernels, arch).items():
            defines = " ".join(f"{name}={value}" for name, value in kernel.defines)
            print(f"sm_{arch} {kernel.source} {defines}:", *used)


if __name__ == "__main__":
    main(*sys.argv[1:])
