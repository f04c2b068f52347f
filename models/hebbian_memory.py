"""The Hebbian key-value memory: `store_and_recall` writes pairs in one shot and reads with a query.

Shapes: B batch, L pairs in a sequence, T time steps an input is held, E embedding size, M memory size.
Source: arXiv:2205.11276, Fig. 1 and "Hebbian plasticity" in Methods. Parameters have the original implementation's names.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.dynamics import POPULATIONS, Dynamics
from models.neurons import Activity, population
from models.through_time import through_time

XAVIER_GAIN = math.sqrt(2)

# While gradients are recorded, writing keeps the memory at every N-th step and recomputes the steps between.
RECOMPUTE_EVERY = 25


class WritingLayer(nn.Module):
    """The weight that drives keys and values while pairs are written. `forward` returns the weight, so that hooks, pruning
    and parametrizations of the layer act in every backend."""

    def __init__(self, embedding_size: int, memory_size: int):
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * memory_size, 2 * embedding_size), gain=XAVIER_GAIN))

    def forward(self) -> Tensor:
        """2M x 2E: the rows drive keys, then values; the columns come from vectors, then labels."""
        return self.W


class ReadingLayer(nn.Module):
    """The weight that drives the keys while the memory is read. `forward` returns it, as in the writing layer."""

    def __init__(self, embedding_size: int, memory_size: int):
        super().__init__()
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(memory_size, embedding_size + memory_size), gain=XAVIER_GAIN))

    def forward(self) -> Tensor:
        """M x (E + M): the columns come from the query, then from the values (feedback)."""
        return self.W


def store_and_recall(
    features_current: Tensor,
    labels_current: Tensor,
    query_current: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    dynamics: Dynamics,
    record: bool = False,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any] | None]:
    """The network in time. This function is the definition: every backend computes the same.

    Args:
        features_current, labels_current: constant input currents of the encoding population, B x L x E.
        query_current: the same for the query, B x E.
        write_weight, read_weight: as `WritingLayer` and `ReadingLayer` return them.
        record: also return the activity.

    Returns:
        The readout (value spikes summed over the last steps of reading, B x M), the spike counts of every population
        (B x neurons), and with `record` the activity, detached: population -> spikes, B x time x neurons; "memory", B x M x M.
        This function adds "membranes", population -> B x time x neurons, and "memories", B x L x M x M, the memory
        after each pair.
    """
    currents = features_current, labels_current, query_current.unsqueeze(1)
    features, labels, query = (population(dynamics.neuron, current, dynamics.num_time_steps) for current in currents)

    key_current, value_current = linear(torch.cat([features.spikes, labels.spikes], dim=-1), write_weight).chunk(2, dim=-1)
    memories, write_key, write_value = hebbian_write(key_current, value_current, dynamics)

    from_query, from_values = read_weight.split([query_current.shape[-1], read_weight.shape[0]], dim=1)
    read_key, read_value = hebbian_read(linear(query.spikes, from_query), memories[-1], from_values, dynamics)

    readout = read_value.spikes[:, -dynamics.readout_steps :].sum(1)
    in_time = dict(zip(POPULATIONS, (features, labels, query, write_key, write_value, read_key, read_value), strict=True))
    spike_counts = {name: neurons.spikes.sum(1) for name, neurons in in_time.items()}
    if not record:
        return readout, spike_counts, None
    activity: dict[str, Any] = {name: neurons.spikes.detach() for name, neurons in in_time.items()}
    activity["membranes"] = {name: neurons.membrane.detach() for name, neurons in in_time.items()}
    activity["memories"] = torch.stack(memories, dim=1).detach()
    activity["memory"] = activity["memories"][:, -1]
    return readout, spike_counts, activity


def hebbian_write(key_current: Tensor, value_current: Tensor, dynamics: Dynamics) -> tuple[list[Tensor], Activity, Activity]:
    """Write pairs into an empty memory. At each time step, with the memory W from the step before:

        k = LIF(i_k)
        v = LIF(i_v + memory_feedback * W k)
        traces of k and v, then the Hebbian update of W

    Args:
        key_current, value_current: i_k and i_v, B x (L * T) x M.

    Returns:
        The memory after each pair (L matrices B x M x M, values x keys), and the key and value neurons in time.
    """
    neuron, rule = dynamics.neuron, dynamics.rule
    keys = population(neuron, key_current)  # keys do not depend on the memory

    def step(state, k, i_v):
        memory, value, value_trace, key_trace = state
        recalled = (memory @ k.unsqueeze(-1)).squeeze(-1)
        value = neuron.step(i_v + dynamics.memory_feedback * recalled, value)
        key_trace = rule.update_trace(key_trace, k)
        value_trace = rule.update_trace(value_trace, value.spikes)
        memory = rule.update(memory, value_trace, key_trace)
        return (memory, value, value_trace, key_trace), (value.spikes, value.membrane)

    trace = torch.zeros_like(key_current[:, 0])
    state = (torch.zeros_like(trace.unsqueeze(-1) * trace.unsqueeze(-2)), neuron.initial_state(trace), trace, trace)
    memories, values = [], []
    for k, i_v in zip(*(x.split(dynamics.num_time_steps, dim=1) for x in (keys.spikes, value_current)), strict=True):
        state, value = through_time(step, state, k, i_v, recompute_every=RECOMPUTE_EVERY)  # one pair
        memories.append(state[0])
        values.append(value)
    return memories, keys, Activity(*(torch.cat(series, dim=1) for series in zip(*values, strict=True)))


def hebbian_read(
    query_current: Tensor, memory: Tensor, feedback_weight: Tensor, dynamics: Dynamics
) -> tuple[Activity, Activity]:
    """Read from a memory without changing it. At each time step t, with no value spikes before step 0:

        k(t) = LIF(i_q(t) + W_feedback v(t - readout_delay))
        v(t) = LIF(W k(t))

    Args:
        query_current: i_q, B x T x M.
        memory: W, B x M x M (values x keys).
        feedback_weight: W_feedback, M x M, from value neurons to key neurons.

    Returns:
        The key and value neurons in time.
    """
    neuron = dynamics.neuron

    def step(state, current):
        key, value, delayed = state
        key = neuron.step(current + linear(delayed[0], feedback_weight), key)
        value = neuron.step((memory @ key.spikes.unsqueeze(-1)).squeeze(-1), value)
        return (key, value, (*delayed[1:], value.spikes)), (key.spikes, key.membrane, value.spikes, value.membrane)

    rest, steps = neuron.initial_state(query_current[:, 0]), query_current.shape[1]
    silence = torch.zeros_like(query_current[:, 0])
    # With a delay of all time steps or more, no feedback arrives.
    _, outputs = through_time(step, (rest, rest, (silence,) * min(dynamics.readout_delay, steps)), query_current)
    return Activity(*outputs[:2]), Activity(*outputs[2:])
