"""Train and test every run of a sweep, several at a time. Start it again to continue, also on more machines.

python -m experiments.sweep experiments/results.yaml --output_dir runs/results

The YAML file names groups of runs. A group gives options of the task script; a list of values makes one run for each of them
(several lists: for each combination), in the order of the file:

    published:
      sequence_length: [1, 2, 5, 10]
      num_classes: sequence_length   # the same as the length
      seed: [1, 2, 3]
      epochs: 250
      test_lengths: 2-10             # lengths to test (default: the training length)

A group may be a list of such blocks. A run is the folder OUTPUT_DIR/GROUP/RUN, named after the options that have lists. In
addition to the files of the task script, it holds log.txt (the output), command.txt (the commands, each with the commit of the
program) and accuracy_by_length.csv (the network that is best in validation, on the original test set).
Accuracy against an option: python plot_memorizing_associations_task.py --metrics OUTPUT_DIR --against OPTION
"""

import argparse
import contextlib
import csv
import functools
import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import memorizing_associations_task as task
from utils import checkpoints, run
from utils.errors import UsageError, UserError, in_one_line
from utils.interruption import Interruption
from utils.options import Parser, number, read_words, words_of, words_of_yaml
from utils.results import COMMANDS, INDECISIVE

SCRIPT = Path(task.__file__)
LOG, LOCK = "log.txt", ".sweep.lock"
POLL_SECONDS = 0.5
PARSER = Parser("")
NOT_TO_SET = set("config resume evaluate print_options output_dir gpu multiprocessing_distributed start_epoch".split())
DECISIVE = [name for name in task.add_options(PARSER) if name not in INDECISIVE]
DEFAULTS = vars(PARSER.complete())


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="file of runs (see the top of experiments/sweep.py)")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="folder of the sweep")
    parser.add_argument("--jobs", type=number(int, 1), help="runs at a time (default: number of GPUs, or cores // threads)")
    parser.add_argument("--threads", type=number(int, 1), default=1, help="CPU threads per run (default: 1)")
    args = parser.parse_args(argv)
    jobs = read_sweep(args.sweep, args.output_dir)
    for job in jobs:
        job.refuse_another_run()
    waiting, ended, gpus = deque(jobs), [], find_gpus(args.jobs, args.threads)
    with Interruption(patient=True) as interruption, ThreadPoolExecutor(len(gpus)) as places:
        list(places.map(functools.partial(work, waiting, ended, args.threads, interruption), gpus))
    failed = [(job, reason) for job, reason in ended if reason]
    done, left = len(ended) - len(failed), len(jobs) - len(ended)
    print(f"{done} of {len(jobs)} runs done, {len(failed)} failed, {left} unfinished", flush=True)
    for job, reason in failed:
        print(f"failed: {job.name}: {reason} ({job.folder / LOG})", flush=True)
    return interruption.status or int(bool(failed))


# The runs


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str  # group/run
    folder: Path
    given: dict[str, str]  # the options in the sweep file, as words
    options: dict[str, Any]  # all options
    test_lengths: tuple[int, ...]

    def command(self, testing: bool) -> list[str]:
        """Testing takes the backend from the checkpoint."""
        resume = self.folder / checkpoints.BEST if testing else "auto"
        words = ["--evaluate", *words_of({"sequence_length": self.test_lengths})] if testing else words_of(self.given)
        return [sys.executable, str(SCRIPT), "--output_dir", str(self.folder), "--resume", str(resume), *words]

    def epochs_done(self) -> int:
        """Epochs in the last checkpoint, from which a run resumes. The task script reports a damaged one."""
        try:
            return checkpoints.load(self.folder / checkpoints.LAST)["epoch"]
        except UserError:
            return 0

    def is_tested(self) -> bool:
        """Whether the table is of the best network, at these lengths."""
        table = self.folder / run.TABLE
        try:
            lengths = tuple(int(row["sequence_length"]) for row in csv.DictReader(table.read_text().splitlines()))
            return lengths == self.test_lengths and table.stat().st_mtime >= (self.folder / checkpoints.BEST).stat().st_mtime
        except (OSError, KeyError, TypeError, ValueError, csv.Error):
            return False

    def differences(self, record: dict[str, Any]) -> list[str]:
        """A phrase for each option in which a recorded run differs from the sweep file."""
        record = DEFAULTS | record
        names = [*DECISIVE, "backend"] if "backend" in self.given else DECISIVE
        return [f"{name} {self.options[name]} (run: {record[name]})" for name in names if self.options[name] != record[name]]

    def refuse_another_run(self) -> None:
        """Refuse a folder that holds a run with other options; more epochs are allowed."""
        if (path := self.folder / run.OPTIONS).exists():
            try:
                record = PARSER.given(words_of_yaml(path))
            except UsageError as wrong:
                raise UserError(f"{path}: {wrong}; correct it or choose another --output_dir") from None
            record["epochs"] = max(self.epochs_done(), self.options["epochs"])
            if differences := self.differences(record):
                other = f"holds another run: {', '.join(differences)}; choose another --output_dir or group name"
                raise UserError(f"{self.folder}: {other}")


def read_sweep(path: Path, output_dir: Path) -> list[Job]:
    """The runs that a sweep file describes. Raises UserError where a group or an option is wrong."""
    jobs, name = [], "the file"
    try:
        found = read_words(path)
        groups = found if isinstance(found, dict) else {name: found}
        for name in groups:
            for block in groups[name] if isinstance(groups[name], list) else [groups[name]]:
                jobs += _jobs(name, block, output_dir)
    except UsageError as wrong:
        raise UserError(f"{path}: {name}: {wrong}") from None
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{path}: {', '.join(twice)}: twice; give the option that differs as a list")
    return jobs


