"""Train and test every run of a sweep, several at a time. Started again, it does what is left; on more machines, they share it.

python -m experiments.sweep experiments/results.yaml --output_dir runs/results

The YAML file names groups of runs. A group gives options of the task script; a list of values makes one run for each of them
(several lists: for each combination), in the order of the file:

    published:
      sequence_length: [1, 2, 5, 10]
      num_classes: sequence_length   # the same as the length
      seed: [1, 2, 3]
      epochs: 250
      test_lengths: 2-10             # to test at when trained; without it, at the length trained on

A group may be a list of such blocks. A run is the folder OUTPUT_DIR/GROUP/RUN, named after the options that have lists. Beside
what the task script keeps there, it holds log.txt (what the run printed), command.txt (the commands that made it, each with the
commit of the program) and accuracy_by_length.csv (accuracy on the published test set of the network of highest validation
accuracy).
"""

import argparse
import csv
import functools
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from utils import checkpoints
from utils.errors import UserError, in_one_line
from utils.interruption import Interruption
from utils.options import CURRICULUM, MODEL, TASK_GROUPS, TRAINING, Options, Parser
from utils.results import COMMANDS
from utils.run import METRICS, OPTIONS, TABLE, commit
from utils.run import lock as hold

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "memorizing_associations_task.py"
LOG, LOCK = "log.txt", ".sweep.lock"
POLL_SECONDS = 0.5
say = functools.partial(print, flush=True)
_NOT_TO_SET = {"resume", "evaluate", "print_options", "output_dir", "gpu", "multiprocessing_distributed", "start_epoch"}
_DEFAULTS = {option.name: option.default for options in TASK_GROUPS.values() for option in options}
_RESULT_DEPENDS_ON = {option.name for option in (*MODEL, *TRAINING, *CURRICULUM)} | {"dataset_seed", "inf_data"}


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="the runs (the head of this module describes the file)")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=positive, help="runs at a time (default: one per GPU; without GPUs, cores // threads)")
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of a run (default: 1)")
    parser.add_argument("--list", action="store_true", help="print the command of each run, and stop")
    args = parser.parse_args(argv)
    jobs = read_sweep(args.sweep, args.output_dir)
    if args.list:
        print(*(shown(job.training()) for job in jobs), sep="\n")
        return 0
    for job in jobs:
        job.refuse_another_run()
    gpus = find_gpus(args.jobs, args.threads)
    with Interruption(patient=True) as interruption:  # a second signal must not leave the runs behind
        return Sweep(jobs, gpus, args.threads).work(interruption)


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
    given: dict[str, Any]  # the options in the sweep file
    options: dict[str, Any]  # all of them
    test_lengths: tuple[int, ...]

    def training(self) -> list[str]:
        return [*self._script("auto"), *_words(self.given)]

    def testing(self) -> list[str]:
        given = {name: self.given[name] for name in ("backend", "device", "dist_backend") if name in self.given}
        lengths = {"sequence_length": ",".join(map(str, self.test_lengths))}
        return [*self._script(self.folder / checkpoints.BEST), "--evaluate", *_words(given | lengths)]

    def _script(self, resume: Path | str) -> list[str]:
        return [sys.executable, str(SCRIPT), "--output_dir", str(self.folder), "--resume", str(resume)]

    def epochs_done(self) -> int:
        try:
            return (self.folder / METRICS).read_bytes().count(b"\n")
        except OSError:
            return 0

    def is_trained(self) -> bool:
        return self.epochs_done() >= self.options["epochs"]

    def is_tested(self) -> bool:
        """The best network, at these lengths."""
        table = self.folder / TABLE
        try:
            lengths = tuple(int(row["sequence_length"]) for row in csv.DictReader(table.read_text().splitlines()))
            return lengths == self.test_lengths and table.stat().st_mtime >= (self.folder / checkpoints.BEST).stat().st_mtime
        except (OSError, KeyError, ValueError):
            return False

    def differences(self, record: dict[str, Any]) -> list[str]:
        """A phrase for each option by which a recorded run was trained otherwise than the sweep file says."""
        record = _DEFAULTS | record
        names = sorted(_RESULT_DEPENDS_ON | ({"backend"} & self.given.keys()))
        return [f"{name} {self.options[name]} (run: {record[name]})" for name in names if self.options[name] != record[name]]

    def refuse_another_run(self) -> None:
        """See that no run stands in the folder that is of other options; more epochs continue one."""
        if (self.folder / OPTIONS).exists():
            record = (read_yaml(self.folder / OPTIONS) or {}) | {"epochs": max(self.epochs_done(), self.options["epochs"])}
            if differences := self.differences(record):
                other = f"is another run: {', '.join(differences)}; choose another --output_dir or group name"
                raise UserError(f"{self.folder}: {other}")


def _words(options: dict[str, Any]) -> list[str]:
    """Options as one gives them on a command line."""
    words = []
    for name, value in options.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", "none" if value is None else str(value)]
    return words


def read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}") from failure
    except (yaml.YAMLError, UnicodeDecodeError) as failure:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(failure).split())}); correct or remove it") from failure


def read_sweep(path: Path, output_dir: Path) -> list[Job]:
    """The runs that a sweep file describes.

    Raises:
        UserError: unreadable, or a group or an option is wrong.
    """
    groups = read_yaml(path)
    groups = groups if isinstance(groups, dict) else {"": groups}
    blocks = [(str(name), block) for name, group in groups.items() for block in (group if isinstance(group, list) else [group])]
    if not all(name and isinstance(block, dict) for name, block in blocks):
        raise UserError(f"{path}: must hold groups of options (see the head of {Path(__file__).name})")
    jobs = [job for name, block in blocks for job in _jobs(f"{path}: {name}", name, block, output_dir)]
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: {', '.join(twice)}: twice; give the option that differs as a list")
    return jobs


