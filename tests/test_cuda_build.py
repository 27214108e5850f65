"""The CUDA kernels without a GPU: NVRTC compiles them for every architecture, what it compiled is
kept, and the self-check runs all of them.
"""

import itertools
import logging
import re
import types

import emulator
import pytest
import torch

from libs.ops.cuda import adaln, compiler, fp8, launch, launch_plan, prebuild, self_check
from libs.ops.cuda.launch_plan import Kernel
from libs.ops.cuda.prebuild import kernels_of_configs
from utils import UserError

needs_nvrtc = pytest.mark.skipif(compiler.missing() is not None, reason=str(compiler.missing()))

# ---------------------------------------- keys and cache, on a small kernel of our own

KERNEL = Kernel("small/add.cu", "add", (("kType", "float"),))
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
    monkeypatch.setenv("DIM_CACHE_DIR", str(tmp_path / "cache"))
    for function in (compiler.digest, compiler.say_once):
        function.cache_clear()
    yield tmp_path / "cache"
    compiler.digest.cache_clear()


@pytest.fixture
def compilations(monkeypatch):
    """A list that grows by one at each compilation."""
    done, compile_kernel = [], compiler.compile_kernel

    def counted(kernel, arch):
        done.append((kernel, arch))
        return compile_kernel(kernel, arch)

    monkeypatch.setattr(compiler, "compile_kernel", counted)
    return done


@needs_nvrtc
def test_second_use_compiles_nothing(small, compilations):
    first, second = (compiler.load_or_compile(KERNEL, 80) for _ in range(2))
    assert len(compilations) == 1
    assert first == second and first[:4] == b"\x7fELF"


@needs_nvrtc
def test_the_key_holds_all_that_matters(small):
    csrc = compiler.CSRC / "small"
    keys = [compiler.key(KERNEL, 80)]
    assert compiler.key(KERNEL, 80) == keys[0]
    keys.append(compiler.key(KERNEL, 90))
    keys.append(compiler.key(KERNEL._replace(defines=(("kType", "double"),)), 80))
    for file, text in (("shift.cuh", "constexpr int kShift = 2;\n"), ("add.cu", SOURCE + "//\n")):
        (csrc / file).write_text(text)
        compiler.digest.cache_clear()
        keys.append(compiler.key(KERNEL, 80))
    assert len(set(keys)) == len(keys)


@needs_nvrtc
def test_an_unwritable_cache_is_a_warning(small, compilations, caplog):
    small.write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING, "dim"):
        assert compiler.load_or_compile(KERNEL, 80) == compiler.load_or_compile(KERNEL, 80)
    assert len(compilations) == 2
    record = caplog.records[0]
    assert "DIM_CACHE_DIR" in record.message and str(small) in record.message


@needs_nvrtc
def test_prebuild_fills_the_cache(small, monkeypatch, capsys, compilations):
    monkeypatch.setattr(prebuild, "kernels_of_configs", lambda dtype, arch: [KERNEL])
    prebuild.main("80;sm_90")
    assert capsys.readouterr().out.startswith("1 CUDA kernels for sm_80 are in ")
    for arch in (80, 90):
        assert compiler.load_or_compile(KERNEL, arch)
    assert len(compilations) == 2


# ---------------------------------------- self-check


@pytest.fixture
def gpu(monkeypatch):
    """The emulator's, which runs nothing here."""
    gpu = emulator.install(monkeypatch)
    monkeypatch.setattr(launch, "run", lambda *args: None)
    monkeypatch.setattr(self_check, "driver_version", lambda: "580")
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.0")
    return gpu


@pytest.mark.parametrize("arch", [75, 80, 90])
@pytest.mark.parametrize("dtype", launch_plan.CTYPES)
def test_the_self_check_runs_every_kernel(gpu, dtype, arch):
    gpu.arch = arch
    list(self_check.worst_errors(gpu, getattr(torch, dtype)))
    assert gpu.kernels == set(kernels_of_configs(dtype, arch))


@pytest.fixture
def checking(gpu, monkeypatch, tmp_path):
    """A self-check without kernels: `errors` are what it finds, `runs` how often it ran."""
    state = types.SimpleNamespace(errors=[0.01], runs=0)

    def worst_errors(gpu, dtype):
        state.runs += 1
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        return [("scan", error, 0.02) for error in state.errors]

    monkeypatch.setattr(self_check, "worst_errors", worst_errors)
    monkeypatch.setattr(compiler, "compile_all", lambda *args: None)
    monkeypatch.setattr(launch, "refuse_capture", lambda: None)
    monkeypatch.setenv("DIM_CACHE_DIR", str(tmp_path))
    gpu.checked = set()
    return state


