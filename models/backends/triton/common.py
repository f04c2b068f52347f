"""Shared by the three operations: the equations on the device, and the launch of a kernel.

Every tensor is contiguous, time before neurons. Constants are compile-time values, the dataclasses of `models.neurons` and
`models.plasticity`; sizes that change from batch to batch are not (`do_not_specialize`). The symbols are those of the
dataclasses: z, v, r of a neuron, k and kappa of a key, nu of a value, w of the memory.
"""

from dataclasses import astuple

import torch
import triton
import triton.language as tl

REGISTERS = 65536  # of a multiprocessor


@triton.jit
def lif_step(current, z, v, r, neuron: tl.constexpr):
    """`models.neurons.LIFNeuron.step`. Returns z', v', r' and the membrane for `lif_adjoint`.

    This membrane is 0 while the neuron is refractory, so that the surrogate derivative vanishes.
    """
    if neuron.perfect_reset:
        v = neuron.alpha * v * (1 - z) + (1 - neuron.alpha) * current
    else:
        v = neuron.alpha * v + (1 - neuron.alpha) * current - neuron.thr * z
    may_fire = r == 0
    fires = may_fire & (v - neuron.thr > 0)  # not v > thr: Triton 3.6 rounds the constant of a comparison to float32
    r = tl.where(may_fire, tl.where(fires, neuron.refractory_time_steps, 0), r - 1)
    return fires.to(v.dtype), v, r, tl.where(may_fire, v, 0.0)


@triton.jit
def lif_adjoint(grad_z, v, grad_v, neuron: tl.constexpr):
    """Gradient of the membrane at t, from the gradients of the spikes at t and of the membrane at t + 1.

    The gradient of the current is (1 - alpha) times this gradient.
    """
    u = v * (1 / neuron.thr) - 1
    surrogate = neuron.dampening_factor * tl.maximum(1 - tl.abs(u), 0.0)
    if neuron.perfect_reset:
        z = (u > 0).to(v.dtype)
        grad_z -= neuron.alpha * v * grad_v
        grad_v = neuron.alpha * grad_v * (1 - z)
    else:
        grad_z -= neuron.thr * grad_v
        grad_v = neuron.alpha * grad_v
    return grad_v + grad_z * surrogate * (1 / neuron.thr)


@triton.jit
def trace_step(trace, z, rule: tl.constexpr):
    """`models.plasticity.HebbianRule.update_trace`."""
    return rule.beta * trace + (1 - rule.beta) * z


@triton.jit
def hebbian_step(w, nu, kappa, rule: tl.constexpr):
    """`models.plasticity.HebbianRule.update`, in few operations that keep an untouched weight at exactly 0."""
    gain = (rule.gamma_pos * nu)[:, None] * kappa[None, :]
    return ((1 - rule.gamma_neg * kappa * kappa)[None, :] - gain) * w + rule.w_max * gain


def launch(kernel, programs: int, *args, **constants) -> None:
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[(programs,)](*args, **constants, enable_fp_fusion=True)


def dataclass_of(cls, values: list[float]):
    """The dataclass of constants that passed through torch.library as floats."""
    return cls(*(type(default)(value) for default, value in zip(astuple(cls()), values, strict=True)))


def tile_of(size: int, elements: int) -> dict[str, int]:
    """Rows and columns of a tile of about `elements` elements that spans all columns of a size x size matrix."""
    columns = triton.next_power_of_2(size)
    return {"size": size, "columns": columns, "rows": max(1, min(columns, elements // columns))}
