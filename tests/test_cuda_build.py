"""The CUDA kernels without a GPU: NVRTC compiles them for every architecture, the cache keeps what
it compiled whatever happens to its files, and what is missing is said.
"""

import concurrent.futures
import itertools
import json
import logging
import os
import runpy
import subprocess
import sys
import textwrap

import golden_cases
import pytest

from libs.ops.cuda import compiler, launch_plan, prebuild
from libs.ops.cuda.compiler import Program, load_or_compile
from libs.ops.cuda.shipped import kernels_of_configs
from utils import UserError

torch = pytest.importorskip("torch")
MISSING = compiler.missing(torch.version.cuda)
needs_nvrtc = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# ---------------------------------------- keys and cache, on a small kernel of our own

PROGRAM = Program("small/add.cu", (("kType", "float"),))
SOURCE = """
#include "small/shift.cuh"
extern "C" __global__ void add(kType* x) { x[threadIdx.x] += kShift; }
"""


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A csrc/ of our own and an empty cache; returns the cache's directory."""
    (tmp_path / "csrc" / "small").mkdir(parents=True)
    (tmp_path / "csrc" / "small" / "add.cu").write_text(SOURCE)
    (tmp_path / "csrc" / "small" / "shift.cuh").write_text("constexpr int kShift = 1;\n")
    monkeypatch.setattr(compiler, "CSRC", tmp_path / "csrc")
    monkeypatch.setattr(compiler, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("DIM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch):
    """A list that grows by one at each compilation."""
    done, compile_program = [], compiler.compile_program

    def counted(program, arch):
        done.append((program, arch))
        return compile_program(program, arch)

    monkeypatch.setattr(compiler, "compile_program", counted)
    return done


def entry(cache):
    (path,) = cache.iterdir()
    return path


@needs_nvrtc
def test_second_use_compiles_nothing(small, compilations):
    announced = []
    first = load_or_compile(PROGRAM, 80, lambda: announced.append(1))
    second = load_or_compile(PROGRAM, 80, lambda: announced.append(2))
    assert len(compilations) == 1 and announced == [1]
    assert first == second and first.cubin[:4] == b"\x7fELF"
    assert first.resources["add"].registers > 0 and first.resources["add"].spill_stores == 0


@needs_nvrtc
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-100] + b"x" + data[-99:],
        lambda data: b"DiM kernels 0" + data[13:],
        lambda data: b"\x7fELF" + data,
        lambda data: data.replace(b'"key"', b'"kez"'),
    ],
    ids=["last byte", "half", "empty", "one byte changed", "old", "no entry", "header"],
)
def test_a_corrupt_entry_is_rebuilt(small, compilations, damage):
    expected = load_or_compile(PROGRAM, 80)
    whole = entry(small).read_bytes()
    assert damage(whole) != whole
    entry(small).write_bytes(damage(whole))
    assert load_or_compile(PROGRAM, 80).cubin == expected.cubin and len(compilations) == 2
    assert entry(small).read_bytes() == whole


@needs_nvrtc
def test_a_foreign_entry_is_rebuilt(small, compilations):
    """A whole entry of another architecture under this one's name."""
    load_or_compile(PROGRAM, 80)
    other = entry(small).read_bytes()
    entry(small).unlink()
    expected = load_or_compile(PROGRAM, 90).cubin
    entry(small).write_bytes(other)
    assert load_or_compile(PROGRAM, 90).cubin == expected and len(compilations) == 3


@needs_nvrtc
def test_the_key_holds_all_that_matters(small, monkeypatch):
    csrc = compiler.CSRC / "small"
    keys = [compiler.key(PROGRAM, 80)]
    assert compiler.key(PROGRAM, 80) == keys[0]
    keys.append(compiler.key(PROGRAM, 90))
    keys.append(compiler.key(Program(PROGRAM.source, (("kType", "double"),)), 80))
    (csrc / "shift.cuh").write_text("constexpr int kShift = 2;\n")
    keys.append(compiler.key(PROGRAM, 80))
    (csrc / "add.cu").write_text(SOURCE + "// more\n")
    keys.append(compiler.key(PROGRAM, 80))
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "12.8.93")
    keys.append(compiler.key(PROGRAM, 80))
    monkeypatch.setattr(compiler, "OPTIONS", compiler.OPTIONS | {"debug": True})
    keys.append(compiler.key(PROGRAM, 80))
    assert len(set(keys)) == len(keys)
    (csrc / "unrelated.cuh").write_text("")
    assert compiler.key(PROGRAM, 80) == keys[-1]


@needs_nvrtc
def test_prebuilt_comes_first(small, compilations):
    compiled = compiler.compile_program(PROGRAM, 80)
    compiler.write_entry(compiler.PREBUILT, PROGRAM, 80, compiled)
    assert load_or_compile(PROGRAM, 80) == compiled
    assert len(compilations) == 1 and not small.exists()


