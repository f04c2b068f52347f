#!/usr/bin/env python3
"""Train and test every run of a sweep, several at a time; run it again to go on where it stopped.

python experiments/sweep.py experiments/results.yaml --output_dir runs/sweep

The YAML file names groups of runs. A group gives options of the task script; a list of values makes one run for each of them
(several lists: for each combination), in the order of the file:

    published:
      sequence_length: [1, 2, 5, 10]
      num_classes: sequence_length   # the same as the length
      seed: [1, 2, 3]
      epochs: 250
      test_lengths: 2-10             # to test at when trained; without it, at the length trained on

A run is the folder OUTPUT_DIR/GROUP/RUN, named after the options that have lists. Beside what the task script keeps there, it
holds log.txt (what the run said), command.txt (the commands that made it, each with the commit of the program) and
accuracy_by_length.csv (accuracy on the published test set of the checkpoint of highest validation accuracy).
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils import checkpoints  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.interruption import Interruption  # noqa: E402
from utils.options import TASK_GROUPS, Options, lengths  # noqa: E402
from utils.run import METRICS, Run  # noqa: E402

SCRIPT = ROOT / "memorizing_associations_task.py"
POLL_SECONDS = 0.5
_OPTIONS = {option.name: option for options in TASK_GROUPS.values() for option in options}
_NOT_TO_SET = {"resume", "evaluate", "print_options", "output_dir", "gpu", "multiprocessing_distributed", "start_epoch"}


def main(argv=None) -> int:
    args = get_args_parser().parse_args(argv)
    try:
        runs = read_sweep(args.sweep, args.output_dir)
        if args.list:
            print(*(" ".join(run.training()) for run in runs), sep="\n")
            return 0
        slots = find_slots(args.jobs, args.threads)
        with Interruption() as interruption:
            return Sweep(runs, slots, args.threads, args.test_only).work(interruption)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="the runs (the head of this script describes the file)")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=positive, help="runs at a time (default: one a GPU; without GPUs, cores // threads)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of a run (default: 1)")
    parser.add_argument(
        "--test_only", "--test-only", action="store_true", help="train nothing; test the runs as they are, finished or not"
    )
    parser.add_argument("--list", action="store_true", help="print the command of each run, and stop")
    return parser


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


# What is to run


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # group/run
    folder: Path
    options: dict[str, Any]
    test_lengths: str

    @property
    def epochs(self) -> int:
        return self.options.get("epochs", _OPTIONS["epochs"].default)

    def training(self) -> list[str]:
        return [*self._script("auto"), *itertools.chain.from_iterable(map(_argument, self.options, self.options.values()))]

    def testing(self) -> list[str]:
        return [*self._script(self.folder / checkpoints.BEST), "--evaluate", "--sequence_length", self.test_lengths]

    def _script(self, resume: Path | str) -> list[str]:
        return [sys.executable, str(SCRIPT), "--output_dir", str(self.folder), "--resume", str(resume)]

    def epochs_done(self) -> int:
        """Epochs in the run's metrics file."""
        try:
            return (self.folder / METRICS).read_bytes().count(b"\n")
        except OSError:
            return 0

    def is_trained(self) -> bool:
        return self.epochs_done() >= self.epochs

    def is_tested(self) -> bool:
        table, tested = self.folder / "accuracy_by_length.csv", self.folder / checkpoints.BEST
        return table.exists() and tested.exists() and table.stat().st_mtime >= tested.stat().st_mtime


def read_sweep(path: Path, output_dir: Path) -> list[Job]:
    """The runs that a sweep file describes.

    Raises:
        UserError: unreadable, or a group or an option is wrong.
    """
    try:
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}") from failure
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(failure).split())})") from failure
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError(f"{path}: must hold groups of options (see the head of {Path(__file__).name})")
    return [job for name, group in groups.items() for job in _jobs(f"{path}: {name}", str(name), group, output_dir)]


def _jobs(where: str, group_name: str, group: dict[str, Any], output_dir: Path) -> Iterator[Job]:
    group = dict(group)
    test_lengths = group.pop("test_lengths", None)
    lists = {name: values for name, values in group.items() if isinstance(values, list)}
    for combination in itertools.product(*lists.values()):
        chosen = dict(zip(lists, combination, strict=True))
        options = group | chosen
        if options.get("num_classes") == "sequence_length":
            options["num_classes"] = options.get("sequence_length", _OPTIONS["sequence_length"].default)
        run_name = "-".join(f"{name}{value}" for name, value in chosen.items()) or "run"
        resolved = _check(where, options)
        tested = test_lengths if test_lengths is not None else resolved["sequence_length"]
        if max(_as_tuple(_convert(lengths, f"{where}: test_lengths", tested))) > resolved["num_classes"]:
            raise UserError(f"{where}: test_lengths: {tested} is more than num_classes {resolved['num_classes']}")
        yield Job(f"{group_name}/{run_name}", output_dir / group_name / run_name, options, str(tested))


def _check(where: str, options: dict[str, Any]) -> dict[str, Any]:
    """All options of a run, its own and the defaults."""
    for name in options:
        if name not in _OPTIONS or name in _NOT_TO_SET:
            reason = "the sweep itself sets it" if name in _OPTIONS else "no such option of the task script"
            raise UserError(f"{where}: {name}: {reason}")
    given = {name: _convert(_OPTIONS[name].convert, f"{where}: {name}", value) for name, value in options.items()}
    resolved = Options({n: o.default for n, o in _OPTIONS.items()} | given, frozenset(given), TASK_GROUPS)
    if error := resolved.combination_error():
        raise UserError(f"{where}: {error}")
    if resolved["seed"] is None:
        raise UserError(f"{where}: seed: a sweep needs seeds, so that its runs can be repeated")
    return resolved.values


