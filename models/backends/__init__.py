"""Accelerators: programs that compute in less time what the plain model (`models.memorizing_associations`) defines.

A kernel backend is a module with two functions:

    unavailable(device_type) -> str | None     why it cannot run on such a device here, in one line with the remedy, or None
    store_and_recall(features_current, labels_current, query_current, write_weight, read_weight, dynamics, record)
                                               as the plain model's function of the same name, which defines the meaning

"reference" is the name of the plain model itself, and "compiled" that of the plain model with its time loop compiled by
`torch.compile`: `auto` never takes it, since it compiles for minutes. Before a kernel or compiled code is used with some
constants for the first time in a process, it must prove that it computes what the plain model does.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from models.dynamics import Dynamics
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

BACKENDS = ("auto", "triton", "cpp", "compiled", "reference")
KERNELS = ("triton", "cpp")  # those that `auto` tries, from the fastest to the slowest, before the plain model

# What the kernels take. A constant beside these would be dropped in silence.
KNOWN = {
    Dynamics: {"num_time_steps", "readout_delay", "memory_feedback", "readout_steps", "neuron", "rule"},
    LIFNeuron: {"thr", "perfect_reset", "refractory_time_steps", "tau_mem", "dampening_factor"},
    HebbianRule: {"w_max", "gamma_pos", "gamma_neg", "tau_trace"},
}

TINY = 3, 10, 18  # samples, embedding size and memory size of the case in which a kernel proves itself


class BackendError(RuntimeError):
    """A backend asked for by name cannot run here, or does not compute this network."""


def check_name(name: str) -> None:
    """Raises ValueError for a name that is not one of BACKENDS."""
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")


def choose(
    name: str,
    device_type: str,
    dynamics: Dynamics,
    plain: Callable,
    altered: str | None = None,
    sizes: tuple[int, int, int] = TINY,
    dtype: torch.dtype = torch.float32,
) -> tuple[str, dict[str, str]]:
    """The backend that runs a network on a device ("cpu", "cuda"), and for each faster kernel why it does not.

    `auto` takes the fastest kernel that runs here and proves that it is this model, else the plain model, with a warning; a
    backend asked for by name runs or raises.

    Args:
        plain: the plain model, with the signature of a kernel.
        altered: why a kernel cannot stand for this network's layers, or None.
        sizes, dtype: samples, embedding size and memory size, and type, that the time loop is compiled for.

    Raises:
        ValueError: no such backend.
        BackendError: the backend asked for cannot run this network here.
    """
    check_name(name)
    if name in KERNELS and (reason := _objection(name, device_type, dynamics, plain, altered)):
        raise BackendError(f"backend {name}: {reason}")
    if name == "compiled" and (reason := _objection_to_compiled(device_type, dynamics, plain, equations(), sizes, dtype)):
        raise BackendError(f"backend compiled: {reason}")
    if name != "auto":
        return name, {}
    why_not = {}
    for kernel in KERNELS:
        reason = _objection(kernel, device_type, dynamics, plain, altered)
        if reason is None:
            return kernel, why_not
        why_not[kernel] = reason
    if device_type == "cpu":
        del why_not["triton"]  # nobody expects a GPU's kernels there
    reasons = "; ".join(f"{kernel}: {reason}" for kernel, reason in why_not.items())
    changed = any(unavailable(kernel, device_type) is None for kernel in why_not)
    _warn_of_the_plain_model(f"({reasons})" + ("; --backend compiled is several times faster" if changed else ""))
    return "reference", why_not


def program(name: str) -> Callable:
    """What a backend other than the plain model consists of: the kernel's `store_and_recall`, or the compiled time loop."""
    if name not in _programs:
        module = importlib.import_module(f"models.backends.{name}")
        _programs[name] = module.store_and_recall if name in KERNELS else module.through_time
    return _programs[name]


_programs: dict[str, Callable] = {}


def build(name: str, device_type: str) -> None:
    """Build ahead what a backend compiles, before processes start that would all want to.

    Raises:
        BackendError: the backend asked for by name cannot run here.
    """
    for kernel in KERNELS:
        reason = unavailable(kernel, device_type) if name in ("auto", kernel) else None
        if reason and name == kernel:
            raise BackendError(f"backend {kernel}: {reason}")


@functools.cache
def _warn_of_the_plain_model(reasons: str) -> None:
    warnings.warn(f"using the plain model, which is slow {reasons}", stacklevel=2)


@functools.cache
def unavailable(kernel: str, device_type: str) -> str | None:
    """Why a kernel backend cannot run on such a device here, in one line with the remedy, or None."""
    return importlib.import_module(f"models.backends.{kernel}").unavailable(device_type)


@functools.cache
def _objection_to_compiled(
    device_type: str, dynamics: Dynamics, plain: Callable, equations: tuple, sizes: tuple[int, int, int], dtype: torch.dtype
) -> str | None:
    """Compile the time loop for a training with these sizes, and why it does not compute the plain model, or None.

    With the run's own number of threads: other code is compiled for another.
    """
    how_long = "one to three minutes, and some seconds more at the first evaluation; less if PyTorch's cache holds it"
    print(f"compiling the time loop ({how_long}) ...", file=sys.stderr, flush=True)
    compiled = functools.partial(plain, loop=program("compiled"))
    try:
        return _first_difference(compiled, device_type, dynamics, plain, (dtype,), sizes)
    except Exception as failure:  # of Python, C++ or Triton, in many layers
        cause = str(getattr(failure, "inner_exception", failure))  # PyTorch wraps it
        reason = next((line for line in cause.splitlines() if line.strip()), type(failure).__name__)
        compiler = "a C++ compiler (g++, or set CXX)" if device_type == "cpu" else "Triton and a C compiler"
        return f"torch.compile fails ({reason.strip()[:200]}); it needs {compiler}; --backend reference runs without"


