"""What computes in less time the function that the plain model defines (`models.hebbian_memory.store_and_recall`).

A backend is a module with two functions:

    unavailable(device_type) -> str | None     why it cannot run on such a device here, in one line with the remedy, or None
    store_and_recall(features_current, labels_current, query_current, write_weight, read_weight, dynamics, record)
                                               as the plain function

"reference" is the plain function itself, and "compiled" is it with its time loop compiled by `torch.compile`, which takes
minutes. "triton" is experimental: it has not run on a GPU yet. A kernel is used with some constants only after it agreed with
the plain function in a tiny case with them.
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
KERNELS = ("triton", "cpp")  # those that `auto` tries, from the fastest to the slowest, before the plain function
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-2}  # of the norm of a result or a gradient
NEGLIGIBLE = 1e-30  # norm, where products of float32 vanish
TRIALS = 3  # rounding flips a spike in one draw in some thousands, a wrong program differs in all

_functions: dict[str, Callable] = {}  # those chosen so far, by name


class BackendError(RuntimeError):
    """A backend asked for by name cannot run here, or does not compute this network."""


def check_name(backend: str | Callable) -> None:
    """Raises ValueError for what is neither a function nor one of BACKENDS."""
    if not callable(backend) and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, or a function, not {backend!r}")


def find(backend: str | Callable, device: torch.device, dynamics: Dynamics, plain: Callable) -> Callable:
    """The function that computes a network in time: `backend` itself if it is one, or that of a name; raises as `choose`."""
    return backend if callable(backend) else _functions[choose(backend, str(device), dynamics, plain)]


@torch.compiler.assume_constant_result  # a name: a function that is returned cannot be traced
def choose(name: str, device: str, dynamics: Dynamics, plain: Callable) -> str:
    """The name of the backend that runs a network with these constants on a device, such as "cpu" or "cuda:1".

    `auto` takes the first kernel that runs here and agrees with the plain function, else that one, with a warning that says
    why. The plain function stands in for "compiled" while the caller is traced.

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
    """The functions and properties of the classes of neuron and rule: one that is replaced in a running process is noticed."""
    classes = [kind for part in (dynamics.neuron, dynamics.rule) for kind in type(part).__mro__[:-1]]
    kinds = (property, classmethod, staticmethod)
    return tuple(value for kind in classes for value in vars(kind).values() if callable(value) or isinstance(value, kinds))


@functools.lru_cache(maxsize=1024)
def _choose(name: str, device: str, dynamics: Dynamics, plain: Callable, equations: tuple) -> str:
    reasons = []
    for candidate in KERNELS if name == "auto" else (name,):
        try:
            function = load(candidate, device)
            if candidate == "compiled":  # it checks itself, for the sizes that it is called with
                function = functools.partial(function, plain=plain)
            else:
                check(function, device, dynamics, plain)
            _functions[candidate] = function
            return candidate
        except Exception as failure:  # whatever a kernel raises in its check, `auto` goes on without it
            reason = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
            if name != "auto":
                raise BackendError(f"backend {candidate}: {reason}") from failure
            if candidate != "triton" or device.startswith("cuda"):  # elsewhere nobody expects a GPU's kernels
                reasons.append(f"{candidate}: {reason}")
    warnings.warn(f"using the plain model, which is slow ({'; '.join(reasons)})", stacklevel=2)
    return "reference"


def load(name: str, device: str) -> Callable:
    """The function of a kernel, or the compiled one. Raises BackendError where it cannot run on such a device here."""
    module = importlib.import_module(f"models.backends.{name}")
    if reason := module.unavailable(device.split(":")[0]):
        raise BackendError(reason)
    return module.store_and_recall


def constants(dynamics: Dynamics, known: Iterable[str]) -> dict[str, Any]:
    """All constants by name, for a kernel that knows these, and the equations of `LIFNeuron` and `HebbianRule`.

    Raises:
        BackendError: there are others, or some are lacking, or a class has equations of its own.
    """
    for part, base in ((dynamics.neuron, LIFNeuron), (dynamics.rule, HebbianRule)):
        if not isinstance(part, base):
            raise BackendError(f"it does not know {type(part).__name__}, only {base.__name__}; use compiled or reference")
        own = {name for kind in type(part).__mro__ if kind not in base.__mro__ for name in vars(kind) if hasattr(base, name)}
        if changed := sorted(name for name in own if not name.startswith("__") and name not in base.__dataclass_fields__):
            raise BackendError(f"it does not know {', '.join(changed)} of {type(part).__name__}; use compiled or reference")
    parts = (dynamics, dynamics.neuron, dynamics.rule)
    values = {field.name: getattr(part, field.name) for part in parts for field in fields(part)}
    del values["neuron"], values["rule"]
    if unknown := sorted(values.keys() ^ set(known)):
        raise BackendError(f"it does not know a network with or without {', '.join(unknown)}; use compiled or reference")
    return values


