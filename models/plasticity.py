"""The Hebbian rule of the memory: its constants and one update.

Source: arXiv:2205.11276, "Hebbian plasticity" in Methods.
"""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HebbianRule:
    """Constants of the Hebbian rule, under the names of the command-line options."""

    w_max: float = 1.0  # soft upper bound of a weight
    gamma_pos: float = 0.3  # strength of potentiation
    gamma_neg: float = 0.3  # strength of depression
    tau_trace: float = 20.0  # time constant of the spike traces, ms

    @property
    def beta(self) -> float:
        """Decay of a trace in one step, exp(-1 ms / tau_trace)."""
        return math.exp(-1.0 / self.tau_trace)


def update_trace(trace: Tensor, spikes: Tensor, constants: HebbianRule) -> Tensor:
    """One step of a spike trace: beta * trace + (1 - beta) * spikes."""
    beta = constants.beta
    return beta * trace + (1 - beta) * spikes


def hebbian_update(memory: Tensor, value_trace: Tensor, key_trace: Tensor, constants: HebbianRule) -> Tensor:
    """One step of the Hebbian memory, from traces already updated in this step.

        W_ij + gamma_pos (w_max - W_ij) nu_i kappa_j - gamma_neg kappa_j^2 W_ij

    Args:
        memory: W, batch x values x keys (row i a value neuron, column j a key neuron).
        value_trace: nu, batch x values.
        key_trace: kappa, batch x keys.
    """
    nu, kappa = value_trace.unsqueeze(-1), key_trace.unsqueeze(-2)
    potentiation = constants.gamma_pos * (constants.w_max - memory) * (nu * kappa)
    depression = constants.gamma_neg * kappa**2 * memory
    return memory + potentiation - depression