def equations() -> tuple:
    """The functions that hold the published equations: whoever replaces one in a running process is noticed."""
    return LIFNeuron.step, LIFNeuron.initial_state, HebbianRule.update, HebbianRule.update_trace


def _objection(kernel: str, device_type: str, dynamics: Dynamics, plain: Callable, altered: str | None) -> str | None:
    """Why a kernel does not run this network, or None."""
    reason = unavailable(kernel, device_type) or altered or _unknown(dynamics)
    return reason or _difference(kernel, device_type, dynamics, plain, equations())


def _unknown(dynamics: Dynamics) -> str | None:
    """What the kernels do not know among neuron, rule and constants."""
    for constants, known in ((dynamics, Dynamics), (dynamics.neuron, LIFNeuron), (dynamics.rule, HebbianRule)):
        if type(constants) is not known:
            return f"it does not know {type(constants).__name__}, only {known.__name__}; use compiled or reference"
        if unknown := {f.name for f in fields(known)} ^ KNOWN[known]:
            return f"it does not know the constant {', '.join(sorted(unknown))} of {known.__name__}; use compiled or reference"
    return None


# The proof ---------------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}  # of the norm of a gradient
NEGLIGIBLE = 1e-30  # where products of float32 vanish
TRIALS = 3  # rounding flips a spike in one draw in some thousands, a wrong program differs in all


@functools.cache
def _difference(kernel: str, device_type: str, dynamics: Dynamics, plain: Callable, equations: tuple) -> str | None:
    """How a kernel differs from the plain model in a tiny case with these constants, or None."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so little work, threads that wait for each other cost more than they do
    try:
        return _first_difference(program(kernel), device_type, dynamics, plain, tuple(TOLERANCE))
    finally:
        torch.set_num_threads(threads)


def _first_difference(
    store_and_recall: Callable,
    device_type: str,
    dynamics: Dynamics,
    plain: Callable,
    dtypes: tuple[torch.dtype, ...],
    sizes: tuple[int, int, int] = TINY,
) -> str | None:
    for dtype in dtypes:
        difference = None
        for seed in range(TRIALS):
            operands, dynamics_of_case = tiny_case(dynamics, dtype, device_type, seed, sizes)
            expected = outcome(plain, operands, dynamics_of_case)
            if not all(torch.isfinite(x).all() for x in expected.values()):
                continue  # these constants let the model itself diverge
            difference = compare(outcome(store_and_recall, operands, dynamics_of_case), expected, TOLERANCE[dtype])
            if difference is None:
                break
        if difference:
            name = str(dtype).removeprefix("torch.")
            return f"it does not compute the model of these equations and constants ({name}: {difference})"
    return None


def tiny_case(
    dynamics: Dynamics, dtype: torch.dtype, device_type: str, seed: int, sizes: tuple[int, int, int] = TINY
) -> tuple[list[Tensor], Dynamics]:
    """Currents and weights that make neurons with these constants fire, for samples of two pairs."""
    pairs, (batch, embedding, memory) = 2, sizes
    steps = min(dynamics.num_time_steps, max(20, min(dynamics.readout_delay + 8, 40)))
    thr, gain = getattr(dynamics.neuron, "thr", 1.0), 1 - getattr(dynamics.neuron, "alpha", 0.95)
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        # A membrane reaches the threshold in a few steps, whatever the time constant is.
        scale = thr * (1 + 0.4 / gain)
        return (scale * (torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low)).to(dtype)

    currents = [uniform(0, 1, *shape) for shape in ((batch, pairs, embedding), (batch, pairs, embedding), (batch, embedding))]
    weights = [uniform(-0.15, 0.4, 2 * memory, 2 * embedding), uniform(-0.1, 1.0, memory, embedding + memory)]
    return [x.to(device_type).requires_grad_() for x in (*currents, *weights)], replace(dynamics, num_time_steps=steps)


def outcome(store_and_recall: Callable, operands: list[Tensor], dynamics: Dynamics) -> dict[str, Tensor]:
    """Readout and spike counts, and the gradients of a sum in which each has a weight of its own."""
    with torch.enable_grad():
        readout, spike_counts, _ = store_and_recall(*operands, dynamics=dynamics, record=False)
        results = {"readout": readout} | spike_counts
        objective = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x)).sum()
                        for x in results.values())  # fmt: skip
        gradients = torch.autograd.grad(objective, operands)
    names = "features_current", "labels_current", "query_current", "write_weight", "read_weight"
    return results | {f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> str | None:
    """The first result that differs, with how much, or None."""
    for name, expected in theirs.items():
        error = (ours[name].detach().double() - expected.detach().double()).norm()
        if not error <= tolerance * expected.detach().double().norm() + NEGLIGIBLE:
            return f"{name} differs by {error / expected.detach().norm():.2g} of its norm"
    return None
