"""Several processes that train one network, by `torch.distributed`. Without a process group, all of this is the one process."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

_CPU = torch.device("cpu")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among all of all nodes."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes files."""
    return rank() == 0


def shard(start: int, stop: int) -> tuple[int, int]:
    """The part of a range of samples that is this process's; the parts of all processes make up the range. It may be empty."""
    size = stop - start
    return start + size * rank() // world_size(), start + size * (rank() + 1) // world_size()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum over the processes. Not differentiated through."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_reduce_max(number: int) -> int:
    """The greatest of the processes' numbers."""
    if world_size() == 1:
        return number
    value = torch.tensor(number, device=_CPU)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return int(value)


def broadcast_object(value: Any) -> Any:
    """What the main process holds here; the others' is ignored."""
    if world_size() == 1:
        return value
    holder = [value if is_main() else None]
    dist.broadcast_object_list(holder, src=0, device=_CPU)
    return holder[0]


def print_rank0(message: str) -> None:
    """Print a line on the main process, above a progress bar."""
    if is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def batch_mean(values: dict[str, Tensor], batch_size: int) -> dict[str, Tensor]:
    """Means over a batch that is spread over the processes, for each name 1 x N from this process's part (n x N).

    The gradient goes to this process's samples: summed over the processes it is that of the mean over the whole batch.
    """
    local = {name: value.sum(0) / batch_size for name, value in values.items()}
    if world_size() == 1:
        return {name: mean.unsqueeze(0) for name, mean in local.items()}
    everywhere = all_reduce_sum(torch.cat(list(local.values()))).split([len(mean) for mean in local.values()])
    return {
        name: (mean + (whole - mean).detach()).unsqueeze(0)
        for (name, mean), whole in zip(local.items(), everywhere, strict=True)
    }
