"""The Triton backend agrees with the reference.

On a GPU the kernels run there. Without one, `test_on_the_interpreter` runs the same tests in Triton's interpreter (in a process
of its own, as Triton decides when it is imported), and another test compiles the kernels for an H100.
"""

import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from helpers import OPERANDS, assert_agree, outcome
from torch.nn.functional import linear

pytest.importorskip("triton", reason="Triton is not installed; it is optional, for GPUs")

import triton
from triton.backends.compiler import GPUTarget

import models
from models import BackendError, Dynamics, backends, store_and_recall
from models.backends import triton as fused
from models.backends.triton import population as population_kernels
from models.backends.triton import reading, writing
from models.hebbian_memory import hebbian_read, hebbian_write
from models.neurons import LIFNeuron, population
from models.plasticity import HebbianRule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU: test_on_the_interpreter runs it")
slow_if_interpreted = pytest.mark.slow if INTERPRETED else lambda test: test  # there such tests take 5 to 10 s each
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@compiles
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
@pytest.mark.skipif(
    triton.__version__.startswith("3.6") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4),
    reason="the interpreter of Triton 3.6 fails with NumPy 2.4 or later (conversion of arrays to Python scalars)",
)
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, __file__]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------- against the reference


@pytest.fixture
def poison():
    """Fills uninitialized memory with NaN: what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills by default
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles a program and several programs a sample, at sizes that the interpreter can bear."""
    monkeypatch.setattr(writing, "WRITE_TILE", 128)
    monkeypatch.setattr(writing, "WRITE_BACKWARD_TILE", 64)
    monkeypatch.setattr(reading, "READ_TILE", 64)


