"""The time loops as fused GPU kernels in Triton, with cuBLAS products between them.

The three operations take the arguments of the plain ones, which define the meaning. Shapes as there: B batch, L pairs in a
sequence, T time steps an input is held, E embedding size, M memory size.

How time and GPU memory are spent:
- `lif`: one thread a neuron. The backward runs the forward again for the membranes, then time in reverse.
- `hebbian_write`: given the keys, a row of the memory (a value neuron) is independent of every other. A program is one warp;
  it holds a tile of rows in registers and walks through time. The memory is kept every SEGMENT steps, from where the backward
  replays. A program adds up the key gradients of its tiles, and those of several programs are summed in a fixed order, without
  atomics: two runs on one GPU give identical bits.
- `hebbian_read`: one program a sample, which reads from the memory (in cache) the columns of the neurons that fired.

With the environment variable TRITON_INTERPRET=1 the kernels run in Triton's interpreter, on a CPU too, thousands of times
slower. That is for tests; `auto` then takes this backend on any device.
"""

import os
from dataclasses import astuple, fields

import torch
from torch import Tensor
from torch.nn.functional import linear

from models.dynamics import POPULATIONS, Dynamics
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

try:
    import triton

    from models.backends.triton import kernels
except ImportError as error:
    kernels, IMPORT_ERROR = None, error

NEURONS_PER_PROGRAM = 128  # one thread a neuron
# The memory is kept every SEGMENT steps; the backward holds the UNROLLED states before as many steps at a time.
SEGMENT = 8
UNROLLED = 4
# Elements of a program's tile, and the registers that a thread may use: compiled for an H100 at memory size 100, next to
# nothing is spilled, and a multiprocessor holds 16 programs of the forward and 12 of the backward.
WRITE_TILE, WRITE_REGISTERS = 1024, 128
WRITE_BACKWARD_TILE, WRITE_BACKWARD_REGISTERS = 512, 168
READ_TILE = 4096
REGISTERS = 65536  # of a multiprocessor


