"""Several processes that train one network, by `torch.distributed`. Without a process group, the only process has rank 0."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among the processes of all nodes."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this is the process that prints, logs and writes files."""
    return rank() == 0


def shard(start: int, stop: int) -> tuple[int, int]:
    """This process's part of a range of samples, which may be empty. The parts of all processes make up the range."""
    size = stop - start
    return start + size * rank() // world_size(), start + size * (rank() + 1) // world_size()


def all_reduce(values: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum over the processes, or the result of another `op`, without a gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values, op)
    return values


def all_reduce_max(number: int) -> int:
    """The greatest of the processes' numbers."""
    return int(all_reduce(torch.tensor(number), dist.ReduceOp.MAX))


def broadcast_object(value: Any) -> Any:
    """The main process's value, in every process."""
    if world_size() == 1:
        return value
    holder = [value if is_main() else None]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]


def print_rank0(message: str) -> None:
    """Print a line on the main process, above a progress bar."""
    if is_main():
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


def batch_mean(values: dict[str, Tensor], batch_size: int) -> dict[str, Tensor]:
    """Means over a batch that is spread over the processes: for each name 1 x N, from this process's part (n x N).

    The gradient goes to this process's samples. Summed over the processes, it is the gradient of the mean over the batch.
    """
    means = {}
    for name, value in values.items():
        own = value.sum(0, keepdim=True) / batch_size
        means[name] = own + (all_reduce(own) - own).detach()
    return means
