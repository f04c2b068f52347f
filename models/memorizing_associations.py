"""The network that memorizes associations: what is connected to what.

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size, M memory size.
Source: arXiv:2205.11276, Fig. 1 and "Memorizing associations" in Methods.
"""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import backends
from models.constants import check_bounds, constant
from models.dynamics import POPULATIONS, Dynamics
from models.hebbian_memory import XAVIER_GAIN, ReadingLayer, WritingLayer
from models.neurons import LIFNeuron, population
from models.operands import check_operands
from models.plasticity import HebbianRule
from models.through_time import through_time

SECONDS_PER_STEP = 1e-3
SILENT_BELOW = 0.01  # Hz, mean rate of a population: one spike of 100 neurons in a second


@dataclass(frozen=True)
class Sizes:
    """Sizes of the network, under the names of the command-line options."""

    num_classes: int = constant(10, "labels to draw from", low=1, high=10**6)  # C
    feature_size: int = constant(10, "size of the random vectors", low=1, high=10**6)  # F
    embedding_size: int = constant(80, "neurons of an encoding population", low=1, high=10**6)  # E
    memory_size: int = constant(100, "key neurons, and value neurons, of the memory", low=1, high=10**6)  # M

    __post_init__ = check_bounds


class Output(NamedTuple):
    """What the network returns."""

    logits: Tensor  # B x C
    rates: dict[str, Tensor]  # population -> firing rates in Hz, B x neurons, differentiable
    # With record=True, detached: population -> spikes, B x time x neurons, and "memory" -> B x M x M. The plain model adds
    # "membranes" -> {population -> B x time x neurons} and "memories" -> B x L x M x M, the memory after each pair.
    activity: dict[str, Any] | None


class EmbeddingLayer(nn.Module):
    """Embeds a label: a row of a table. `embedding.weight` is C x E."""

    def __init__(self, num_classes: int, embedding_size: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding_size)
        nn.init.xavier_uniform_(self.embedding.weight, gain=XAVIER_GAIN)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding(labels)


