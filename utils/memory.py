"""The memory that a training needs, estimated before it starts. Shapes and names as in `models`.

The estimates count the largest arrays of each backend; benchmarks/faults.py holds them against measured peaks. That of `triton`
is counted from its buffers, not measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.hebbian_memory import RECOMPUTE_EVERY as SEGMENT_STEPS
from utils.errors import UserError

_FLOAT = 4  # bytes
_START = 160 * 2**20  # what PyTorch loads with the first optimizer and the first backward pass
_CGROUP = Path("/sys/fs/cgroup")


def needed(backend: str, options: Mapping[str, Any], batch: int) -> int:
    """Bytes that a training with `batch` samples on a device will need beside what its process holds before."""
    C, F, E, M = (options[name] for name in ("num_classes", "feature_size", "embedding_size", "memory_size"))
    weights = E * (F + C) + 4 * E * M + M * (E + M) + C * M
    fixed = 4 * _FLOAT * weights + _batches(options, batch)  # of each weight: itself, its gradient, two moments of Adam
    match backend:
        case "reference":
            return _START + fixed + _reference(options, batch)
        case "cpp":
            return _START + fixed + _cpp(options, batch)
        case _:
            return 2**29 + fixed + _triton(options, batch)


def _batches(options: Mapping[str, Any], batch: int) -> int:
    """Batches of samples made ahead, and the random numbers that each worker makes one from."""
    L, C, F, workers = (options[name] for name in ("sequence_length", "num_classes", "feature_size", "workers"))
    a_sample = _FLOAT * (L * F + F) + 8 * (L + 1)
    return batch * ((workers * options["prefetch_factor"] + 2) * a_sample + max(workers, 1) * 8 * (L * F + 2 * C))


def _reference(options: Mapping[str, Any], batch: int) -> int:
    L, T, E, M = (options[name] for name in ("sequence_length", "num_time_steps", "embedding_size", "memory_size"))
    steps, memory = L * T, _FLOAT * batch * M**2
    # Three of the memory's size for each step of a segment; temporary ones leave holes between small objects in the C library's
    # heap, which takes what is below 32 MiB (found by measurement, glibc).
    in_a_segment = 320 if memory < 2**22 else 125 if memory < 2**25 else 3 * SEGMENT_STEPS + 5
    nodes = 33_000 * steps  # of the graph; their size does not depend on the batch
    return (steps // SEGMENT_STEPS + in_a_segment) * memory + nodes + batch * steps * (2 * E * 28 + 2 * M * 24)


def _cpp(options: Mapping[str, Any], batch: int) -> int:
    """Of store_and_recall.cpp: the largest buffers of `Sample`, once a thread, and the `Weights` of every part of a batch."""
    L, T, E, M = (options[name] for name in ("sequence_length", "num_time_steps", "embedding_size", "memory_size"))
    steps = L * T
    Ep, Mp = (-(-size // 16) * 16 for size in (E, M))  # whole vectors
    for_slopes = 3 if options["perfect_reset"] else 1  # of each LIF neuron at each step: slopes, and carries and resets
    in_time = steps * (for_slopes * 2 * (Ep + Mp) + 2 * Mp)
    columns = steps // 16 * M * Mp * 3 // 4  # before every segment; of neurons that have not fired there are none
    a_thread = in_time + columns + 3 * M * Mp + 8 * Ep * Mp
    a_part = 5 * Ep * Mp + Mp**2
    a_sample = 4 * L * E + 2 * (3 * E + 5 * M)  # currents, spike counts and their gradients
    return _FLOAT * (min(batch, torch.get_num_threads()) * a_thread + min(batch, 64) * a_part + batch * a_sample)


def _triton(options: Mapping[str, Any], batch: int) -> int:
    L, T, E, M = (options[name] for name in ("sequence_length", "num_time_steps", "embedding_size", "memory_size"))
    from models.backends.triton import SEGMENT  # loaded already where this backend runs

    steps = L * T
    return _FLOAT * batch * (steps * (10 * E + 11 * M) + (steps // SEGMENT + 4) * M**2)


def available(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, or None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((_CGROUP / "memory.current").read_text()))
    except OSError:
        pass  # no Linux, or no limit
    return min(found, default=None)


def check(backend: str, device: torch.device, options: Mapping[str, Any], processes: int) -> None:
    """See that the training of `processes` processes on this node fits.

    Raises:
        UserError: it does not; the message says which batch would.
    """
    there = available(device)
    if there is None:
        return

    def total(batch: int) -> int:
        a_process = needed(backend, options, -(-batch // processes))
        return a_process if device.type == "cuda" else processes * a_process  # processes on CPUs share the memory

    batch = options["batch_size"]
    if total(batch) <= there:
        return
    fitting = batch
    while fitting and total(fitting) > there:
        fitting //= 2
    raise UserError(
        f"--batch_size {batch} needs about {total(batch) / 2**30:.1f} GiB with the {backend} backend, of which "
        f"{there / 2**30:.1f} GiB are free; "
        + (f"--batch_size {fitting} would fit" if fitting else "no batch fits: choose a smaller network or another --backend")
    )