def unavailable(device_type: str) -> str | None:
    """Why this backend cannot run on such a device here, in one line with the remedy, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not interpreted and (device_type != "cuda" or torch.version.hip):
        return "it runs on NVIDIA GPUs; use --device cuda there, or the cpp backend"
    if kernels is None:
        return f"Triton cannot be imported ({IMPORT_ERROR}); install it with `pip install triton`"
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"Triton {triton.__version__} is too old; install 3.6 or later, which comes with PyTorch 2.11"
    if not interpreted and not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; check nvidia-smi, CUDA_VISIBLE_DEVICES and that PyTorch is built for CUDA"
    return None


def lif(current: Tensor, steps: int, constants: LIFNeuron) -> Tensor:
    """`models.neurons.population`, its spikes."""
    return _lif(current, steps, astuple(constants))


def hebbian_write(key_current: Tensor, value_current: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor, Tensor]:
    """`models.hebbian_memory.hebbian_write`: the last memory, key spikes, value spikes."""
    key_spikes = lif(key_current, 1, dynamics.neuron)  # keys do not depend on the memory
    save = torch.is_grad_enabled()
    constants = astuple(dynamics.neuron), astuple(dynamics.rule)
    memory, value_spikes, *_ = _write(key_spikes, value_current, dynamics.memory_feedback, *constants, save)
    return memory, key_spikes, value_spikes


def hebbian_read(query_current: Tensor, memory: Tensor, feedback_weight: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor]:
    """`models.hebbian_memory.hebbian_read`: key spikes, value spikes."""
    return _read(query_current, memory, feedback_weight, dynamics.readout_delay, astuple(dynamics.neuron))[:2]


def store_and_recall(
    features_current: Tensor,
    labels_current: Tensor,
    query_current: Tensor,
    write_weight: Tensor,
    read_weight: Tensor,
    dynamics: Dynamics,
    record: bool = False,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor] | None]:
    """As `MemorizingAssociations.store_and_recall`, as a function of the weights."""
    num_steps, constants = dynamics.num_time_steps, dynamics.neuron
    embedding_size = query_current.shape[-1]
    encoded = lif(torch.cat([features_current, labels_current], dim=-1), num_steps, constants)
    query = lif(query_current.unsqueeze(1), num_steps, constants)

    to_keys, to_values = write_weight.chunk(2)
    memory, write_key, write_value = hebbian_write(linear(encoded, to_keys), linear(encoded, to_values), dynamics)
    from_query, from_values = read_weight[:, :embedding_size], read_weight[:, embedding_size:]
    read_key, read_value = hebbian_read(linear(query, from_query), memory, from_values, dynamics)

    spikes = dict(zip(POPULATIONS, (*encoded.chunk(2, -1), query, write_key, write_value, read_key, read_value), strict=True))
    return (
        read_value[:, -dynamics.readout_steps :].sum(1),
        {name: z.sum(1) for name, z in spikes.items()},
        {name: z.detach() for name, z in (spikes | {"memory": memory}).items()} if record else None,
    )


def _launch(kernel, programs: int, *args, **constants) -> None:
    with torch.cuda.device_of(args[0]):  # Triton launches on the current device
        kernel[(programs,)](*args, **constants, enable_fp_fusion=True)


def _constants(cls, values: list[float]):
    """The dataclass of constants that crossed torch.library as floats."""
    return cls(*(f.type(value) for f, value in zip(fields(cls), values, strict=True)))


def _without_gradient(ctx, outputs: list[Tensor]) -> None:
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)  # or PyTorch makes zeros of their sizes, as large as all that is kept


def _tile(size: int, elements: int) -> dict[str, int]:
    """Rows and columns of a tile of about so many elements that spans the columns of a size x size matrix."""
    columns = triton.next_power_of_2(size)
    return {"size": size, "columns": columns, "rows": max(1, min(columns, elements // columns))}


# A population of LIF neurons -------------------------------------------------------------------------------------------


@torch.library.custom_op("fused_triton::lif", mutates_args=())
def _lif(current: Tensor, steps: int, neuron: list[float]) -> Tensor:
    return _lif_forward(current.contiguous(), steps, neuron, membranes=False)


@torch.library.custom_op("fused_triton::lif_backward", mutates_args=())
def _lif_backward(grad_spikes: Tensor, current: Tensor, steps: int, neuron: list[float]) -> Tensor:
    current, grad_current = current.contiguous(), current.new_empty(current.shape)
    membranes = _lif_forward(current, steps, neuron, membranes=True)
    _each_neuron(
        kernels.lif_backward, grad_spikes.contiguous(), membranes, grad_current, like=current, steps=steps, neuron=neuron
    )
    return grad_current


def _lif_forward(current: Tensor, steps: int, neuron: list[float], membranes: bool) -> Tensor:
    batch, inputs, neurons = current.shape
    out = current.new_empty(batch, inputs * steps, neurons)
    _each_neuron(kernels.lif_forward, current, out, like=current, steps=steps, neuron=neuron, membranes=membranes)
    return out


def _each_neuron(kernel, *tensors: Tensor, like: Tensor, neuron: list[float], **constants) -> None:
    batch, inputs, neurons = like.shape
    _launch(
        kernel,
        triton.cdiv(batch * neurons, NEURONS_PER_PROGRAM),
        *tensors,
        inputs,
        batch * neurons,
        neurons=neurons,
        block=NEURONS_PER_PROGRAM,
        neuron=_constants(LIFNeuron, neuron),
        **constants,
    )


@_lif.register_fake
def _(current, steps, neuron):
    return current.new_empty(current.shape[0], current.shape[1] * steps, current.shape[2])


@_lif_backward.register_fake
def _(grad_spikes, current, steps, neuron):
    return current.new_empty(current.shape)


def _lif_setup(ctx, inputs, output):
    current, *ctx.constants = inputs
    ctx.save_for_backward(current)


def _lif_gradient(ctx, grad_spikes):
    return _lif_backward(grad_spikes, *ctx.saved_tensors, *ctx.constants), None, None


_lif.register_autograd(_lif_gradient, setup_context=_lif_setup)


# Writing ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fused_triton::hebbian_write", mutates_args=())
def _write(
    key_spikes: Tensor, current: Tensor, feedback: float, neuron: list[float], rule: list[float], save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The memory, the value spikes, and what the backward wants if `save`: traces of keys and values, membranes of the
    values, and the memory every SEGMENT steps."""
    key_spikes, current = key_spikes.contiguous(), current.contiguous()
    outputs = _write_outputs(current, save)
    batch, steps, size = current.shape
    tile = _tile(size, WRITE_TILE)
    _launch(
        kernels.write_forward,
        batch * triton.cdiv(size, tile["rows"]),
        key_spikes,
        current,
        *outputs,
        steps,
        **tile,
        segment=SEGMENT,
        feedback=feedback,
        neuron=_constants(LIFNeuron, neuron),
        rule=_constants(HebbianRule, rule),
        save=save,
        num_warps=1,
        maxnreg=WRITE_REGISTERS,
    )
    return outputs


