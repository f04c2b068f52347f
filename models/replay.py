"""What a recording leaves out, recomputed from its spikes: membrane potentials, and the memory after each pair.

Shapes: B batch, L pairs in a sequence, M memory size.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from models.backends import Dynamics
from models.memorizing_associations import MemorizingAssociations
from models.neurons import LIFNeuron, LIFState, lif_step
from models.plasticity import hebbian_update, update_trace


class Replay(NamedTuple):
    """What `replay` returns."""

    membranes: dict[str, Tensor]  # population -> membrane potentials, B x time x neurons
    memories: Tensor  # the memory after each pair, B x L x M x M


@torch.no_grad()
def replay(
    model: MemorizingAssociations, features: Tensor, labels: Tensor, query: Tensor, activity: Mapping[str, Tensor]
) -> Replay:
    """Membranes and memories that belong to the recorded spikes, whichever backend recorded them.

    Neurons are reset where they were recorded to spike, so that rounding cannot lead membranes away from the recording.

    Args:
        features, labels, query: what `model` was given.
        activity: what it recorded.
    """
    dynamics = model.dynamics
    steps, size = dynamics.num_time_steps, model.sizes.embedding_size
    features_current, labels_current, query_current = model.encoding_currents(features, labels, query)

    encoded = torch.cat([activity["features_encoded"], activity["labels_encoded"]], dim=-1)
    key_current, value_current = linear(encoded, model.writing_layer.W).chunk(2, dim=-1)
    memories, recalled = _write(activity["write_key"], activity["write_value"], dynamics)

    from_query, from_values = model.reading_layer.W.split([size, model.sizes.memory_size], dim=1)
    delayed = pad(activity["read_value"], (0, 0, dynamics.readout_delay, 0))[:, :steps]
    currents = {
        "features_encoded": features_current.repeat_interleave(steps, dim=1),
        "labels_encoded": labels_current.repeat_interleave(steps, dim=1),
        "query_encoded": query_current.unsqueeze(1).expand(-1, steps, -1),
        "write_key": key_current,
        "write_value": value_current + dynamics.memory_feedback * recalled,
        "read_key": linear(activity["query_encoded"], from_query) + linear(delayed, from_values),
        "read_value": activity["read_key"] @ activity["memory"].mT,
    }
    return Replay({name: _membrane(current, activity[name], dynamics.neuron) for name, current in currents.items()}, memories)


def _membrane(current: Tensor, spikes: Tensor, constants: LIFNeuron) -> Tensor:
    """Membrane potentials of a population that receives `current` and emits `spikes`, all B x time x neurons."""
    state = LIFState.at_rest(current[:, 0])
    membranes = []
    for i, z in zip(current.unbind(1), spikes.unbind(1), strict=True):
        membranes.append(lif_step(i, state, constants).membrane)
        state = state._replace(spikes=z, membrane=membranes[-1])  # refractoriness does not act on the membrane
    return torch.stack(membranes, dim=1)


def _write(key_spikes: Tensor, value_spikes: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """The memory after each pair (B x L x M x M), and its output W k to the value neurons at each step (B x time x M)."""
    memory = key_spikes.new_zeros(*key_spikes[:, 0].shape, key_spikes.shape[-1])
    key_trace = value_trace = torch.zeros_like(key_spikes[:, 0])
    memories, recalled = [], []
    for t, (k, v) in enumerate(zip(key_spikes.unbind(1), value_spikes.unbind(1), strict=True), start=1):
        recalled.append((memory @ k.unsqueeze(-1)).squeeze(-1))
        key_trace = update_trace(key_trace, k, dynamics.rule)
        value_trace = update_trace(value_trace, v, dynamics.rule)
        memory = hebbian_update(memory, value_trace, key_trace, dynamics.rule)
        if t % dynamics.num_time_steps == 0:
            memories.append(memory)
    return torch.stack(memories, dim=1), torch.stack(recalled, dim=1)