class MemorizingAssociations(nn.Module):
    """Embedding -> encoding LIF population -> writing and reading layers around a Hebbian memory -> linear output."""

    def __init__(self, sizes: Sizes = Sizes(), dynamics: Dynamics = Dynamics(), backend: str = "auto"):  # noqa: B008, frozen
        super().__init__()
        self.sizes, self.dynamics, self.backend = sizes, dynamics, backend
        self._choice = None  # what was asked for, and the backend chosen
        self.input_layer = nn.Linear(sizes.feature_size, sizes.embedding_size, bias=False)
        nn.init.xavier_uniform_(self.input_layer.weight, gain=XAVIER_GAIN)
        self.embedding_layer = EmbeddingLayer(sizes.num_classes, sizes.embedding_size)
        self.writing_layer = WritingLayer(sizes.embedding_size, sizes.memory_size, dynamics)
        self.reading_layer = ReadingLayer(sizes.embedding_size, sizes.memory_size, dynamics)
        self.output_layer = nn.Linear(sizes.memory_size, sizes.num_classes, bias=False)

    def forward(self, features: Tensor, labels: Tensor, query: Tensor, record: bool = False) -> Output:
        """Memorize the pairs, then answer the query.

        Args:
            features: vectors, B x L x F.
            labels: their labels, B x L, int64 in 0..C-1.
            query: one of the vectors, B x F.
            record: return the spikes of every population and the memory, too.

        Raises:
            ValueError: the arguments do not belong together or to this network.
            models.BackendError: the backend asked for by name cannot run this network here.
        """
        check_operands(self, features, labels, query)
        if torch.is_autocast_enabled(features.device.type) and not torch.compiler.is_compiling():
            warnings.warn("the network computes in float32 in spite of autocast: spikes need its precision", stacklevel=2)
        with torch.autocast(features.device.type, enabled=False):
            currents = self.encoding_currents(features, labels, query)
            readout, spike_counts, activity = self.program(features.device.type)(*currents, record=record)
            return Output(self.output_layer(readout), self._rates(spike_counts, features.shape[1]), activity)

    def encoding_currents(self, features: Tensor, labels: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Constant input currents of the encoding population: for vectors and labels B x L x E, for the query B x E."""
        # The published layer multiplies by an E x E matrix of ones, which is not learned, and sums over its E rows.
        gain = self.sizes.embedding_size
        return gain * self.input_layer(features), gain * self.embedding_layer(labels), gain * self.input_layer(query)

    def store_and_recall(
        self, features_current: Tensor, labels_current: Tensor, query_current: Tensor, record: bool = False, loop=through_time
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any] | None]:
        """The network in time: this is what every backend computes.

        Args:
            features_current, labels_current, query_current: as `encoding_currents` returns them.
            loop: what applies a step at every time step, as `through_time` does.

        Returns:
            The readout (value spikes summed over the last steps of reading, B x M), the spike counts of every population
            (B x neurons), and what `record` asks for, as in `Output`.
        """
        steps, neuron = self.dynamics.num_time_steps, self.dynamics.neuron
        currents = features_current, labels_current, query_current.unsqueeze(1)
        features, labels, query = (population(neuron, current, steps, loop) for current in currents)

        memories, write_key, write_value = self.writing_layer(features.spikes, labels.spikes, loop)
        read_key, read_value = self.reading_layer(query.spikes, memories[-1], loop)

        readout = read_value.spikes[:, -self.dynamics.readout_steps :].sum(1)
        in_time = dict(zip(POPULATIONS, (features, labels, query, write_key, write_value, read_key, read_value), strict=True))
        spike_counts = {name: neurons.spikes.sum(1) for name, neurons in in_time.items()}
        activity = None
        if record:
            activity = {name: neurons.spikes.detach() for name, neurons in in_time.items()}
            activity["membranes"] = {name: neurons.membrane.detach() for name, neurons in in_time.items()}
            activity["memories"] = torch.stack(memories, dim=1).detach()
            activity["memory"] = activity["memories"][:, -1]
        return readout, spike_counts, activity

    def prepare_backend(self, device_type: str) -> tuple[str, dict[str, str]]:
        """Choose the backend, build it, and have it prove that it computes this network, before a run depends on it.

        Args:
            device_type: "cpu" or "cuda".

        Returns:
            Its name, and for each faster one why it does not run.

        Raises:
            models.BackendError: the backend asked for by name cannot run this network here.
        """
        altered = _altered((self.writing_layer, self.reading_layer))
        sizes, dtype = (64, self.sizes.embedding_size, self.sizes.memory_size), self.output_layer.weight.dtype
        request = self.backend, device_type, self.dynamics, altered, sizes, dtype, backends.equations()
        if self._choice is None or self._choice[0] != request:
            self._choice = request, backends.choose(*request[:3], reference, *request[3:-1])
        return self._choice[1]

    def program(self, device_type: str):
        """What runs `store_and_recall` on a device: a function of the currents."""
        if torch.compiler.is_compiling():
            if self._choice is None:
                raise RuntimeError("call model.prepare_backend(device_type) before torch.compile or torch.export")
            name, _ = self._choice[1]
        else:
            name, _ = self.prepare_backend(device_type)
        if name == "reference":
            return self.store_and_recall
        program = backends.program(name)
        if name == "compiled":
            return functools.partial(self.store_and_recall, loop=program)
        weights = {"write_weight": self.writing_layer.W, "read_weight": self.reading_layer.W}
        return functools.partial(program, **weights, dynamics=self.dynamics)

    def _rates(self, spike_counts: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        duration = self.dynamics.num_time_steps * SECONDS_PER_STEP
        while_writing = ("features_encoded", "labels_encoded", "write_key", "write_value")
        return {name: n / (duration * length if name in while_writing else duration) for name, n in spike_counts.items()}


def reference(
    features_current: Tensor,
    labels_current: Tensor,
    query_current: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    dynamics: Dynamics,
    record: bool = False,
    loop=through_time,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any] | None]:
    """`MemorizingAssociations.store_and_recall` as a function of the weights, which a kernel backend is compared with."""
    sizes = Sizes(embedding_size=query_current.shape[-1], memory_size=read_weight.shape[0])
    network = MemorizingAssociations(sizes, dynamics, "reference")
    for layer, weight in ((network.writing_layer, write_weight), (network.reading_layer, read_weight)):
        del layer.W
        layer.W = weight
    return network.store_and_recall(features_current, labels_current, query_current, record, loop)


def _altered(layers: tuple[nn.Module, ...]) -> str | None:
    """Why a kernel, which takes only the weights of these layers, would not compute what they do; or None."""
    for layer, known in zip(layers, (WritingLayer, ReadingLayer), strict=True):
        if type(layer).forward is not known.forward:
            return f"it does not know the layer {type(layer).__name__}"
        if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return f"it does not run the hooks of {known.__name__} (pruning uses them: prune.remove makes it permanent)"
    return None


def build_model(
    options: Mapping[str, Any], backend: str = "auto", neuron: Any = None, rule: Any = None
) -> MemorizingAssociations:
    """The network of a mapping of options under their names on the command line (others are ignored, missing ones have their
    default).

    Args:
        backend: one of `models.BACKENDS`.
        neuron, rule: in place of those that the options describe: objects with the methods of `LIFNeuron` and `HebbianRule`.

    Raises:
        ValueError: unknown backend, or a constant out of bounds.
    """
    backends.check_name(backend)

    def given(constants: type) -> dict[str, Any]:
        return {field.name: options[field.name] for field in fields(constants) if field.name in options}

    parts = {"neuron": neuron or LIFNeuron(**given(LIFNeuron)), "rule": rule or HebbianRule(**given(HebbianRule))}
    return MemorizingAssociations(Sizes(**given(Sizes)), Dynamics(**given(Dynamics) | parts), backend)


def rate_regularization(mean_rates: Mapping[str, Tensor], target_rate: float) -> Tensor:
    """Activity regularization R: sum over populations of mean_neurons((mean_batch(rate) - target_rate)^2), in Hz^2.

    Args:
        mean_rates: population -> firing rate of each neuron, mean over the batch, in Hz.
        target_rate: in Hz.

    Raises:
        ValueError: these are the rates of several samples.
    """
    for name, mean in mean_rates.items():
        if mean.numel() != mean.shape[-1]:
            raise ValueError(f"mean_rates: {name} must hold one mean rate per neuron, not {tuple(mean.shape)}")
    return torch.stack([(mean - target_rate).square().mean() for mean in mean_rates.values()]).sum()
