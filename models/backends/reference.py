"""The time loops in plain PyTorch. This file defines the meaning; every other backend must agree with it.

Shapes: B batch, L pairs in a sequence, T time steps an input is held, E embedding size, M memory size.
Source: arXiv:2205.11276, Fig. 1 and "Memorizing associations" in Methods.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from models.neurons import LIFNeuron, LIFState, lif_step
from models.plasticity import HebbianRule, hebbian_update, update_trace

# The recorded populations, under the names that rates and activity are given by.
POPULATIONS = (
    "features_encoded",
    "labels_encoded",
    "query_encoded",
    "write_key",
    "write_value",
    "read_key",
    "read_value",
)

# While gradients are kept, the writing loop is recomputed in segments of so many steps: memory grows with the number of
# segments plus the length of one, and one memory matrix a step is never kept.
SEGMENT_STEPS = 25


@dataclass(frozen=True)
class Dynamics:
    """All constants of the network in time."""

    num_time_steps: int = 100  # T, steps (ms) for which each input is held
    readout_delay: int = 1  # steps after which value spikes feed back to the reading keys
    memory_feedback: float = 0.2  # strength of the memory's output to the value neurons while writing
    readout_steps: int = 30  # value spikes of so many last steps are summed for the output
    neuron: LIFNeuron = field(default_factory=LIFNeuron)
    rule: HebbianRule = field(default_factory=HebbianRule)


class Recalled(NamedTuple):
    """What a backend returns."""

    readout: Tensor  # B x M, value spikes summed over the last steps of reading
    spike_counts: dict[str, Tensor]  # population -> B x neurons, differentiable
    activity: dict[str, Tensor] | None  # population -> spikes B x time x neurons, and "memory" B x M x M; detached


def lif(current: Tensor, steps: int, constants: LIFNeuron) -> Tensor:
    """A feed-forward LIF population, from rest.

    Args:
        current: B x inputs x neurons; every input is held for `steps` steps.

    Returns:
        Spikes, B x (inputs * steps) x neurons.
    """
    state = LIFState.at_rest(current[:, 0])
    spikes = []
    for held in current.unbind(1):
        for _ in range(steps):
            state = lif_step(held, state, constants)
            spikes.append(state.spikes)
    return torch.stack(spikes, dim=1)


def hebbian_write(key_current: Tensor, value_current: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor, Tensor]:
    """Write into an empty Hebbian memory.

    At each step, with the memory W as it was before: k = LIF(i_k), v = LIF(i_v + 0.2 W k); then the traces of k and v and the
    Hebbian update of W.

    Args:
        key_current, value_current: i_k and i_v, B x time x M.

    Returns:
        The memory after the last step (B x M x M, values x keys), key spikes and value spikes (B x time x M).
    """
    key_spikes = lif(key_current, 1, dynamics.neuron)  # keys do not depend on the memory
    memory, value_spikes = _RecomputedWrite.apply(key_spikes, value_current, dynamics)
    return memory, key_spikes, value_spikes


class _RecomputedWrite(torch.autograd.Function):
    """The writing loop, recomputed segment by segment for its gradient.

    `torch.utils.checkpoint` does the same, but the many small nodes it leaves between the large matrices fragment the heap
    until the process is as large as if every matrix were kept.
    """

    @staticmethod
    def forward(ctx, key_spikes: Tensor, value_current: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
        batch, _, size = key_spikes.shape
        trace = torch.zeros_like(key_spikes[:, 0])
        carry = (key_spikes.new_zeros(batch, size, size), *LIFState.at_rest(value_current[:, 0]), trace, trace)
        starts, values = [], []
        for k, i_v in zip(key_spikes.split(SEGMENT_STEPS, 1), value_current.split(SEGMENT_STEPS, 1), strict=True):
            if any(ctx.needs_input_grad):
                starts.append(carry)
            *carry, v = _write_segment(k, i_v, dynamics, *carry)
            values.append(v)
        ctx.dynamics, ctx.starts = dynamics, starts
        ctx.save_for_backward(key_spikes, value_current)
        return carry[0], torch.cat(values, dim=1)

    @staticmethod
    def backward(ctx, grad_memory: Tensor, grad_values: Tensor):
        key_spikes, value_current = ctx.saved_tensors
        zeros = torch.zeros_like(key_spikes[:, 0])
        grad_carry = (grad_memory, *[zeros] * 5)
        grad_keys, grad_currents = [], []
        segments = [x.split(SEGMENT_STEPS, 1) for x in (key_spikes, value_current, grad_values)]
        for k, i_v, grad_v, carry in reversed(list(zip(*segments, ctx.starts, strict=True))):
            inputs = [x.detach().requires_grad_() for x in (k, i_v, *carry)]
            with torch.enable_grad():
                outputs = _write_segment(*inputs[:2], ctx.dynamics, *inputs[2:])
            gradients = torch.autograd.grad(outputs, inputs, (*grad_carry, grad_v), allow_unused=True, materialize_grads=True)
            grad_keys.append(gradients[0])
            grad_currents.append(gradients[1])
            grad_carry = gradients[2:]
        return torch.cat(grad_keys[::-1], dim=1), torch.cat(grad_currents[::-1], dim=1), None


def _write_segment(key_spikes, value_current, dynamics, memory, z, v, r, value_trace, key_trace):
    state = LIFState(z, v, r)
    values = []
    for k, i_v in zip(key_spikes.unbind(1), value_current.unbind(1), strict=True):
        recalled = (memory @ k.unsqueeze(-1)).squeeze(-1)
        state = lif_step(i_v + dynamics.memory_feedback * recalled, state, dynamics.neuron)
        key_trace = update_trace(key_trace, k, dynamics.rule)
        value_trace = update_trace(value_trace, state.spikes, dynamics.rule)
        memory = hebbian_update(memory, value_trace, key_trace, dynamics.rule)
        values.append(state.spikes)
    return memory, *state, value_trace, key_trace, torch.stack(values, dim=1)


def hebbian_read(query_current: Tensor, memory: Tensor, feedback_weight: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """Read from a Hebbian memory, which stays as it is.

    At each step k(t) = LIF(i_q(t) + W_feedback v(t - readout_delay)), v(t) = LIF(W k(t)); no value spikes before step 0.

    Args:
        query_current: i_q, B x time x M.
        memory: W, B x M x M (values x keys).
        feedback_weight: W_feedback, M x M, from value neurons to key neurons.

    Returns:
        Key spikes and value spikes, B x time x M.
    """
    key = value = LIFState.at_rest(query_current[:, 0])
    keys, values = [], []
    for t, current in enumerate(query_current.unbind(1)):
        if t >= dynamics.readout_delay:
            current = current + linear(values[t - dynamics.readout_delay], feedback_weight)
        key = lif_step(current, key, dynamics.neuron)
        value = lif_step((memory @ key.spikes.unsqueeze(-1)).squeeze(-1), value, dynamics.neuron)
        keys.append(key.spikes)
        values.append(value.spikes)
    return torch.stack(keys, dim=1), torch.stack(values, dim=1)


def store_and_recall(
    features_current: Tensor,
    labels_current: Tensor,
    query_current: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    dynamics: Dynamics,
    record: bool = False,
) -> Recalled:
    """The whole network in time: encode the pairs, write them into the memory, encode the query, read.

    Args:
        features_current, labels_current: constant input currents of the encoding population, B x L x E.
        query_current: the same for the query, B x E.
        write_weight: 2M x 2E; first M rows to the keys, last M to the values; first E columns from vectors, last E from labels.
        read_weight: M x (E + M); first E columns from the query, last M from the value neurons.
        record: return the spikes of every population and the memory, too.
    """
    num_steps, constants = dynamics.num_time_steps, dynamics.neuron
    features = lif(features_current, num_steps, constants)
    labels = lif(labels_current, num_steps, constants)
    query = lif(query_current.unsqueeze(1), num_steps, constants)

    embedding_size = query.shape[-1]
    key_current, value_current = linear(torch.cat([features, labels], dim=-1), write_weight).chunk(2, dim=-1)
    memory, write_key, write_value = hebbian_write(key_current, value_current, dynamics)
    from_query, from_values = read_weight[:, :embedding_size], read_weight[:, embedding_size:]
    read_key, read_value = hebbian_read(linear(query, from_query), memory, from_values, dynamics)

    spikes = dict(zip(POPULATIONS, (features, labels, query, write_key, write_value, read_key, read_value), strict=True))
    return Recalled(
        readout=read_value[:, -dynamics.readout_steps :].sum(1),
        spike_counts={name: z.sum(1) for name, z in spikes.items()},
        activity={name: z.detach() for name, z in (spikes | {"memory": memory}).items()} if record else None,
    )


def unavailable(device_type: str) -> None:
    """Runs everywhere."""
    return None
