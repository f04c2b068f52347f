"""Fused CPU kernels: `store_and_recall.cpp`, compiled on first use and registered with `torch.library`."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from models.dynamics import POPULATIONS, Dynamics

SOURCE = Path(__file__).with_name("store_and_recall.cpp")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-pthread", "-fno-tree-loop-distribute-patterns")
CACHE_VARIABLE = "MEMORIZING_ASSOCIATIONS_CACHE"
INTEGERS = (
    "batch",
    "pairs",
    "embedding",
    "memory",
    "num_time_steps",
    "readout_delay",
    "readout_steps",
    "refractory_time_steps",
    "perfect_reset",
    "threads",
)
CONSTANTS = ("memory_feedback", "thr", "alpha", "dampening_factor", "w_max", "gamma_pos", "gamma_neg", "beta")
TENSORS = (
    "features",
    "labels",
    "query",
    "write_weight",
    "read_weight",
    "readout",
    "counts",
    "spikes",
    "memory",
    "value_order",
    "grad_readout",
    "grad_counts",
    "grad_features",
    "grad_labels",
    "grad_query",
    "grad_write_weight",
    "grad_read_weight",
)


class Options(ctypes.Structure):
    """`struct Options` of the source."""

    _fields_ = [(name, ctypes.c_int64) for name in INTEGERS] + [(name, ctypes.c_double) for name in CONSTANTS]


class Tensors(ctypes.Structure):
    """`struct Tensors` of the source."""

    _fields_ = [(name, ctypes.c_void_p) for name in TENSORS]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels: from the cache, or compiled now, by one process at a time.

    Raises:
        subprocess.CalledProcessError: the compiler fails; its message is in `stderr`.
        OSError: the cache cannot be written, or the library not be loaded.
    """
    cache = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "memorizing_associations")
    what = repr((FLAGS, os.environ.get("CXX", "g++"), torch.__version__, _processor()))
    key = hashlib.sha256(SOURCE.read_bytes() + what.encode()).hexdigest()[:16]
    path = cache / key / "store_and_recall.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.parent / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when a process dies, too
            if not path.exists():
                _compile(path)
    return ctypes.CDLL(str(path))


def _compile(path: Path) -> None:
    print("compiling the CPU kernels, once for this machine (some seconds) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [os.environ.get("CXX", "g++"), *FLAGS, str(SOURCE), "-o", str(built)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        built.replace(path)  # at once: no other process sees half a file


def _processor() -> str:
    """What the code is compiled for: of a home folder shared by machines, each has its own."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return repr(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"its kernels run on a CPU, not on {device_type}"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler found; install g++ or set CXX"
    try:
        library()
    except subprocess.CalledProcessError as failure:
        reason = next((line for line in failure.stderr.splitlines() if "error" in line), f"status {failure.returncode}")
        return f"its kernels cannot be compiled ({reason.strip()}); set CXX to another C++17 compiler"
    except OSError as failure:
        return f"its kernels cannot be kept or loaded ({failure}); set {CACHE_VARIABLE} to a folder that can be written to"
    return None


def _constants(dynamics: Dynamics) -> list[float]:
    values = asdict(dynamics) | asdict(dynamics.neuron) | asdict(dynamics.rule)
    values |= {"alpha": dynamics.neuron.alpha, "beta": dynamics.rule.beta}
    return [float(values[name]) for name in (*INTEGERS[4:-1], *CONSTANTS)]


def _call(name: str, constants: list[float], tensors: dict[str, Tensor]) -> None:
    batch, pairs, embedding = tensors["features"].shape
    integers = [int(x) for x in constants[:5]]
    memory = tensors["read_weight"].shape[0]
    options = Options(batch, pairs, embedding, memory, *integers, torch.get_num_threads(), *constants[5:])
    pointers = Tensors(**{k: t.data_ptr() for k, t in tensors.items() if t.numel()})
    dtype = str(tensors["features"].dtype).removeprefix("torch.")
    if getattr(library(), f"{name}_{dtype}")(ctypes.byref(options), ctypes.byref(pointers)):
        raise MemoryError("out of memory in the cpp kernels")


def _counts_size(features: Tensor, read_weight: Tensor) -> int:
    return 3 * features.shape[-1] + 4 * read_weight.shape[0]


@torch.library.custom_op("memorizing_associations::store_and_recall", mutates_args=(), device_types="cpu")
def _forward(
    features: Tensor,
    labels: Tensor,
    query: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    constants: list[float],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    results = _empty(features, labels, query, write_weight, read_weight, constants, record)
    inputs = (x.contiguous() for x in (features, labels, query, write_weight, read_weight))
    results[2].zero_()  # the kernel writes only where a neuron fires
    _call("forward", constants, dict(zip(TENSORS, (*inputs, *results), strict=False)))
    return results


@_forward.register_fake
def _empty(features, labels, query, write_weight, read_weight, constants, record):
    batch, pairs, embedding = features.shape
    size, steps = read_weight.shape[0], int(constants[0])
    spikes = batch * steps * (pairs * (2 * embedding + 2 * size) + embedding + 2 * size) if record else 0
    return (
        features.new_empty(batch, size),
        features.new_empty(batch, _counts_size(features, read_weight)),
        features.new_empty(spikes),
        features.new_empty((batch, size, size) if record else 0),
        features.new_empty((batch, size), dtype=torch.int32),
    )


@torch.library.custom_op("memorizing_associations::store_and_recall_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_readout: Tensor,
    grad_counts: Tensor,
    features: Tensor,
    labels: Tensor,
    query: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    value_order: Tensor,
    constants: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (features, labels, query, write_weight, read_weight)]
    gradients = tuple(torch.zeros_like(x) for x in inputs)
    tensors = dict(zip(TENSORS, inputs, strict=False))
    tensors |= {"value_order": value_order, "grad_readout": grad_readout.contiguous(), "grad_counts": grad_counts.contiguous()}
    tensors |= dict(zip(TENSORS[-5:], gradients, strict=True))
    _call("backward", constants, tensors)
    return gradients


@_backward.register_fake
def _(grad_readout, grad_counts, features, labels, query, write_weight, read_weight, value_order, constants):
    return tuple(torch.empty_like(x) for x in (features, labels, query, write_weight, read_weight))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.constants, _ = inputs
    ctx.save_for_backward(*tensors, output[-1])


def _autograd(ctx, grad_readout, grad_counts, *_):
    return *_backward(grad_readout, grad_counts, *ctx.saved_tensors, ctx.constants), None, None


_forward.register_autograd(_autograd, setup_context=_setup_context)


def store_and_recall(
    features_current: Tensor,
    labels_current: Tensor,
    query_current: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    dynamics: Dynamics,
    record: bool = False,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
    """As `MemorizingAssociations.store_and_recall`, as a function of the weights."""
    (batch, pairs, embedding), size = features_current.shape, read_weight.shape[0]
    readout, counts, spikes, memory, _ = _forward(
        features_current, labels_current, query_current, write_weight, read_weight, _constants(dynamics), record
    )
    widths = (embedding,) * 3 + (size,) * 4
    activity = None
    if record:
        writing, reading = pairs * dynamics.num_time_steps, dynamics.num_time_steps
        lengths = (writing, writing, reading, writing, writing, reading, reading)
        trains = spikes.split([batch * t * n for t, n in zip(lengths, widths, strict=True)])
        activity = {
            name: train.detach().view(batch, t, n)
            for name, train, t, n in zip(POPULATIONS, trains, lengths, widths, strict=True)
        }
        activity["memory"] = memory.detach()
    return readout, dict(zip(POPULATIONS, counts.split(widths, dim=1), strict=True)), activity