def _jobs(group_name: str, block: Any, output_dir: Path) -> Iterator[Job]:
    if not isinstance(block, dict):
        raise UsageError(f"must hold options, or a list of blocks of them (see the top of {Path(__file__).name})")
    block = {name.replace("-", "_"): value for name, value in block.items()}
    test_lengths = block.pop("test_lengths", None)
    if fixed := sorted(NOT_TO_SET & block.keys()):
        raise UsageError(f"{', '.join(fixed)}: the sweep itself sets it")
    lists = {name: values for name, values in block.items() if isinstance(values, list)}
    for combination in itertools.product(*lists.values()):
        given = block | dict(zip(lists, combination, strict=True))
        if wrong := [name for name, value in given.items() if not isinstance(value, str)]:
            raise UsageError(f"{', '.join(wrong)}: must have one value, or a list of values")
        if given.get("num_classes") == "sequence_length":
            given["num_classes"] = given.get("sequence_length", str(DEFAULTS["sequence_length"]))
        options = _options(given)
        if options["seed"] is None:
            raise UsageError("seed: a sweep needs seeds, so that its runs can be repeated")
        tested = {"sequence_length": test_lengths or options["sequence_length"], "evaluate": True}
        lengths = _options(given | tested, "test_lengths: ")["sequence_length"]
        # A switch is named True or False, however the file spells it.
        values = {name: options[name] if isinstance(options.get(name), bool) else given[name] for name in lists}
        name = f"{group_name}/{'-'.join(f'{name}{value}' for name, value in values.items()) or 'run'}"
        yield Job(name, output_dir / name, given, options, lengths if isinstance(lengths, tuple) else (lengths,))


def _options(given: dict[str, Any], where: str = "") -> dict[str, Any]:
    """All options of the task script: the given ones and defaults. Raises UsageError."""
    try:
        args = PARSER.complete(PARSER.given(words_of(given)))
        task.check_lengths(
            args.sequence_length, args.num_classes, evaluate=args.evaluate, curriculum_start=args.curriculum_start
        )
    except UsageError as wrong:
        raise UsageError(f"{where}{wrong}") from None
    return vars(args)


# Running


def find_gpus(jobs: int | None, threads: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES for each concurrent run; None leaves it unchanged."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    gpus = visible.split(",")[:count] or [None]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [gpus[n % len(gpus)] for n in range(jobs or count or max(1, cores // threads))]


def work(waiting: deque[Job], ended: list[tuple[Job, str]], threads: int, interruption: Interruption, gpu: str | None) -> None:
    """One worker of a sweep: train and test runs that no other holds, until none waits. `ended` gets runs and failures."""
    while not interruption.signal:
        try:
            job = waiting.popleft()
        except IndexError:
            return
        try:
            with hold(job.folder) as is_ours:
                reason = attend(job, gpu, threads, interruption) if is_ours else None
        except OSError as failure:
            reason = str(failure)
        if reason is None:
            waiting.append(job)
            time.sleep(POLL_SECONDS / (len(waiting) + 1))
        else:
            ended.append((job, reason))


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[bool]:
    """Lock a run, at most until this process ends. Yields False if another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(FileLock(folder / LOCK).acquire(timeout=0))
            FileLock(folder / run.LOCK).acquire(timeout=0).lock.release()  # a run may continue after its sweep ended
            is_ours = True
        except Timeout:
            is_ours = False
        except (NotImplementedError, OSError) as failure:
            if not run.means_no_locks(failure):
                raise
            is_ours = True  # without locks, the sweep trains as the task script does, which warns
        yield is_ours


def attend(job: Job, gpu: str | None, threads: int, interruption: Interruption) -> str | None:
    """Train and test a run, as far as needed. Returns why it failed, empty if it is done, None if interrupted."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)} | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    for testing in (False, True):
        if job.is_tested() if testing else job.epochs_done() >= job.options["epochs"]:
            continue
        print(f"{job.name}: {'test' if testing else 'train'}{f' on GPU {gpu}' if gpu else ''}", flush=True)
        with open(job.folder / LOG, "a") as log, open(job.folder / COMMANDS, "a") as record:
            # The last digits of results depend on the number of threads.
            record.write(f"{run.commit()}: OMP_NUM_THREADS={threads} {shown(job.command(testing))}\n")
            quiet = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            process = subprocess.Popen(job.command(testing), env=environment, **quiet)
        while process.poll() is None and not interruption.signal:
            time.sleep(POLL_SECONDS)
        if interruption.signal:
            process.terminate()  # the run saves
            process.wait()
            return None
        status, printed = process.returncode, (job.folder / LOG).read_text(errors="replace").strip().splitlines()
        killed = [f"killed by signal {-status} ({signal.strsignal(-status)})"] if status < 0 else []
        reason = [f"exit status {status}", *printed[-1:], *killed][-1]
        print(f"{job.name}: {'failed: ' * bool(status)}{reason}", flush=True)
        if status:
            return reason
    return ""


def shown(command: list[str]) -> str:
    """A command as one types it in the checkout."""
    return shlex.join(["python", *(word.removeprefix(f"{SCRIPT.parent}/") for word in command[1:])])


if __name__ == "__main__":
    sys.exit(main())
