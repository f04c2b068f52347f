#!/usr/bin/env python3
"""Time and memory of one training step, for each backend, network, sequence length, batch and memory size.

    python benchmarks/training_step.py --backends cpp reference --batches 64 512
    python benchmarks/training_step.py --networks pretrained/recipe-sequence_length10-seed1.pth.tar

The kernels follow the spikes, so a step costs what the network's activity costs: a new network fires most, a trained one much
less. Each case runs in a process of its own. No speed is printed for a result that has not been checked: first the backend's
spikes and gradients are held against the reference's in float64, with the network's own weights where it is a trained one.
"""

import argparse
import itertools
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[1]))

import data
import models
from models import POPULATIONS
from utils import checkpoints
from utils.errors import UserError

NEW = "new"


def build(case: dict, backend: str, **changes) -> models.MemorizingAssociations:
    """The network of a case: new, from seed 0, or a checkpoint's."""
    torch.manual_seed(0)
    if case["network"] == NEW:
        return models.build_model({"num_classes": case["length"], "memory_size": case["memory_size"]} | changes, backend)
    checkpoint = checkpoints.load(case["network"])
    model = models.build_model(checkpoint["params"] | changes, backend)
    model.load_state_dict(checkpoint["state_dict"])
    return model


def samples(model, first: int, batch: int, length: int) -> data.Samples:
    return data.training_samples(first, first + batch, 0, length, model.sizes.num_classes, model.sizes.feature_size, 42)


def step(model, batch: data.Samples) -> list[torch.Tensor]:
    """Forward and backward pass of the training objective; the gradients."""
    output = model(batch.features, batch.labels, batch.query)
    mean_rates = {name: rate.mean(0) for name, rate in output.rates.items()}
    loss = cross_entropy(output.logits, batch.answer) + 1e-5 * models.rate_regularization(mean_rates, 0.0)
    return torch.autograd.grad(loss, list(model.parameters()))


def check(case: dict) -> str | None:
    """What differs from the reference at two samples of up to five pairs in float64, or None."""
    results = []
    for name, place in ((case["backend"], case["device"]), ("reference", "cpu")):
        model = build(case, name, num_time_steps=40).double().to(place)
        drawn = samples(model, 0, 2, min(case["length"], 5))
        here = data.Samples(drawn.features.double(), drawn.labels, drawn.query.double(), drawn.answer).to(torch.device(place))
        with torch.no_grad():
            activity = model(here.features, here.labels, here.query, record=True).activity
        results.append(({n: z.cpu() for n, z in activity.items()}, [g.cpu() for g in step(model, here)]))
    (ours, our_gradients), (theirs, their_gradients) = results
    for name in POPULATIONS:
        if not torch.equal(ours[name], theirs[name]):
            return f"spikes of {name}"
    for gradient, expected in zip(our_gradients, their_gradients, strict=True):
        if (gradient - expected).abs().max() > 1e-9 * max(expected.abs().max().item(), 1e-12):
            return "gradients"
    return None


def measure(case: dict) -> dict:
    """Median seconds of a step, of a 4096 x 4096 x 4096 float32 product beside it, and peak MiB."""
    device, size = torch.device(case["device"]), case["batch"]
    model = build(case, case["backend"]).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for number in range(case["after"]):
        gradients = step(model, samples(model, number * size, size, case["length"]).to(device))
        for weight, gradient in zip(model.parameters(), gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
    batch = samples(model, case["after"] * size, size, case["length"]).to(device)
    step(model, batch)  # warm
    memory = peak(case["device"])
    square = torch.randn(4096, 4096, device=device)
    square @ square
    times = {"step": [], "product": []}
    for _ in range(case["repeats"]):
        for name, function in (("step", lambda: step(model, batch)), ("product", lambda: square @ square)):
            start = time.perf_counter()
            function()
            if case["device"] != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()} | {"peak": memory}


def peak(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def one_case(case: dict) -> None:
    """In a process of its own: print the result as JSON."""
    difference = check(case)
    print(json.dumps({"wrong": difference} if difference else measure(case)))


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def cases(arguments: argparse.Namespace) -> list[dict]:
    """What is to be measured, in the order of the options."""
    found = []
    for backend, network in itertools.product(arguments.backends, arguments.networks):
        sizes = itertools.product(arguments.lengths, arguments.memory_sizes)
        if network != NEW:
            params = checkpoints.load(network)["params"]
            sizes = [(params["sequence_length"], params["memory_size"])]
        for (length, memory_size), batch in itertools.product(sizes, arguments.batches):
            if backend != "reference" or batch <= arguments.reference_batch:
                case = {"backend": backend, "network": network, "length": length, "memory_size": memory_size, "batch": batch}
                found.append(case | {name: getattr(arguments, name) for name in ("device", "after", "repeats")})
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cpp", "reference"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--networks", nargs="+", default=[NEW], help=f"'{NEW}', or checkpoints, which bring their own sizes")
    parser.add_argument("--after", type=int, default=0, help="training steps before those measured")
    parser.add_argument("--lengths", nargs="+", type=int, default=[10])
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 512])
    parser.add_argument("--memory_sizes", nargs="+", type=int, default=[100])
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
    print(f"{processor()}, torch {torch.__version__}\n")
    print("| backend | network | pairs | memory size | batch | s a step | samples/s | of a 4096³ product | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    return max(map(report, to_measure), default=0)


def report(case: dict) -> int:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    network = Path(case["network"]).name.removesuffix(".pth.tar") + (f", {case['after']} steps on" if case["after"] else "")
    title = f"| {case['backend']} | {network} | {case['length']} | {case['memory_size']} | {case['batch']} |"
    if done.returncode:
        print(title, f"failed: {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
        return 1
    found = json.loads(done.stdout.splitlines()[-1])
    if found.get("wrong"):
        print(title, f"wrong, not measured: {found['wrong']} differ | | | |", flush=True)
        return 1
    speed, share = case["batch"] / found["step"], found["step"] / found["product"]
    print(title, f"{found['step']:.3f} | {speed:,.0f} | {share:.2f} | {found['peak']:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
