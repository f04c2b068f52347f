"""The Hebbian rule of the memory: its constants, the spike traces, and one update.

Source: arXiv:2205.11276, "Hebbian plasticity" in Methods.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from models.constants import check_bounds, constant


@dataclass(frozen=True)
class HebbianRule:
    """The rule: its constants under the names of the command-line options, and its equations.

    Another rule is a frozen dataclass with the same two methods (examples/another_rule.py).
    """

    w_max: float = constant(1.0, above=0)  # soft upper bound of a Hebbian weight
    gamma_pos: float = constant(0.3, low=0)  # strength of Hebbian potentiation
    gamma_neg: float = constant(0.3, low=0)  # strength of Hebbian depression
    tau_trace: float = constant(20.0, above=0)  # time constant of the spike traces, ms

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def beta(self) -> float:
        """Decay of a trace in one step, exp(-1 ms / tau_trace)."""
        return math.exp(-1.0 / self.tau_trace)

    def update_trace(self, trace: Tensor, spikes: Tensor) -> Tensor:
        """One step of a spike trace: beta * trace + (1 - beta) * spikes."""
        return self.beta * trace + (1 - self.beta) * spikes

    def update(self, memory: Tensor, value_trace: Tensor, key_trace: Tensor) -> Tensor:
        """One step of the Hebbian memory, from traces already updated in this step.

            W_ij + gamma_pos (w_max - W_ij) nu_i kappa_j - gamma_neg kappa_j^2 W_ij

        Args:
            memory: W, batch x values x keys (row i a value neuron, column j a key neuron).
            value_trace: nu, batch x values.
            key_trace: kappa, batch x keys.
        """
        nu, kappa = value_trace.unsqueeze(-1), key_trace.unsqueeze(-2)
        potentiation = self.gamma_pos * (self.w_max - memory) * (nu * kappa)
        depression = self.gamma_neg * kappa**2 * memory
        return memory + potentiation - depression