def check_operands(features: Tensor, labels: Tensor, query: Tensor, write_weight: Tensor, read_weight: Tensor) -> None:
    """See that currents and weights are what a kernel may read: hooks and replaced layers can return anything.

    Raises:
        ValueError: naming the operand.
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


# The check of a kernel. It leaves no trace in its caller: no module is built, and no random number of the caller's is drawn.


def check(
    function: Callable,
    device: str,
    dynamics: Dynamics,
    plain: Callable,
    dtypes: Iterable[torch.dtype] = tuple(TOLERANCE),
    sizes: tuple[int, int, int] = (3, 10, 18),
) -> None:
    """Compare a function with the plain one in a tiny case with these constants: results and gradients.

    Args:
        sizes: samples, embedding size and memory size.

    Raises:
        BackendError: they differ.
    """
    # In a thread of its own, where the caller's inference mode, autocast, vmap, fake tensors and default device are not on.
    with _one_at_a_time, ThreadPoolExecutor(1, "check", torch.set_num_threads, (torch.get_num_threads(),)) as thread:
        thread.submit(_check, function, device, dynamics, plain, dtypes, sizes).result()


_one_at_a_time = threading.Lock()  # a check switches what is on in all threads


def _check(function, device, dynamics, plain, dtypes, sizes) -> None:
    for dtype, signed in itertools.product(dtypes, (False, True)):
        for seed in range(TRIALS):
            operands, dynamics_of_case = tiny_case(dynamics, dtype, device, seed, sizes, signed)
            # Anomaly mode and the default generator are those of all threads; an own neuron may draw random numbers.
            with torch.autograd.set_detect_anomaly(False), torch.random.fork_rng(devices=[]):
                ours, theirs = (outcome(f, operands, dynamics_of_case) for f in (function, plain))
            diverges = not torch.isfinite(theirs["memory"]).all()  # of these constants, in the plain function itself
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
        signed: of both signs and stronger, so that membranes go far below rest, and the memory towards its bound.
    """
    pairs, (batch, embedding, memory) = (3 if signed else 2), sizes
    steps = min(dynamics.num_time_steps, max(20, min(dynamics.readout_delay + 8, 40)))
    thr, gain = getattr(dynamics.neuron, "thr", 1.0), 1 - getattr(dynamics.neuron, "alpha", 0.95)
    generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        # A membrane reaches the threshold in a few steps, whatever the time constant is.
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu") * (high - low) + low
        return (thr * (1 + 0.4 / gain) * drawn).to(device, dtype).requires_grad_()

    low, high = (-1.5, 3) if signed else (0, 1)
    shapes = (batch, pairs, embedding), (batch, pairs, embedding), (batch, embedding)
    currents = [uniform(low, high, *shape) for shape in shapes]
    ranges = ((-0.8, 1.2), (-0.8, 1.0)) if signed else ((-0.15, 0.4), (-0.1, 1.0))
    weights = [uniform(*ranges[0], 2 * memory, 2 * embedding), uniform(*ranges[1], memory, embedding + memory)]
    return [*currents, *weights], replace(dynamics, num_time_steps=steps)


def outcome(function: Callable, operands: list[Tensor], dynamics: Dynamics) -> dict[str, Tensor]:
    """Readout, spike counts and memory, and the gradients of a sum in which each count has a weight of its own."""
    readout, spike_counts, activity = function(*operands, dynamics, True)
    results = {"readout": readout} | spike_counts
    seeds = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype, device=x.device).view_as(x) for x in results.values()]
    gradients = torch.autograd.grad(list(results.values()), operands, seeds)
    names = "features_current", "labels_current", "query_current", "write_weight", "read_weight"
    results |= {f"gradient of {name}": x for name, x in zip(names, gradients, strict=True)}
    return results | {"memory": activity["memory"]}


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> str | None:
    """The first result that differs, with how much, or None. What is not finite in `theirs` is not compared."""
    for name, expected in theirs.items():
        if not torch.isfinite(expected).all():
            continue
        error = (ours[name].detach().double() - expected.detach().double()).norm()
        if not error <= tolerance * expected.detach().double().norm() + NEGLIGIBLE:
            return f"{name} differs by {error / expected.detach().norm():.2g} of its norm"
    return None
