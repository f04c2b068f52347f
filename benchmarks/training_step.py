"""Time and memory of one training step, for each backend, network, sequence length, batch, memory size, number of processes.

    python -m benchmarks.training_step --backends cpp reference --batches 64 512
    python -m benchmarks.training_step --networks pretrained/recipe-sequence_length10-seed2.pth.tar
    python -m benchmarks.training_step --backends cpp --batches 512 --processes 1 2

The kernels follow the spikes, so a step costs what the network's activity costs: a new network fires most, a trained one much
less. The step is the task script's own, from the second epoch (with the regularization of rates). Each case runs in a process
of its own, or in several that divide the batch and the threads. No speed is printed for a result that has not been checked:
first the backend's spikes and gradients are compared with the reference's in float64, with the network's own weights.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import data
import memorizing_associations_task as task
import models
from models import POPULATIONS
from utils import checkpoints, distributed
from utils.errors import UserError
from utils.options import MODEL, TASK_GROUPS, Parser

NEW = "new"
MEASURED = "s a step", "samples/s", "of a 4096³ product", "peak MiB", "exchange, ms"
EPOCH = 1  # the first one with the regularization


class Training:
    """The network of a case (new, from seed 0, or a checkpoint's) in training, on one batch after the other."""

    def __init__(self, case: dict, backend: str, device: str, dtype=torch.float32, **changes):
        self.options = Parser("", TASK_GROUPS).parse([])
        if case["network"] == NEW:
            sizes = {"sequence_length": case["length"], "num_classes": case["length"], "memory_size": case["memory_size"]}
            self.options.values |= sizes
        else:
            checkpoint = checkpoints.load(case["network"])
            self.options.adopt(checkpoint["params"], MODEL)
        self.options.values |= {"batch_size": case["batch"]} | changes
        torch.manual_seed(0)
        self.model = models.build_model(self.options.values, backend)
        if case["network"] != NEW:
            self.model.load_state_dict(checkpoint["state_dict"])
        self.model.to(torch.device(device), dtype)
        self.network = DistributedDataParallel(self.model) if distributed.world_size() > 1 else self.model
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.options["learning_rate"])
        self.draw(0)

    def draw(self, number: int) -> None:
        """This process's shard of a batch."""
        first = number * self.options["batch_size"]
        shard = distributed.shard(first, first + self.options["batch_size"])
        batch = data.training_samples(*shard, EPOCH, **data.sizes(self.options))
        weight = self.model.output_layer.weight
        features, query = batch.features.to(weight), batch.query.to(weight)
        self.batch = data.Samples(features, batch.labels.to(weight.device), query, batch.answer.to(weight.device))

    def step(self) -> None:
        values = {"batch_size": self.options["batch_size"], "l2": self.options["l2"], "options": self.options}
        task.train_step(self.network, self.optimizer, self.batch, **values, where="")


def check(case: dict) -> str | None:
    """What differs from the reference at two samples of up to five pairs in float64, or None."""
    results = []
    changes = {"num_time_steps": 40, "batch_size": 2, "max_grad_norm": 0.0, "sequence_length": min(case["length"], 5)}
    for backend, device in ((case["backend"], case["device"]), ("reference", "cpu")):
        training = Training(case, backend, device, torch.float64, **changes)
        batch = training.batch
        with torch.no_grad():
            activity = training.model(batch.features, batch.labels, batch.query, record=True).activity
        training.step()
        results.append(
            ({name: activity[name].cpu() for name in POPULATIONS}, [w.grad.cpu() for w in training.model.parameters()])
        )
    (ours, our_gradients), (theirs, their_gradients) = results
    for name in POPULATIONS:
        if not torch.equal(ours[name], theirs[name]):
            return f"spikes of {name}"
    for gradient, expected in zip(our_gradients, their_gradients, strict=True):
        if (gradient - expected).abs().max() > 1e-9 * max(expected.abs().max().item(), 1e-12):
            return "gradients"
    return None