def test_what_passed_is_noted(gpu, checking, monkeypatch):
    def use(dtype=torch.bfloat16):
        gpu.checked.clear()
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            self_check.require_checked(gpu, dtype)
        return checking.runs

    assert [use(), use()] == [1, 1] and gpu.checked == {torch.bfloat16}
    assert [use(torch.float16), use(torch.float16)] == [2, 2]
    monkeypatch.setattr(self_check, "driver_version", lambda: "581")
    assert [use(), use()] == [3, 3]


@pytest.mark.parametrize("error", [0.03, float("nan")])
def test_wrong_numbers_are_refused_until_they_are_right(gpu, checking, error):
    checking.errors = [0.01, error]
    for _ in range(2):
        with pytest.raises(UserError, match="compute wrong numbers on a GPU .sm_90.: scan"):
            self_check.require_checked(gpu, torch.float32)
    assert checking.runs == 2 and not gpu.checked
    checking.errors = [0.01]
    self_check.require_checked(gpu, torch.float32)


# ---------------------------------------- the kernels


def assert_no_spills(found, allowed=0):
    spilling = [
        f"{kernel}: {used}"
        for kernel, used in found.items()
        if max(used.spill_stores, used.spill_loads) > allowed
    ]
    assert not spilling, "\n".join(spilling)


@needs_nvrtc
def test_kernels_of_a_network():
    import compile_kernels

    assert_no_spills(compile_kernels.measure_all(kernels_of_configs("bfloat16", 90), 90))


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("arch", [75, 80, 86, 89, 90, 100, 120])
def test_kernels_of_the_configs(arch):
    import compile_kernels

    assert_no_spills(compile_kernels.measure_all(compile_kernels.config_kernels(arch), arch))


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", [80, 90])
def test_all_other_kernels(arch):
    """Registers are bounded for the configs' sake (kMinBlocks): two may spill elsewhere."""
    import compile_kernels

    assert_no_spills(compile_kernels.measure_all(compile_kernels.other_kernels(arch), arch), 8)


def test_the_list_of_the_configs_kernels_is_complete():
    """No batch, resolution or GPU size needs a kernel, for the configs' N and width, that the list
    lacks."""
    for dtype in launch_plan.CTYPES:
        listed = set(kernels_of_configs(dtype, 75))
        for batch, length, channels, multiprocessors in itertools.product(
            (1, 2, 16, 96, 1000), (78, 366, 1230, 9806), (256, 1024, 3072), (20, 108, 160)
        ):
            for name, size in (("scan", 16), ("conv", 3)):
                for way in ("forward", "backward"):
                    plan = getattr(launch_plan, f"{name}_{way}")(
                        batch, length, channels, size, dtype, multiprocessors
                    )
                    assert plan.kernels() <= listed


@pytest.mark.parametrize(
    "file, struct, slots",
    [
        ("selective_scan/params.cuh", "ScanParams", launch_plan.ScanParams),
        ("causal_conv1d/conv.cuh", "ConvParams", launch_plan.ConvParams),
        ("adaln/adaln.cuh", "AdalnParams", adaln.AdalnParams),
        ("fp8/quantize.cuh", "QuantizeParams", fp8.QuantizeParams),
    ],
)
def test_structs_have_the_size_that_the_kernels_assert(file, struct, slots):
    text = (compiler.CSRC / file).read_text()
    assert eval(re.search(rf"sizeof\({struct}\) == ([\d +*]+),", text)[1]) == 8 * slots[None]


def test_shared_memory_suffices():
    """The configs' kernels fit sm_75, which has 64 KiB a block; the others fit sm_86 and sm_120."""
    for states, dtype in itertools.product((1, 16, 17, 32, 33, 64), launch_plan.CTYPES):
        for batch in (2, 96):
            for way in ("forward", "backward"):
                plan = getattr(launch_plan, f"scan_{way}")(batch, 1230, 3072, states, dtype, 132)
                largest = max(launch.shared_bytes for launch in plan.launches)
                assert largest <= (64 if states == 16 else 99) * 1024
