"""The Hebbian key-value memory: a writing layer that stores pairs in one shot, and a reading layer that recalls them.

Shapes: B batch, L pairs in a sequence, T time steps an input is held, E embedding size, M memory size.
Source: arXiv:2205.11276, Fig. 1 and "Hebbian plasticity" in Methods. Parameters carry the published names.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from models.dynamics import Dynamics
from models.neurons import Activity, population
from models.through_time import through_time

XAVIER_GAIN = math.sqrt(2)

# While gradients are recorded, the memory is kept at every N-th step of writing, and recomputed between.
RECOMPUTE_EVERY = 25


class WritingLayer(nn.Module):
    """Stores pairs. `W` is 2M x 2E: the rows drive keys, then values; the columns come from vectors, then labels."""

    def __init__(self, embedding_size: int, memory_size: int, dynamics: Dynamics):
        super().__init__()
        self.dynamics = dynamics
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * memory_size, 2 * embedding_size), gain=XAVIER_GAIN))

    def forward(self, features: Tensor, labels: Tensor, loop=through_time) -> tuple[list[Tensor], Activity, Activity]:
        """Write pairs into an empty memory.

        Args:
            features, labels: spikes of the encoding population, B x (L * T) x E.
            loop: what applies a step at every time step, as `through_time` does.

        Returns:
            The memory after each pair (L matrices B x M x M, values x keys), and the key and value neurons in time.
        """
        key_current, value_current = linear(torch.cat([features, labels], dim=-1), self.W).chunk(2, dim=-1)
        return hebbian_write(key_current, value_current, self.dynamics, loop)


def hebbian_write(
    key_current: Tensor, value_current: Tensor, dynamics: Dynamics, loop=through_time
) -> tuple[list[Tensor], Activity, Activity]:
    """At each time step, with the memory W as it was before:

        k = LIF(i_k)
        v = LIF(i_v + memory_feedback * W k)
        traces of k and v, then the Hebbian update of W

    Args:
        key_current, value_current: i_k and i_v, B x (L * T) x M.

    Returns:
        As `WritingLayer.forward`.
    """
    neuron, rule = dynamics.neuron, dynamics.rule
    keys = population(neuron, key_current, loop=loop)  # they do not depend on the memory

    def step(state, k, i_v):
        memory, value, value_trace, key_trace = state
        recalled = (memory @ k.unsqueeze(-1)).squeeze(-1)
        value = neuron.step(i_v + dynamics.memory_feedback * recalled, value)
        key_trace = rule.update_trace(key_trace, k)
        value_trace = rule.update_trace(value_trace, value.spikes)
        memory = rule.update(memory, value_trace, key_trace)
        return (memory, value, value_trace, key_trace), (value.spikes, value.membrane)

    batch, _, size = key_current.shape
    trace = key_current.new_zeros(batch, size)
    state = (key_current.new_zeros(batch, size, size), neuron.initial_state(trace), trace, trace)
    memories, values = [], []
    for k, i_v in zip(*(x.split(dynamics.num_time_steps, dim=1) for x in (keys.spikes, value_current)), strict=True):
        state, value = loop(step, state, k, i_v, recompute_every=RECOMPUTE_EVERY)  # one pair
        memories.append(state[0])
        values.append(value)
    return memories, keys, Activity(*(torch.cat(series, dim=1) for series in zip(*values, strict=True)))


class ReadingLayer(nn.Module):
    """Recalls what belongs to a query. `W` is M x (E + M): it drives the keys from the query and from the values (feedback)."""

    def __init__(self, embedding_size: int, memory_size: int, dynamics: Dynamics):
        super().__init__()
        self.dynamics = dynamics
        self.W = nn.Parameter(nn.init.xavier_uniform_(torch.empty(memory_size, embedding_size + memory_size), gain=XAVIER_GAIN))

    def forward(self, query: Tensor, memory: Tensor, loop=through_time) -> tuple[Activity, Activity]:
        """Read from a memory, which stays as it is.

        Args:
            query: spikes of the encoding population, B x T x E.
            memory: B x M x M, values x keys.
            loop: what applies a step at every time step, as `through_time` does.

        Returns:
            The key and value neurons in time.
        """
        from_query, from_values = self.W.split([query.shape[-1], self.W.shape[0]], dim=1)
        return hebbian_read(linear(query, from_query), memory, from_values, self.dynamics, loop)


def hebbian_read(
    query_current: Tensor, memory: Tensor, feedback_weight: Tensor, dynamics: Dynamics, loop=through_time
) -> tuple[Activity, Activity]:
    """At each time step t, with no value spikes before step 0:

        k(t) = LIF(i_q(t) + W_feedback v(t - readout_delay))
        v(t) = LIF(W k(t))

    Args:
        query_current: i_q, B x T x M.
        memory: W, B x M x M (values x keys).
        feedback_weight: W_feedback, M x M, from value neurons to key neurons.
    """
    neuron = dynamics.neuron

    def step(state, current):
        key, value, delayed = state
        key = neuron.step(current + linear(delayed[0], feedback_weight), key)
        value = neuron.step((memory @ key.spikes.unsqueeze(-1)).squeeze(-1), value)
        return (key, value, (*delayed[1:], value.spikes)), (key.spikes, key.membrane, value.spikes, value.membrane)

    rest, steps = neuron.initial_state(query_current[:, 0]), query_current.shape[1]
    silence = torch.zeros_like(query_current[:, 0])
    # A delay of all time steps or more is one that nothing comes through.
    _, outputs = loop(step, (rest, rest, (silence,) * min(dynamics.readout_delay, steps)), query_current)
    return Activity(*outputs[:2]), Activity(*outputs[2:])
