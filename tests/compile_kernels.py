"""`python compile_kernels.py ARCH SET`: compiles a set of kernels with NVRTC for one architecture
and prints [[source, definitions, seconds, Resources], ...] as JSON. A process of its own for
test_cuda_build.py, that imports no torch.
"""

import itertools
import json
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def all_kernels(launch_plan):
    """Every kernel that any shape of any dtype, number of states and width can want."""
    found = set()
    shapes = list(itertools.product((1, 2, 96), (1, 366, 9806), (5, 3072)))
    for dtype, shape in itertools.product(launch_plan.CTYPE_OF_DTYPE, shapes):
        for sizes, plans in (
            (range(1, 65), (
                launch_plan.scan_forward, launch_plan.scan_backward,
                launch_plan.scan_backward_with_output,
            )),
            (range(2, 9), (launch_plan.conv_forward, launch_plan.conv_backward)),
        ):  # fmt: skip
            for size, plan_of in itertools.product(sizes, plans):
                found |= plan_of(*shape, size, dtype, 132).kernels()
    return found


def main(arch, which):
    sys.path.insert(0, str(ROOT))
    package = sys.modules["libs.ops"] = types.ModuleType("libs.ops")
    package.__path__ = [str(ROOT / "libs" / "ops")]  # without its __init__, which imports torch
    from libs.ops.cuda import compiler, launch_plan
    from libs.ops.cuda.shipped import kernels_of_configs

    kernels = set(kernels_of_configs(int(arch)))
    if which == "others":
        kernels = all_kernels(launch_plan) - kernels
    results = []
    for kernel in sorted(kernels):
        start = time.monotonic()
        program = compiler.Program(kernel.source, kernel.defines)
        used = compiler.compile_program(program, arch).resources[kernel.name]
        results.append([kernel.source, kernel.defines, time.monotonic() - start, used._asdict()])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
