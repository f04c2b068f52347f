"""Spiking networks without a Hebbian memory: one recurrent population, whose activity has to carry the pairs.

Shapes: B batch, L pairs in a sequence, C classes, F features, T time steps an input is held, N neurons (memory size).
Source: Bellec et al., Long short-term memory and learning-to-learn in networks of spiking neurons, NeurIPS 2018.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.constants import constant
from models.hebbian_memory import RECOMPUTE_EVERY, XAVIER_GAIN
from models.memorizing_associations import SECONDS_PER_STEP, Output
from models.neurons import LIFNeuron, Spike
from models.operands import check_operands
from models.through_time import through_time


class AdaptiveState(NamedTuple):
    """State of a population of adaptive neurons; each has the shape of the input current."""

    spikes: Tensor  # z, 0 or 1
    membrane: Tensor  # v
    refractory: Tensor  # r, steps left in which the neuron cannot fire
    adaptation: Tensor  # a, trace of the neuron's own spikes


@dataclass(frozen=True)
class AdaptiveLIFNeuron(LIFNeuron):
    """A LIF neuron whose threshold rises with its own spikes: theta + adaptation * a."""

    adaptation: float = constant(1.8, "rise of the threshold with the trace of the neuron's own spikes", low=0)
    tau_adaptation: float = constant(800.0, "time constant of that trace, ms", above=0)

    def initial_state(self, like: Tensor) -> AdaptiveState:
        return AdaptiveState(*super().initial_state(like), torch.zeros_like(like))

    def step(self, current: Tensor, state: AdaptiveState) -> AdaptiveState:
        """As `LIFNeuron.step`, with the threshold of each neuron in place of theta, after

        a' = rho a + (1 - rho) z,    rho = exp(-1 ms / tau_adaptation)
        """
        z, v, r, a = state
        rho = math.exp(-1.0 / self.tau_adaptation)
        a = rho * a + (1 - rho) * z
        threshold = self.thr + self.adaptation * a
        reset = self.alpha * v * z if self.perfect_reset else threshold * z
        v = self.alpha * v + (1 - self.alpha) * current - reset
        z = Spike.apply((v - threshold) / threshold, r == 0, self.dampening_factor)
        r = torch.where(r > 0, r - 1, self.refractory_time_steps * z.detach())
        return AdaptiveState(z, v, r, a)


class RecurrentLIF(nn.Module):
    """Input current of vector and label -> recurrent population -> linear output of its spikes while the query is shown.

    Neurons are those of the published network, their spikes weighted like any of its spikes and a step late. Rates are
    regularized alike, in two populations: the neurons while pairs are stored, and while one is recalled.
    """

    def __init__(
        self,
        num_classes: int = 10,
        feature_size: int = 10,
        memory_size: int = 214,
        num_time_steps: int = 100,
        readout_steps: int = 30,
        neuron: LIFNeuron = LIFNeuron(),  # noqa: B008, it is frozen
    ):
        super().__init__()
        self.num_time_steps, self.readout_steps, self.neuron = num_time_steps, readout_steps, neuron
        self.input_layer = nn.Linear(feature_size, memory_size, bias=False)
        self.embedding_layer = nn.Embedding(num_classes, memory_size)
        self.recurrent_weight = nn.Parameter(torch.empty(memory_size, memory_size))
        self.output_layer = nn.Linear(memory_size, num_classes, bias=False)
        for weight in (self.input_layer.weight, self.embedding_layer.weight, self.recurrent_weight):
            nn.init.xavier_uniform_(weight, gain=XAVIER_GAIN)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor, record: bool = False) -> Output:
        """As `MemorizingAssociations.forward`; `record` adds the spikes of both populations."""
        check_operands(self, features, labels, query)
        pairs = self.input_layer(features) + self.embedding_layer(labels)
        state = (self.recurrent_weight, self.neuron.initial_state(pairs[:, 0]))
        counts, spikes = 0, []
        for current in pairs.unbind(1):
            state, now = self._hold(current, state)
            counts = counts + now.sum(1)
            spikes += [now.detach()] if record else []
        _, recalling = self._hold(self.input_layer(query), state)
        seconds = self.num_time_steps * SECONDS_PER_STEP
        rates = {"storing": counts / (seconds * pairs.shape[1]), "recalling": recalling.sum(1) / seconds}
        activity = {"storing": torch.cat(spikes, 1), "recalling": recalling.detach()} if record else None
        return Output(self.output_layer(recalling[:, -self.readout_steps :].sum(1)), rates, activity)

    def _hold(self, current: Tensor, state) -> tuple[tuple, Tensor]:
        """The state after an input current B x N was held, and the spikes, B x T x N."""

        def step(state, current):
            weight, neurons = state  # the weight is part of the state because recomputation gives gradients to that alone
            neurons = self.neuron.step(current + linear(neurons.spikes, weight), neurons)
            return (weight, neurons), (neurons.spikes,)

        held = current.unsqueeze(1).expand(-1, self.num_time_steps, -1)
        state, (spikes,) = through_time(step, state, held, recompute_every=RECOMPUTE_EVERY)
        return state, spikes


class AdaptiveLIF(RecurrentLIF):
    """The same network of adaptive neurons."""

    def __init__(
        self,
        num_classes: int = 10,
        feature_size: int = 10,
        memory_size: int = 214,
        num_time_steps: int = 100,
        readout_steps: int = 30,
        neuron: AdaptiveLIFNeuron = AdaptiveLIFNeuron(),
    ):
        super().__init__(num_classes, feature_size, memory_size, num_time_steps, readout_steps, neuron)
