"""Fused CPU kernels: `store_and_recall.cpp`, compiled on first use (`build.py`) and registered with `torch.library`."""

import ctypes
import functools
import os

import torch
from torch import Tensor

from models import backends
from models.backends import BackendError
from models.backends.cpp.build import BuildError, Options, Tensors, library
from models.backends.derivatives import differentiable, not_differentiable
from models.dynamics import POPULATIONS, Dynamics

SIZES = ("batch", "pairs", "embedding", "memory", "threads")
KINDS = {name: kind for name, kind, *_ in Options._fields_}
CONSTANTS = [name for name in KINDS if name not in SIZES]
KNOWN = {*CONSTANTS, "tau_mem", "tau_trace"} - {"alpha", "beta"}
TENSORS = [name for name, *_ in Tensors._fields_]


@functools.cache  # a compilation that failed is not tried again
def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"its kernels run on a CPU, not on {device_type}"
    if os.name == "nt":
        return "its kernels need Linux or macOS; on Windows use WSL2"
    try:
        library()
    except BuildError as failure:
        return str(failure)
    return None


def _constants(dynamics: Dynamics) -> list[float]:
    values = backends.constants(dynamics, KNOWN) | {"alpha": dynamics.neuron.alpha, "beta": dynamics.rule.beta}
    return [float(values[name]) for name in CONSTANTS]


def _call(name: str, constants: list[float], tensors: dict[str, Tensor]) -> None:
    batch, pairs, embedding = tensors["features"].shape
    sizes = (batch, pairs, embedding, tensors["read_weight"].shape[0], torch.get_num_threads())
    values = dict(zip(SIZES, sizes, strict=True)) | dict(zip(CONSTANTS, constants, strict=True))
    options = Options(**{k: int(v) if KINDS[k] is ctypes.c_int64 else v for k, v in values.items()})
    pointers = Tensors(**{k: t.data_ptr() for k, t in tensors.items() if t.numel()})
    dtype = str(tensors["features"].dtype).removeprefix("torch.")
    if getattr(library(), f"{name}_{dtype}")(ctypes.byref(options), ctypes.byref(pointers)):
        raise BackendError(
            f"out of memory in the cpp kernels with {batch} samples and {sizes[-1]} threads; use a smaller --batch_size"
        )


@torch.library.custom_op("memorizing_associations::store_and_recall", mutates_args=(), device_types="cpu")
def _forward(
    features: Tensor,
    labels: Tensor,
    query: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    constants: list[float],
    record: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
        features.new_empty(batch, 3 * embedding + 4 * size),
        features.new_empty(spikes),
        features.new_empty((batch, size, size) if record else 0),
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
    constants: list[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (features, labels, query, write_weight, read_weight)]
    first, second, third, fourth, fifth = gradients = [torch.zeros_like(x) for x in inputs]
    tensors = dict(zip(TENSORS, inputs, strict=False))
    tensors |= {"grad_readout": grad_readout.contiguous(), "grad_counts": grad_counts.contiguous()}
    tensors |= dict(zip(TENSORS[-5:], gradients, strict=True))
    _call("backward", constants, tensors)
    return first, second, third, fourth, fifth


@_backward.register_fake
def _(grad_readout, grad_counts, features, labels, query, write_weight, read_weight, constants):
    return tuple(torch.empty_like(x) for x in (features, labels, query, write_weight, read_weight))


_backward_once = not_differentiable(torch.ops.memorizing_associations.store_and_recall_backward.default)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.constants, _ = inputs
    _, _, *not_learned = output
    ctx.mark_non_differentiable(*not_learned)
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_readout, grad_counts, *_):
    return *_backward_once(grad_readout, grad_counts, *ctx.saved_tensors, ctx.constants), None, None


_run = differentiable(torch.ops.memorizing_associations.store_and_recall.default, _setup_context, _gradient)


def store_and_recall(
    features_current: Tensor,
    labels_current: Tensor,
    query_current: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    dynamics: Dynamics,
    record: bool = False,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
    """As `models.hebbian_memory.store_and_recall`."""
    backends.check_operands(features_current, labels_current, query_current, write_weight, read_weight)
    (batch, pairs, embedding), size = features_current.shape, read_weight.shape[0]
    readout, counts, spikes, memory = _run(
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
