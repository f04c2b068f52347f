"""Device code of the Triton backend. What each kernel computes is defined by `reference`; `triton` launches them.

Every tensor is contiguous, time before neurons. Constants are compile-time values, the dataclasses of `models.neurons` and
`models.plasticity`; sizes that change from batch to batch are not (`do_not_specialize`). Symbols as there: z, v, r of a
neuron, k and kappa of a key, nu of a value, w of the memory.
"""

import triton
import triton.language as tl

AHEAD = tl.constexpr(8)  # loads in flight: a step of a feed-forward population takes far less than a load

# ------------------------------------------------------------------------------------------------------------ equations


@triton.jit
def lif_step(current, z, v, r, neuron: tl.constexpr):
    """`models.neurons.lif_step`. Returns z', v', r' and the membrane that `lif_adjoint` wants.

    That one is 0 while the neuron is refractory: there the surrogate derivative vanishes, as it does for masked spikes.
    """
    if neuron.perfect_reset:
        v = neuron.alpha * v * (1 - z) + (1 - neuron.alpha) * current
    else:
        v = neuron.alpha * v + (1 - neuron.alpha) * current - neuron.thr * z
    may_fire = r == 0
    fires = may_fire & (v - neuron.thr > 0)  # not v > thr: Triton 3.6 rounds a constant that it compares with to float32
    r = tl.where(may_fire, tl.where(fires, neuron.refractory_time_steps, 0), r - 1)
    return fires.to(v.dtype), v, r, tl.where(may_fire, v, 0.0)


@triton.jit
def lif_adjoint(grad_z, v, grad_v, neuron: tl.constexpr):
    """Gradient of the membrane at t, from those of the spikes at t and of the membrane at t + 1.

    (1 - alpha) times it is the gradient of the current.
    """
    u = v * (1 / neuron.thr) - 1
    surrogate = neuron.dampening_factor * tl.maximum(1 - tl.abs(u), 0.0)
    if neuron.perfect_reset:
        z = (u > 0).to(v.dtype)
        grad_z -= neuron.alpha * v * grad_v
        grad_v = neuron.alpha * grad_v * (1 - z)
    else:
        grad_z -= neuron.thr * grad_v
        grad_v = neuron.alpha * grad_v
    return grad_v + grad_z * surrogate * (1 / neuron.thr)


@triton.jit
def trace_step(trace, z, rule: tl.constexpr):
    """`models.plasticity.update_trace`."""
    return rule.beta * trace + (1 - rule.beta) * z


@triton.jit
def hebbian_step(w, nu, kappa, rule: tl.constexpr):
    """`models.plasticity.hebbian_update`, in a form of few operations that keeps an untouched weight at exactly 0."""
    gain = (rule.gamma_pos * nu)[:, None] * kappa[None, :]
    return ((1 - rule.gamma_neg * kappa * kappa)[None, :] - gain) * w + rule.w_max * gain


# --------------------------------------------------------------------------------------------- feed-forward populations


