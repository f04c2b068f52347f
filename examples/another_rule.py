"""A custom Hebbian rule: Oja's. Train a network with it, then plot this rule and the default one:

python memorizing_associations_task.py --config configs/quickstart.yaml --rule examples.another_rule:OjaRule
python -m examples.another_rule
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

from models.constants import constant
from models.plasticity import HebbianRule


@dataclass(frozen=True)
class OjaRule(HebbianRule):
    """W_ij + eta nu_i (kappa_j - nu_i W_ij): Oja (1982). A weight decays while its value neuron, not its key neuron, fires."""

    eta: float = constant(0.3, low=0)  # learning rate of the rule

    def update(self, memory, value_trace, key_trace):
        nu, kappa = value_trace.unsqueeze(-1), key_trace.unsqueeze(-2)  # memory: rows are values, columns are keys
        return memory + self.eta * nu * (kappa - nu * memory)


if __name__ == "__main__":
    for name, rule in (("default", HebbianRule()), ("Oja", OjaRule())):
        weight = [torch.zeros(1, 1)]
        for value, key in [(0.5, 0.5)] * 100 + [(0.0, 0.5)] * 100 + [(0.5, 0.0)] * 100:
            weight.append(rule.update(weight[-1], torch.tensor([value]), torch.tensor([key])))
        plt.plot(torch.cat(weight), label=name)
    plt.title("Both traces are 0.5, then only the key's, then only the value's")
    plt.xlabel("time (ms)")
    plt.ylabel("Hebbian weight")
    plt.legend()
    plt.savefig("another_rule.png", dpi=150)
