#!/usr/bin/env python3
"""Real faults, counted: what a training survives, and what a reader refuses. The tests run short versions of these.

python benchmarks/faults.py killed --times 200      SIGKILL, half of them while a checkpoint is written, then --resume auto
python benchmarks/faults.py damaged --times 1000    damaged checkpoints: refused, or provably intact
python benchmarks/faults.py options --times 2000    random command lines and YAML files for both scripts
python benchmarks/faults.py steps --times 10000     training steps: memory and throughput over time
python benchmarks/faults.py memory                  the estimated memory of a run beside its measured peak
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import memorizing_associations_task as task
from utils import checkpoints
from utils.checkpoint_contents import digest
from utils.errors import UserError
from utils.memory import needed
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
        _become(body)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Options


def options(times: int, seed: int) -> dict:
    """So many random command lines and YAML files in all (tests/test_options.py)."""
    tests = Path(__file__).resolve().parents[1] / "tests" / "test_options.py"
    each = -(-times // 12)  # six properties, two scripts
    environment = os.environ | {"OPTIONS_EXAMPLES": str(each)}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", tests], env=environment, cwd=tests.parents[1], check=True)
    return {"random command lines and files": 12 * each, "exit status of the tests": done.returncode}


# Time


def steps(times: int, seed: int) -> dict:
    """So many training steps: the memory of the process and its throughput, in the first and the last fifth after a start."""
    data.TRAINING_SAMPLES, per_fifth = 16 * times, times // 5
    data.EVALUATION_SAMPLES["validation"] = SAMPLES["validation"]
    marks, train_step = [], task.train_step

    def counted_step(*arguments):
        train_step(*arguments)
        counted_step.done += 1
        if counted_step.done % per_fifth == 0:
            marks.append((time.perf_counter(), time.process_time(), _resident_mebibytes()))

    counted_step.done, task.train_step = 0, counted_step
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--batch_size", "16", "--epochs", "1", "--output_dir", scratch, "--seed", str(seed)]
        assert task.main([*TINY, *options]) == 0
    (_, _, first), *_, (_, _, last) = marks
    cpu = [after[1] - before[1] for before, after in itertools.pairwise(marks)]
    assert last - first < 5, f"memory grew from {first:.1f} to {last:.1f} MiB"
    assert cpu[-1] < 1.5 * min(cpu), f"CPU seconds for each fifth of the steps: {cpu}"
    return {
        "steps": counted_step.done,
        "MiB after each fifth": [round(mark[2], 1) for mark in marks],
        "CPU ms a step in each fifth but the first": [round(1000 * seconds / per_fifth, 2) for seconds in cpu],
    }


def _resident_mebibytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


# Memory


def memory(times: int, seed: int) -> list[dict]:
    """The estimate of the first so many of MEMORY_CASES beside the measured peak, MiB, each in a process of its own.

    `start` is what the process holds when it estimates: interpreter, PyTorch, the program.
    """
    rows = []
    for case in MEMORY_CASES[:times]:
        words = [sys.executable, __file__, "memory", "--seed", str(seed), "--case", json.dumps(case)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        row = json.loads(done.stdout.splitlines()[-1])
        row["ratio"] = round(row["estimate"] / row["peak"], 2)
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    assert all(abs(row["ratio"] - 1) < 0.3 for row in rows), rows
    return rows


def memory_of(case: dict, seed: int) -> dict:
    """Train two steps in this process; what it estimates before, and its peak."""
    backend, batch, length, size, threads = (case[name] for name in ("backend", "batch", "pairs", "memory_size", "threads"))
    torch.set_num_threads(threads)
    data.TRAINING_SAMPLES, data.EVALUATION_SAMPLES["validation"] = 2 * batch, min(batch, task.EVALUATION_BATCH)
    found = {}

    def estimate(backend, device, options, processes):
        found["start"] = _resident_mebibytes()
        found["estimate"] = found["start"] + needed(backend, options, batch) / 2**20

    task.memory.check = estimate
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        sizes = {"batch_size": batch, "sequence_length": length, "num_classes": length, "memory_size": size}
        rest = {"epochs": 1, "seed": seed, "device": "cpu", "backend": backend, "output_dir": scratch}
        assert task.main([f"--{name}={value}" for name, value in (sizes | rest).items()]) == 0
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return case | {name: round(value) for name, value in found.items()}


MEMORY_CASES = [
    dict(zip(("backend", "batch", "pairs", "memory_size", "threads"), values, strict=True))
    for values in (
        ("cpp", 512, 1, 100, 1),
        ("reference", 4, 1, 100, 1),
        ("cpp", 64, 10, 100, 1),
        ("cpp", 512, 10, 100, 1),
        ("cpp", 512, 10, 100, 2),
        ("cpp", 512, 55, 100, 1),
        ("cpp", 512, 55, 100, 2),
        ("cpp", 64, 10, 400, 1),
        ("cpp", 64, 10, 400, 2),
        ("cpp", 64, 30, 400, 2),
        ("cpp", 8192, 10, 20, 2),
        ("reference", 1, 10, 100, 1),
        ("reference", 4, 10, 100, 1),
        ("reference", 16, 1, 100, 1),
        ("reference", 16, 10, 100, 1),
        ("reference", 64, 2, 100, 1),
        ("reference", 4, 1, 400, 1),
    )
]


# Damaged files


def damaged(times: int, seed: int) -> dict:
    """Damage a checkpoint of this program and the published one in so many ways."""
    shorten_epochs()
    published = Path(__file__).resolve().parents[1] / "tests" / "golden" / "published_format_checkpoint.pth.tar"
    with tempfile.TemporaryDirectory() as scratch:
        assert in_child(lambda: train(Path(scratch), 2)) == 0
        ours = damaged_files(Path(scratch) / checkpoints.LAST, times // 2, seed)
    return {"ours": ours, "published format": damaged_files(published, times - times // 2, seed)}


def damaged_files(path: Path, times: int, seed: int) -> Counter:
    """Cut, overwrite and flip bits of a checkpoint. Each copy must be refused in one line, or hold what the original holds."""
    rng = random.Random(seed)
    original, known = path.read_bytes(), digest(checkpoints.load(path))
    # No digest tells which of two tensors of one shape is which in published files.
    kinds = DAMAGES if "digest" in torch.load(path, weights_only=False) else DAMAGES[:-1]
    counts = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "damaged.pth.tar"
        for number in range(times):
            copy.write_bytes(kinds[number % len(kinds)](bytearray(original), rng))
            try:
                loaded = checkpoints.load(copy)
            except UserError as refusal:
                assert str(refusal).startswith(f"{copy}: ") and len(str(refusal).splitlines()) == 1, refusal
                counts["refused"] += 1
            else:
                assert digest(loaded) == known, f"damage {number} (seed {seed}) was loaded"
                counts["intact"] += 1
    return counts


def cut(content: bytearray, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flip_bit_anywhere(content: bytearray, rng: random.Random) -> bytes:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def flip_bit_in_directory(content: bytearray, rng: random.Random) -> bytes:
    content[rng.randrange(content.index(b"PK\1\2"), len(content))] ^= 1 << rng.randrange(8)
    return content


def flip_bit_in_header(content: bytearray, rng: random.Random) -> bytes:
    headers = [i for i in range(len(content)) if content[i : i + 4] == b"PK\3\4"]
    content[rng.choice(headers) + rng.randrange(60)] ^= 1 << rng.randrange(8)
    return content


def overwrite_block(content: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    content[start : start + 512] = rng.choice([bytes(512), rng.randbytes(512)])
    return content


def swap_records(content: bytearray, rng: random.Random) -> bytes:
    """Exchange the contents of two tensors of one size, under checksums that are right again."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    sizes = Counter(len(record) for name, record in records.items() if "/data/" in name)
    size = rng.choice([size for size, number in sizes.items() if number > 1 and size > 8])
    one, other = rng.sample([name for name, record in records.items() if "/data/" in name and len(record) == size], 2)
    records[one], records[other] = records[other], records[one]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    return out.getvalue()


