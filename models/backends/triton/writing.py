"""Writing into the memory on the GPU.

Given the keys, the rows of the memory (value neurons) are independent. A program is one warp; it holds a tile of rows in
registers and walks through time. The memory is kept every SEGMENT steps, and the backward pass replays from there. Key
gradients are summed in a fixed order without atomics, over the tiles of a program, then over the programs: two runs on one GPU
give identical bits.
"""

from dataclasses import astuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.backends.derivatives import differentiable, not_differentiable
from models.backends.triton.common import (
    REGISTERS,
    dataclass_of,
    hebbian_step,
    launch,
    lif_adjoint,
    lif_step,
    tile_of,
    trace_step,
)
from models.backends.triton.population import lif
from models.dynamics import Dynamics
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule

# The memory is kept every SEGMENT steps; the backward pass holds the states before UNROLLED steps at a time.
SEGMENT = 8
UNROLLED = 4
# Elements of a program's tile, and the registers that a thread may use. Compiled for an H100 at memory size 100, almost
# no register is spilled. A multiprocessor holds 16 forward programs or 12 backward programs.
WRITE_TILE, WRITE_REGISTERS = 1024, 128
WRITE_BACKWARD_TILE, WRITE_BACKWARD_REGISTERS = 512, 168


def hebbian_write(key_current: Tensor, value_current: Tensor, dynamics: Dynamics) -> tuple[Tensor, Tensor, Tensor]:
    """`models.hebbian_memory.hebbian_write`: the last memory, key spikes, value spikes."""
    key_spikes = lif(key_current, 1, dynamics.neuron)  # keys do not depend on the memory
    save = torch.is_grad_enabled()
    constants = astuple(dynamics.neuron), astuple(dynamics.rule)
    memory, value_spikes, *_ = _store(key_spikes, value_current, dynamics.memory_feedback, *constants, save)
    return memory, key_spikes, value_spikes


