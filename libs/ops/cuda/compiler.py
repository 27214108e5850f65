"""Compiles the kernels of csrc/ with NVRTC, the compiler that torch brings, and keeps the results.

Needs neither nvcc, nor a host compiler, nor a GPU. A result is looked for in libs/ops/prebuilt/
(written by `DIM_PREBUILD_ARCHS=...`, see setup.py) and in the cache directory, DIM_CACHE_DIR or the
user's own; its name is a hash of all that it depends on. Imports torch only to ask for its version,
so that setup.py can use it.
"""

import functools
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

from utils import UserError, replacing

CSRC = Path(__file__).resolve().parents[3] / "csrc"
PREBUILT = Path(__file__).resolve().parent / "prebuilt"
# lineinfo lets profilers show source lines and does not change the code; -v reports Resources.
OPTIONS = {"std": "c++17", "lineinfo": True, "ptxas_options": ["-v"]}
_MAGIC = b"DiM kernels 1\n"  # a new number for a new file format

_log = logging.getLogger("dim")


class Program(NamedTuple):
    """One compilation: a file of csrc/ and the macros that choose what it instantiates."""

    source: str  # relative to csrc/
    defines: tuple = ()  # pairs (macro, value), both strings


class Resources(NamedTuple):
    """What ptxas says a kernel uses: per thread, except shared memory, which is per block."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


class Compiled(NamedTuple):
    cubin: bytes
    resources: dict  # kernel's name -> Resources


# ---------------------------------------- what is installed


@functools.cache
def missing(cuda_version):
    """None, or a sentence saying what keeps kernels from being compiled beside a torch built for
    this CUDA version ('13.0'; None for a torch without CUDA), with the command that mends it.
    """
    if not cuda_version:
        return "this PyTorch is built without CUDA; install the ordinary wheel: pip install torch"
    major, minor = cuda_version.split(".")[:2]
    bindings = f'pip install "cuda-bindings=={major}.*"'
    try:
        from cuda.bindings import __version__ as found
    except ImportError:
        return f"cuda.bindings cannot be imported; run: {bindings}"
    if found.split(".")[0] != major:
        return f"cuda-bindings {found} does not fit PyTorch's CUDA {cuda_version}; run: {bindings}"
    try:
        from cuda.core import Program as _  # noqa: F401
    except ImportError as error:
        return f'cuda.core cannot be imported ({error}); run: pip install -U "cuda-core>=1.0"'
    suffix = "-cu12" if major == "12" else ""
    try:
        nvrtc_version()
    except Exception as error:  # whatever the loader of the day raises
        return (
            f"NVRTC cannot be loaded ({type(error).__name__}); run: "
            f'pip install "nvidia-cuda-nvrtc{suffix}=={major}.{minor}.*"'
        )
    if _cuda_headers() is None:
        return (
            "the CUDA headers (cuda_fp16.h, cuda_bf16.h) are not found; run: "
            f'pip install "nvidia-cuda-runtime{suffix}=={major}.{minor}.*"'
        )
    return None


def unsupported(arch):
    """None, or why NVRTC cannot compile for this architecture (90 for sm_90)."""
    from cuda.bindings import nvrtc

    _, known = nvrtc.nvrtcGetSupportedArchs()
    if int(arch) in known:
        return None
    return (
        f"NVRTC {nvrtc_version()} compiles for sm_{min(known)} to sm_{max(known)}, not for "
        f"sm_{arch}; newer GPUs need a newer PyTorch: pip install -U torch"
    )


@functools.cache
def nvrtc_version():
    """'13.0', with the wheel's exact version where it came as one."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    if int(error):
        raise RuntimeError(f"nvrtcVersion: {error}")
    for wheel in ("nvidia-cuda-nvrtc", f"nvidia-cuda-nvrtc-cu{major}"):
        try:
            version = importlib.metadata.version(wheel)
        except importlib.metadata.PackageNotFoundError:
            continue
        if version.startswith(f"{major}.{minor}."):
            return version
    return f"{major}.{minor}"


@functools.cache
def _cuda_headers():
    """Directory of cuda_bf16.h: the wheels torch brings, conda, or CUDA_HOME; None without."""
    from cuda.pathfinder import find_nvidia_header_directory

    try:
        found = find_nvidia_header_directory("cudart")
    except Exception:  # it finds several, or it is told of one that is not there
        return None
    return found if found and (Path(found) / "cuda_bf16.h").exists() else None


# ---------------------------------------- keys and files