@needs_nvrtc
def test_an_unwritable_cache_is_no_error(small, compilations, caplog):
    small.write_text("a file where the directory should be")
    compiler.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "dim"):
        assert load_or_compile(PROGRAM, 80).cubin == load_or_compile(PROGRAM, 80).cubin
    assert len(compilations) == 2
    (record,) = caplog.records
    assert "DIM_CACHE_DIR" in record.message and str(small) in record.message


@needs_nvrtc
def test_many_processes_at_once(small):
    """All find an empty cache, all get the kernel, one whole entry stays and nothing else."""
    code = """
        import importlib.util, pathlib, sys
        spec = importlib.util.spec_from_file_location("cuda_compile", "libs/ops/cuda/compiler.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.CSRC, module.PREBUILT = map(pathlib.Path, sys.argv[1:])
        program = module.Program("small/add.cu", (("kType", "float"),))
        for _ in range(20):
            print(len(module.load_or_compile(program, 80).cubin))
            for path in module.cache_directory().glob("*.bin"):
                path.unlink(missing_ok=True)
        module.load_or_compile(program, 80)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    command += [str(compiler.CSRC), str(compiler.PREBUILT)]
    processes = [
        subprocess.Popen(
            command, cwd=golden_cases.ROOT, env=dict(os.environ), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, outputs
    sizes = {line for output, _ in outputs for line in output.split()}
    assert len(sizes) == 1
    assert not [path for path in small.iterdir() if path.suffix != ".bin"]
    assert load_or_compile(PROGRAM, 80).cubin


@needs_nvrtc
def test_a_mistake_in_a_kernel_is_told(small):
    (compiler.CSRC / "small" / "add.cu").write_text("extern int;\nnonsense")
    message = r"(?s)csrc/small/add.cu does not compile for sm_80 .*nonsense"
    with pytest.raises(UserError, match=message):
        load_or_compile(PROGRAM, 80)
    assert not small.exists()


def test_cache_directory(monkeypatch):
    monkeypatch.delenv("DIM_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    if sys.platform != "win32":
        assert str(compiler.cache_directory()) == "/somewhere/dim-kernels"
    monkeypatch.setenv("DIM_CACHE_DIR", "elsewhere")
    assert str(compiler.cache_directory()) == "elsewhere"


# ---------------------------------------- what is missing


@pytest.fixture
def no_memory():
    """`missing` forgets what it found, before and after."""
    compiler.missing.cache_clear()
    yield
    compiler.missing.cache_clear()


@needs_nvrtc
def test_another_cuda_than_torchs(no_memory):
    assert 'pip install "cuda-bindings==9.*"' in compiler.missing("9.1")
    assert "built without CUDA" in compiler.missing(None)


@needs_nvrtc
@pytest.mark.parametrize(
    "module, command",
    [("cuda.bindings", "cuda-bindings=="), ("cuda.core", "cuda-core>=")],
)
def test_a_package_that_is_not_installed(no_memory, monkeypatch, module, command):
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises ImportError
    assert f'pip install {"-U " * (module == "cuda.core")}"{command}' in compiler.missing(
        torch.version.cuda
    )


@needs_nvrtc
def test_headers_and_compiler_that_are_not_there(no_memory, monkeypatch):
    def nothing():
        raise OSError("libnvrtc.so.13: cannot open shared object file")

    monkeypatch.setattr(compiler, "_cuda_headers", lambda: None)
    assert "pip install \"nvidia-cuda-runtime" in compiler.missing(torch.version.cuda)
    compiler.missing.cache_clear()
    monkeypatch.setattr(compiler, "nvrtc_version", nothing)
    assert "pip install \"nvidia-cuda-nvrtc" in compiler.missing(torch.version.cuda)


@needs_nvrtc
def test_a_gpu_that_nvrtc_does_not_know():
    assert compiler.unsupported(80) is None
    assert "not for sm_999" in compiler.unsupported(999)


# ---------------------------------------- ahead of time


@needs_nvrtc
def test_prebuild(small, monkeypatch, capsys):
    kernel = launch_plan.Kernel(PROGRAM.source, "add", PROGRAM.defines)
    monkeypatch.setattr(prebuild, "kernels_of_configs", lambda arch: [kernel])
    monkeypatch.setattr(prebuild, "REPORT", compiler.PREBUILT / "report.txt")
    assert prebuild.main("80;sm_90") == 0
    printed = capsys.readouterr().out
    assert "sm_80: 1 CUDA kernels compiled with NVRTC" in printed and "sm_90: 1" in printed
    assert prebuild.REPORT.read_text() == printed
    monkeypatch.setattr(compiler, "compile_program", None)  # not called
    assert load_or_compile(PROGRAM, "90").cubin and load_or_compile(PROGRAM, 80).cubin


@needs_nvrtc
@pytest.mark.parametrize(
    "archs, message", [("13;90", "not for sm_13"), ("hopper", "like '90;100'")]
)
def test_what_cannot_be_prebuilt_is_told(small, monkeypatch, capsys, archs, message):
    monkeypatch.setattr(prebuild, "REPORT", compiler.PREBUILT / "report.txt")
    assert prebuild.main(archs) == 1
    assert message in capsys.readouterr().out


def test_setup_prebuilds_only_when_it_installs_and_is_asked(monkeypatch):
    """setup.py runs with other commands too, and an installation must never fail for kernels."""
    import setuptools

    def run(*arguments, **variables):
        with monkeypatch.context() as patch:
            patch.setattr(setuptools, "setup", lambda: None)
            patch.setattr(subprocess, "run", lambda command, **options: started.append(command))
            patch.setattr(sys, "argv", ["setup.py", *arguments])
            patch.delenv("DIM_PREBUILD_ARCHS", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            runpy.run_path(str(golden_cases.ROOT / "setup.py"))

    started = []
    run("editable_wheel")
    run("egg_info", DIM_PREBUILD_ARCHS="90")
    assert not started
    run("editable_wheel", DIM_PREBUILD_ARCHS="90;100")
    assert started == [[sys.executable, "-m", "libs.ops.cuda.prebuild", "90;100"]]


# ---------------------------------------- the kernels

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


@pytest.fixture(scope="module")
def compiling():
    """(architecture, set) -> a future of what compile_kernels.py prints; two processes at a time,
    all architectures' configs at once."""
    # A copy: pytest writes to os.environ at every phase, and a process that a thread starts
    # meanwhile with the environment itself can fail with EFAULT.
    environment = dict(os.environ)

    def compile_all(arch, which):
        command = [sys.executable, "tests/compile_kernels.py", str(arch), which]
        result = subprocess.run(
            command, cwd=golden_cases.ROOT, env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        started = {}

        def start(arch, which):
            if (arch, which) not in started:
                started[arch, which] = pool.submit(compile_all, arch, which)
            return started[arch, which]

        yield start
        pool.shutdown(cancel_futures=True)


def check_resources(results, arch, capsys, allowed=0):
    """Prints a line, and fails where a kernel spills registers, of more bytes than allowed, to
    memory."""
    seconds = sum(row[2] for row in results)
    registers = [row[3]["registers"] for row in results]
    spilling = [
        row for row in results if max(row[3]["spill_stores"], row[3]["spill_loads"]) > allowed
    ]
    with capsys.disabled():
        print(
            f"\nsm_{arch}: {len(results)} kernels in {seconds:.1f} s, {min(registers)} to "
            f"{max(registers)} registers, {len(spilling)} that spill over {allowed} bytes"
        )
    lines = [
        f"csrc/{source} {' '.join(f'{k}={v}' for k, v in defines)}: {used}"
        for source, defines, _, used in spilling
    ]
    assert not lines, f"spilling on sm_{arch}:\n" + "\n".join(lines)


@needs_nvrtc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_kernels_of_the_configs(arch, compiling, capsys):
    for other in ARCHITECTURES:
        compiling(other, "configs")
    check_resources(compiling(arch, "configs").result(), arch, capsys)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", (80, 90))
def test_all_other_kernels(arch, compiling, capsys):
    for other in (80, 90):
        compiling(other, "others")
    # Registers are bounded for the configs' sake (kMinBlocks): two may spill elsewhere.
    check_resources(compiling(arch, "others").result(), arch, capsys, allowed=8)


def test_the_list_of_the_configs_kernels_is_complete():
    """No batch, resolution or GPU size needs a kernel, for the configs' N and width, that the list
    lacks."""
    listed = set(kernels_of_configs(75))
    for dtype, batch, length, channels, multiprocessors in itertools.product(
        launch_plan.CTYPE_OF_DTYPE, (1, 2, 16, 96, 1000), (78, 366, 1230, 9806),
        (256, 1024, 3072), (20, 108, 160),
    ):  # fmt: skip
        for name, size in (("scan", 16), ("conv", 3)):
            for way in ("forward", "backward"):
                plan = getattr(launch_plan, f"{name}_{way}")(
                    batch, length, channels, size, dtype, multiprocessors
                )
                assert plan.kernels() <= listed


def test_shared_memory_suffices():
    """The configs' kernels fit sm_75, which has 64 KiB a block; the others fit sm_86 and sm_120."""
    for states, dtype in itertools.product((1, 16, 17, 32, 33, 64), launch_plan.CTYPE_OF_DTYPE):
        for batch in (2, 96):
            for way in ("forward", "backward"):
                plan = getattr(launch_plan, f"scan_{way}")(batch, 1230, 3072, states, dtype, 132)
                largest = max(launch.shared_bytes for launch in plan.launches)
                assert largest <= (64 if states == 16 else 99) * 1024