def inputs(batch, length, embedding, memory):
    """Currents and weights, double precision, that make every population fire."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, *shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low

    currents = [uniform(0, 1, *shape) for shape in ((batch, length, embedding), (batch, length, embedding), (batch, embedding))]
    weights = uniform(-0.2, 0.3, 2 * memory, 2 * embedding), uniform(-0.3, 0.4, memory, embedding + memory)
    return [x.to(DEVICE).requires_grad_() for x in (*currents, *weights)]


def quick(**constants):
    """Constants with which a few steps suffice for all populations to fire."""
    return models.constants({"tau_mem": 5.0, "tau_trace": 4.0, "num_time_steps": 9} | constants)[1]


OTHER = {"thr": 0.2, "refractory_time_steps": 1, "dampening_factor": 0.5, "w_max": 2.0, "gamma_pos": 0.4, "gamma_neg": 0.1}
CASES = {
    "odd sizes": quick(),
    "hard reset": quick(perfect_reset=True),
    "no refractory steps": quick(refractory_time_steps=0),
    "other constants": quick(**OTHER, memory_feedback=0.7, readout_steps=3),
    "feedback after 3 steps": quick(readout_delay=3),
    "feedback later than the last step": quick(num_time_steps=7, readout_delay=8),
    "a single neuron": quick(gamma_pos=3.0),  # Triton makes constants of integers that are 1
}
RUNS = [(name, torch.float64) for name in CASES]
RUNS += [(name, torch.float32) for name in ("other constants", "odd sizes", "hard reset")]  # every training runs in float32
LATER = [RUNS[2], RUNS[5], *RUNS[-2:]] if INTERPRETED else []


@runs_kernels
@pytest.mark.parametrize("name, dtype", [pytest.param(*run, marks=[pytest.mark.slow] if run in LATER else []) for run in RUNS])
def test_agrees_with_the_plain_function(name, dtype, small_tiles, poison):
    sizes = (1, 1, 1, 1) if name == "a single neuron" else (2 if name == "odd sizes" else 1, 2, 10, 9)
    tensors = [x.detach().to(dtype).requires_grad_() for x in inputs(*sizes)]
    if name == "a single neuron":
        for weight in tensors[3:]:
            weight.data.fill_(0.7)
    ours, theirs = (outcome(function, CASES[name], tensors) for function in (fused.store_and_recall, store_and_recall))
    for result in ["readout"] if name == "a single neuron" else theirs:
        assert theirs[result].any(), f"{result} is zero: nothing is tested"
    if dtype == torch.float32:
        assert backends.compare(ours, theirs, 1e-2) is None
    else:
        assert_agree(ours, theirs, 1e-10)


@runs_kernels
def test_a_current_that_is_not_a_number_reaches_the_gradients():
    """The training stops at a gradient that is not finite; a slope of 0 would hide it."""
    tensors = inputs(batch=1, length=1, embedding=4, memory=3)
    with torch.no_grad():
        tensors[3][0, 0] = float("nan")
    results = outcome(fused.store_and_recall, quick(), tensors)
    assert not all(results[name].isfinite().all() for name in OPERANDS)


@runs_kernels
def test_an_empty_batch():
    """What a process gets of a global batch smaller than the number of processes."""
    tensors = inputs(batch=0, length=1, embedding=2, memory=2)
    results = outcome(fused.store_and_recall, quick(num_time_steps=2), tensors)
    assert results["readout"].shape == (0, 2) and not any(results[name].any() for name in OPERANDS)


@runs_kernels
def test_without_gradients_the_same_and_nothing_kept(small_tiles, poison):
    dynamics = Dynamics(num_time_steps=5)
    tensors = inputs(batch=1, length=1, embedding=4, memory=3)
    _, _, kept = fused.store_and_recall(*tensors, dynamics, record=True)
    with torch.no_grad():
        _, _, evaluated = fused.store_and_recall(*tensors, dynamics, record=True)
    for name, spikes in kept.items():
        assert torch.equal(evaluated[name], spikes)
    *_, traces, membranes, checkpoints = writing._write(*fused_write_arguments(save=False))
    assert traces.numel() == membranes.numel() == checkpoints.numel() == 0


@runs_kernels
@slow_if_interpreted
def test_two_runs_give_identical_bits(small_tiles):
    dynamics = quick(num_time_steps=3)
    tensors = inputs(batch=2, length=1, embedding=4, memory=9)
    assert_agree(*(outcome(fused.store_and_recall, dynamics, tensors) for _ in range(2)), 0)


@runs_kernels
@pytest.mark.parametrize("name", golden.FLOAT64)
@slow_if_interpreted
def test_float64_agrees_with_the_published_program(name):
    if INTERPRETED and name == "full_size_float64":
        pytest.skip("takes an hour in the interpreter")
    golden.check(golden.load(name), "triton", DEVICE)


# --------------------------------------------------------------------------------------------------- torch.library, choice


def fused_write_arguments(save):
    tensors = [torch.rand(1, 2, 2, device=DEVICE, dtype=torch.float64) for _ in range(2)]
    return *tensors, 0.2, astuple(LIFNeuron()), astuple(HebbianRule()), save


@runs_kernels
@slow_if_interpreted
def test_operations_are_registered_as_torch_library_wants():
    neuron = list(astuple(LIFNeuron()))

    def tensor(*shape):
        return 4 * torch.rand(shape, device=DEVICE, dtype=torch.float64)

    torch.library.opcheck(population_kernels._lif, (tensor(1, 1, 2), 2, neuron))
    torch.library.opcheck(writing._write, fused_write_arguments(save=True))
    torch.library.opcheck(reading._read, (tensor(1, 2, 2), tensor(1, 2, 2), tensor(2, 2), 1, neuron))


@runs_kernels
@pytest.mark.parametrize("used", [0, 1, 2])
def test_gradients_of_some_outputs_only(used):
    """Unused outputs have gradients of None."""
    dynamics = quick(num_time_steps=3)

    def gradients(write, read):
        memory, values = write(*currents, dynamics)
        outputs = values, *read(currents[0], memory, weight, dynamics)
        return torch.autograd.grad(outputs[used].sum(), [*currents, weight], allow_unused=True)

    def plain_write(*operands):
        memories, _, values = hebbian_write(*operands)
        return memories[-1], values.spikes

    def plain_read(*operands):
        return [neurons.spikes for neurons in hebbian_read(*operands)]

    def fused_write(*operands):
        return fused.hebbian_write(*operands)[::2]

    torch.manual_seed(0)
    shapes = (1, 6, 3), (1, 6, 3), (3, 3)
    *currents, weight = (torch.rand(s, device=DEVICE, dtype=torch.float64, requires_grad=True) for s in shapes)
    plain = gradients(plain_write, plain_read)
    for ours, theirs in zip(gradients(fused_write, fused.hebbian_read), plain, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@runs_kernels
def test_derivatives_that_the_kernels_lack_raise():
    """Forward mode and second derivatives of each of the three operations."""
    dynamics = quick(num_time_steps=2)
    currents = [torch.rand(1, 2, 3, device=DEVICE, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    memory, weight = (torch.rand(shape, device=DEVICE, dtype=torch.float64) for shape in ((1, 3, 3), (3, 3)))
    operations = (
        lambda x: fused.lif(x, 2, dynamics.neuron),
        lambda x: fused.hebbian_write(x, currents[1], dynamics)[0],
        lambda x: fused.hebbian_write(currents[0], x, dynamics)[0],
        lambda x: fused.hebbian_read(x, memory, weight, dynamics)[1],
    )
    for operation in operations:
        with pytest.raises(RuntimeError, match="jvp"):
            torch.func.jvp(operation, (currents[0].detach(),), (memory[:, :2],))
        (first,) = torch.autograd.grad(operation(currents[0]).sum(), currents[0], create_graph=True)
        with pytest.raises(BackendError, match="no second derivatives"):
            torch.autograd.grad(first.sum(), currents[0])


@runs_kernels
def test_strided_inputs():
    """Gradients of sums are expanded, a transposed memory is not contiguous: kernels count on contiguous tensors."""
    current, weight = (torch.rand(shape, device=DEVICE, dtype=torch.float64) for shape in ((2, 3, 4), (4, 4)))
    strided = (4 * current).transpose(0, 2).requires_grad_()
    ours = fused.lif(strided, 3, LIFNeuron())
    theirs = population(LIFNeuron(), strided, 3).spikes
    assert torch.equal(ours, theirs)
    (expected,) = torch.autograd.grad(theirs.sum(), strided)
    torch.testing.assert_close(torch.autograd.grad(ours.sum(), strided)[0], expected, rtol=0, atol=1e-10)
    query, memory = linear(4 * current, weight), torch.rand(4, 4, 2, device=DEVICE, dtype=torch.float64).transpose(0, 2)
    for ours, theirs in zip(
        fused.hebbian_read(query, memory, weight.t(), Dynamics()),
        [neurons.spikes for neurons in hebbian_read(query, memory, weight.t(), Dynamics())],
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@compiles
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_auto_takes_another_backend_and_says_why(monkeypatch):
    assert backends.choose("auto", "cpu", Dynamics(), store_and_recall) != "triton"
    with pytest.raises(BackendError, match="backend triton: it runs on NVIDIA GPUs"):
        backends.choose("triton", "cpu", Dynamics(), store_and_recall)
    with pytest.raises(BackendError, match="no CUDA device"):
        backends.choose("triton", "cuda:0", Dynamics(), store_and_recall)
    for version, message in {"3.5.1": "3.5.1 is too old", "3.10.0": "no CUDA device"}.items():  # 3.10 is newer than 3.6
        monkeypatch.setattr(triton, "__version__", version)
        assert message in fused.unavailable("cuda")
    monkeypatch.setattr(fused, "IMPORT_ERROR", "No module named 'triton'")
    assert "pip install triton" in fused.unavailable("cuda")


# ------------------------------------------------------------------------------------------------ compiled without a GPU


class H100:
    """Stands in for Triton's driver where there is no GPU, so that kernels are compiled as they would be for a launch."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@compiles
