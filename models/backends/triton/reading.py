"""Reading from the memory on the GPU: one program per sample.

A program reads only the columns of neurons that fired, from the memory in cache.
"""

from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.backends.derivatives import differentiable, not_differentiable
from models.backends.triton.common import dataclass_of, launch, lif_adjoint, lif_step, tile_of
from models.dynamics import Dynamics
from models.neurons import LIFNeuron

READ_TILE = 4096


def hebbian_read(query_current: Tensor, memory: Tensor, feedback_weight: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """`models.hebbian_memory.hebbian_read`: key spikes, value spikes."""
    return _recall(query_current, memory, feedback_weight, dynamics.readout_delay, astuple(dynamics.neuron))[:2]


@triton.jit
def product(vector, matrix, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """sum_r vector[r] * matrix[r, c] for all c; rows where the vector is 0 are not read."""
    c = tl.arange(0, columns)
    total = tl.zeros((rows, columns), matrix.dtype.element_ty)
    for first in range(0, size, rows):
        r = first + tl.arange(0, rows)
        x = tl.load(vector + r, r < size, other=0.0)
        wanted = (x != 0)[:, None] & (c < size)[None, :]
        total += x[:, None] * tl.load(matrix + r[:, None] * size + c[None, :], wanted, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["steps"])
def read_forward(
    current,  # B x time x size
    memory,  # B x size x size, keys x values (transposed)
    weight,  # size x size, values x keys (transposed)
    key_spikes,  # B x time x size, like all below
    value_spikes,
    key_membranes,
    value_membranes,
    steps,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    delay: tl.constexpr,
    neuron: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    memory += sample * size * size
    n = tl.arange(0, columns)
    valid = n < size
    k_z = tl.zeros((columns,), memory.dtype.element_ty)
    k_v, v_z, v_v = k_z, k_z, k_z
    k_r = tl.zeros((columns,), tl.int32)
    v_r = k_r
    for t in range(steps):
        now = (sample * steps + t) * size
        drive = tl.load(current + now + n, valid, other=0.0)
        if t >= delay:
            drive += product(value_spikes + now - delay * size, weight, size, rows, columns)
        k_z, k_v, k_r, membrane = lif_step(drive, k_z, k_v, k_r, neuron)
        tl.store(key_spikes + now + n, k_z, valid)
        tl.store(key_membranes + now + n, membrane, valid)
        tl.debug_barrier()  # other threads read these spikes

        drive = product(key_spikes + now, memory, size, rows, columns)
        v_z, v_v, v_r, membrane = lif_step(drive, v_z, v_v, v_r, neuron)
        tl.store(value_spikes + now + n, v_z, valid)
        tl.store(value_membranes + now + n, membrane, valid)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["steps"])
def read_backward(
    grad_keys,  # B x time x size
    grad_values,  # B x time x size
    key_membranes,  # of read_forward
    value_membranes,
    memory,  # B x size x size, values x keys
    weight,  # size x size, keys x values
    grad_key_drive,  # B x time x size
    grad_value_drive,  # B x time x size
    steps,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    delay: tl.constexpr,
    neuron: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    memory += sample * size * size
    n = tl.arange(0, columns)
    valid = n < size
    grad_k_v = tl.zeros((columns,), memory.dtype.element_ty)
    grad_v_v = grad_k_v
    for t in range(steps - 1, -1, -1):
        now = (sample * steps + t) * size
        grad_z = tl.load(grad_values + now + n, valid, other=0.0)
        if t + delay < steps:
            grad_z += product(grad_key_drive + now + delay * size, weight, size, rows, columns)
        grad_v_v = lif_adjoint(grad_z, tl.load(value_membranes + now + n, valid, other=0.0), grad_v_v, neuron)
        tl.store(grad_value_drive + now + n, (1 - neuron.alpha) * grad_v_v, valid)
        tl.debug_barrier()  # other threads read these gradients

        grad_z = tl.load(grad_keys + now + n, valid, other=0.0)
        grad_z += product(grad_value_drive + now, memory, size, rows, columns)
        grad_k_v = lif_adjoint(grad_z, tl.load(key_membranes + now + n, valid, other=0.0), grad_k_v, neuron)
        tl.store(grad_key_drive + now + n, (1 - neuron.alpha) * grad_k_v, valid)
        tl.debug_barrier()


@torch.library.custom_op("fused_triton::hebbian_read", mutates_args=())
def _read(
    current: Tensor, memory: Tensor, weight: Tensor, delay: int, neuron: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key spikes, value spikes, and the membranes of both."""
    current = current.contiguous()
    outputs = torch.empty_like(current), torch.empty_like(current), torch.empty_like(current), torch.empty_like(current)
    batch, steps, size = current.shape
    launch(
        read_forward,
        batch,
        current,
        memory.transpose(1, 2).contiguous(),
        weight.t().contiguous(),
        *outputs,
        steps,
        **tile_of(size, READ_TILE),
        delay=delay,
        neuron=dataclass_of(LIFNeuron, neuron),
    )
    return outputs


@torch.library.custom_op("fused_triton::hebbian_read_backward", mutates_args=())
def _read_backward(
    grad_keys: Tensor,
    grad_values: Tensor,
    key_membranes: Tensor,
    value_membranes: Tensor,
    memory: Tensor,
    weight: Tensor,
    delay: int,
    neuron: list[float],
) -> tuple[Tensor, Tensor]:
    """Gradients of the drives (input currents) of keys and values."""
    grad_drives = torch.empty_like(key_membranes), torch.empty_like(key_membranes)
    batch, steps, size = key_membranes.shape
    launch(
        read_backward,
        batch,
        grad_keys.contiguous(),
        grad_values.contiguous(),
        key_membranes,
        value_membranes,
        memory.contiguous(),
        weight.contiguous(),
        *grad_drives,
        steps,
        **tile_of(size, READ_TILE),
        delay=delay,
        neuron=dataclass_of(LIFNeuron, neuron),
    )
    return grad_drives


@_read.register_fake
def _(current, memory, weight, delay, neuron):
    return tuple(current.new_empty(current.shape) for _ in range(4))


@_read_backward.register_fake
def _(grad_keys, grad_values, key_membranes, *_):
    return key_membranes.new_empty(key_membranes.shape), key_membranes.new_empty(key_membranes.shape)


def _read_setup(ctx, inputs, output):
    _, memory, weight, *ctx.constants = inputs
    keys, values, *membranes = output
    ctx.set_materialize_grads(False)  # or PyTorch would make zeros for all kept tensors
    ctx.save_for_backward(memory, weight, keys, values, *membranes)


def _read_gradient(ctx, grad_keys, grad_values, *_):
    memory, weight, keys, values, *membranes = ctx.saved_tensors
    delay, _ = ctx.constants
    grad_keys = torch.zeros_like(keys) if grad_keys is None else grad_keys
    grad_values = torch.zeros_like(keys) if grad_values is None else grad_values
    to_keys, to_values = _read_backward_once(grad_keys, grad_values, *membranes, memory, weight, *ctx.constants)
    grad_memory = to_values.transpose(1, 2) @ keys
    grad_weight = torch.einsum("bti,btj->ij", to_keys[:, delay:], values[:, : max(0, values.shape[1] - delay)])
    return to_keys, grad_memory, grad_weight, None, None


_read_backward_once = not_differentiable(torch.ops.fused_triton.hebbian_read_backward.default)
_recall = differentiable(torch.ops.fused_triton.hebbian_read.default, _read_setup, _read_gradient)