@triton.jit(do_not_specialize=["inputs", "total"])
def lif_forward(
    current,  # B x inputs x neurons, each held for `steps` steps
    out,  # B x (inputs * steps) x neurons: the membranes for the adjoint if `membranes`, else the spikes
    inputs,
    total,  # B * neurons
    steps: tl.constexpr,
    neurons: tl.constexpr,
    block: tl.constexpr,
    neuron: tl.constexpr,
    membranes: tl.constexpr,
):
    n = tl.program_id(0) * block + tl.arange(0, block)
    valid = n < total
    sample = (n // neurons).to(tl.int64)
    current += sample * inputs * neurons + n % neurons
    out += sample * inputs * steps * neurons + n % neurons

    z = tl.zeros((block,), current.dtype.element_ty)
    v = z
    r = tl.zeros((block,), tl.int32)
    for t in tl.range(inputs * steps, num_stages=AHEAD):
        held = tl.load(current + t // steps * neurons, valid, other=0.0)
        z, v, r, membrane = lif_step(held, z, v, r, neuron)
        tl.store(out + t * neurons, membrane if membranes else z, valid)


@triton.jit(do_not_specialize=["inputs", "total"])
def lif_backward(
    grad_spikes,  # B x (inputs * steps) x neurons
    membranes,  # of lif_forward
    grad_current,  # B x inputs x neurons
    inputs,
    total,
    steps: tl.constexpr,
    neurons: tl.constexpr,
    block: tl.constexpr,
    neuron: tl.constexpr,
):
    n = tl.program_id(0) * block + tl.arange(0, block)
    valid = n < total
    sample = (n // neurons).to(tl.int64)
    grad_spikes += sample * inputs * steps * neurons + n % neurons
    membranes += sample * inputs * steps * neurons + n % neurons
    grad_current += sample * inputs * neurons + n % neurons

    grad_v = tl.zeros((block,), grad_spikes.dtype.element_ty)
    summed = grad_v
    for t in tl.range(inputs * steps - 1, -1, -1, num_stages=AHEAD):
        grad_z = tl.load(grad_spikes + t * neurons, valid, other=0.0)
        grad_v = lif_adjoint(grad_z, tl.load(membranes + t * neurons, valid, other=0.0), grad_v, neuron)
        summed += grad_v
        if t % steps == 0:
            tl.store(grad_current + t // steps * neurons, (1 - neuron.alpha) * summed, valid)
            summed = tl.zeros((block,), grad_v.dtype)


# -------------------------------------------------------------------------------------------------------------- writing


@triton.jit(do_not_specialize=["steps"])
def write_forward(
    key_spikes,  # B x time x size
    current,  # B x time x size
    memory,  # B x size x size, written into
    value_spikes,  # B x time x size
    # What the backward wants, if `save`:
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
    groups,  # a sample's tiles are shared among so many programs
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
            # Steps past the last one load zeros: there the memory stays as it is and no gradient arises.
            before, nus, kappas = (), (), ()
            for n in tl.static_range(unrolled):
                now = (sample * steps + start + n) * size
                limit = tl.where(start + n < steps, size, 0)
                nu = tl.load(value_traces + now + i, i < limit, other=0.0)
                kappa = tl.load(key_traces + now + j, j < limit, other=0.0)
                before, nus, kappas = before + (w,), nus + (nu,), kappas + (kappa,)  # noqa: RUF005 (Triton cannot unpack)
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

                # The derivative of W' by W anew: the factors of all states would not fit into the registers.
                k = tl.load(key_spikes + now + j, j < limit, other=0.0)
                grad_w = grad_w * (1 - rule.gamma_neg * kappa * kappa)[None, :] - scaled * kappa[None, :]
                grad_w += (feedback * grad_drive)[:, None] * k[None, :]

                grad_k = (1 - rule.beta) * grad_kappa + feedback * tl.sum(w * grad_drive[:, None], 0)
                grad_k += tl.load(grad_keys + now + j, j < tl.where(tile == group, 0, limit), other=0.0)
                tl.store(grad_keys + now + j, grad_k, j < limit)


# -------------------------------------------------------------------------------------------------------------- reading


@triton.jit
def product(vector, matrix, size: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """sum_r vector[r] * matrix[r, c] for all c; rows where the vector is 0 are not read."""
    c = tl.arange(0, columns)
    total = tl.zeros((rows, columns), matrix.dtype.element_ty)
    for first in range(0, size, rows):
        r = first + tl.arange(0, rows)
        x = tl.load(vector + r, r < size, other=0.0)
        wanted = (x != 0)[:, None] & (c < size)[None, :]
        total += x[:, None] * tl.load(matrix + r[:, None] * size + c[None, :], wanted, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["steps"])
def read_forward(
    current,  # B x time x size
    memory,  # B x size x size, keys x values (transposed)
    weight,  # size x size, values x keys (transposed)
    key_spikes,  # B x time x size, like all below
    value_spikes,
    key_membranes,
    value_membranes,
    steps,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    delay: tl.constexpr,
    neuron: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    memory += sample * size * size
    n = tl.arange(0, columns)
    valid = n < size
    k_z = tl.zeros((columns,), memory.dtype.element_ty)
    k_v, v_z, v_v = k_z, k_z, k_z
    k_r = tl.zeros((columns,), tl.int32)
    v_r = k_r
    for t in range(steps):
        now = (sample * steps + t) * size
        drive = tl.load(current + now + n, valid, other=0.0)
        if t >= delay:
            drive += product(value_spikes + now - delay * size, weight, size, rows, columns)
        k_z, k_v, k_r, membrane = lif_step(drive, k_z, k_v, k_r, neuron)
        tl.store(key_spikes + now + n, k_z, valid)
        tl.store(key_membranes + now + n, membrane, valid)
        tl.debug_barrier()  # other threads read these spikes

        drive = product(key_spikes + now, memory, size, rows, columns)
        v_z, v_v, v_r, membrane = lif_step(drive, v_z, v_v, v_r, neuron)
        tl.store(value_spikes + now + n, v_z, valid)
        tl.store(value_membranes + now + n, membrane, valid)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["steps"])
def read_backward(
    grad_keys,  # B x time x size
    grad_values,  # B x time x size
    key_membranes,  # of read_forward
    value_membranes,
    memory,  # B x size x size, values x keys
    weight,  # size x size, keys x values
    grad_key_drive,  # B x time x size
    grad_value_drive,  # B x time x size
    steps,
    size: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    delay: tl.constexpr,
    neuron: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    memory += sample * size * size
    n = tl.arange(0, columns)
    valid = n < size
    grad_k_v = tl.zeros((columns,), memory.dtype.element_ty)
    grad_v_v = grad_k_v
    for t in range(steps - 1, -1, -1):
        now = (sample * steps + t) * size
        grad_z = tl.load(grad_values + now + n, valid, other=0.0)
        if t + delay < steps:
            grad_z += product(grad_key_drive + now + delay * size, weight, size, rows, columns)
        grad_v_v = lif_adjoint(grad_z, tl.load(value_membranes + now + n, valid, other=0.0), grad_v_v, neuron)
        tl.store(grad_value_drive + now + n, (1 - neuron.alpha) * grad_v_v, valid)
        tl.debug_barrier()  # other threads read these gradients

        grad_z = tl.load(grad_keys + now + n, valid, other=0.0)
        grad_z += product(grad_value_drive + now, memory, size, rows, columns)
        grad_k_v = lif_adjoint(grad_z, tl.load(key_membranes + now + n, valid, other=0.0), grad_k_v, neuron)
        tl.store(grad_key_drive + now + n, (1 - neuron.alpha) * grad_k_v, valid)
        tl.debug_barrier()
