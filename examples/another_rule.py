"""Another Hebbian rule, defined outside the package: Oja's, trained at a small size and compared with the published one.

python -m examples.another_rule [training steps, backend]
"""

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

import models
from models.constants import constant
from models.plasticity import HebbianRule


@dataclass(frozen=True)
class OjaRule(HebbianRule):
    """W_ij + eta nu_i (kappa_j - nu_i W_ij): Oja (1982). A weight decays where the value neuron is active, not the key."""

    eta: float = constant(0.3, low=0)  # learning rate of the rule

    def update(self, memory, value_trace, key_trace):
        nu, kappa = value_trace.unsqueeze(-1), key_trace.unsqueeze(-2)  # of memory: rows are values, columns keys
        return memory + self.eta * nu * (kappa - nu * memory)


def learn(ax, name: str, steps: int, backend: str, **changes) -> None:
    """Train a network with another rule or neuron to store one pair and recall its label, of four; draw its accuracy."""
    torch.manual_seed(1)
    model = models.build_model(dict(num_classes=4, num_time_steps=30, embedding_size=16, memory_size=16), backend, **changes)
    optimizer, accuracy = torch.optim.Adam(model.parameters(), lr=1e-2), torch.zeros(steps)
    for step in range(steps):
        features, labels = torch.rand(64, 1, 10), torch.randint(4, (64, 1))
        logits, answer = model(features, labels, query=features[:, 0]).logits, labels[:, 0]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, answer).backward()
        optimizer.step()
        accuracy[step] = 100 * (logits.argmax(1) == answer).float().mean()
    print(f"{name}: accuracy {accuracy[-20:].mean():.0f} % in the last steps")
    ax.plot(accuracy.unfold(0, min(10, steps), 1).mean(1), label=name)
    ax.set(xlabel="training step", ylabel="accuracy (%)", title="One pair, four labels")


def main(steps: str = "150", backend: str = "reference") -> None:
    figure, (learning, weight) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, rule in (("published", HebbianRule()), ("Oja", OjaRule())):
        learn(learning, name, int(steps), backend, rule=rule)
        course = [0.0]
        for value, key in [(0.5, 0.5)] * 100 + [(0.0, 0.5)] * 100 + [(0.5, 0.0)] * 100:
            course.append(rule.update(torch.tensor([[course[-1:]]]), torch.tensor([[value]]), torch.tensor([[key]])).item())
        weight.plot(course, label=name)
    weight.set(xlabel="time (ms)", ylabel="Hebbian weight", title="Key and value active | key | value")
    learning.legend()
    figure.savefig("another_rule.png", dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
