"""The leaky integrate-and-fire (LIF) neuron: its constants, one time step, its surrogate gradient, and a population in time.

One time step is 1 ms. Shapes: B batch, N neurons. Source: arXiv:2205.11276, "Neuron model" in Methods.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.constants import check_bounds, constant
from models.through_time import through_time


class LIFState(NamedTuple):
    """State of a population; all three have the shape of the input current."""

    spikes: Tensor  # z, 0 or 1
    membrane: Tensor  # v
    refractory: Tensor  # r, steps left in which the neuron cannot fire


@dataclass(frozen=True)
class LIFNeuron:
    """A LIF neuron: its constants under the names of the command-line options, and its equations.

    Another neuron is a frozen dataclass with the same two methods, whose state has `spikes` and `membrane`
    (examples/another_neuron.py).
    """

    thr: float = constant(0.1, above=0)  # theta, firing threshold
    perfect_reset: bool = constant(False)  # reset the membrane to 0 instead of subtracting the threshold
    refractory_time_steps: int = constant(3, low=0, high=10**6)  # refractory time steps (ms) after a spike
    tau_mem: float = constant(20.0, above=0)  # time constant of the membrane, ms
    dampening_factor: float = constant(1.0, low=0)  # height of the surrogate derivative

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def alpha(self) -> float:
        """Decay of the membrane potential in one step, exp(-1 ms / tau_mem)."""
        return math.exp(-1.0 / self.tau_mem)

    def initial_state(self, like: Tensor) -> LIFState:
        """The state at rest of a population whose input current has the shape of `like`."""
        zeros = torch.zeros_like(like)
        return LIFState(zeros, zeros, zeros)

    def step(self, current: Tensor, state: LIFState) -> LIFState:
        """One time step.

            v' = alpha v + (1 - alpha) I - theta z        (perfect_reset: v' = alpha v (1 - z) + (1 - alpha) I)
            z' = 1  if (v' - theta) / theta > 0 and r = 0, else 0
            r' = r - 1  if r > 0, else refractory_time_steps * z'

        The membrane also integrates its input while the neuron is refractory. The gradient flows through v and z, also where z
        resets the membrane, but not through r.

        Args:
            current: I, any shape.
            state: (z, v, r), each with the shape of `current`.
        """
        z, v, r = state
        if self.perfect_reset:
            v = self.alpha * v * (1 - z) + (1 - self.alpha) * current
        else:
            v = self.alpha * v + (1 - self.alpha) * current - self.thr * z
        z = Spike.apply((v - self.thr) / self.thr, r == 0, self.dampening_factor)
        r = torch.where(r > 0, r - 1, self.refractory_time_steps * z.detach())
        return LIFState(z, v, r)


class Spike(torch.autograd.Function):
    """Heaviside step of u for neurons that are not refractory, with a triangular surrogate derivative.

    Forward: 1 where u > 0 and the neuron may fire. Backward: dampening_factor * max(0, 1 - |u|) where it may fire, else 0.
    """

    generate_vmap_rule = True  # torch.func.vmap and per-sample gradients

    @staticmethod
    def forward(u: Tensor, may_fire: Tensor, dampening_factor: float) -> Tensor:
        return ((u > 0) & may_fire).to(u.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        u, may_fire, ctx.dampening_factor = inputs
        ctx.save_for_backward(u, may_fire)

    @staticmethod
    def backward(ctx, grad_spikes: Tensor):
        u, may_fire = ctx.saved_tensors
        surrogate = ctx.dampening_factor * torch.clamp(1 - u.abs(), min=0)
        return grad_spikes * surrogate * may_fire, None, None


class Activity(NamedTuple):
    """A population in time, both B x time x N."""

    spikes: Tensor
    membrane: Tensor


def population(neuron: LIFNeuron, current: Tensor, hold: int = 1) -> Activity:
    """A feed-forward population of neurons through time, from rest.

    Args:
        current: input currents, B x inputs x N; each is held for `hold` time steps.
    """

    def step(state, now):
        state = neuron.step(now, state)
        return state, (state.spikes, state.membrane)

    held = current.repeat_interleave(hold, dim=1) if hold > 1 else current
    _, outputs = through_time(step, neuron.initial_state(current[:, 0]), held)
    return Activity(*outputs)
