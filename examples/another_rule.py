"""Another Hebbian rule, defined outside the package: Oja's, trained at a small size and compared with the published one.

python -m examples.another_rule [training steps, backend]
"""

import sys
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import models
from models.constants import constant
from models.plasticity import HebbianRule

OPTIONS = {"num_classes": 4, "num_time_steps": 30, "embedding_size": 16, "memory_size": 16}


@dataclass(frozen=True)
class OjaRule(HebbianRule):
    """W_ij + eta nu_i (kappa_j - nu_i W_ij): Oja (1982). A weight decays where the value neuron is active, not the key."""

    eta: float = constant(0.3, "learning rate of the rule", low=0)

    def update(self, memory, value_trace, key_trace):
        nu, kappa = value_trace.unsqueeze(-1), key_trace.unsqueeze(-2)  # of memory: rows are values, columns keys
        return memory + self.eta * nu * (kappa - nu * memory)


def train(model: torch.nn.Module, steps: int) -> list[float]:
    """Accuracy of each training step: store one pair, then recall its label, of four. Only the memory can tell which."""
    optimizer, accuracy = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(steps):
        features, labels = torch.rand(64, 1, 10), torch.randint(4, (64, 1))
        logits, answer = model(features, labels, query=features[:, 0]).logits, labels[:, 0]
        optimizer.zero_grad()
        cross_entropy(logits, answer).backward()
        optimizer.step()
        accuracy.append(100 * (logits.argmax(1) == answer).float().mean().item())
    return accuracy


def main(steps: int, backend: str) -> None:
    figure, (learning, weight) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for name, rule in (("published", HebbianRule()), ("Oja", OjaRule())):
        torch.manual_seed(1)
        accuracy = train(models.build_model(OPTIONS, backend, rule=rule), steps)
        print(f"{name}: accuracy {sum(accuracy[-20:]) / len(accuracy[-20:]):.0f} % in the last steps")
        learning.plot(torch.tensor(accuracy).unfold(0, min(10, steps), 1).mean(1), label=name)
        w, course = torch.zeros(1, 1, 1), []
        for value, key in [(0.5, 0.5)] * 100 + [(0.0, 0.5)] * 100 + [(0.5, 0.0)] * 100:
            w = rule.update(w, torch.tensor([[value]]), torch.tensor([[key]]))
            course.append(w.item())
        weight.plot(course, label=name)
    learning.set(xlabel="training step", ylabel="accuracy (%)", title="One pair, four labels")
    weight.set(xlabel="time (ms)", ylabel="Hebbian weight", title="Key and value active | key | value")
    learning.legend()
    figure.savefig("another_rule.png", dpi=150)


if __name__ == "__main__":
    steps, backend = sys.argv[1:] or ("150", "reference")
    main(int(steps), backend)
