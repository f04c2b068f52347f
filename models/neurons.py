"""The leaky integrate-and-fire (LIF) neuron: its constants, one time step, its surrogate gradient.

One time step is 1 ms. Source: arXiv:2205.11276, "Neuron model" in Methods.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class LIFNeuron:
    """Constants of every LIF neuron of the network, under the names of the command-line options."""

    thr: float = 0.1  # firing threshold theta
    perfect_reset: bool = False  # hard reset to 0 in place of subtracting the threshold
    refractory_time_steps: int = 3  # steps after a spike in which a neuron cannot fire
    tau_mem: float = 20.0  # membrane time constant, ms
    dampening_factor: float = 1.0  # height of the surrogate derivative

    @property
    def alpha(self) -> float:
        """Decay of the membrane potential in one step, exp(-1 ms / tau_mem)."""
        return math.exp(-1.0 / self.tau_mem)


class LIFState(NamedTuple):
    """State of a population; all three have the shape of the input current."""

    spikes: Tensor  # z, 0 or 1
    membrane: Tensor  # v
    refractory: Tensor  # r, steps left in which the neuron cannot fire

    @classmethod
    def at_rest(cls, like: Tensor) -> "LIFState":
        zeros = torch.zeros_like(like)
        return cls(zeros, zeros, zeros)


class Spike(torch.autograd.Function):
    """Heaviside step of u for neurons that are not refractory, with a triangular surrogate derivative.

    Forward: 1 where u > 0 and the neuron may fire. Backward: dampening_factor * max(0, 1 - |u|) where it may fire, else 0.
    """

    @staticmethod
    def forward(ctx, u: Tensor, may_fire: Tensor, dampening_factor: float) -> Tensor:
        ctx.save_for_backward(u, may_fire)
        ctx.dampening_factor = dampening_factor
        return ((u > 0) & may_fire).to(u.dtype)

    @staticmethod
    def backward(ctx, grad_spikes: Tensor):
        u, may_fire = ctx.saved_tensors
        surrogate = ctx.dampening_factor * torch.clamp(1 - u.abs(), min=0)
        return grad_spikes * surrogate * may_fire, None, None


def lif_step(current: Tensor, state: LIFState, constants: LIFNeuron) -> LIFState:
    """One time step of a LIF population.

        v' = alpha v + (1 - alpha) I - theta z        (perfect_reset: v' = alpha v (1 - z) + (1 - alpha) I)
        z' = 1  if (v' - theta) / theta > 0 and r = 0, else 0
        r' = r - 1  if r > 0, else refractory_time_steps * z'

    The membrane goes on integrating while the neuron is refractory. The gradient flows through v and through z, also where z
    resets the membrane; none flows through r.

    Args:
        current: I, any shape.
        state: (z, v, r), each of the shape of `current`.
    """
    alpha, theta = constants.alpha, constants.thr
    z, v, r = state
    if constants.perfect_reset:
        v = alpha * v * (1 - z) + (1 - alpha) * current
    else:
        v = alpha * v + (1 - alpha) * current - theta * z
    z = Spike.apply((v - theta) / theta, r == 0, constants.dampening_factor)
    r = torch.where(r > 0, r - 1, constants.refractory_time_steps * z.detach())
    return LIFState(z, v, r)
