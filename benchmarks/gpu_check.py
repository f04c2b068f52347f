#!/usr/bin/env python3
"""Measure the Triton backend on a GPU: agreement, speed, GPU memory, launches, the floor. Part of benchmarks/gpu_check.sh.

    python benchmarks/gpu_check.py --output FOLDER

Prints a Markdown table line by line as it measures and writes it to FOLDER/table.md. With TRITON_INTERPRET=1 everything runs
at tiny sizes on the CPU, in Triton's interpreter: that tests this script, and its times mean nothing.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import golden
import torch
import triton
from torch.profiler import ProfilerActivity, profile

import data
import memorizing_associations_task as task
import models
from models import POPULATIONS
from models.backends.triton.writing import SEGMENT
from utils.options import TASK_GROUPS, Options, Parser

EPOCH = 1  # the first one with the activity regularization
DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if DRY else "cuda")
TINY = "--num_time_steps 4 --embedding_size 4 --memory_size 5 --feature_size 3 --batch_size 2".split()
STEPS = 2 if DRY else 20  # timed; their median counts
GB, MS = 1e9, 1e-3

Row = tuple[str, str, str]  # what, measured, aim
measured: dict[str, float] = {}  # what later parts need of earlier ones


class Training:
    """A network in training, on one batch."""

    def __init__(self, backend: str, length: int = 10, batch_size: int | None = None):
        given = ["--sequence_length", length, "--num_classes", max(10, length), *(TINY if DRY else ())]
        given += [] if batch_size is None else ["--batch_size", batch_size]
        self.options: Options = Parser("", TASK_GROUPS).parse([str(word) for word in given])
        torch.manual_seed(0)
        self.model = models.build_model(self.options.values, backend).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.options["learning_rate"])
        sizes = (length, *(self.options[name] for name in ("num_classes", "feature_size", "dataset_seed")))
        self.batch = data.training_samples(0, self.options["batch_size"], EPOCH, *sizes).to(DEVICE)

    def step(self) -> None:
        size = len(self.batch)
        task.train_step(self.model, self.optimizer, self.batch, size, EPOCH, self.options, "")

    def timed(self, steps: int) -> tuple[float, float]:
        """Median seconds of a step after the first, which compiles; peak GPU memory in bytes."""
        self.step()
        if not DRY:
            torch.cuda.reset_peak_memory_stats()
        seconds = [timed(self.step) for _ in range(steps)]
        return statistics.median(seconds), 0 if DRY else torch.cuda.max_memory_allocated()

    def weights(self) -> torch.Tensor:
        return torch.cat([weight.detach().flatten() for weight in self.model.parameters()])


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def timed(call) -> float:
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


# Parts


def environment() -> Iterator[Row]:
    name = "a CPU, in the interpreter: times mean nothing" if DRY else torch.cuda.get_device_name()
    yield "GPU", name, ""
    yield "PyTorch, Triton", f"{torch.__version__}, {triton.__version__}", ""


def published_numbers() -> Iterator[Row]:
    """At full size; the tests have the small ones."""
    if DRY:
        return  # an hour in the interpreter
    golden.check(golden.load("full_size_float64"), "triton", DEVICE.type)
    yield "published numbers, float64", "agrees", "spikes equal, all else to 1e-9"
    expected = golden.load("full_size_float32")
    output, *_ = golden.run(expected, "triton", DEVICE.type)
    shares = [(output.activity[name].cpu() != expected.out[name]).float().mean().item() for name in POPULATIONS]
    yield "published numbers, float32: largest share of other spikes", f"{max(shares):.2%}", "< 1 %"
    if max(shares) >= 0.01:
        raise ArithmeticError("other spikes than published")


def against_the_reference() -> Iterator[Row]:
    ours, theirs = (Training(backend, 2, 2 if DRY else 64) for backend in ("triton", "reference"))
    spikes = [t.model(*tuple(t.batch)[:3], record=True).activity for t in (ours, theirs)]
    shares = [(spikes[0][name] != spikes[1][name]).float().mean().item() for name in POPULATIONS]
    yield "reference on this GPU, float32: largest share of other spikes", f"{max(shares):.2%}", "< 1 %"
    if max(shares) >= 0.01:
        raise ArithmeticError("other spikes than the reference's")
    for training in (ours, theirs):
        training.step()
    change = (ours.weights() - theirs.weights()).abs().max().item()
    yield "weights after one step: largest difference", f"{change:.1e}", ""


def speed() -> Iterator[Row]:
    training = Training("triton")
    seconds, peak = training.timed(STEPS)
    measured["samples a second"] = len(training.batch) / seconds
    measured["step"] = seconds
    yield f"training step, batch {len(training.batch)}", f"{seconds / MS:.1f} ms", "<= 25 ms"
    yield "its peak GPU memory", f"{peak / GB:.2f} GB", "<= 8 GB"


def two_runs() -> Iterator[Row]:
    weights = []
    for _ in range(2):
        training = Training("triton", 2 if DRY else 10)
        for _ in range(2):
            training.step()
        weights.append(training.weights())
    if not torch.equal(*weights):
        raise ArithmeticError("two runs of two steps end in different weights")
    yield "weights of two runs of two steps", "identical", "identical bits"


def launches() -> Iterator[Row]:
    training = Training("triton", 2 if DRY else 10)
    training.step()
    with profile(activities=[ProfilerActivity.CPU, *([] if DRY else [ProfilerActivity.CUDA])]) as profiler:
        training.step()
        synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = sum(e.name.startswith(("Memcpy", "Memset")) for e in kernels)
    yield "kernels launched in a step", f"{len(kernels) - copies}, and {copies} copies", "tens to hundreds"
    by_name: dict[str, list[float]] = {}
    for event in kernels:
        by_name.setdefault(event.name[:48], []).append(event.time_range.elapsed_us() * 1e-6)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:10]
    for name, seconds in longest:
        yield f"of this, {len(seconds)} x `{name}`", f"{sum(seconds) / MS:.2f} ms", ""


def floor() -> Iterator[Row]:
    """What the arithmetic and the traffic of the writing would take at the card's measured rates."""
    size = 64 if DRY else 8192
    square = torch.rand(size, size, device=DEVICE)
    large = torch.empty(2**10 if DRY else 2**29, device=DEVICE)
    target = torch.empty_like(large)
    flops_rate = 2 * size**3 / statistics.median(timed(lambda: square @ square) for _ in range(5))
    bytes_rate = 2 * 4 * large.numel() / statistics.median(timed(lambda: target.copy_(large)) for _ in range(5))
    yield "card: copy", f"{bytes_rate / 1e12:.2f} TB/s read and written", ""
    yield "card: float32 matrix product", f"{flops_rate / 1e12:.1f} TFLOP/s", ""

    options = Training("triton", 2 if DRY else 10).options
    E, M = options["embedding_size"], options["memory_size"]
    steps = options["batch_size"] * options["sequence_length"] * options["num_time_steps"]
    # For a weight of the memory, a step is 6 operations forward, 4 in the replay, 16 backward; W_write is in three products.
    operations = steps * (26 * M**2 + 3 * 2 * 2 * E * 2 * M)
    # Encoded spikes, currents, spikes, traces, membranes and gradients are each written once, and read where they are needed:
    # 5 times 2 E and 21 times M floats a step. Then the memories that are kept.
    traffic = 4 * steps * (5 * 2 * E + 21 * M + 2 * M**2 // SEGMENT)
    compute, move = operations / flops_rate, traffic / bytes_rate
    yield "floor: operations", f"{operations / 1e9:.0f} GFLOP, {compute / MS:.1f} ms", ""
    yield "floor: traffic", f"{traffic / GB:.1f} GB, {move / MS:.1f} ms", ""
    if "step" in measured:
        yield "step over the larger of the two", f"{measured['step'] / max(compute, move):.1f} times", ""


def long_sequences() -> Iterator[Row]:
    training = Training("triton", 3 if DRY else 55)
    seconds, peak = training.timed(1 if DRY else 3)
    yield f"{training.options['sequence_length']} pairs, batch {len(training.batch)}", f"{seconds / MS:.0f} ms", ""
    yield "its peak GPU memory", f"{peak / GB:.1f} GB", "fits one GPU"


def reference_speed() -> Iterator[Row]:
    """The reference at the largest batch it can hold, by doubling."""
    best, batch_size = 0.0, 2 if DRY else 512
    for _ in range(1 if DRY else 5):
        try:
            seconds, peak = Training("reference", 2 if DRY else 10, batch_size).timed(1)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        best = max(best, batch_size / seconds)
        yield f"reference, batch {batch_size}", f"{seconds:.2f} s, {peak / GB:.1f} GB", ""
        if seconds > 15:
            break
        batch_size *= 2
    yield "triton over reference, at its best batch", f"{measured.get('samples a second', 0) / best:.0f} times", ">= 50 times"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for table.md")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    checks = (environment, against_the_reference, published_numbers, two_runs)
    measurements = (speed, launches, floor, long_sequences, reference_speed)
    failed = False
    with open(folder / "table.md", "w") as table:

        def write(row: Row) -> None:
            line = f"| {' | '.join(row)} |"
            print(line, flush=True)
            table.write(line + "\n")
            table.flush()

        write(("what", "measured", "aim"))
        write(("---", "---", "---"))
        for part in (*checks, *measurements):
            if failed and part is measurements[0]:
                write(("**not measured**", "speed means nothing while a check fails", ""))
                break
            try:
                for row in part():
                    write(row)
            except Exception as error:  # the other parts are worth having
                failed = True
                write((f"**{part.__name__} failed**", f"{type(error).__name__}: {error}".splitlines()[0], ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