def _jobs(where: str, group_name: str, group: dict[str, Any], output_dir: Path) -> Iterator[Job]:
    group = dict(group)
    test_lengths = group.pop("test_lengths", None)
    lists = {name: values for name, values in group.items() if isinstance(values, list)}
    for combination in itertools.product(*lists.values()):
        chosen = dict(zip(lists, combination, strict=True))
        given = group | chosen
        if given.get("num_classes") == "sequence_length":
            given["num_classes"] = given.get("sequence_length", _DEFAULTS["sequence_length"])
        if fixed := sorted(_NOT_TO_SET & given.keys()):
            raise UserError(f"{where}: {', '.join(fixed)}: the sweep itself sets it")
        options = _resolve(where, _words(given))
        if options["seed"] is None:
            raise UserError(f"{where}: seed: a sweep needs seeds, so that its runs can be repeated")
        tested = options.all_lengths
        if test_lengths is not None:
            words = _words(given | {"sequence_length": test_lengths, "evaluate": True})
            tested = _resolve(f"{where}: test_lengths", words).all_lengths
        run_name = "-".join(f"{name}{value}" for name, value in chosen.items()) or "run"
        yield Job(f"{group_name}/{run_name}", output_dir / group_name / run_name, given, options.values, tested)


def _resolve(where: str, words: list[str]) -> Options:
    """All options of the task script, those on this command line and the defaults."""
    try:
        options = Parser("", TASK_GROUPS).parse(words)
        options.check_combination()
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return options


# Running


def find_gpus(jobs: int | None, threads: int) -> list[str | None]:
    """For each run at a time, its CUDA_VISIBLE_DEVICES; None: as it is."""
    count = torch.cuda.device_count()
    if count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",")[:count] if visible else [str(n) for n in range(count)]
        return [gpus[n % count] for n in range(jobs or count)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [None] * (jobs or max(1, cores // threads))


@dataclass
class Child:
    """A run at work."""

    job: Job
    gpu: str | None
    process: subprocess.Popen
    testing: bool
    lock: IO
    epochs: int  # that have been reported


class Sweep:
    """Keeps its places (one per GPU, or `jobs`) busy until all runs are trained and tested, by it or by another sweep.

    A run is locked by the sweep that works on it. The system releases the lock when that sweep and its run have ended, however
    they end, so that another sweep takes over what a dead machine held.
    """

    def __init__(self, jobs: list[Job], gpus: list[str | None], threads: int):
        self.jobs, self.free, self.threads = jobs, list(gpus), threads
        self.waiting, self.children, self.failed, self.done = list(jobs), [], [], 0
        self.commit = commit()

    def work(self, interruption: Interruption) -> int:
        """Returns the exit status: 1 if runs failed, 128 plus the number of the signal after one."""
        try:
            while (self.waiting or self.children) and not interruption.signal:
                for job in list(self.waiting):
                    if self.free and (lock := hold(job.folder, LOCK)):
                        self.waiting.remove(job)
                        self._begin(job, self.free.pop(0), lock)
                time.sleep(POLL_SECONDS)
                self._collect()
        finally:
            self._stop()
        stopped = len(self.jobs) - self.done - len(self.failed)
        say(f"{self.done} of {len(self.jobs)} runs done, {len(self.failed)} failed, {stopped} unfinished")
        for job, reason in self.failed:
            say(f"failed: {job.name}: {reason} ({job.folder / LOG})")
        return interruption.status or (1 if self.failed else 0)

    def _begin(self, job: Job, gpu: str | None, lock: IO) -> None:
        """Start what a run needs next, if it needs anything."""
        testing = job.is_trained()
        if testing and job.is_tested():
            self._end(gpu, lock)
            self.done += 1
            return
        command = job.testing() if testing else job.training()
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with open(job.folder / LOG, "a") as log, open(job.folder / COMMANDS, "a") as record:
            # The number of threads decides the last digits.
            record.write(f"{self.commit}: OMP_NUM_THREADS={self.threads} {shown(command)}\n")
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            process = subprocess.Popen(command, env=environment, pass_fds=[lock.fileno()], **quiet)
        self.children.append(Child(job, gpu, process, testing, lock, job.epochs_done()))
        say(f"{job.name}: {'test' if testing else 'train'}{f' on GPU {gpu}' if gpu else ''}")

    def _collect(self) -> None:
        for child in list(self.children):
            job, status = child.job, child.process.poll()
            if status is None:
                if (epochs := job.epochs_done()) > child.epochs:
                    child.epochs = epochs
                    say(f"{job.name}: epoch {epochs}/{job.options['epochs']}")
                continue
            self.children.remove(child)
            last = last_line(job.folder / LOG)
            if status == 0 and not child.testing:
                self._begin(job, child.gpu, child.lock)
                continue
            self._end(child.gpu, child.lock)
            say(f"{job.name}: {'failed: ' * bool(status)}{last or f'exit status {status}'}")
            if status:
                self.failed.append((job, last or f"exit status {status}"))
            else:
                self.done += 1

    def _end(self, gpu: str | None, lock: IO) -> None:
        self.free.append(gpu)
        lock.close()

    def _stop(self) -> None:
        """Let the children save, and wait for them."""
        for child in self.children:
            child.process.send_signal(signal.SIGTERM)
        if self.children:
            say(f"waiting for {len(self.children)} runs to save")
        for child in self.children:
            child.process.wait()
            child.lock.close()


def shown(command: list[str]) -> str:
    """A command as one types it in the checkout."""
    return shlex.join(["python", *(word.removeprefix(f"{ROOT}/") for word in command[1:])])


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


if __name__ == "__main__":
    sys.exit(main())
