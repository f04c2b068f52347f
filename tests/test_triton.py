"""The Triton backend agrees with the plain function.

With a GPU, the kernels run on it. Without a GPU, `test_kernels_pass_in_the_interpreter` runs the same tests in Triton's
interpreter (in another process, since Triton chooses it when imported), and another test compiles for an H100.
"""

import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import golden
import pytest
import torch
from helpers import OPERANDS, assert_agree, outcome, strided_outcome

pytest.importorskip("triton", reason="Triton is not installed; it is optional, for GPUs")

import triton
from triton.backends.compiler import GPUTarget

import models
from models import BackendError, Dynamics, backends, store_and_recall
from models.backends import triton as fused
from models.backends.triton import population, reading, writing
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
runs_kernels = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU: runs in the interpreter instead")
slow_if_interpreted = pytest.mark.slow if INTERPRETED else pytest.mark.skipif(False, reason="")  # 5 to 10 s each
compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")


@compiles
# On a GPU all tests of this file run the kernels themselves.
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernels run on the GPU")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_pass_in_the_interpreter(which):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, __file__]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Against the plain function


@pytest.fixture
def hard(monkeypatch):
    """Small tiles: several tiles per program and several programs per sample, at sizes that the interpreter can run.

    Uninitialized memory is NaN, so the tests notice a result that a kernel does not write.
    """
    monkeypatch.setattr(writing, "WRITE_TILE", 128)
    monkeypatch.setattr(writing, "WRITE_BACKWARD_TILE", 64)
    monkeypatch.setattr(reading, "READ_TILE", 64)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized memory
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def case(batch=1, embedding=10, memory=9, dtype=torch.float64, **constants):
    """Currents, weights and constants with which all populations fire within a few steps."""
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, *shape):
        drawn = torch.rand(*shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return drawn.to(DEVICE, dtype).requires_grad_()

    currents = [uniform(0, 1, *shape) for shape in ((batch, 2, embedding), (batch, 2, embedding), (batch, embedding))]
    weights = uniform(-0.2, 0.3, 2 * memory, 2 * embedding), uniform(-0.3, 0.4, memory, embedding + memory)
    constants = {"tau_mem": 5.0, "tau_trace": 4.0, "num_time_steps": 9} | constants
    return [*currents, *weights], models.constants(constants)[1]


OTHER = {"thr": 0.2, "refractory_time_steps": 1, "dampening_factor": 0.5, "w_max": 2.0, "gamma_pos": 0.4, "gamma_neg": 0.1}
CASES = {
    "odd sizes": {"batch": 2, "readout_delay": 3},
    "hard reset": {"perfect_reset": True, "refractory_time_steps": 0},
    "other constants": OTHER | {"memory_feedback": 0.7, "readout_steps": 3},
    "feedback later than the last step": {"num_time_steps": 7, "readout_delay": 8},
}


@runs_kernels
@pytest.mark.parametrize(
    "name, dtype",
    [
        ("odd sizes", torch.float64),
        ("hard reset", torch.float64),
        ("other constants", torch.float64),
        pytest.param("feedback later than the last step", torch.float64, marks=slow_if_interpreted),
        ("other constants", torch.float32),  # training runs in float32
        pytest.param("hard reset", torch.float32, marks=slow_if_interpreted),
    ],
)
def test_kernels_agree_with_the_plain_function(name, dtype, hard):
    tensors, dynamics = case(dtype=dtype, **CASES[name])
    ours, theirs = (outcome(function, dynamics, tensors) for function in (fused.store_and_recall, store_and_recall))
    for result in theirs:
        assert theirs[result].any(), f"{result} is zero: nothing is tested"
    if dtype == torch.float32:
        assert backends.compare(ours, theirs, 1e-2) is None
    else:
        assert_agree(ours, theirs, 1e-10)


@runs_kernels
def test_a_single_neuron_agrees_with_the_plain_function(hard):
    """Triton turns integer arguments of 1 into constants."""
    tensors, dynamics = case(embedding=1, memory=1, gamma_pos=3.0)
    for weight in tensors[3:]:
        weight.data.fill_(0.7)
    ours, theirs = (outcome(function, dynamics, tensors) for function in (fused.store_and_recall, store_and_recall))
    assert theirs["readout"].any()
    assert_agree(ours, theirs, 1e-10)


@runs_kernels
@pytest.mark.parametrize("population", ["write_value", "read_key", "read_value"])
def test_gradients_of_a_single_output_agree_with_the_plain_function(population, hard):
    """The gradients of the other outputs are None."""
    tensors, dynamics = case(embedding=6, memory=5, num_time_steps=6, readout_delay=2)
    gradients = []
    for function in (fused.store_and_recall, store_and_recall):
        count = function(*tensors, dynamics)[1][population].sum()
        gradients.append(torch.autograd.grad(count, tensors, allow_unused=True, materialize_grads=True))
    assert gradients[1][3].any()
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


@runs_kernels
def test_strided_and_expanded_operands_agree_with_the_plain_function():
    tensors, dynamics = case(batch=2, embedding=8, memory=6, thr=0.05, num_time_steps=6, readout_delay=2)
    ours, theirs = (strided_outcome(function, dynamics, tensors) for function in (fused.store_and_recall, store_and_recall))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@runs_kernels
def test_a_nan_current_reaches_the_gradients():
    """Training stops at a gradient that is not finite. A slope of 0 would hide the NaN."""
    tensors, dynamics = case(embedding=4, memory=3)
    with torch.no_grad():
        tensors[3][0, 0] = float("nan")
    results = outcome(fused.store_and_recall, dynamics, tensors)
    assert not all(results[name].isfinite().all() for name in OPERANDS)


@runs_kernels
def test_an_empty_batch_gives_an_empty_readout_and_zero_gradients():
    """A process gets an empty batch if the global batch is smaller than the number of processes."""
    tensors, dynamics = case(batch=0, embedding=2, memory=2, num_time_steps=2)
    results = outcome(fused.store_and_recall, dynamics, tensors)
    assert results["readout"].shape == (0, 2) and not any(results[name].any() for name in OPERANDS)


def write_arguments(save):
    tensors = [torch.rand(1, 2, 2, device=DEVICE, dtype=torch.float64) for _ in range(2)]
    return *tensors, 0.2, astuple(LIFNeuron()), astuple(HebbianRule()), save


@runs_kernels
def test_without_gradients_spikes_are_the_same_and_nothing_is_kept(hard):
    tensors, dynamics = case(embedding=4, memory=3, num_time_steps=5)
    _, _, kept = fused.store_and_recall(*tensors, dynamics, record=True)
    with torch.no_grad():
        _, _, evaluated = fused.store_and_recall(*tensors, dynamics, record=True)
    for name, spikes in kept.items():
        assert torch.equal(evaluated[name], spikes)
    *_, traces, membranes, checkpoints = writing._write(*write_arguments(save=False))
    assert traces.numel() == membranes.numel() == checkpoints.numel() == 0


# Only programs that run at the same time could sum in another order.
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: the interpreter runs one program after the other")
def test_two_runs_give_identical_bits():
    tensors, dynamics = case(batch=8, memory=40)
    assert_agree(*(outcome(fused.store_and_recall, dynamics, tensors) for _ in range(2)), 0)


@runs_kernels
@pytest.mark.parametrize("name", golden.FLOAT64)
@slow_if_interpreted
def test_float64_agrees_with_the_original_implementation(name):
    if INTERPRETED and name == "full_size_float64":  # a GPU runs it, and the smaller cases cover all options
        pytest.skip("takes an hour in the interpreter")
    golden.check(golden.load(name), "triton", DEVICE)


@runs_kernels
@slow_if_interpreted
def test_registered_operations_pass_opcheck():
    neuron = list(astuple(LIFNeuron()))

    def tensor(*shape):
        return 4 * torch.rand(shape, device=DEVICE, dtype=torch.float64)

    torch.library.opcheck(population._lif, (tensor(1, 1, 2), 2, neuron))
    torch.library.opcheck(writing._write, write_arguments(save=True))
    torch.library.opcheck(reading._read, (tensor(1, 2, 2), tensor(1, 2, 2), tensor(2, 2), 1, neuron))


@runs_kernels
def test_derivatives_that_the_kernels_lack_raise():
    """Forward mode and second derivatives of each of the three operations."""
    dynamics = Dynamics(num_time_steps=2)
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


# Without a GPU


@compiles
# The messages of a machine without a GPU.
@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_auto_takes_another_backend_and_says_why(monkeypatch):
    assert backends.choose("auto", "cpu", Dynamics(), store_and_recall) != "triton"
    for device, message in {"cpu": "it runs on NVIDIA GPUs", "cuda:0": "PyTorch sees no CUDA device"}.items():
        with pytest.raises(BackendError, match=f"backend triton: {message}"):
            backends.choose("triton", device, Dynamics(), store_and_recall)
    for version, message in {"3.5.1": "3.5.1 is too old", "3.10.0": "no CUDA device"}.items():  # 3.10 is newer than 3.6
        monkeypatch.setattr(triton, "__version__", version)
        assert message in fused.unavailable("cuda")
    monkeypatch.setattr(fused, "IMPORT_ERROR", "No module named 'triton'")
    assert "pip install triton" in fused.unavailable("cuda")


class H100:
    """Replaces Triton's driver where there is no GPU, so that kernels are compiled as for a launch."""

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
        (1, 1, 1, 1, 1, torch.float32),
    ],
)
def test_kernels_compile_for_an_h100(batch, length, embedding, memory, steps, dtype, monkeypatch, tmp_path):
    """The interpreter is more lenient than the compiler: types of loop variables, float literals, compile-time conditions."""
    shared = {}

    def launch(kernel, programs, *args, **constants):
        done = kernel.warmup(*args, grid=(programs,), **constants, enable_fp_fusion=True)
        assert "cubin" in done.asm
        shared[kernel.__name__] = done.metadata.shared

    for module in (population, writing, reading):
        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", H100())
    shapes = (length, embedding), (length, embedding), (embedding,)
    currents = [torch.zeros(batch, *shape, dtype=dtype, requires_grad=True) for shape in shapes]
    weights = torch.zeros(2 * memory, 2 * embedding, dtype=dtype), torch.zeros(memory, embedding + memory, dtype=dtype)
    readout, spike_counts, _ = fused.store_and_recall(*currents, *weights, Dynamics(num_time_steps=steps))
    (readout.sum() + sum(count.sum() for count in spike_counts.values())).backward()
    assert shared.keys() == {f"{name}_{way}" for name in ("lif", "write", "read") for way in ("forward", "backward")}
    assert max(shared.values()) < 64 * 1024, f"bytes of shared memory: {shared}"


@compiles
@pytest.mark.slow
def test_the_dry_run_of_gpu_check_succeeds(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--output", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "triton over reference" in (tmp_path / "table.md").read_text()