def measure(rank: int, case: dict, port: int | None) -> None:
    """One process of a case. The first prints the median seconds of a step and of a 4096 x 4096 x 4096 float32 product beside
    it, peak MiB, and the median seconds of what the processes exchange in a step, alone."""
    processes, device = case["processes"], case["device"]
    torch.set_num_threads(max(1, case["threads"] // processes))
    if processes > 1:
        store = dist.TCPStore("127.0.0.1", port)
        dist.init_process_group("gloo" if device == "cpu" else "nccl", store=store, rank=rank, world_size=processes)
        device = f"cuda:{rank}" if device == "cuda" else device
    training = Training(case, case["backend"], device)
    for number in range(case["after"]):
        training.draw(number)
        training.step()
    training.draw(case["after"])
    training.step()  # warm
    memory = peak(device)
    square = torch.randn(4096, 4096, device=device)
    square @ square
    weights = torch.cat([weight.detach().flatten() for weight in training.model.parameters()])
    inputs = training.batch.features, training.batch.labels, training.batch.query
    rates = torch.cat([rates[0].detach() for rates in training.model(*inputs).rates.values()])

    def exchange() -> None:
        for values in (rates, weights, weights[0]):
            distributed.all_reduce(values)
        distributed.all_reduce_max(0)

    timed = {"step": training.step, "exchange": exchange} | ({"product": lambda: square @ square} if rank == 0 else {})
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(case["repeats"]):
        for name, function in timed.items():
            distributed.all_reduce_max(0)
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        if rank:
            distributed.all_reduce_max(0)  # while the first computes the product
    if rank == 0:
        print(json.dumps({name: statistics.median(values) for name, values in times.items()} | {"peak": memory}))


def peak(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def one_case(case: dict) -> None:
    """In a process of its own: print the result as JSON."""
    if difference := check(case):
        print(json.dumps({"wrong": difference}))
    elif case["processes"] == 1:
        measure(0, case, None)
    else:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        mp.spawn(measure, (case, store.port), case["processes"])


def processor(threads: int) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {threads} threads"


def cases(arguments: argparse.Namespace) -> list[dict]:
    """What is to be measured, in the order of the options."""
    found = []
    for backend, network in itertools.product(arguments.backends, arguments.networks):
        sizes = itertools.product(arguments.lengths, arguments.memory_sizes)
        if network != NEW:
            params = checkpoints.load(network)["params"]
            sizes = [(params["sequence_length"], params["memory_size"])]
        for (length, memory_size), batch, processes in itertools.product(sizes, arguments.batches, arguments.processes):
            if backend != "reference" or batch <= arguments.reference_batch:
                case = {"backend": backend, "network": network, "length": length, "memory_size": memory_size, "batch": batch}
                case |= {name: getattr(arguments, name) for name in ("device", "after", "repeats", "threads")}
                found += [case | {"processes": processes, "compiler": compiler} for compiler in arguments.compilers]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cpp", "reference"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--networks", nargs="+", default=[NEW], help=f"'{NEW}', or checkpoints, which bring their own sizes")
    parser.add_argument("--after", type=int, default=0, help="training steps before those measured")
    parser.add_argument("--lengths", nargs="+", type=int, default=[10])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 512], help="over all processes")
    parser.add_argument("--memory_sizes", nargs="+", type=int, default=[100])
    parser.add_argument("--processes", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="over all processes")
    parser.add_argument("--compilers", nargs="+", default=[""], help='each as CXX, with the build target: "g++ -march=haswell"')
    parser.add_argument("--reference_batch", type=int, default=16, help="largest batch for the reference")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        one_case(json.loads(arguments.case))
        return 0
    try:
        to_measure = cases(arguments)
    except UserError as error:
        parser.error(str(error))
    print(f"{processor(arguments.threads)}, torch {torch.__version__}\n")
    head = "backend", "network", "pairs", "memory size", "batch", "processes", *MEASURED
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    return max(map(report, to_measure), default=0)


def report(case: dict) -> int:
    command = [sys.executable, "-m", "benchmarks.training_step", "--case", json.dumps(case)]
    environment = os.environ | ({"CXX": case["compiler"]} if case["compiler"] else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    network = Path(case["network"]).name.removesuffix(".pth.tar") + (f", {case['after']} steps on" if case["after"] else "")
    sizes = " | ".join(str(case[name]) for name in ("length", "memory_size", "batch", "processes"))
    built = f" ({case['compiler']})" if case["compiler"] else ""
    title = f"| {case['backend']}{built} | {network} | {sizes} |"
    if done.returncode:
        print(title, f"failed: {done.stderr.strip().splitlines()[-1]} | | | | |", flush=True)
        return 1
    found = json.loads(done.stdout.splitlines()[-1])
    if found.get("wrong"):
        print(title, f"wrong, not measured: {found['wrong']} differ | | | | |", flush=True)
        return 1
    speed, product = case["batch"] / found["step"], found["step"] / found["product"]
    exchange = f"{1e3 * found['exchange']:.2f}" if case["processes"] > 1 else ""
    print(title, f"{found['step']:.3f} | {speed:,.0f} | {product:.2f} | {found['peak']:.0f} | {exchange} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