DAMAGES = (cut, flip_bit_anywhere, flip_bit_in_directory, flip_bit_in_header, overwrite_block, swap_records)


def _legacy(path: Path) -> None:
    torch.save({"epoch": 1, "state_dict": {}, "params": {}}, path, _use_new_zipfile_serialization=False)


def _compressed(path: Path) -> None:
    """An archive of 10 kB that unpacks to 10 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))


NOT_CHECKPOINTS = {
    "absent": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "folder": lambda path: path.mkdir(),
    "YAML": lambda path: path.write_text("memory_size: 100\n"),
    "picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000)),
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "NumPy archive": lambda path: np.savez(path.with_suffix(".npz"), a=np.zeros(3)) or path.with_suffix(".npz").rename(path),
    "archive of text": lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "text"),
    "compressed archive": _compressed,
    "pickle": lambda path: path.write_bytes(pickle.dumps({"epoch": 1})),
    "before PyTorch 1.6": _legacy,
    "tensor": lambda path: torch.save(torch.zeros(3), path),
    "weights alone": lambda path: torch.save({"input_layer.weight": torch.zeros(8, 10)}, path),
    "list": lambda path: torch.save([1, 2], path),
    "another program's checkpoint": lambda path: torch.save({"epoch": 3, "model": {}, "state_dict": {}}, path),
}


def _edit(*path_and_value):
    """A change of what stands under a path of keys; a callable gets the old value."""
    *path, last, value = path_and_value

    def change(checkpoint):
        part = checkpoint
        for key in path:
            part = vars(part) if isinstance(part, argparse.Namespace) else part
            if key not in part and not isinstance(part, list):
                return None
            part = part[key]
        part = vars(part) if isinstance(part, argparse.Namespace) else part
        if not isinstance(part, list) and last not in part:
            return None
        if value is DELETE:
            del part[last]
        else:
            part[last] = value(part[last]) if callable(value) else value
        return checkpoint

    return change


def _swap_moments(checkpoint):
    moment = checkpoint["optimizer"]["state"][0]
    moment["exp_avg"], moment["exp_avg_sq"] = moment["exp_avg_sq"], moment["exp_avg"]
    return checkpoint


def _swap_weights(checkpoint):
    state = checkpoint["state_dict"]
    state["writing_layer.W"], state["reading_layer.W"] = state["reading_layer.W"], state["writing_layer.W"]
    return checkpoint


def _itself(checkpoint):
    checkpoint["history"] = nested = []
    nested.append(nested)
    return checkpoint


DELETE = object()
NAN = float("nan")
CHANGES = {
    "weights with NaN": _edit("state_dict", "writing_layer.W", lambda w: torch.full_like(w, NAN)),
    "weights infinite": _edit("state_dict", "output_layer.weight", lambda w: w / 0),
    "weights of another shape": _edit("state_dict", "reading_layer.W", lambda w: w[1:]),
    "weights as integers": _edit("state_dict", "reading_layer.W", lambda w: w.int()),
    "weights as a list": _edit("state_dict", "reading_layer.W", lambda w: w.tolist()),
    "weights sparse": _edit("state_dict", "reading_layer.W", lambda w: w.to_sparse()),
    "weights missing": _edit("state_dict", "input_layer.weight", DELETE),
    "weights swapped": _swap_weights,
    "weights of the same shape": _edit("state_dict", "writing_layer.W", lambda w: w.flip(0)),
    "ones not ones": _edit("state_dict", "encoding_layer.encoding", lambda w: w + 1),
    "state_dict a list": _edit("state_dict", lambda state: list(state)),
    "state_dict missing": _edit("state_dict", DELETE),
    "epoch missing": _edit("epoch", DELETE),
    "epoch negative": _edit("epoch", -1),
    "epoch text": _edit("epoch", "3"),
    "epoch a fraction": _edit("epoch", 2.5),
    "epoch huge": _edit("epoch", 10**400),
    "epoch true": _edit("epoch", True),
    "sample negative": _edit("sample", -5),
    "sample too large": _edit("sample", 10**6),
    "sample without sums": _edit("sample", 64),
    "sample missing": _edit("sample", DELETE),
    "history missing": _edit("history", DELETE),
    "history cut": _edit("history", lambda h: h[:-1] + h[:1]),
    "history not finite": _edit("history", 0, "train_loss", NAN),
    "history rates text": _edit("history", 0, "rates", "fast"),
    "history in itself": _itself,
    "running not sums": _edit("running", {"samples": "x"}),
    "best_acc text": _edit("best_acc", "good"),
    "best_acc NaN": _edit("best_acc", torch.tensor(NAN)),
    "best_acc two": _edit("best_acc", torch.zeros(2)),
    "best_acc missing": _edit("best_acc", DELETE),
    "optimizer missing": _edit("optimizer", DELETE),
    "optimizer empty": _edit("optimizer", {}),
    "optimizer moments swapped": _swap_moments,
    "optimizer moment NaN": _edit("optimizer", "state", 0, "exp_avg", lambda m: m * NAN),
    "optimizer moment of another shape": _edit("optimizer", "state", 1, "exp_avg", lambda m: m[:1, :1]),
    "optimizer moment missing": _edit("optimizer", "state", 1, "exp_avg_sq", DELETE),
    "optimizer parameter missing": _edit("optimizer", "state", 1, DELETE),
    "optimizer step text": _edit("optimizer", "state", 0, "step", "three"),
    "optimizer step negative": _edit("optimizer", "state", 0, "step", torch.tensor(-1.0)),
    "optimizer betas text": _edit("optimizer", "param_groups", 0, "betas", ("a", "b")),
    "optimizer of other parameters": _edit("optimizer", "param_groups", 0, "params", [7, 8]),
    "optimizer two groups": _edit("optimizer", "param_groups", lambda groups: groups * 2),
    "params missing": _edit("params", DELETE),
    "params a list": _edit("params", [1]),
    "params without a size": _edit("params", "memory_size", DELETE),
    "params of another size": _edit("params", "memory_size", 9),
    "params of impossible size": _edit("params", "memory_size", 10**12),
    "params size text": _edit("params", "memory_size", "many"),
    "params size negative": _edit("params", "embedding_size", -8),
    "params threshold NaN": _edit("params", "thr", NAN),
    "params reset a number": _edit("params", "perfect_reset", 3),
    "params tensor": _edit("params", "tau_mem", torch.tensor(20.0)),
    "params another threshold": _edit("params", "thr", 0.2),
    "digest text": _edit("digest", "0" * 64),
}
# Where no digest was written, as in published files, such a change leaves a file that is possible.
UNSEEN_WITHOUT_DIGEST = {"weights of the same shape", "params another threshold", "optimizer moments swapped"}


def _become(body) -> None:
    """In a forked process: run `body` with its output thrown away, and exit with its status."""
    status = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        torch.set_num_threads(1)  # threads do not survive a fork
        status = body()
    finally:
        os._exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("fault", choices=FAULTS)
    parser.add_argument("--times", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)  # one of MEMORY_CASES, to run in this process
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(memory_of(arguments.case, arguments.seed)))
        return
    result = FAULTS[arguments.fault](arguments.times or FULL[arguments.fault], arguments.seed)
    print(json.dumps({arguments.fault: result}, indent=2))


FAULTS = {"killed": killed, "damaged": damaged, "memory": memory, "options": options, "steps": steps}
FULL = {"killed": 200, "damaged": 1000, "memory": len(MEMORY_CASES), "options": 2000, "steps": 10_000}

if __name__ == "__main__":
    main()
