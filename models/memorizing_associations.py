"""The network that memorizes associations: what is connected to what.

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size, M memory size.
Source: arXiv:2205.11276, Fig. 1 and "Memorizing associations" in Methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import backends
from models.backends.reference import POPULATIONS, Dynamics
from models.layers import EmbeddingLayer, InputLayer, ReadingLayer, WritingLayer
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

SECONDS_PER_STEP = 1e-3
SILENT_BELOW = 0.01  # Hz, mean rate of a population: one spike of 100 neurons in a second


@dataclass(frozen=True)
class Sizes:
    """Sizes of the network, under the names of the command-line options."""

    num_classes: int = 10  # C
    feature_size: int = 10  # F
    embedding_size: int = 80  # E
    memory_size: int = 100  # M


class Output(NamedTuple):
    """What the network returns."""

    logits: Tensor  # B x C
    rates: dict[str, Tensor]  # population -> firing rates in Hz, B x neurons, differentiable
    activity: dict[str, Tensor] | None  # with record=True: population -> B x time x neurons; "memory" -> B x M x M


class MemorizingAssociations(nn.Module):
    """Embedding -> encoding LIF population -> writing and reading layers around a Hebbian memory -> linear output."""

    def __init__(self, sizes: Sizes, dynamics: Dynamics, backend: str = "auto"):
        super().__init__()
        self.sizes, self.dynamics, self.backend = sizes, dynamics, backend
        self.input_layer = InputLayer(sizes.feature_size, sizes.embedding_size)
        self.embedding_layer = EmbeddingLayer(sizes.num_classes, sizes.embedding_size)
        self.writing_layer = WritingLayer(sizes.embedding_size, sizes.memory_size)
        self.reading_layer = ReadingLayer(sizes.embedding_size, sizes.memory_size)
        self.output_layer = nn.Linear(sizes.memory_size, sizes.num_classes, bias=False)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor, record: bool = False) -> Output:
        """Memorize the pairs, then answer the query.

        Args:
            features: vectors, B x L x F.
            labels: their labels, B x L, int64 in 0..C-1.
            query: one of the vectors, B x F.
            record: return the spikes of every population and the memory, too.
        """
        recalled = backends.store_and_recall(
            *self.encoding_currents(features, labels, query),
            self.writing_layer.W,
            self.reading_layer.W,
            self.dynamics,
            record=record,
            backend=self.backend,
        )
        return Output(
            self.output_layer(recalled.readout), self._rates(recalled.spike_counts, features.shape[1]), recalled.activity
        )

    def encoding_currents(self, features: Tensor, labels: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Constant input currents of the encoding population: for vectors and labels B x L x E, for the query B x E."""
        # The published layer multiplies by an E x E matrix of ones, which is not learned, and sums over its E rows.
        gain = self.sizes.embedding_size
        return gain * self.input_layer(features), gain * self.embedding_layer(labels), gain * self.input_layer(query)

    def _rates(self, spike_counts: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        duration = self.dynamics.num_time_steps * SECONDS_PER_STEP
        while_writing = ("features_encoded", "labels_encoded", "write_key", "write_value")
        return {name: n / (duration * length if name in while_writing else duration) for name, n in spike_counts.items()}


def rate_regularization(rates: Mapping[str, Tensor], target_rate: float) -> Tensor:
    """Activity regularization R: sum over populations of mean_neurons((mean_batch(rate) - target_rate)^2), in Hz^2.

    Args:
        rates: population -> firing rates in Hz, B x neurons.
        target_rate: in Hz.
    """
    return torch.stack([(rates[name].mean(0) - target_rate).square().mean() for name in POPULATIONS]).sum()


def constants_from(cls, options: Mapping[str, Any], **others):
    """A dataclass of constants from a mapping of options; options it does not name are ignored."""
    return cls(**{f.name: options[f.name] for f in fields(cls) if f.name in options}, **others)


def build_model(options: Mapping[str, Any], backend: str = "auto") -> MemorizingAssociations:
    """The network of a mapping of options under their published names (others are ignored, missing ones take their default).

    Args:
        backend: one of `models.backends.BACKENDS`.

    Raises:
        ValueError: unknown backend.
        models.backends.BackendError: a backend asked for by name cannot run here.
    """
    backends.check_backend(backend)
    dynamics = constants_from(
        Dynamics,
        options,
        neuron=constants_from(LIFNeuron, options),
        rule=constants_from(HebbianRule, options),
    )
    return MemorizingAssociations(constants_from(Sizes, options), dynamics, backend)
