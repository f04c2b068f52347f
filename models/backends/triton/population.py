"""A population of LIF neurons on the GPU: one thread per neuron.

The backward pass runs the forward pass again for the membranes, then goes through time in reverse.
"""

from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.backends.derivatives import differentiable, not_differentiable
from models.backends.triton.common import dataclass_of, launch, lif_adjoint, lif_step
from models.neurons import LIFNeuron

NEURONS_PER_PROGRAM = 128  # one thread per neuron
AHEAD = tl.constexpr(8)  # loads in flight: a step of a feed-forward population takes far less than a load


def lif(current: Tensor, steps: int, constants: LIFNeuron) -> Tensor:
    """The spikes of `models.neurons.population`."""
    return _population(current, steps, astuple(constants))


@triton.jit(do_not_specialize=["inputs", "total"])
def lif_forward(
    current,  # B x inputs x neurons, each held for `steps` steps
    out,  # B x (inputs * steps) x neurons: the membranes for the adjoint if `membranes`, else the spikes
    inputs,
    total,  # B * neurons
    steps: tl.constexpr,
    neurons: tl.constexpr,
    block: tl.constexpr,
    neuron: tl.constexpr,
    membranes: tl.constexpr,
):
    n = tl.program_id(0) * block + tl.arange(0, block)
    valid = n < total
    sample = (n // neurons).to(tl.int64)
    current += sample * inputs * neurons + n % neurons
    out += sample * inputs * steps * neurons + n % neurons

    z = tl.zeros((block,), current.dtype.element_ty)
    v = z
    r = tl.zeros((block,), tl.int32)
    for t in tl.range(inputs * steps, num_stages=AHEAD):
        held = tl.load(current + t // steps * neurons, valid, other=0.0)
        z, v, r, membrane = lif_step(held, z, v, r, neuron)
        tl.store(out + t * neurons, membrane if membranes else z, valid)


@triton.jit(do_not_specialize=["inputs", "total"])
def lif_backward(
    grad_spikes,  # B x (inputs * steps) x neurons
    membranes,  # of lif_forward
    grad_current,  # B x inputs x neurons
    inputs,
    total,
    steps: tl.constexpr,
    neurons: tl.constexpr,
    block: tl.constexpr,
    neuron: tl.constexpr,
):
    n = tl.program_id(0) * block + tl.arange(0, block)
    valid = n < total
    sample = (n // neurons).to(tl.int64)
    grad_spikes += sample * inputs * steps * neurons + n % neurons
    membranes += sample * inputs * steps * neurons + n % neurons
    grad_current += sample * inputs * neurons + n % neurons

    grad_v = tl.zeros((block,), grad_spikes.dtype.element_ty)
    summed = grad_v
    for t in tl.range(inputs * steps - 1, -1, -1, num_stages=AHEAD):
        grad_z = tl.load(grad_spikes + t * neurons, valid, other=0.0)
        grad_v = lif_adjoint(grad_z, tl.load(membranes + t * neurons, valid, other=0.0), grad_v, neuron)
        summed += grad_v
        if t % steps == 0:
            tl.store(grad_current + t // steps * neurons, (1 - neuron.alpha) * summed, valid)
            summed = tl.zeros((block,), grad_v.dtype)


@torch.library.custom_op("fused_triton::lif", mutates_args=())
def _lif(current: Tensor, steps: int, neuron: list[float]) -> Tensor:
    return _lif_forward(current.contiguous(), steps, neuron, membranes=False)


@torch.library.custom_op("fused_triton::lif_backward", mutates_args=())
def _lif_backward(grad_spikes: Tensor, current: Tensor, steps: int, neuron: list[float]) -> Tensor:
    current, grad_current = current.contiguous(), current.new_empty(current.shape)
    membranes = _lif_forward(current, steps, neuron, membranes=True)
    _each_neuron(lif_backward, grad_spikes.contiguous(), membranes, grad_current, like=current, steps=steps, neuron=neuron)
    return grad_current


def _lif_forward(current: Tensor, steps: int, neuron: list[float], membranes: bool) -> Tensor:
    batch, inputs, neurons = current.shape
    out = current.new_empty(batch, inputs * steps, neurons)
    _each_neuron(lif_forward, current, out, like=current, steps=steps, neuron=neuron, membranes=membranes)
    return out


def _each_neuron(kernel, *tensors: Tensor, like: Tensor, neuron: list[float], **constants) -> None:
    batch, inputs, neurons = like.shape
    launch(
        kernel,
        triton.cdiv(batch * neurons, NEURONS_PER_PROGRAM),
        *tensors,
        inputs,
        batch * neurons,
        neurons=neurons,
        block=NEURONS_PER_PROGRAM,
        neuron=dataclass_of(LIFNeuron, neuron),
        **constants,
    )


@_lif.register_fake
def _(current, steps, neuron):
    return current.new_empty(current.shape[0], current.shape[1] * steps, current.shape[2])


@_lif_backward.register_fake
def _(grad_spikes, current, steps, neuron):
    return current.new_empty(current.shape)


def _lif_setup(ctx, inputs, output):
    current, *ctx.constants = inputs
    ctx.save_for_backward(current)


def _lif_gradient(ctx, grad_spikes):
    return _lif_backward_once(grad_spikes, *ctx.saved_tensors, *ctx.constants), None, None


_lif_backward_once = not_differentiable(torch.ops.fused_triton.lif_backward.default)
_population = differentiable(torch.ops.fused_triton.lif.default, _lif_setup, _lif_gradient)
