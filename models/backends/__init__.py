"""Faster implementations of the plain function, `models.hebbian_memory.store_and_recall`, which defines the model.

A backend is a module with two functions:

    unavailable(device_type) -> str | None     why it cannot run on such a device here, in one line with the remedy, or None
    store_and_recall(features_current, labels_current, query_current, write_weight, read_weight, dynamics, record)
                                               as the plain function

"reference" is the plain function itself. "compiled" is the plain function with its time loop compiled by `torch.compile`,
which takes minutes. "triton" is experimental: it has not run on a GPU yet. A kernel is used only after it agreed with the plain
function in a tiny case with the same constants.
"""

import functools
import importlib
import itertools
import threading
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from models.dynamics import Dynamics
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

BACKENDS = ("auto", "triton", "cpp", "compiled", "reference")
KERNELS = ("triton", "cpp")  # `auto` tries these, the fastest first, before the plain function
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}  # relative to the norm of a result or a gradient
WITHOUT_KERNEL = "use compiled, or the slower reference"
NEGLIGIBLE = 1e-30  # norm below which float32 products vanish
TRIALS = 3  # rounding flips a spike in one of thousands of draws, a wrong program differs in all draws

_functions: dict[str, Callable] = {}  # name -> function, of the backends chosen so far


class BackendError(RuntimeError):
    """A backend asked for by name cannot run here, or does not compute this network."""


def check_name(backend: str | Callable) -> None:
    """Raises ValueError if the backend is neither a function nor one of BACKENDS."""
    if not callable(backend) and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or a function, not {backend!r}")


def find(backend: str | Callable, device: torch.device, dynamics: Dynamics, plain: Callable) -> Callable:
    """The function that computes a network in time: `backend` itself, or the function of a name. Raises like `choose`."""
    return backend if callable(backend) else _functions[choose(backend, str(device), dynamics, plain)]


@torch.compiler.assume_constant_result  # returns a name: a returned function cannot be traced
def choose(name: str, device: str, dynamics: Dynamics, plain: Callable) -> str:
    """The name of the backend that runs a network with these constants on a device, such as "cpu" or "cuda:1".

    `auto` takes the first kernel that runs here and agrees with the plain function, else the plain function, with a warning
    that says why. While the caller is traced, "compiled" also means the plain function.

    Raises:
        ValueError: no such backend.
        BackendError: the backend asked for by name cannot run this network here.
    """
    check_name(name)
    _functions["reference"] = plain
    if name == "reference" or (name == "compiled" and torch.compiler.is_compiling()):
        return "reference"
    try:
        return _choose(name, device, dynamics, plain, equations(dynamics))
    except TypeError as failure:
        if "unhashable" not in str(failure):
            raise
        remedy = "neuron and rule must be frozen dataclasses"
        if name != "auto":
            raise BackendError(f"backend {name}: {failure}; {remedy}") from None
        warnings.warn(f"using the plain model, which is slow ({failure}; {remedy})", stacklevel=2)
        return "reference"


def equations(dynamics: Dynamics) -> tuple:
    """The functions and properties of the neuron's and the rule's class, so that a replaced one is noticed."""
    classes = [kind for part in (dynamics.neuron, dynamics.rule) for kind in type(part).__mro__[:-1]]
    kinds = (property, classmethod, staticmethod)
    return tuple(value for kind in classes for value in vars(kind).values() if callable(value) or isinstance(value, kinds))


@functools.lru_cache(maxsize=1024)
def _choose(name: str, device: str, dynamics: Dynamics, plain: Callable, equations: tuple) -> str:
    reasons = []
    for candidate in KERNELS if name == "auto" else (name,):
        try:
            function = load(candidate, device)
            if candidate == "compiled":  # it checks itself when called, for the sizes of the call
                function = functools.partial(function, plain=plain)
            else:
                check(function, device, dynamics, plain)
            _functions[candidate] = function
            return candidate
        except Exception as failure:  # whatever a kernel raises in its check, `auto` goes on without it
            reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            if name != "auto":
                raise BackendError(f"backend {candidate}: {reason}") from failure
            if candidate != "triton" or device.startswith("cuda"):  # on a CPU nobody expects a GPU's kernels
                reasons.append(f"{candidate}: {reason}")
    warnings.warn(f"using the plain model, which is slow ({'; '.join(reasons)})", stacklevel=2)
    return "reference"


def load(name: str, device: str) -> Callable:
    """The function of a kernel or of "compiled". Raises BackendError if it cannot run on such a device here."""
    module = importlib.import_module(f"models.backends.{name}")
    if reason := module.unavailable(device.split(":")[0]):
        raise BackendError(reason)
    return module.store_and_recall


def constants(dynamics: Dynamics, known: Iterable[str]) -> dict[str, Any]:
    """All constants by name, for a kernel with the constants `known` and the equations of `LIFNeuron` and `HebbianRule`.

    Raises:
        BackendError: the network has other constants or equations.
    """
    for part, base in ((dynamics.neuron, LIFNeuron), (dynamics.rule, HebbianRule)):
        if not isinstance(part, base):
            raise BackendError(f"it does not know {type(part).__name__}, only {base.__name__}; {WITHOUT_KERNEL}")
        own = {name for kind in type(part).__mro__ if kind not in base.__mro__ for name in vars(kind) if hasattr(base, name)}
        if changed := sorted(name for name in own if not name.startswith("__") and name not in base.__dataclass_fields__):
            raise BackendError(f"it does not know {', '.join(changed)} of {type(part).__name__}; {WITHOUT_KERNEL}")
    parts = (dynamics, dynamics.neuron, dynamics.rule)
    values = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    del values["neuron"], values["rule"]
    if unknown := sorted(values.keys() ^ set(known)):
        raise BackendError(f"it has other constants than the network ({', '.join(unknown)}); {WITHOUT_KERNEL}")
    return values


