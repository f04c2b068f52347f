"""The network that memorizes associations: its sizes, layers and connections.

Shapes: B batch, L pairs in a sequence, C classes, F features, E embedding size, M memory size.
Source: arXiv:2205.11276, Fig. 1 and "Memorizing associations" in Methods.
"""

import contextlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models import backends
from models.constants import check_bounds, constant
from models.dynamics import Dynamics
from models.hebbian_memory import XAVIER_GAIN, ReadingLayer, WritingLayer, store_and_recall
from models.neurons import LIFNeuron
from models.operands import check_labels, check_operands, refuse_misspelled
from models.plasticity import HebbianRule

SECONDS_PER_STEP = 1e-3
SILENT_BELOW = 0.01  # Hz, mean rate of a population: 100 neurons fire one spike per second in total
WHILE_WRITING = ("features_encoded", "labels_encoded", "write_key", "write_value")  # the others fire during the query


@dataclass(frozen=True)
class Sizes:
    """Sizes of the network, under the names of the command-line options."""

    num_classes: int = constant(10, low=1, high=10**6)  # C, number of labels to draw from
    feature_size: int = constant(10, low=1, high=10**6)  # F, size of the random vectors
    embedding_size: int = constant(80, low=1, high=10**6)  # E, neurons in the encoding population
    memory_size: int = constant(100, low=1, high=10**6)  # M, number of key neurons and number of value neurons

    def __post_init__(self) -> None:
        check_bounds(self)


class Output(NamedTuple):
    """What the network returns."""

    logits: Tensor  # B x C
    rates: dict[str, Tensor]  # population -> firing rates in Hz, B x neurons, differentiable
    activity: dict[str, Any] | None  # with record=True: as `store_and_recall` returns it


class EmbeddingLayer(nn.Module):
    """Embeds a label: a row of a table. `embedding.weight` is C x E."""

    def __init__(self, num_classes: int, embedding_size: int):
        super().__init__()
        self.embedding = nn.Embedding(num_classes, embedding_size)
        nn.init.xavier_uniform_(self.embedding.weight, gain=XAVIER_GAIN)

    def forward(self, labels: Tensor) -> Tensor:
        check_labels(labels, self.embedding.num_embeddings)
        return self.embedding(labels)


class MemorizingAssociations(nn.Module):
    """Embedding -> encoding LIF population -> Hebbian memory (written, then read) -> linear output.

    Args:
        dynamics: all constants of the network in time. A change of `model.dynamics` acts at the next forward.
        backend: computes the network in time: one of `models.BACKENDS`, or a function with the signature of
            `models.store_and_recall`.
    """

    def __init__(
        self,
        sizes: Sizes = Sizes(),
        dynamics: Dynamics = Dynamics(),  # noqa: B008
        backend: str | Callable = "auto",
    ):
        super().__init__()
        self.sizes, self.dynamics, self.backend = sizes, dynamics, backend
        self.input_layer = nn.Linear(sizes.feature_size, sizes.embedding_size, bias=False)
        nn.init.xavier_uniform_(self.input_layer.weight, gain=XAVIER_GAIN)
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
            record: also return the spikes of every population and the memory.

        Raises:
            ValueError: the arguments do not belong together or to this network.
            models.BackendError: the backend asked for by name cannot run this network here.
        """
        check_operands(self.named_parameters(), self.sizes.feature_size, features, labels, query)
        with _in_full_precision(features.device.type):
            currents = self.currents(features, labels, query)
            readout, spike_counts, activity = self.store_and_recall(*currents, record=record)
            return Output(self.output_layer(readout), self._rates(spike_counts, features.shape[1]), activity)

    def currents(self, features: Tensor, labels: Tensor, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Constant input currents of the encoding population: for vectors and labels B x L x E, for the query B x E."""
        # The original implementation multiplies by a fixed E x E matrix of ones and sums over its E rows.
        gain = self.sizes.embedding_size
        return gain * self.input_layer(features), gain * self.embedding_layer(labels), gain * self.input_layer(query)

    def store_and_recall(
        self, features_current: Tensor, labels_current: Tensor, query_current: Tensor, record: bool = False
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any] | None]:
        """The network in time, from its currents: `models.store_and_recall`, or another function that computes the same."""
        function = backends.find(self.backend, features_current.device, self.dynamics, store_and_recall)
        weights = self.writing_layer(), self.reading_layer()
        return function(features_current, labels_current, query_current, *weights, self.dynamics, record)

    def _rates(self, spike_counts: dict[str, Tensor], length: int) -> dict[str, Tensor]:
        duration = self.dynamics.num_time_steps * SECONDS_PER_STEP
        return {name: n / (duration * length if name in WHILE_WRITING else duration) for name, n in spike_counts.items()}