def _write_outputs(current: Tensor, save: bool) -> tuple[Tensor, ...]:
    batch, steps, size = current.shape
    kept = steps if save else 0
    return (
        current.new_zeros(batch, size, size),
        current.new_empty(batch, steps, size),
        *(current.new_empty(batch, kept, size) for _ in range(3)),
        current.new_empty(batch, (kept + SEGMENT - 1) // SEGMENT, size, size),
    )


@torch.library.custom_op("fused_triton::hebbian_write_backward", mutates_args=())
def _write_backward(
    grad_memory: Tensor,
    grad_values: Tensor,
    key_spikes: Tensor,
    kept: list[Tensor],
    feedback: float,
    neuron: list[float],
    rule: list[float],
) -> tuple[Tensor, Tensor]:
    """Gradients of the key spikes and of the value current."""
    key_spikes = key_spikes.contiguous()
    batch, steps, size = key_spikes.shape
    tile = _tile(size, WRITE_BACKWARD_TILE)
    groups = min(triton.cdiv(size, tile["rows"]), _groups_that_fill(key_spikes.device, batch))
    grad_current, grad_keys = torch.empty_like(key_spikes), key_spikes.new_empty(groups, batch, steps, size)
    _launch(
        kernels.write_backward,
        batch * groups,
        grad_memory.contiguous(),
        grad_values.contiguous(),
        key_spikes,
        *kept,
        grad_current,
        grad_keys,
        batch,
        steps,
        groups,
        **tile,
        segment=SEGMENT,
        unrolled=UNROLLED,
        feedback=feedback,
        neuron=_constants(LIFNeuron, neuron),
        rule=_constants(HebbianRule, rule),
        num_warps=1,
        maxnreg=WRITE_BACKWARD_REGISTERS,
    )
    return grad_keys.sum(0), grad_current


@_write.register_fake
def _(key_spikes, current, feedback, neuron, rule, save):
    return _write_outputs(current, save)


@_write_backward.register_fake
def _(grad_memory, grad_values, key_spikes, *_):
    return key_spikes.new_empty(key_spikes.shape), key_spikes.new_empty(key_spikes.shape)


def _groups_that_fill(device: torch.device, batch: int) -> int:
    """Programs a sample that fill the GPU: more would only need more memory, for the gradients of the keys."""
    if device.type != "cuda":  # the interpreter
        return 2
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, multiprocessors * REGISTERS // (32 * WRITE_BACKWARD_REGISTERS) // max(1, batch))


def _write_setup(ctx, inputs, output):
    key_spikes, _, *ctx.constants, _ = inputs
    _, _, *kept = output
    _without_gradient(ctx, kept)
    ctx.save_for_backward(key_spikes, *kept)


def _write_gradient(ctx, grad_memory, grad_values, *_):
    key_spikes, *kept = ctx.saved_tensors
    batch, _, size = key_spikes.shape
    grad_memory = key_spikes.new_zeros(batch, size, size) if grad_memory is None else grad_memory
    grad_values = torch.zeros_like(key_spikes) if grad_values is None else grad_values
    return *_write_backward(grad_memory, grad_values, key_spikes, kept, *ctx.constants), None, None, None, None


_write.register_autograd(_write_gradient, setup_context=_write_setup)


# Reading ---------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("fused_triton::hebbian_read", mutates_args=())
def _read(
    current: Tensor, memory: Tensor, weight: Tensor, delay: int, neuron: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Key spikes, value spikes, and the membranes of both."""
    current = current.contiguous()
    outputs = tuple(torch.empty_like(current) for _ in range(4))
    batch, steps, size = current.shape
    _launch(
        kernels.read_forward,
        batch,
        current,
        memory.transpose(1, 2).contiguous(),
        weight.t().contiguous(),
        *outputs,
        steps,
        **_tile(size, READ_TILE),
        delay=delay,
        neuron=_constants(LIFNeuron, neuron),
    )
    return outputs


@torch.library.custom_op("fused_triton::hebbian_read_backward", mutates_args=())
def _read_backward(
    grad_keys: Tensor,
    grad_values: Tensor,
    key_membranes: Tensor,
    value_membranes: Tensor,
    memory: Tensor,
    weight: Tensor,
    delay: int,
    neuron: list[float],
) -> tuple[Tensor, Tensor]:
    """Gradients of the drives (input currents) of keys and values."""
    grad_drives = torch.empty_like(key_membranes), torch.empty_like(key_membranes)
    batch, steps, size = key_membranes.shape
    _launch(
        kernels.read_backward,
        batch,
        grad_keys.contiguous(),
        grad_values.contiguous(),
        key_membranes,
        value_membranes,
        memory.contiguous(),
        weight.contiguous(),
        *grad_drives,
        steps,
        **_tile(size, READ_TILE),
        delay=delay,
        neuron=_constants(LIFNeuron, neuron),
    )
    return grad_drives


@_read.register_fake
def _(current, memory, weight, delay, neuron):
    return tuple(current.new_empty(current.shape) for _ in range(4))


@_read_backward.register_fake
def _(grad_keys, grad_values, key_membranes, *_):
    return key_membranes.new_empty(key_membranes.shape), key_membranes.new_empty(key_membranes.shape)


def _read_setup(ctx, inputs, output):
    _, memory, weight, *ctx.constants = inputs
    keys, values, *membranes = output
    _without_gradient(ctx, membranes)
    ctx.save_for_backward(memory, weight, keys, values, *membranes)


def _read_gradient(ctx, grad_keys, grad_values, *_):
    memory, weight, keys, values, *membranes = ctx.saved_tensors
    delay, _ = ctx.constants
    grad_keys = torch.zeros_like(keys) if grad_keys is None else grad_keys
    grad_values = torch.zeros_like(keys) if grad_values is None else grad_values
    to_keys, to_values = _read_backward(grad_keys, grad_values, *membranes, memory, weight, *ctx.constants)
    grad_memory = to_values.transpose(1, 2) @ keys
    grad_weight = torch.einsum("bti,btj->ij", to_keys[:, delay:], values[:, : max(0, values.shape[1] - delay)])
    return to_keys, grad_memory, grad_weight, None, None


_read.register_autograd(_read_gradient, setup_context=_read_setup)
