"""The memory that a training needs, estimated before it starts. Shapes and names as in `models`.

The estimates count the largest arrays of each backend; benchmarks/faults.py holds them against measured peaks. That of `triton`
is counted from its buffers, not measured.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.kernels.reference import SEGMENT_STEPS
from utils.errors import UserError

_FLOAT = 4  # bytes
_START = 170 * 2**20  # what PyTorch loads with the first optimizer and the first backward pass
_CGROUP = Path("/sys/fs/cgroup")


def needed(backend: str, options: Mapping[str, Any], batch: int) -> int:
    """Bytes that a training with `batch` samples on a device will need beside what its process holds before."""
    L, C, F = (options[name] for name in ("sequence_length", "num_classes", "feature_size"))
    T, E, M = (options[name] for name in ("num_time_steps", "embedding_size", "memory_size"))
    steps = L * T
    weights = E * (F + C) + 4 * E * M + M * (E + M) + C * M
    sample = 8 * (L * F + C) * (options["workers"] * options["prefetch_factor"] + 2)  # batches made ahead
    if backend == "reference":
        # One memory for each segment, a few for each step of one; the states of every population at every step.
        memories = (steps // SEGMENT_STEPS + 4 * SEGMENT_STEPS) * _FLOAT * M**2
        return _START + 4 * _FLOAT * weights + batch * (sample + memories + 40 * steps * (2 * E + 3 * M))
    if backend == "cpp":
        # Gradients of the weights for each of 64 chunks of the batch; for each thread, one sample's states in time.
        a_thread = _FLOAT * (steps // 16 * M**2 + 8 * steps * (E + M))
        fixed = _FLOAT * weights * (64 + 4) + torch.get_num_threads() * a_thread
        return _START + fixed + batch * (sample + 3 * _FLOAT * (2 * L + 1) * E)
    arrays = steps * (10 * E + 11 * M) + (steps // 16 + 4) * M**2
    return 2**29 + 4 * _FLOAT * weights + batch * (sample + _FLOAT * arrays)


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
    shares = processes if device.type == "cuda" else 1  # GPUs share the batch; processes on CPUs share the memory

    def total(batch: int) -> int:
        return needed(backend, options, -(-batch // shares))

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
