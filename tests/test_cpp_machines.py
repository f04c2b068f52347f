"""The C++ kernels on other processors, with other compilers and with sanitizers."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import draw

import models
from models.backends import cpp
from models.backends.cpp import build

DRIVER = Path(__file__).with_name("kernel_driver.cpp")
ODD = {"length": 3, "batch": 2, "num_classes": 3, "feature_size": 3, "embedding_size": 5, "num_time_steps": 37, "thr": 0.02}
CASES = {
    "one neuron": ODD | {"memory_size": 1, "embedding_size": 1, "thr": 0.01},
    "odd": ODD | {"memory_size": 33, "readout_delay": 50},
    "feedback": ODD | {"memory_size": 18, "readout_delay": 5},
    "hard reset": ODD | {"memory_size": 7, "perfect_reset": True, "refractory_time_steps": 0},
    "decayed traces": ODD | {"memory_size": 24, "embedding_size": 20, "tau_trace": 0.5, "gamma_pos": 1.0, "thr": 0.05},
    "no batch": ODD | {"batch": 0, "memory_size": 7},
}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2}


def write_case(path, options, dtype):
    """Write a case, and the plain model's results, for the driver."""
    torch.manual_seed(1)
    model = models.build_model(options, "reference").to(dtype)
    inputs = [x.detach().requires_grad_() for x in model.currents(*draw(options, dtype)[:3])]
    weights = model.writing_layer.W, model.reading_layer.W
    readout, counts, activity = model.store_and_recall(*inputs, record=True)
    counts = torch.cat(list(counts.values()), dim=1)
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(x.shape, generator=generator, dtype=dtype) for x in (readout, counts)]
    gradients = torch.autograd.grad([readout, counts], [*inputs, *weights], seeds)
    spikes = [activity[name].flatten() for name in models.POPULATIONS]
    sizes = (options["batch"], options["length"], model.sizes.embedding_size, model.sizes.memory_size, 3)
    constants = dict(zip(cpp.CONSTANTS, cpp._constants(model.dynamics), strict=True)) | dict(zip(cpp.SIZES, sizes, strict=True))
    arrays = [*inputs, *weights, readout, counts, torch.cat(spikes), activity["memory"], *seeds, *gradients]
    with open(path, "wb") as file:
        file.write(ctypes.c_int64(dtype.itemsize))
        file.write(ctypes.c_double(TOLERANCE[dtype]))
        file.write(build.Options(**{k: int(v) if cpp.KINDS[k] is ctypes.c_int64 else v for k, v in constants.items()}))
        for array in arrays:
            file.write(array.detach().contiguous().numpy().tobytes())


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Files of all cases in both precisions."""
    folder = tmp_path_factory.mktemp("cases")
    for dtype in TOLERANCE:
        for name, options in CASES.items():
            write_case(folder / f"{name}-{dtype}", options, dtype)
    return sorted(folder.iterdir())


EXTENSIONS = {"sse2": "sse2", "avx2": "avx2", "avx512": "avx512dq"}  # as /proc/cpuinfo names them
MACHINES = {
    "g++ avx2": "-O2 -march=haswell",
    "g++ sse2": "-O3 -march=x86-64",
    "g++ avx512": "-O3 -march=skylake-avx512",
    "clang++ sse2": "-O3 -march=x86-64 -Wno-psabi -Werror",
    "clang++ avx2": "-O3 -march=haswell -Werror",
    "clang++ avx512": "-O3 -march=skylake-avx512 -Werror",
    "aarch64-linux-gnu-g++ neon": "-O3 -static",
    "g++ sanitizers": "-O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all",
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "g++ avx2" else []) for n in MACHINES])
def test_kernels_agree_with_the_plain_model_on(name, cases, tmp_path):
    compiler, extension = name.split()
    emulator = ["qemu-aarch64-static"] if extension == "neon" else []
    for program in (compiler, *emulator):  # only `g++ avx2` is a fast test
        if not shutil.which(program):
            pytest.skip(f"needs {program}")  # clang++, qemu and a compiler for ARM are optional
    if EXTENSIONS.get(extension, "") not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"needs a processor with {extension}")  # its instructions would end the driver
    flags = *MACHINES[name].split(), "-std=c++17", "-ffp-contract=fast", "-pthread", f"-I{build.FOLDER}"
    subprocess.run([compiler, *flags, DRIVER, "-o", tmp_path / "driver"], check=True)
    done = subprocess.run([*emulator, tmp_path / "driver", *cases], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("agrees") == len(cases) and not done.stderr
