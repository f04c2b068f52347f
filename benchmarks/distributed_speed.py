#!/usr/bin/env python3
"""Samples per second against the number of processes that share the cores of this machine, and the cost of the exchange.

python benchmarks/distributed_speed.py --processes 1 2 --batch_size 512 --rounds 5

All processes live at the same time and train in turns, round by round, so that other work on the machine weighs on all alike.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch.distributed as dist

import data
import memorizing_associations_task as task
import models
from utils import distributed
from utils.options import TASK_GROUPS, Parser

EPOCH = 1  # the first one with the activity regularization


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="in all")
    parser.add_argument("--batch_size", type=int, default=512, help="of all processes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="in a round")
    args = parser.parse_args()
    print(f"batch {args.batch_size}, {args.threads} threads in all")

    groups = [Group(size, args.threads // size, args.batch_size) for size in args.processes]
    for group in groups:
        group.run("steps", 2)  # warm up
    seconds = [[group.run("steps", args.steps) / args.steps for group in groups] for _ in range(args.rounds)]
    for number, group in enumerate(groups):
        step = statistics.median(line[number] for line in seconds)
        ratio = statistics.median(line[0] / line[number] for line in seconds)
        print(
            f"{group.size} x {group.threads} threads: {args.batch_size / step:7,.0f} samples/s, {ratio:6.1%} of the first",
            end="",
        )
        if group.size > 1:
            exchange = statistics.median(group.run("exchange", 20) / 20 for _ in range(args.rounds))
            print(f", exchange {1e3 * exchange:.2f} ms of {1e3 * step:.0f} ms a step ({exchange / step:.1%})", end="")
        print()
        group.run("end", 0)


class Group:
    """Processes that train one network together, on command."""

    def __init__(self, size: int, threads: int, batch_size: int):
        self.size, self.threads = size, threads
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        pairs = [mp.get_context("spawn").Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pairs]
        theirs = [pipe for _, pipe in pairs]
        mp.spawn(work, (size, threads, batch_size, self._store.port, theirs), size, join=False)

    def run(self, what: str, times: int) -> float:
        """Seconds that the slowest process took."""
        for pipe in self._pipes:
            pipe.send((what, times))
        return max(pipe.recv() for pipe in self._pipes)


def work(rank: int, size: int, threads: int, batch_size: int, port: int, pipes) -> None:
    torch.set_num_threads(threads)
    dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", port), rank=rank, world_size=size)
    options = Parser("", TASK_GROUPS).parse([])
    torch.manual_seed(0)
    model = models.build_model(options.values)
    network = DistributedDataParallel(model) if size > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])
    sizes = (options["sequence_length"], options["num_classes"], options["feature_size"], options["dataset_seed"])
    batch = data.training_samples(*distributed.shard(0, batch_size), EPOCH, *sizes)
    gradients = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    rates = torch.zeros(3 * options["embedding_size"] + 4 * options["memory_size"])

    def steps(times: int) -> None:
        for _ in range(times):
            task.train_step(network, optimizer, batch, batch_size, EPOCH, options, "")
            distributed.all_reduce_max(0)

    def exchange(times: int) -> None:
        """What the processes send each other in a step."""
        for _ in range(times):
            distributed.all_reduce_sum(rates)
            distributed.all_reduce_sum(gradients)
            distributed.all_reduce_max(0)

    while True:
        what, times = pipes[rank].recv()
        if what == "end":
            pipes[rank].send(0.0)
            return
        dist.barrier()
        start = time.perf_counter()
        {"steps": steps, "exchange": exchange}[what](times)
        pipes[rank].send(time.perf_counter() - start)


if __name__ == "__main__":
    main()
