#!/usr/bin/env python3
"""Real faults, counted: what a training survives, and what a reader refuses. The tests run short versions of these.

python benchmarks/faults.py killed --times 200      SIGKILL, half of them while a checkpoint is written, then --resume auto
python benchmarks/faults.py damaged --times 1000    damaged checkpoints: refused, or provably intact
python benchmarks/faults.py options --times 2000    random command lines and YAML files for both scripts
python benchmarks/faults.py steps --times 10000     training steps: memory and throughput over time
python benchmarks/faults.py memory                  the estimated memory of a run beside its measured peak
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import memorizing_associations_task as task
from utils import checkpoints
from utils.checkpoint_contents import digest
from utils.run import METRICS

TINY = """--sequence_length 2 --num_classes 2 --num_time_steps 20 --embedding_size 8 --memory_size 8 --batch_size 64 --seed 1
    --device cpu --workers 1""".split()
SAMPLES = {"training": 320, "validation": 32}  # an epoch, in place of 9,000 and 1,000


def train(folder: Path, epochs: int) -> int:
    return task.main([*TINY, "--epochs", str(epochs), "--resume", "auto", "--output_dir", str(folder)])


def shorten_epochs() -> None:
    data.TRAINING_SAMPLES = SAMPLES["training"]
    data.EVALUATION_SAMPLES["validation"] = SAMPLES["validation"]


# Killed


def killed(times: int, seed: int) -> dict:
    """Kill trainings so many times, resume each until it ends, and hold its weights and metrics to an undisturbed one's."""
    shorten_epochs()
    rng, epochs = random.Random(seed), 10
    kills, ended = Counter(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder, undisturbed = Path(scratch) / "killed", Path(scratch) / "undisturbed"
        start = time.perf_counter()
        assert in_child(lambda: train(undisturbed, epochs)) == 0
        epoch_seconds = (time.perf_counter() - start) / epochs
        while kills.total() < times or folder.exists():
            if kills.total() == times:
                status = in_child(lambda: train(folder, epochs))
            elif kills.total() % 2:
                status = in_child(lambda: kill_while_writing(rng.randrange(9), folder, epochs))
            else:
                status = in_child(lambda: train(folder, epochs), kill_after=rng.uniform(0, 2) * epoch_seconds)
            assert status in (-signal.SIGKILL, 0), f"a resumed training exited with {status}"
            check_metrics(folder)
            if status == 0:
                check_same_run(folder, undisturbed)
                shutil.rmtree(folder)
                ended += 1
            else:
                kills["while a checkpoint was written" if kills.total() % 2 else "at a random moment"] += 1
    return {"killed": dict(kills), "trainings ended, bitwise as the undisturbed one": ended, "epochs each": epochs}


def check_same_run(ours: Path, theirs: Path) -> None:
    """The last checkpoints must be equal bit for bit, and the metrics files; nothing may be left behind."""
    keys = ("epoch", "sample", "state_dict", "optimizer", "history", "best_acc", "running")
    for name in (checkpoints.LAST, checkpoints.BEST):
        one, other = ({key: value for key, value in checkpoints.load(f / name).items() if key in keys} for f in (ours, theirs))
        assert digest(one) == digest(other), f"{name} differs"
    assert (ours / METRICS).read_bytes() == (theirs / METRICS).read_bytes(), "the metrics differ"
    assert not list(ours.glob(".*.tmp")), "temporary files are left"


def check_metrics(folder: Path) -> None:
    """No line of the metrics file may be lost, doubled or torn."""
    if (folder / METRICS).exists() and (folder / checkpoints.LAST).exists():
        epochs = [json.loads(line)["epoch"] for line in (folder / METRICS).read_text().splitlines()]
        finished = checkpoints.load(folder / checkpoints.LAST)["epoch"]
        assert epochs == list(range(len(epochs))), epochs
        assert finished - 1 <= len(epochs) <= finished, (epochs, finished)  # the file follows the checkpoint


def kill_while_writing(number: int, folder: Path, epochs: int) -> int:
    """Train, and be killed (SIGKILL) at the `number`-th point inside the writing of checkpoints: half of it written, not yet
    renamed, just renamed."""
    points = iter(range(number, -1, -1))

    def point() -> None:
        if next(points, None) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    write_atomically, replace = checkpoints.write_atomically, os.replace

    def write_in_parts(path, write):
        def both_halves(file):
            content = io.BytesIO()
            write(content)
            half = len(content.getvalue()) // 2
            file.write(content.getvalue()[:half])
            file.flush()
            point()
            file.write(content.getvalue()[half:])

        write_atomically(path, both_halves if path.suffix == ".tar" else write)

    def replace_between_points(source, target):
        if target.suffix == ".tar":
            point()
        replace(source, target)
        if target.suffix == ".tar":
            point()

    checkpoints.write_atomically, os.replace = write_in_parts, replace_between_points
    return train(folder, epochs)


def in_child(body, kill_after: float | None = None) -> int:
    """Run `body` in a forked process with its output thrown away. Returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            torch.set_num_threads(1)  # threads do not survive a fork
            status = body()
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--times", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    result = FAULTS[arguments.fault](arguments.times or FULL[arguments.fault], arguments.seed)
    print(json.dumps({arguments.fault: result}, indent=2))


FAULTS = {"killed": killed}
FULL = {"killed": 200}

if __name__ == "__main__":
    main()