@pytest.mark.parametrize(
    "batch, length, embedding, memory, steps, dtype",
    [
        (16, 10, 80, 100, 100, torch.float32),
        pytest.param(16, 10, 80, 100, 100, torch.float64, marks=pytest.mark.slow),
        pytest.param(3, 2, 5, 300, 40, torch.float32, marks=pytest.mark.slow),
        (1, 1, 1, 1, 1, torch.float32),
    ],
)
def test_compiles_for_an_h100(batch, length, embedding, memory, steps, dtype, monkeypatch, tmp_path):
    """The interpreter is more lenient than the compiler: types of loop variables, float literals, compile-time conditions."""
    compiled = {}

    def launch(kernel, programs, *args, **constants):
        done = kernel.warmup(*args, grid=(programs,), **constants, enable_fp_fusion=True)
        assert "cubin" in done.asm
        compiled[kernel.__name__] = done

    for module in (population_kernels, writing, reading):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", H100())
    shapes = (length, embedding), (length, embedding), (embedding,)
    currents = [torch.zeros(batch, *shape, dtype=dtype, requires_grad=True) for shape in shapes]
    weights = torch.zeros(2 * memory, 2 * embedding, dtype=dtype), torch.zeros(memory, embedding + memory, dtype=dtype)
    readout, spike_counts, _ = fused.store_and_recall(*currents, *weights, Dynamics(num_time_steps=steps))
    (readout.sum() + sum(count.sum() for count in spike_counts.values())).backward()
    assert set(compiled) == {
        "lif_forward", "lif_backward", "write_forward", "write_backward", "read_forward", "read_backward"
    }  # fmt: skip
    for name, kernel in compiled.items():
        assert kernel.metadata.shared < 64 * 1024, f"{name} takes {kernel.metadata.shared} bytes of shared memory"


@compiles
@pytest.mark.slow
def test_the_script_for_gpus_runs_dry(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--output", tmp_path]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton over reference" in (tmp_path / "table.md").read_text()
