"""The C++ kernels on other processors and by other compilers, and with sanitizers."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import golden
import pytest
import torch
from helpers import draw

import models
from models.backends import cpp
from models.backends.cpp import build

ROOT = Path(__file__).parents[1]
DRIVER = Path(__file__).with_name("kernel_driver.cpp")
ODD = {"length": 3, "batch": 2, "num_classes": 3, "feature_size": 3, "embedding_size": 5, "num_time_steps": 37}
ODD_SIZES = {
    "one neuron": ODD | {"memory_size": 1, "embedding_size": 1, "thr": 0.01},
    "odd": ODD | {"memory_size": 33, "readout_delay": 50, "thr": 0.02},
    "hard reset": ODD | {"memory_size": 7, "perfect_reset": True, "refractory_time_steps": 0, "thr": 0.02},
    "decayed traces": ODD | {"memory_size": 24, "embedding_size": 20, "tau_trace": 0.5, "gamma_pos": 1.0, "thr": 0.05},
    "no batch": ODD | {"batch": 0, "memory_size": 7},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2}


def write_case(path, model, features, labels, query, dtype):
    """One case as the driver reads it, with what the plain model computes."""
    model = model.to(dtype)
    currents = [x.detach() for x in model.currents(features.to(dtype), labels, query.to(dtype))]
    weights = model.writing_layer.W, model.reading_layer.W
    inputs = [x.requires_grad_() for x in currents]
    readout, counts, activity = model.store_and_recall(*inputs, record=True)
    counts = torch.cat(list(counts.values()), dim=1)
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (readout, counts)]
    gradients = torch.autograd.grad([readout, counts], [*inputs, *weights], seeds)
    spikes = [activity[name].flatten() for name in models.POPULATIONS]
    sizes = (*features.shape[:2], model.sizes.embedding_size, model.sizes.memory_size, 3)
    constants = dict(zip(cpp.CONSTANTS, cpp._constants(model.dynamics), strict=True)) | dict(zip(cpp.SIZES, sizes, strict=True))
    options = build.Options(**{k: int(v) if cpp.KINDS[k] is ctypes.c_int64 else v for k, v in constants.items()})
    arrays = [*inputs, *weights, readout, counts, torch.cat(spikes), activity["memory"], *seeds, *gradients]
    with open(path, "wb") as file:
        file.write(torch.tensor([dtype.itemsize]).numpy().tobytes())
        file.write(torch.tensor([TOLERANCE[dtype]], dtype=torch.float64).numpy().tobytes())
        file.write(bytes(options))
        for array in arrays:
            file.write(array.detach().to(dtype).contiguous().numpy().tobytes())


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Files of the small golden cases and of odd sizes, in both precisions."""
    folder = tmp_path_factory.mktemp("cases")
    for dtype in TOLERANCE:
        for name in golden.FLOAT64[:-1]:
            case = golden.load(name)
            model = models.build_model(case.params, "reference")
            model.load_state_dict({k: v for k, v in case.state.items() if k != "encoding_layer.encoding"})
            inputs = case.inputs["features"], case.inputs["labels"], case.inputs["query"]
            write_case(folder / f"{name}-{dtype}", model, *inputs, dtype)
        for name, options in ODD_SIZES.items():
            torch.manual_seed(1)
            write_case(folder / f"{name}-{dtype}", models.build_model(options, "reference"), *draw(options, dtype)[:3], dtype)
    return sorted(folder.iterdir())


def agrees(cases, tmp_path, *compiler, emulator=()):
    driver = tmp_path / "driver"
    flags = "-std=c++17", "-pthread", f"-I{build.FOLDER}", str(DRIVER), "-o", str(driver)
    subprocess.run([*compiler, *flags], check=True)
    done = subprocess.run([*emulator, driver, *cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees") == len(cases) > 10
    assert not done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64-static"),
                    reason="needs g++-aarch64-linux-gnu and qemu-user-static")  # fmt: skip
def test_neon(cases, tmp_path):
    agrees(cases, tmp_path, "aarch64-linux-gnu-g++", "-O3", "-static", emulator=["qemu-aarch64-static"])


@pytest.mark.skipif("avx2" not in Path("/proc/cpuinfo").read_text(), reason="needs a processor with AVX2")
def test_avx2(cases, tmp_path):
    agrees(cases, tmp_path, "g++", "-O2", "-march=haswell")


@pytest.mark.slow
def test_sanitizers(cases, tmp_path):
    flags = "-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    agrees(cases, tmp_path, "g++", *flags)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for x86")
@pytest.mark.parametrize("target", ["x86-64", "haswell", "skylake-avx512"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_builds(tmp_path, compiler, target):
    """The golden files and the property-based tests."""
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    if target == "skylake-avx512" and "avx512dq" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("needs a processor with AVX-512")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpp", "test_golden.py", "test_cpp.py"]
    environment = {"CXX": f"{compiler} -march={target}", build.CACHE_VARIABLE: str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT / "tests", env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++")
@pytest.mark.parametrize("target", ["x86-64", "haswell"] if platform.machine() == "x86_64" else ["native"])
def test_clang_takes_the_source(target):
    flags = f"-march={target}", "-Wno-psabi", "-Werror", f"-I{build.FOLDER}"
    subprocess.run(["clang++", "-std=c++17", "-fsyntax-only", *flags, str(DRIVER)], check=True)