def check_operands(features: Tensor, labels: Tensor, query: Tensor, write_weight: Tensor, read_weight: Tensor) -> None:
    """Check the currents and weights that a kernel reads: hooks and replaced layers can return anything.

    Raises:
        ValueError: an operand has a wrong shape, type or device. The message names it.
    """
    if features.dim() != 3 or read_weight.dim() != 2 or features.dtype not in TOLERANCE:
        raise ValueError("features_current must be B x L x E, read_weight M x (E + M), in float32 or float64")
    (batch, pairs, embedding), memory = features.shape, read_weight.shape[0]
    for name, x, shape in (
        ("labels_current", labels, (batch, pairs, embedding)),
        ("query_current", query, (batch, embedding)),
        ("write_weight", write_weight, (2 * memory, 2 * embedding)),
        ("read_weight", read_weight, (memory, embedding + memory)),
    ):
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} must be of shape {shape}, not {tuple(x.shape)}")
        if x.dtype != features.dtype or x.device != features.device:
            raise ValueError(f"{name} is {x.dtype} on {x.device}, features_current {features.dtype} on {features.device}")


# The check of a kernel does not affect its caller: it builds no module and draws none of the caller's random numbers.


def check(
    function: Callable,
    device: str,
    dynamics: Dynamics,
    plain: Callable,
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCE),
    sizes: tuple[int, int, int] = (3, 10, 18),
) -> None:
    """Compare a function's results and gradients with the plain function's, in a tiny case with these constants.

    Args:
        sizes: samples, embedding size and memory size.

    Raises:
        BackendError: they differ.
    """
    # A new thread has none of the caller's inference mode, autocast, vmap, fake tensors and default device.
    with _one_at_a_time, ThreadPoolExecutor(1, "check", torch.set_num_threads, (torch.get_num_threads(),)) as thread:
        thread.submit(_check, function, device, dynamics, plain, dtypes, sizes).result()


_one_at_a_time = threading.Lock()  # a check changes settings of all threads


def _check(function, device, dynamics, plain, dtypes, sizes) -> None:
    for dtype, signed in itertools.product(dtypes, (False, True)):
        for seed in range(TRIALS):
            operands, dynamics_of_case = tiny_case(dynamics, dtype, device, seed, sizes, signed)
            # All threads share anomaly mode and the default generator, and an own neuron may draw random numbers.
            with torch.autograd.set_detect_anomaly(False), torch.random.fork_rng(devices=[]):
                ours, theirs = (outcome(f, operands, dynamics_of_case) for f in (function, plain))
            diverges = not torch.isfinite(theirs["memory"]).all()  # with these constants, even in the plain function
            difference = None if diverges else compare(ours, theirs, TOLERANCE[dtype])
            if difference is None and not diverges:
                break
        if difference:
            name = str(dtype).removeprefix("torch.")
            raise BackendError(f"it does not compute the model of these equations and constants ({name}: {difference})")


def tiny_case(
    dynamics: Dynamics, dtype: torch.dtype, device: str, seed: int, sizes: tuple[int, int, int], signed: bool = False
) -> tuple[list[Tensor], Dynamics]:
    """Currents and weights that make neurons with these constants fire, for samples of a few pairs.

    Args:
        signed: draw stronger values of both signs, so that membranes go far below rest and the memory nears its bound.
    """
    pairs, (batch, embedding, memory) = (3 if signed else 2), sizes
    steps = min(dynamics.num_time_steps, max(20, min(dynamics.readout_delay + 8, 40)))
    thr, gain = getattr(dynamics.neuron, "thr", 1.0), 1 - getattr(dynamics.neuron, "alpha", 0.95)
    generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        # A membrane reaches the threshold in a few steps, for any time constant.
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") * (high - low) + low
        return (thr * (1 + 0.4 / gain) * drawn).to(device, dtype).requires_grad_()

    low, high = (-1.5, 3) if signed else (0, 1)
    shapes = (batch, pairs, embedding), (batch, pairs, embedding), (batch, embedding)
    currents = [uniform(low, high, *shape) for shape in shapes]
    ranges = ((-0.8, 1.2), (-0.8, 1.0)) if signed else ((-0.15, 0.4), (-0.1, 1.0))
    weights = [uniform(*ranges[0], 2 * memory, 2 * embedding), uniform(*ranges[1], memory, embedding + memory)]
    return [*currents, *weights], replace(dynamics, num_time_steps=steps)


def outcome(function: Callable, operands: list[Tensor], dynamics: Dynamics) -> dict[str, Tensor]:
    """Readout, spike counts and memory, and the gradients of a sum that weights every count differently."""
    readout, spike_counts, activity = function(*operands, dynamics, True)
    results = {"readout": readout} | spike_counts
    seeds = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in results.values()]
    gradients = torch.autograd.grad(list(results.values()), operands, seeds)
    names = "features_current", "labels_current", "query_current", "write_weight", "read_weight"
    results |= {f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)}
    return results | {"memory": activity["memory"]}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> str | None:
    """The first result that differs, and by how much, or None. Results that are not finite in `theirs` are skipped."""
    for name, expected in theirs.items():
        if not torch.isfinite(expected).all():
            continue
        error = (ours[name].detach().double() - expected.detach().double()).norm()
        if not error <= tolerance * expected.detach().double().norm() + NEGLIGIBLE:
            return f"{name} differs by {error / expected.detach().norm():.2g} of its norm"
    return None