def sources(program):
    """[(name, text)] of the program's file and of every header of ours that it includes."""
    found, waiting = {}, [program.source]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = (CSRC / name).read_text(encoding="utf-8")
        for included in re.findall(r'^\s*#\s*include\s*"([^"]+)"', found[name], re.MULTILINE):
            places = ((CSRC / name).parent / included, CSRC / included)
            path = next((p for p in places if p.exists()), None)
            if path is None:
                raise FileNotFoundError(f"csrc/{name} includes {included!r}, which does not exist")
            waiting.append(path.resolve().relative_to(CSRC).as_posix())
    return sorted(found.items())


def key(program, arch):
    """Hash of everything that a compilation depends on."""
    parts = [sources(program), program, OPTIONS, str(arch), nvrtc_version()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def cache_directory():
    if os.environ.get("DIM_CACHE_DIR"):
        return Path(os.environ["DIM_CACHE_DIR"])
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dim-kernels"


def _file_name(program, arch, key_):
    name = program.source.removesuffix(".cu").replace("/", "-")
    return f"{name}-sm_{arch}-{key_[:24]}.bin"


def pack(key_, compiled):
    """An entry's bytes: magic, checksum of the rest, a line of JSON with the key, the cubin."""
    about = {
        "key": key_,
        "resources": {name: r._asdict() for name, r in compiled.resources.items()},
    }
    body = json.dumps(about).encode() + b"\n" + compiled.cubin
    return _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def unpack(key_, data):
    """The Compiled of an entry's bytes; None for anything but a whole entry of this key."""
    checksum, _, body = data.removeprefix(_MAGIC).partition(b"\n")
    if not data.startswith(_MAGIC) or checksum != hashlib.sha256(body).hexdigest().encode():
        return None
    line, _, cubin = body.partition(b"\n")
    about = json.loads(line)
    if about["key"] != key_:
        return None
    resources = {name: Resources(**r) for name, r in about["resources"].items()}
    return Compiled(cubin, resources)


def _read(path, key_):
    try:
        return unpack(key_, path.read_bytes())
    except OSError:  # not there, or not ours to read
        return None


@functools.cache
def warn_once(message):
    _log.warning(message)


def write_entry(directory, program, arch, compiled):
    """Put an entry there in one step, so that another process sees all of it or nothing."""
    key_ = key(program, arch)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _file_name(program, arch, key_)
    with replacing(path) as temporary:
        temporary.write_bytes(pack(key_, compiled))
    return path


# ---------------------------------------- compiling


def load_or_compile(program, arch, announce=lambda: None):
    """The compiled program from prebuilt/, from the cache, or compiled now and cached.

    announce: called before a compilation. Many processes may do this at once: each that finds
    nothing compiles, and the last one's file stays.
    """
    key_ = key(program, arch)
    cache = cache_directory()
    for directory in (PREBUILT, cache):
        compiled = _read(directory / _file_name(program, arch, key_), key_)
        if compiled is not None:
            return compiled
    announce()
    start = time.monotonic()
    compiled = compile_program(program, arch)
    _log.info(f"compiled {program.source} for sm_{arch} in {time.monotonic() - start:.1f} s")
    try:
        write_entry(cache, program, arch, compiled)
    except OSError as error:
        warn_once(
            f"cannot keep compiled CUDA kernels in {cache} ({error.strerror}); every process will "
            "compile them again; set DIM_CACHE_DIR to a directory that can be written"
        )
    return compiled


def compile_program(program, arch):
    """Compile with NVRTC, without looking anywhere; UserError with the compiler's words if it
    fails."""
    import cuda.core

    text = (CSRC / program.source).read_text(encoding="utf-8")
    options = cuda.core.ProgramOptions(
        name=str(CSRC / program.source),
        arch=f"sm_{arch}",
        include_path=[str(CSRC), _cuda_headers()],
        define_macro=list(program.defines) or None,
        **OPTIONS,
    )
    log = io.StringIO()
    try:
        code = cuda.core.Program(text, "c++", options).compile("cubin", logs=log)
    except Exception as error:
        raise UserError(
            f"csrc/{program.source} does not compile for sm_{arch} with NVRTC {nvrtc_version()}; "
            f"DIM_BACKEND=reference runs without it, slowly. The compiler says: "
            + str(error).strip("\0\n ")
        ) from error
    return Compiled(bytes(code.code), parse_resources(log.getvalue()))


def parse_resources(log):
    """{symbol: Resources} of what `ptxas -v` prints."""
    found = {}
    for part in re.split(r"Compiling entry function '", log)[1:]:
        def number(pattern, part=part):
            match = re.search(pattern, part)
            return int(match.group(1)) if match else 0

        found[part.split("'", 1)[0]] = Resources(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores"),
            number(r"(\d+) bytes spill loads"),
            number(r"(\d+) bytes smem"),
        )
    return found