def _in_full_precision(device_type: str) -> contextlib.AbstractContextManager:
    """Turn autocast off: spikes need the precision of the weights."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    if torch.is_autocast_enabled(device_type) and not torch.compiler.is_compiling():
        warnings.warn("the network computes in float32 in spite of autocast: spikes need this precision", stacklevel=3)
    return torch.autocast(device_type, enabled=False)


def build_model(
    params: Mapping[str, Any], backend: str | Callable = "auto", neuron: Any = None, rule: Any = None
) -> MemorizingAssociations:
    """Build the network from options, under their names on the command line.

    Args:
        params: missing options have their defaults, and a run's other options are ignored, so the `params` of a checkpoint
            will do.
        backend: as in `MemorizingAssociations`.
        neuron, rule: objects with the methods of `LIFNeuron` and `HebbianRule`, used instead of those of the options.

    Raises:
        ValueError: an unknown backend, a constant out of bounds, a name that is nearly an option of the network, an option
            that contradicts `neuron` or `rule`, or a `neuron` or `rule` that lacks a method.
    """
    backends.check_name(backend)
    refuse_misspelled(params, list(defaults()))
    sizes, dynamics = constants(params)
    for name, part in {"neuron": neuron, "rule": rule}.items():
        usual = type(getattr(dynamics, name))
        needed = [method for method, value in vars(usual).items() if callable(value) and not method.startswith("_")]
        if part is not None and (missing := [method for method in needed if not hasattr(part, method)]):
            raise ValueError(f"{name}: must have the methods of {usual.__name__}; {part!r:.80} lacks {', '.join(missing)}")
        for field in fields(getattr(dynamics, name)) if part is not None else ():
            own = getattr(part, field.name, None)
            if field.name in params and isinstance(own, bool | int | float) and own != params[field.name]:
                own = f"the given {name} has {getattr(part, field.name)}; leave one of the two out"
                raise ValueError(f"{field.name} {params[field.name]}: {own}")
    dynamics = replace(dynamics, neuron=neuron or dynamics.neuron, rule=rule or dynamics.rule)
    return MemorizingAssociations(sizes, dynamics, backend)


def constants(params: Mapping[str, Any]) -> tuple[Sizes, Dynamics]:
    """Sizes and constants of a network from options; other options are ignored, and missing options have their defaults.

    Raises:
        ValueError: an option has another type or is out of bounds. The message names the option.
    """

    def given(kind: type) -> dict[str, Any]:
        return {field.name: params[field.name] for field in fields(kind) if field.metadata and field.name in params}

    neuron, rule = LIFNeuron(**given(LIFNeuron)), HebbianRule(**given(HebbianRule))
    return Sizes(**given(Sizes)), Dynamics(**given(Dynamics), neuron=neuron, rule=rule)


def defaults() -> dict[str, Any]:
    """The options of a network, with their defaults."""
    kinds = (Sizes, HebbianRule, Dynamics, LIFNeuron)
    return {field.name: field.default for kind in kinds for field in fields(kind) if field.metadata}


def rate_regularization(mean_rates: Mapping[str, Tensor], target_rate: float) -> Tensor:
    """Activity regularization R: sum over populations of mean_neurons((mean_batch(rate) - target_rate)^2), in Hz^2.

    Args:
        mean_rates: population -> firing rate of each neuron, mean over the batch, in Hz.
        target_rate: in Hz.

    Raises:
        ValueError: `mean_rates` holds the rates of several samples instead of their mean.
    """
    for name, mean in mean_rates.items():
        if mean.numel() != mean.shape[-1]:
            raise ValueError(f"mean_rates: {name} must hold one mean rate per neuron, not {tuple(mean.shape)}")
    return torch.stack([(mean - target_rate).square().mean() for mean in mean_rates.values()]).sum()


def silent_populations(rates: Mapping[str, Tensor | float]) -> list[str]:
    """The populations whose mean rate is below `SILENT_BELOW`. Hardly any gradient flows through them.

    Args:
        rates: population -> firing rates in Hz, of any shape, as `Output.rates` has them.
    """
    return [name for name, rate in rates.items() if torch.as_tensor(rate, dtype=torch.float64).mean() < SILENT_BELOW]
