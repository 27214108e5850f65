"""`python -m libs.ops.cuda.prebuild "90;100"`: compiles the CUDA kernels of the shipped configs
ahead of
time, for sm_90 and sm_100, into libs/ops/prebuilt/. Needs no GPU. setup.py runs it when
DIM_PREBUILD_ARCHS is set.
"""

import re
import sys
import time

import torch

from libs.ops.cuda import compiler
from libs.ops.cuda.shipped import kernels_of_configs
from utils import UserError

REPORT = compiler.PREBUILT / "report.txt"


def prebuild(archs):
    """Compile the kernels of the shipped configs for these architectures, such as '90'; a line for
    each.

    Raises UserError if they cannot be compiled here.
    """
    reason = compiler.missing(torch.version.cuda)
    for arch in archs:
        reason = reason or compiler.unsupported(arch)
    if reason:
        raise UserError(reason)
    lines = []
    for arch in archs:
        start = time.monotonic()
        kernels = kernels_of_configs(int(arch))
        programs = sorted({compiler.Program(k.source, k.defines) for k in kernels})
        for program in programs:
            compiled = compiler.compile_program(program, arch)
            compiler.write_entry(compiler.PREBUILT, program, arch, compiled)
        seconds = time.monotonic() - start
        version = compiler.nvrtc_version()
        lines.append(
            f"sm_{arch}: {len(programs)} CUDA kernels compiled with NVRTC {version} in "
            f"{seconds:.0f} s"
        )
    return lines


def main(text):
    archs = [arch.removeprefix("sm_") for arch in re.split(r"[;,\s]+", text.strip()) if arch]
    try:
        if not archs or not all(arch.isdecimal() for arch in archs):
            raise UserError(f"DIM_PREBUILD_ARCHS must be like '90;100', got {text!r}")
        lines, code = prebuild(archs), 0
    except (UserError, OSError) as error:
        lines, code = [f"no CUDA kernels prebuilt: {error}"], 1
    print("\n".join(lines))
    try:
        compiler.PREBUILT.mkdir(exist_ok=True)
        REPORT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError:
        pass  # it was printed
    return code


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
