"""`python -m libs.ops.cuda.prebuild "90;100"`: compiles the CUDA kernels of the shipped configs for
sm_90 and sm_100 into the cache ahead of time. Needs no GPU. setup.py runs it when
DIM_PREBUILD_ARCHS is set.
"""

import re
import sys

from libs.ops.cuda import compiler
from libs.ops.cuda.config_kernels import kernels_of_configs
from libs.ops.cuda.launch_plan import CTYPES


def main(text):
    for arch in map(int, re.findall(r"\d+", text)):
        kernels = {k for dtype in CTYPES for k in kernels_of_configs(dtype, arch)}
        compiler.compile_all(kernels, arch)
        print(f"{len(kernels)} CUDA kernels for sm_{arch} are in {compiler.cache_directory()}")


if __name__ == "__main__":
    main(sys.argv[1])
