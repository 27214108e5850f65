"""Compiles the kernels of csrc/ with NVRTC, the compiler that torch brings, and keeps the results.

Needs neither nvcc, nor a host compiler, nor a GPU. The cache is cuda.core's, in DIM_CACHE_DIR or in
the user's cache directory; `python -m libs.ops.cuda.prebuild` fills it ahead of time.
"""

import functools
import hashlib
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parents[3] / "csrc"


@functools.cache
def missing():
    """None, or a sentence: what keeps kernels from being compiled beside this torch."""
    try:
        from cuda.core import Program as _  # noqa: F401

        if not (Path(_cuda_headers()) / "cuda_bf16.h").exists():
            raise FileNotFoundError("cuda_bf16.h")
        nvrtc_version()
    except Exception as error:  # whatever the loaders of the day raise
        return (
            f"kernels need cuda-core, and cuda-bindings and NVRTC of PyTorch's CUDA, "
            f"{torch.version.cuda} ({type(error).__name__}: {error})"
        )
    return None


@functools.cache
def nvrtc_version():
    """'13.0'"""
    from cuda.bindings import nvrtc

    return "{1}.{2}".format(*nvrtc.nvrtcVersion())


@functools.cache
def _cuda_headers():
    """Directory of cuda_bf16.h: of the wheels that torch brings, conda, or CUDA_HOME."""
    from cuda.pathfinder import find_nvidia_header_directory

    return find_nvidia_header_directory("cudart")


def cache_directory():
    if os.environ.get("DIM_CACHE_DIR"):
        return Path(os.environ["DIM_CACHE_DIR"])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dim-kernels"


@functools.cache
def digest(pattern):
    """SHA-256 of the files of csrc/ that match, names and contents."""
    found = hashlib.sha256()
    for path in sorted(CSRC.rglob(pattern)):
        found.update(f"{path.relative_to(CSRC)}\0{path.stat().st_size}\0".encode())
        found.update(path.read_bytes())
    return found.digest()


def _options(kernel, arch):
    """No path of this machine. lineinfo shows profilers source lines and changes no code."""
    return {
        "name": kernel.source, "arch": f"sm_{arch}", "define_macro": list(kernel.defines),
        "std": "c++17", "lineinfo": True,
    }  # fmt: skip


def key(kernel, arch):
    """Hash of everything that a compilation depends on."""
    from cuda.core import ProgramOptions
    from cuda.core.utils import make_program_cache_key

    options, text = ProgramOptions(**_options(kernel, arch)), (CSRC / kernel.source).read_text()
    return make_program_cache_key(
        code=text, code_type="c++", options=options, target_type="cubin",
        extra_digest=digest("*.cuh"),
    )  # fmt: skip


@functools.cache
def say_once(line):
    """A warning, as outside a run nobody listens to what is below."""
    logging.getLogger("dim").warning(line)


def warn_of_cache(reason):
    say_once(
        f"cannot keep compiled CUDA kernels in {cache_directory()} ({reason}); every process will "
        "compile them again; set DIM_CACHE_DIR to a directory that can be written"
    )


def compile_kernel(kernel, arch, logs=None, **options):
    """cuda.core's ObjectCode of a kernel (launch_plan.Kernel), compiled without looking anywhere.
    options: further ones of ProgramOptions."""
    from cuda.core import Program, ProgramOptions

    options |= _options(kernel, arch) | {"include_path": [str(CSRC), _cuda_headers()]}
    program = Program((CSRC / kernel.source).read_text(), "c++", ProgramOptions(**options))
    return program.compile("cubin", logs=logs)


def load_or_compile(kernel, arch):
    """The cubin of a kernel, from the cache, or compiled now and put there.
    Of many processes at once each that finds nothing compiles, and the last one's file stays."""
    from cuda.core.utils import FileStreamProgramCache

    cache, name = {}, key(kernel, arch)
    try:
        cache = FileStreamProgramCache(cache_directory())
        if cubin := cache.get(name):
            return cubin
    except OSError as error:
        warn_of_cache(error.strerror)
    say_once(f"compiling CUDA kernels for sm_{arch}, once; they are kept in {cache_directory()}")
    cubin = bytes(compile_kernel(kernel, arch).code)
    try:
        cache[name] = cubin
    except OSError as error:
        warn_of_cache(error.strerror)
    return cubin


def compile_all(kernels, arch):
    """Put the kernels into the cache, those that are missing; NVRTC runs on several threads."""
    import cuda.core.utils  # noqa: F401  not by several threads at once
    with ThreadPoolExecutor(min(16, os.cpu_count())) as pool:
        list(pool.map(lambda kernel: load_or_compile(kernel, arch), kernels))
