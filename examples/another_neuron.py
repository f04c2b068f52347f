"""A custom neuron with an adaptive threshold. Train a network of such neurons, then plot this neuron and the default one:

python memorizing_associations_task.py --config configs/quickstart.yaml --neuron examples.another_neuron:AdaptiveNeuron
python -m examples.another_neuron
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from models.constants import constant
from models.neurons import LIFNeuron, Spike, population


class AdaptiveState(NamedTuple):
    spikes: Tensor  # z
    membrane: Tensor  # v
    refractory: Tensor  # r
    adaptation: Tensor  # a, a trace of the neuron's own spikes


@dataclass(frozen=True)
class AdaptiveNeuron(LIFNeuron):
    """Each spike raises the threshold, which is thr + strength * a (LSNN: Bellec et al. 2018)."""

    tau_adaptation: float = constant(100.0, above=0)  # time constant of the threshold, ms
    strength: float = constant(1.0, low=0)  # rise of the threshold

    def initial_state(self, like: Tensor) -> AdaptiveState:
        return AdaptiveState(*super().initial_state(like), torch.zeros_like(like))

    def step(self, current: Tensor, state: AdaptiveState) -> AdaptiveState:
        z, v, r, a = state
        rho = math.exp(-1 / self.tau_adaptation)
        a = rho * a + (1 - rho) * z
        v = self.alpha * v + (1 - self.alpha) * current - self.thr * z
        z = Spike.apply((v - self.thr - self.strength * a) / self.thr, r == 0, self.dampening_factor)
        r = torch.where(r > 0, r - 1, self.refractory_time_steps * z.detach())
        return AdaptiveState(z, v, r, a)


if __name__ == "__main__":
    for name, neuron in (("default", LIFNeuron()), ("adaptive threshold", AdaptiveNeuron())):
        spikes = population(neuron, torch.linspace(0.1, 1, 100)[None, None], hold=400).spikes[0]  # 400 ms x 100 neurons
        plt.plot(1000 * spikes.unfold(0, 20, 1).mean((1, 2)), label=name)
    plt.title("100 neurons, constant currents from 0.1 to 1")
    plt.xlabel("time (ms)")
    plt.ylabel("firing rate (Hz)")
    plt.legend()
    plt.savefig("another_neuron.png", dpi=150)
