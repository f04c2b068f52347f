"""Check and measure the Triton backend, in less than 8 minutes on an H100: agreement, speed, memory, a run, the tests.

    python -m benchmarks.gpu_check [--output FOLDER]
    python -m benchmarks.gpu_check --dry-run    the same at tiny sizes on a CPU, in Triton's interpreter: times mean nothing

Prints a Markdown table line by line, and writes it to FOLDER/table.md. First the Triton backend is compared with the numbers
of the original implementation and with the reference; if it differs, no speed is measured. The exit status is 0 if all ran.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from benchmarks import training_step
from models import POPULATIONS
from tests import golden
from utils import checkpoints
from utils.run import METRICS

ROOT = Path(__file__).resolve().parent.parent
DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"
TINY = {"num_time_steps": 4, "embedding_size": 4, "memory_size": 5, "feature_size": 3}
STEPS = 2 if DRY else 20  # timed; their median counts
GB, MS = 1e9, 1e-3

Row = tuple[str, str, str]  # what, measured, aim
measured: dict[str, float] = {}  # values that later parts need


class Training(training_step.Training):
    """A network in training on one batch, at the default options or tiny."""

    def __init__(self, backend: str, length: int = 10, batch_size: int = 512):
        length, batch_size = (2, 2) if DRY else (length, batch_size)
        case = {"network": training_step.NEW, "length": length, "memory_size": 100, "batch": batch_size}
        super().__init__(case, backend, DEVICE, **(TINY if DRY else {}))

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


# Checks


def environment(_) -> Iterator[Row]:
    name = "a CPU, in the interpreter: times mean nothing" if DRY else torch.cuda.get_device_name()
    yield "GPU", name, ""
    yield "PyTorch, Triton", f"{torch.__version__}, {triton.__version__}", ""


def published_numbers(_) -> Iterator[Row]:
    """At full size; the tests check the small ones."""
    if DRY:
        return  # an hour in the interpreter
    golden.check(golden.load("full_size_float64"), "triton", DEVICE)
    yield "original implementation, float64", "agrees", "spikes equal, all else to 1e-9"
    expected = golden.load("full_size_float32")
    output, *_ = golden.run(expected, "triton", DEVICE)
    shares = [(output.activity[name].cpu() != expected.out[name]).float().mean().item() for name in POPULATIONS]
    yield "original implementation, float32: largest share of differing spikes", f"{max(shares):.2%}", "< 1 %"
    if max(shares) >= 0.01:
        raise ArithmeticError("spikes differ from the original implementation's")


def against_the_reference(_) -> Iterator[Row]:
    ours, theirs = (Training(backend, 2, 64) for backend in ("triton", "reference"))
    spikes = [t.model(t.batch.features, t.batch.labels, t.batch.query, record=True).activity for t in (ours, theirs)]
    shares = [(spikes[0][name] != spikes[1][name]).float().mean().item() for name in POPULATIONS]
    yield "reference on this device, float32: largest share of differing spikes", f"{max(shares):.2%}", "< 1 %"
    if max(shares) >= 0.01:
        raise ArithmeticError("spikes differ from the reference's")
    for training in (ours, theirs):
        training.step()
    change = (ours.weights() - theirs.weights()).abs().max().item()
    yield "weights after one step: largest difference", f"{change:.1e}", ""


def two_runs(_) -> Iterator[Row]:
    weights = []
    for _ in range(2):
        training = Training("triton")
        for _ in range(2):
            training.step()
        weights.append(training.weights())
    if not torch.equal(*weights):
        raise ArithmeticError("two runs of two steps end in different weights")
    yield "weights of two runs of two steps", "identical", "identical bits"


# Measurements


def speed(_) -> Iterator[Row]:
    training = Training("triton")
    seconds, peak = training.timed(STEPS)
    measured["samples a second"] = training.batch_size / seconds
    yield f"training step, batch {training.batch_size}", f"{seconds / MS:.1f} ms", "<= 25 ms"
    yield "its peak GPU memory", f"{peak / GB:.2f} GB", "<= 8 GB"


def long_sequences(_) -> Iterator[Row]:
    training = Training("triton", 55)
    seconds, peak = training.timed(1 if DRY else 3)
    yield f"{training.length} pairs, batch {training.batch_size}", f"{seconds / MS:.0f} ms", ""
    yield "its peak GPU memory", f"{peak / GB:.1f} GB", "fits one GPU"


def reference_speed(_) -> Iterator[Row]:
    """The reference, with the batch doubled while memory and time allow."""
    best, batch_size = 0.0, 512
    for _ in range(1 if DRY else 5):
        try:
            training = Training("reference", batch_size=batch_size)
            seconds, peak = training.timed(1)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        best = max(best, training.batch_size / seconds)
        yield f"reference, batch {training.batch_size}", f"{seconds:.2f} s, {peak / GB:.1f} GB", ""
        if seconds > 15:
            break
        batch_size *= 2
    yield "triton over reference, at its best batch", f"{measured.get('samples a second', 0) / best:.0f} times", ">= 50 times"


# The scripts


def script(seconds: int, *arguments) -> int:
    """Exit status of a script, which is interrupted after `seconds`, so that it saves."""
    limit = ["timeout", "--preserve-status", "--kill-after=20", str(seconds)]
    return subprocess.run([*limit, sys.executable, *map(str, arguments)], cwd=ROOT).returncode


def training(folder: Path) -> Iterator[Row]:
    """Train with a seed that learns. At the time limit, the run saves and stops."""
    run = folder / "training"
    shutil.rmtree(run, ignore_errors=True)
    backend = ["--device", DEVICE, "--backend", "cpp" if DRY else "triton"]  # in the interpreter an epoch would take hours
    options = ["--curriculum_start", "2", "--seed", "1", "--epochs", "250"]
    if DRY:
        tiny = "--sequence_length 2 --num_classes 2 --num_time_steps 10 --embedding_size 4 --memory_size 4 --epochs 2"
        options += tiny.split()
    start = time.monotonic()
    status = script(120, "memorizing_associations_task.py", *backend, *options, "--output_dir", run)
    seconds = f"{time.monotonic() - start:.0f}"
    yield "training: exit status, seconds", f"{status}, {seconds}", "0 (143: stopped for time)"
    history = [json.loads(line)["validation_accuracy"] for line in (run / METRICS).read_text().splitlines()]
    yield "training: epochs, best validation accuracy", f"{len(history)}, {max(history):.1f} %", "> 95 %"
    status = script(60, "memorizing_associations_task.py", "--resume", run / checkpoints.BEST, "--evaluate")
    yield "test of the best network: exit status", f"{status}", "0"
    curve = ["plot_memorizing_associations_task.py", "--metrics", run / METRICS, "--output", folder / "training.png"]
    yield "training curve: exit status", f"{script(60, *curve)}", "0"


def tests(_) -> Iterator[Row]:
    if not DRY:
        yield "tests on the GPU: exit status", f"{script(150, '-m', 'pytest', '-q', 'tests/test_triton.py')}", "0"


CHECKS = (environment, against_the_reference, published_numbers, two_runs)
MEASUREMENTS = (speed, long_sequences, reference_speed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/gpu_check"), help="folder of the results")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="run at tiny sizes on a CPU, to test this program")
    args = parser.parse_args()
    if args.dry_run and not DRY:  # the interpreter is chosen when Triton is imported
        environment_of_it = os.environ | {"TRITON_INTERPRET": "1"}
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]], environment_of_it)
    if not (DRY or torch.cuda.is_available()):
        parser.error("there is no CUDA device here; --dry-run tests the program without one")
    args.output.mkdir(parents=True, exist_ok=True)
    failed = False
    with open(args.output / "table.md", "w") as table:

        def write(row: Row) -> None:
            line = f"| {' | '.join(row)} |"
            print(line, flush=True)
            table.write(line + "\n")
            table.flush()

        write(("what", "measured", "aim"))
        write(("---", "---", "---"))
        for part in (*CHECKS, *MEASUREMENTS, training, tests):
            if failed and part in MEASUREMENTS:
                write((f"**{part.__name__} not measured**", "speed means nothing while a check fails", ""))
                continue
            try:
                for row in part(args.output):
                    write(row)
            except Exception as error:  # the other parts still run
                failed = True
                write((f"**{part.__name__} failed**", f"{type(error).__name__}: {error}".splitlines()[0], ""))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