@triton.jit(do_not_specialize=["steps"])
def write_forward(
    key_spikes,  # B x time x size
    current,  # B x time x size
    memory,  # B x size x size, written into
    value_spikes,  # B x time x size
    # For the backward pass, if `save`:
    key_traces,  # B x time x size
    value_traces,  # B x time x size
    membranes,  # B x time x size
    checkpoints,  # B x ceil(time / segment) x size x size, the memory before steps 0, segment, 2 segment, ...
    steps,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    segment: tl.constexpr,
    feedback: tl.constexpr,
    neuron: tl.constexpr,
    rule: tl.constexpr,
    save: tl.constexpr,
):
    tiles: tl.constexpr = (size + rows - 1) // rows
    tile = tl.program_id(0) % tiles
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    i = tile * rows + tl.arange(0, rows)
    j = tl.arange(0, columns)
    valid_i, valid_j = i < size, j < size
    valid = valid_i[:, None] & valid_j[None, :]
    ij = i[:, None] * size + j[None, :]
    memory += sample * size * size + ij
    segments = (steps + segment - 1) // segment

    w = tl.load(memory, valid, other=0.0)  # tl.zeros has another layout, and Triton would keep w in both
    kappa = tl.zeros((columns,), w.dtype)
    z = tl.zeros((rows,), w.dtype)
    v, nu = z, z
    r = tl.zeros((rows,), tl.int32)
    for t in range(steps):
        now = (sample * steps + t) * size
        if save and t % segment == 0:
            tl.store(checkpoints + (sample * segments + t // segment) * size * size + ij, w, valid)
        k = tl.load(key_spikes + now + j, valid_j, other=0.0)
        drive = tl.load(current + now + i, valid_i, other=0.0) + feedback * tl.sum(w * k[None, :], 1)
        z, v, r, membrane = lif_step(drive, z, v, r, neuron)
        kappa = trace_step(kappa, k, rule)
        nu = trace_step(nu, z, rule)
        w = hebbian_step(w, nu, kappa, rule)
        tl.store(value_spikes + now + i, z, valid_i)
        if save:
            tl.store(value_traces + now + i, nu, valid_i)
            tl.store(membranes + now + i, membrane, valid_i)
            tl.store(key_traces + now + j, kappa, j < tl.where(tile == 0, size, 0))
    tl.store(memory, w, valid)


@triton.jit(do_not_specialize=["batch", "steps", "groups"])
def write_backward(
    grad_memory,  # B x size x size
    grad_values,  # B x time x size
    key_spikes,  # B x time x size
    key_traces,  # of write_forward, like the next three
    value_traces,
    membranes,
    checkpoints,
    grad_current,  # B x time x size
    grad_keys,  # groups x B x time x size, to be summed over the groups
    batch,
    steps,
    groups,  # programs that share a sample's tiles
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    segment: tl.constexpr,  # a multiple of `unrolled`
    unrolled: tl.constexpr,
    feedback: tl.constexpr,
    neuron: tl.constexpr,
    rule: tl.constexpr,
):
    dtype = grad_memory.dtype.element_ty
    group = tl.program_id(0) % groups
    sample = (tl.program_id(0) // groups).to(tl.int64)
    j = tl.arange(0, columns)
    valid_j = j < size
    segments = (steps + segment - 1) // segment
    grad_keys += group.to(tl.int64) * batch * steps * size

    for tile in range(group, (size + rows - 1) // rows, groups):
        i = tile * rows + tl.arange(0, rows)
        valid_i = i < size
        valid = valid_i[:, None] & valid_j[None, :]
        ij = i[:, None] * size + j[None, :]
        tl.debug_barrier()  # the key gradients of the last tile are written before this one adds to them

        grad_w = tl.load(grad_memory + sample * size * size + ij, valid, other=0.0)
        grad_v = tl.zeros((rows,), dtype)
        grad_nu = tl.zeros((rows,), dtype)
        grad_kappa = tl.zeros((columns,), dtype)
        for chunk in range((steps - 1) // unrolled, -1, -1):
            # Replay from the last memory kept to the `unrolled` states before the steps of this chunk.
            start = chunk * unrolled
            w = tl.load(checkpoints + (sample * segments + start // segment) * size * size + ij, valid, other=0.0)
            for t in range(start // segment * segment, start):
                now = (sample * steps + t) * size
                nu = tl.load(value_traces + now + i, valid_i, other=0.0)
                kappa = tl.load(key_traces + now + j, valid_j, other=0.0)
                w = hebbian_step(w, nu, kappa, rule)
            # Steps past the last one load zeros, which change neither the memory nor a gradient.
            before, nus, kappas = (), (), ()
            for n in tl.static_range(unrolled):
                now = (sample * steps + start + n) * size
                limit = tl.where(start + n < steps, size, 0)
                nu = tl.load(value_traces + now + i, i < limit, other=0.0)
                kappa = tl.load(key_traces + now + j, j < limit, other=0.0)
                before, nus, kappas = before + (w,), nus + (nu,), kappas + (kappa,)  # type: ignore[assignment]  # noqa: RUF005 (Triton cannot unpack)
                w = hebbian_step(w, nu, kappa, rule)

            for n in tl.static_range(unrolled - 1, -1, -1):
                now = (sample * steps + start + n) * size
                limit = tl.where(start + n < steps, size, 0)
                w, nu, kappa = before[n], nus[n], kappas[n]
                room = rule.w_max - w
                scaled = grad_w * (rule.gamma_pos * nu)[:, None]
                grad_nu = rule.beta * grad_nu + rule.gamma_pos * tl.sum(grad_w * kappa[None, :] * room, 1)
                grad_kappa = rule.beta * grad_kappa + tl.sum(scaled * room, 0)
                grad_kappa -= 2 * rule.gamma_neg * kappa * tl.sum(grad_w * w, 0)

                grad_z = tl.load(grad_values + now + i, i < limit, other=0.0) + (1 - rule.beta) * grad_nu
                membrane = tl.load(membranes + now + i, i < limit, other=0.0)
                grad_v = lif_adjoint(grad_z, membrane, grad_v, neuron)
                grad_drive = (1 - neuron.alpha) * grad_v
                tl.store(grad_current + now + i, grad_drive, i < limit)

                # Recompute the derivative of W' by W: the factors of all states would not fit into the registers.
                k = tl.load(key_spikes + now + j, j < limit, other=0.0)
                grad_w = grad_w * (1 - rule.gamma_neg * kappa * kappa)[None, :] - scaled * kappa[None, :]
                grad_w += (feedback * grad_drive)[:, None] * k[None, :]

                grad_k = (1 - rule.beta) * grad_kappa + feedback * tl.sum(w * grad_drive[:, None], 0)
                grad_k += tl.load(grad_keys + now + j, j < tl.where(tile == group, 0, limit), other=0.0)
                tl.store(grad_keys + now + j, grad_k, j < limit)


@torch.library.custom_op("fused_triton::hebbian_write", mutates_args=())
def _write(
    key_spikes: Tensor, current: Tensor, feedback: float, neuron: list[float], rule: list[float], save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The memory and the value spikes. With `save`, also for the backward pass: traces of keys and values, membranes of the
    values, and the memory every SEGMENT steps."""
    key_spikes, current = key_spikes.contiguous(), current.contiguous()
    outputs = _write_outputs(current, save)
    batch, steps, size = current.shape
    tile = tile_of(size, WRITE_TILE)
    launch(
        write_forward,
        batch * triton.cdiv(size, tile["rows"]),
        key_spikes,
        current,
        *outputs,
        steps,
        **tile,
        segment=SEGMENT,
        feedback=feedback,
        neuron=dataclass_of(LIFNeuron, neuron),
        rule=dataclass_of(HebbianRule, rule),
        save=save,
        num_warps=1,
        maxnreg=WRITE_REGISTERS,
    )
    return outputs


def _write_outputs(current: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, steps, size = current.shape
    kept = steps if save else 0
    return (
        current.new_zeros(batch, size, size),
        current.new_empty(batch, steps, size),
        current.new_empty(batch, kept, size),
        current.new_empty(batch, kept, size),
        current.new_empty(batch, kept, size),
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
    tile = tile_of(size, WRITE_BACKWARD_TILE)
    groups = min(triton.cdiv(size, tile["rows"]), _groups_that_fill(key_spikes.device, batch))
    grad_current, grad_keys = torch.empty_like(key_spikes), key_spikes.new_empty(groups, batch, steps, size)
    launch(
        write_backward,
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
        neuron=dataclass_of(LIFNeuron, neuron),
        rule=dataclass_of(HebbianRule, rule),
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
    """Programs per sample that fill the GPU: more programs would only need more memory, for the gradients of the keys."""
    if device.type != "cuda":  # the interpreter
        return 2
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, multiprocessors * REGISTERS // (32 * WRITE_BACKWARD_REGISTERS) // max(1, batch))


def _write_setup(ctx, inputs, output):
    key_spikes, _, *ctx.constants, _ = inputs
    _, _, *kept = output
    ctx.set_materialize_grads(False)  # or PyTorch would make zeros for all kept tensors
    ctx.save_for_backward(key_spikes, *kept)


def _write_gradient(ctx, grad_memory, grad_values, *_):
    key_spikes, *kept = ctx.saved_tensors
    batch, _, size = key_spikes.shape
    grad_memory = key_spikes.new_zeros(batch, size, size) if grad_memory is None else grad_memory
    grad_values = torch.zeros_like(key_spikes) if grad_values is None else grad_values
    return *_write_backward_once(grad_memory, grad_values, key_spikes, kept, *ctx.constants), None, None, None, None


_write_backward_once = not_differentiable(torch.ops.fused_triton.hebbian_write_backward.default)
_store = differentiable(torch.ops.fused_triton.hebbian_write.default, _write_setup, _write_gradient)
