"""Time and memory of one training step, for each backend, network, sequence length, batch and memory size.

    python -m benchmarks.training_step --backends cpp reference --batches 64 512
    python -m benchmarks.training_step --networks pretrained/recipe-sequence_length10-seed2.pth.tar
    CXX="g++ -march=haswell" OMP_NUM_THREADS=1 python -m benchmarks.training_step --backends cpp

The kernels' time depends on the number of spikes: a new network fires most, a trained one much less. The step is the task
script's, as in the second epoch (with rate regularization). Each case runs in a separate process. Before it is measured, the
backend's spikes and gradients are compared with the reference's in float64, with the network's weights.
"""

import argparse
import itertools
import json
import operator
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import data
import memorizing_associations_task as task
import models
from models import POPULATIONS
from utils import checkpoints
from utils.errors import UserError

NEW = "new"
EPOCH = 1  # the first one with rate regularization
HEAD = "backend", "network", "pairs", "memory size", "batch", "s a step", "samples/s", "of a 4096³ product", "peak MiB"


class Training:
    """The network of a case (new with seed 0, or from a checkpoint) in training. `model` changes constants of the network; all
    other options have the defaults of the task script."""

    def __init__(self, case, backend, device, dtype=torch.float32, *, learning_rate=0.003, max_grad_norm=40.0, **model):
        params, weights = {"num_classes": case["length"], "memory_size": case["memory_size"]}, None
        if case["network"] != NEW:
            params, weights = operator.itemgetter("params", "state_dict")(checkpoints.load(case["network"]))
        self.length, self.batch_size, self.max_grad_norm = case["length"], case["batch"], max_grad_norm
        torch.manual_seed(0)
        self.model = models.build_model(params | model, backend)
        self.model.load_state_dict(weights or self.model.state_dict())
        self.model.to(torch.device(device), dtype)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate)
        self.draw(0)

    def draw(self, number: int) -> None:
        """Draw a batch by its number."""
        first, sizes, weight = number * self.batch_size, self.model.sizes, self.model.output_layer.weight
        task_sizes = {"num_classes": sizes.num_classes, "feature_size": sizes.feature_size, "dataset_seed": 42}
        batch = data.training_samples(first, first + self.batch_size, EPOCH, self.length, **task_sizes)
        features, query = batch.features.to(weight), batch.query.to(weight)
        self.batch = data.Samples(features, batch.labels.to(weight.device), query, batch.answer.to(weight.device))

    def step(self) -> None:
        strengths = {"l2": 1e-5, "target_rate": 0.0, "max_grad_norm": self.max_grad_norm}
        task.train_step(self.model, self.optimizer, self.batch, batch_size=self.batch_size, **strengths, at="")


def check(case: dict) -> str | None:
    """What differs from the reference in float64, for two samples of up to five pairs, or None."""
    results = []
    small = case | {"batch": 2, "length": min(case["length"], 5)}
    for backend in (case["backend"], "reference"):
        training = Training(small, backend, "cpu", torch.float64, num_time_steps=40, max_grad_norm=0.0)
        batch = training.batch
        with torch.no_grad():
            activity = training.model(batch.features, batch.labels, batch.query, record=True).activity
        training.step()
        results.append((activity, [weight.grad for weight in training.model.parameters()]))
    (ours, our_gradients), (theirs, their_gradients) = results
    for name in POPULATIONS:
        if not torch.equal(ours[name], theirs[name]):
            return f"spikes of {name}"
    for gradient, expected in zip(our_gradients, their_gradients, strict=True):
        if (gradient - expected).abs().max() > 1e-9 * max(expected.abs().max().item(), 1e-12):
            return "gradients"
    return None


def measure(case: dict) -> dict[str, float]:
    """Median seconds of a step and of a 4096 x 4096 x 4096 float32 product, measured in turn, and peak MiB."""
    training = Training(case, case["backend"], "cpu")
    training.step()  # warm
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    square = torch.randn(4096, 4096)
    square @ square
    timed = {"step": training.step, "product": lambda: square @ square}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(case["repeats"]):
        for name, function in timed.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()} | {"peak": peak}


def cases(arguments: argparse.Namespace) -> list[dict]:
    """The cases to measure, in the order of the options."""
    found = []
    for backend, network in itertools.product(arguments.backends, arguments.networks):
        sizes = itertools.product(arguments.lengths, arguments.memory_sizes)
        if network != NEW:
            params = checkpoints.load(network)["params"]
            sizes = [(params.get("sequence_length", arguments.lengths[0]), params["memory_size"])]
        for (length, memory_size), batch in itertools.product(sizes, arguments.batches):
            case = {"backend": backend, "network": network, "length": length, "memory_size": memory_size, "batch": batch}
            found.append(case | {"repeats": arguments.repeats})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cpp", "reference"])
    parser.add_argument("--networks", nargs="+", default=[NEW], help=f"'{NEW}', or checkpoints, which have their own sizes")
    parser.add_argument("--lengths", nargs="+", type=int, default=[10])
    parser.add_argument("--batches", nargs="+", type=int, default=[64])
    parser.add_argument("--memory_sizes", nargs="+", type=int, default=[100])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        case = json.loads(arguments.case)
        wrong = check(case)
        print(json.dumps({"wrong": wrong} if wrong else measure(case)))
        return 0
    try:
        to_measure = cases(arguments)
    except UserError as error:
        parser.error(str(error))
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = next(iter(re.findall(r"model name\s*: (.*)", cpuinfo)), platform.processor())
    print(f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}")
    return max(map(report, to_measure), default=0)


def report(case: dict) -> int:
    command = [sys.executable, "-m", "benchmarks.training_step", "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    network = Path(case["network"]).name.removesuffix(".pth.tar")
    title = f"| {case['backend']} | {network} | {case['length']} | {case['memory_size']} | {case['batch']} |"
    found = {} if done.returncode else json.loads(done.stdout.splitlines()[-1])
    if done.returncode or "wrong" in found:
        failed = f"failed: {[done.returncode, *done.stderr.splitlines()][-1]}"
        reason = f"wrong, not measured: {found['wrong']} differ" if found else failed
        print(title, f"{reason} | | | |", flush=True)
        return 1
    speed, product = case["batch"] / found["step"], found["step"] / found["product"]
    print(title, f"{found['step']:.3f} | {speed:,.0f} | {product:.2f} | {found['peak']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
