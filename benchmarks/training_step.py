#!/usr/bin/env python3
"""Time and memory of one training step, for each backend, sequence length, batch and memory size.

    python benchmarks/training_step.py --backends cpp reference --batches 64 512

Each case runs in a process of its own. No speed is printed for a result that has not been checked: first the backend's spikes
and gradients are held against the reference's in float64.
"""

import argparse
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
from models.kernels import POPULATIONS


def step(model, samples) -> list[torch.Tensor]:
    """Forward and backward pass of the training objective; the gradients."""
    output = model(samples.features, samples.labels, samples.query)
    loss = cross_entropy(output.logits, samples.answer) + 1e-5 * models.rate_regularization(output.rates, 0.0)
    return torch.autograd.grad(loss, list(model.parameters()))


def check(backend: str, device: str, length: int, memory_size: int) -> str | None:
    """What differs from the reference at two samples in float64, or None."""
    options = {"num_classes": length, "memory_size": memory_size, "num_time_steps": 40}
    drawn = data.training_samples(0, 2, 0, length, length, 10, 42)
    samples = data.Samples(drawn.features.double(), drawn.labels, drawn.query.double(), drawn.answer)
    results = []
    for name, place in ((backend, device), ("reference", "cpu")):
        torch.manual_seed(0)
        model = models.build_model(options, name).double().to(place)
        here = data.Samples(*(field.to(place) for field in tuple(samples)))
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


def measure(backend: str, device: str, length: int, batch: int, memory_size: int, repeats: int) -> dict:
    """Median seconds of a step, of a 4096 x 4096 x 4096 float32 product beside it, and peak MiB."""
    torch.manual_seed(0)
    model = models.build_model({"num_classes": length, "memory_size": memory_size}, backend).to(device)
    samples = data.training_samples(0, batch, 0, length, length, 10, 42).to(torch.device(device))
    step(model, samples)  # warm
    memory = peak(device)
    square = torch.randn(4096, 4096, device=device)
    square @ square
    times = {"step": [], "product": []}
    for _ in range(repeats):
        for name, function in (("step", lambda: step(model, samples)), ("product", lambda: square @ square)):
            start = time.perf_counter()
            function()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()} | {"peak": memory}


def peak(device: str) -> float:
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return torch.cuda.max_memory_allocated() / 2**20


def one_case(case: dict) -> None:
    """In a process of its own: print the result as JSON."""
    difference = check(case["backend"], case["device"], min(case["length"], 5), case["memory_size"])
    print(json.dumps({"wrong": difference} if difference else measure(**case)))


def processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backends", nargs="+", default=["cpp", "reference"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
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
    print(f"{processor()}, torch {torch.__version__}\n")
    print("| backend | pairs | memory size | batch | s a step | samples/s | of a 4096³ product | peak MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    status = 0
    for backend in arguments.backends:
        for length in arguments.lengths:
            for memory_size in arguments.memory_sizes:
                for batch in arguments.batches:
                    if backend == "reference" and batch > arguments.reference_batch:
                        continue
                    case = {"backend": backend, "device": arguments.device, "length": length, "batch": batch}
                    case |= {"memory_size": memory_size, "repeats": arguments.repeats}
                    status |= report(case)
    return status


def report(case: dict) -> int:
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    title = f"| {case['backend']} | {case['length']} | {case['memory_size']} | {case['batch']} |"
    if done.returncode:
        print(title, f"failed: {done.stderr.strip().splitlines()[-1]} | | | |", flush=True)
        return 1
    found = json.loads(done.stdout.splitlines()[-1])
    if found.get("wrong"):
        print(title, f"wrong, not measured: {found['wrong']} differ | | | |", flush=True)
        return 1
    speed, share = case["batch"] / found["step"], found["step"] / found["product"]
    print(
        title,
        f"{found['step']:.3f} | {speed:,.0f} | {share:.2f} | {found['peak']:.0f} |",
        flush=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
