"""Another neuron, defined outside the package: with an adaptive threshold, trained and compared with the published one.

python -m examples.another_neuron [training steps, backend]
"""

import math
import sys
from dataclasses import dataclass
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from examples.another_rule import learn
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


def main(steps: str = "150", backend: str = "reference") -> None:
    figure, (learning, rate) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, neuron in (("published", LIFNeuron()), ("adaptive threshold", AdaptiveNeuron())):
        learn(learning, name, int(steps), backend, neuron=neuron)
        spikes = population(neuron, torch.linspace(0.1, 1, 100)[None, None], hold=400).spikes[0]  # 100 neurons, 400 ms
        rate.plot(1000 * spikes.unfold(0, 20, 1).mean((1, 2)), label=name)
    rate.set(xlabel="time (ms)", ylabel="firing rate (Hz)", title="100 neurons, constant currents")
    learning.legend()
    figure.savefig("another_neuron.png", dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