def _convert(converter, where: str, value: Any) -> Any:
    try:
        return converter(value)
    except ValueError as wrong:
        raise UserError(f"{where}: {wrong}") from None


def _as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _argument(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, bool):
        return (f"--{name}" if value else f"--no-{name}",)
    return f"--{name}", "none" if value is None else str(value)


# Where to run


class Slot(NamedTuple):
    """Room for one run at a time."""

    gpu: str | None  # what CUDA_VISIBLE_DEVICES shall be; None: as it is


def find_slots(jobs: int | None, threads: int) -> list[Slot]:
    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",")[:count] if visible else [str(n) for n in range(count)]
        return [Slot(gpus[n % count]) for n in range(jobs or count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [Slot(None)] * (jobs or max(1, cores // threads))


@dataclass
class Child:
    """A run at work."""

    job: Job
    slot: Slot
    process: subprocess.Popen
    testing: bool


class Sweep:
    """Keeps the slots busy until all runs are trained and tested."""

    def __init__(self, jobs: list[Job], slots: list[Slot], threads: int, test_only: bool = False):
        self.jobs, self.free, self.threads, self.test_only = jobs, list(slots), threads, test_only
        self.waiting, self.children, self.failed, self.done = list(jobs), [], [], 0
        self.commit = commit()

    def work(self, interruption: Interruption) -> int:
        """Returns the exit status: 1 if runs failed, 128 plus the number of the signal after one."""
        epochs = sum(job.epochs for job in self.jobs)
        self.bar = tqdm(total=epochs, unit=" epochs", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        self.seen = {job.name: job.epochs_done() for job in self.jobs}
        try:
            while (self.waiting or self.children) and not interruption.signal:
                self._fill()
                time.sleep(POLL_SECONDS if self.children else 0)
                self._collect()
                self._show()
        finally:
            self._stop()
        self._show()
        self.bar.close()
        stopped = len(self.jobs) - self.done - len(self.failed)
        say(f"{self.done} of {len(self.jobs)} runs done, {len(self.failed)} failed, {stopped} to go on with")
        for job, reason in self.failed:
            say(f"failed: {job.name}: {reason} ({job.folder / 'log.txt'})")
        return interruption.status or (1 if self.failed else 0)

    def _fill(self) -> None:
        while self.free and self.waiting:
            self._begin(self.waiting.pop(0), self.free[0])

    def _begin(self, job: Job, slot: Slot) -> None:
        """Start what a run needs next, in a slot that is free, if it needs anything."""
        to_test = job.is_trained() or self.test_only
        if to_test and (job.is_tested() or not Run(job.folder).holds_checkpoint()):
            self.done += job.is_trained()
            return
        try:
            process = self._start(job, slot, job.testing() if to_test else job.training())
        except OSError as failure:
            self.failed.append((job, failure.strerror))
            say(f"{job.name}: {self.failed[-1][1]}")
            return
        self.free.remove(slot)
        self.children.append(Child(job, slot, process, to_test))
        say(f"{job.name}: {'test' if to_test else 'train'}{f' on GPU {slot.gpu}' if slot.gpu else ''}")

    def _start(self, job: Job, slot: Slot, command: list[str]) -> subprocess.Popen:
        job.folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        if slot.gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
        with open(job.folder / "log.txt", "a") as log:
            with open(job.folder / "command.txt", "a") as record:
                record.write(f"{self.commit}: {shown(command)}\n")
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)

    def _collect(self) -> None:
        for child in [child for child in self.children if child.process.poll() is not None]:
            self.children.remove(child)
            self.free.append(child.slot)
            status, job = child.process.returncode, child.job
            if status:
                self.failed.append((job, last_line(job.folder / "log.txt") or f"exit status {status}"))
                say(f"{job.name}: failed: {self.failed[-1][1]}")
            elif child.testing:
                self.done += job.is_trained()
                say(f"{job.name}: {last_line(job.folder / 'log.txt')}")
            else:
                self._begin(job, child.slot)

    def _show(self) -> None:
        for job in [child.job for child in self.children]:
            epochs = job.epochs_done()
            if epochs > self.seen[job.name] and self.bar.disable:
                say(f"{job.name}: epoch {epochs}/{job.epochs}")
            self.seen[job.name] = epochs
        self.bar.set_postfix_str(f"{len(self.children)} at work, {len(self.failed)} failed", refresh=False)
        self.bar.n = sum(min(self.seen[job.name], job.epochs) for job in self.jobs)
        self.bar.refresh()

    def _stop(self) -> None:
        """Let the children save, and wait for them."""
        for child in self.children:
            child.process.send_signal(signal.SIGTERM)
        if self.children:
            say(f"waiting for {len(self.children)} runs to save")
        for child in self.children:
            child.process.wait()
        self.children.clear()


def commit() -> str:
    """The commit of the program, marked where files differ from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+changes", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown commit"


def shown(command: list[str]) -> str:
    """A command as one types it in the checkout."""
    return " ".join(["python", *(word.removeprefix(f"{ROOT}/") for word in command[1:])])


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def say(message: str) -> None:
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
