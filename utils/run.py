"""The folder of a run: its options, its checkpoints, its metrics; and the checkpoint that a run continues."""

import contextlib
import fcntl
import itertools
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from utils import checkpoints
from utils.errors import UsageError, UserError
from utils.metrics import write_metrics, write_table
from utils.options import DATA, MODEL, RECORDED, SEQUENCE_LENGTH, Options

OPTIONS = "options.yaml"
METRICS = "metrics.jsonl"
TABLE = "accuracy_by_length.csv"
LOCK = ".lock"


def lock(folder: Path, name: str) -> IO | None:
    """Make a folder and lock it by a file in it; None while another process holds the lock.

    The system releases it when it is closed, here and in every process that inherits it, however they end.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / name, "a")  # noqa: SIM115, the caller closes it
    except OSError as failure:
        raise UserError(f"--output_dir {folder}: cannot be used ({failure.strerror}); choose another folder") from failure
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        print(f"warning: --output_dir {folder}: no locks there; see that no other training uses it", flush=True)
    return file


class Run:
    """The folder of a run:

    options.yaml         the options, which --config reads, below an entry for every start of the run
    checkpoint.pth.tar   all that an exact continuation needs (see utils/checkpoints.py)
    model_best.pth.tar   the same, of the epoch of highest validation accuracy
    metrics.jsonl        one JSON object per epoch; a repetition gives all of it again, bit for bit, but `seconds` (wall time)
    tensorboard/         with --logging
    .lock                held by the process that writes into the folder
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def lock(self) -> None:
        """Make the folder and keep other trainings out of it, for as long as this object and its process live.

        Raises:
            UserError: the folder cannot be made or written to, or another training holds it.
        """
        self._lock = lock(self.folder, LOCK)
        if not self._lock:
            raise UserError(
                f"--output_dir {self.folder}: another training is writing into it; wait for its end or choose another folder"
            )
        for name in (OPTIONS, METRICS, checkpoints.LAST, checkpoints.BEST):
            checkpoints.remove_left_behind(self.folder / name)

    def holds_checkpoint(self) -> bool:
        return any((self.folder / name).exists() for name in (checkpoints.LAST, checkpoints.BEST))

    def check_record(self) -> None:
        """Raises UserError where the record of a run stands without a checkpoint: a new run would overwrite it."""
        standing = [name for name in (OPTIONS, METRICS) if (self.folder / name).exists()]
        if standing and not self.holds_checkpoint():
            raise UserError(
                f"--output_dir {self.folder}: holds {' and '.join(standing)} of a run, but no checkpoint to continue; "
                "put the checkpoint back or choose another folder"
            )

    def check_may_write(self, resumed: Path | None, position: tuple[int, int]) -> None:
        """See that no checkpoint is lost by training on from `resumed`, or anew (None).

        Args:
            position: epoch and sample from which the training continues.

        Raises:
            UserError: the folder holds another run, or a later checkpoint of this one.
        """
        self.check_record()
        last = self.folder / checkpoints.LAST
        # The folder, not the file, is resolved: a checkpoint may be a symbolic link to another disk.
        here = resumed is not None and resumed.parent.resolve() == self.folder.resolve()
        if not self.holds_checkpoint() or (here and resumed.name == checkpoints.LAST):
            return
        try:
            there = checkpoints.load(last)
        except UserError:
            there = None  # damaged or not there: nothing to lose
        if not here:
            if there and not there["history"] and not there["sample"]:
                return  # nothing has been trained yet
            raise UserError(
                f"--output_dir {self.folder}: holds a run already; --resume auto continues it, or choose another folder"
            )
        if there and (there["epoch"], there["sample"]) > position:
            raise UserError(
                f"--resume {resumed}: {last} is later (epoch {there['epoch']}); resume that, or choose another --output_dir"
            )

    def record(self, options: Options, resumed: Path | None, how: str) -> None:
        """Write the options, below an entry for this start and those of the starts before it.

        Args:
            resumed: the checkpoint that this start continues; entries of its run are kept.
            how: what started where, and what it changed.
        """
        entries = []
        if resumed:
            try:
                lines = resumed.with_name(OPTIONS).read_text(encoding="utf-8").splitlines()
                entries = list(itertools.takewhile(lambda line: line.startswith(("# started", "# resumed", "#   ")), lines))
            except (OSError, UnicodeDecodeError):
                pass  # a published checkpoint, or one that was copied
        at, command = time.strftime("%Y-%m-%d %H:%M:%S"), shlex.join(["python", *sys.argv])
        program = f"commit {commit()}, Python {platform.python_version()}, PyTorch {torch.__version__}"
        entries.append(f"# {'resumed' if resumed else 'started'} {at} {how}; host {socket.gethostname()}, {program}")
        entries.append(f"#   {''.join(c if c.isprintable() else '?' for c in command)}")
        text = "\n".join(entries) + "\n\n" + options.to_yaml()
        checkpoints.write_atomically(self.folder / OPTIONS, lambda file: file.write(text.encode(errors="replace")))

    def save(self, checkpoint: dict[str, Any], is_best: bool = False) -> Path:
        """Write the metrics file from the checkpoint's history, then the checkpoint.

        Killed in between, a run resumes from the checkpoint before, and writes both again: no line is ever missing.
        """
        if is_best:
            checkpoints.save(self.folder / checkpoints.BEST, checkpoint)
        write_metrics(self.folder / METRICS, checkpoint["history"])
        last = self.folder / checkpoints.LAST
        checkpoints.save(last, checkpoint)
        return last


def commit() -> str:
    """The commit of the program, marked where files differ from it."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty=+changes", "--abbrev=10", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def new_folder() -> Path:
    """A new folder in runs/, which nobody else has."""
    for number in itertools.count(1):
        folder = Path("runs") / (checkpoints.time_stamp() + (f"-{number}" if number > 1 else ""))
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as failure:
            raise UserError(f"{folder}: cannot be made ({failure.strerror}); choose a folder by --output_dir") from failure


@contextlib.contextmanager
def find_folder(options: Options, checkpoint: dict | None, leads: bool) -> Iterator[Path]:
    """The folder of a training: --output_dir, or that of the checkpoint to continue, or a new one.

    Args:
        leads: whether the main process runs here; elsewhere none is made, and its name is the first node's.
    """
    if options["output_dir"] or not leads:
        yield Path(options["output_dir"])
    elif checkpoint and Path(options["resume"]).with_name(OPTIONS).exists():
        yield Path(options["resume"]).parent
    else:
        folder = new_folder()
        try:
            yield folder
        finally:
            with contextlib.suppress(OSError):
                folder.rmdir()  # it is empty where the start was refused


def save_table(options: Options, rows: list[dict[str, Any]], **others: Any) -> None:
    """Write what an evaluation found: into --output_dir, or beside the checkpoint under its name.

    Raises:
        UserError: it cannot be written into --output_dir; beside a checkpoint that is a warning.
    """
    asked_for = options["output_dir"]
    beside = Path(f"{options['resume'].removesuffix('.pth.tar')}.{TABLE}")
    others |= {"num_classes": options["num_classes"], "dataset_seed": options["dataset_seed"], "checkpoint": options["resume"]}
    try:
        write_table(Path(asked_for) / TABLE if asked_for else beside, [row | others for row in rows])
    except UserError as failure:
        if asked_for:
            raise
        print(f"warning: {failure}", flush=True)


# The checkpoint of --resume


def find_checkpoint(options: Options) -> dict[str, Any] | None:
    """The checkpoint that --resume names, or None for a new run. `options` gets the options and the path of the checkpoint.

    Raises:
        UsageError: an option that is given cannot be changed.
        UserError: there is no such checkpoint.
    """
    resume = options["resume"]
    if not resume:
        if options["evaluate"]:
            raise UserError("--evaluate needs a checkpoint: --resume PATH")
        return None
    if resume == "auto" and not options["output_dir"]:
        raise UserError("--resume auto needs to know the run: --output_dir FOLDER")
    folder = Path(options["output_dir"] if resume == "auto" else resume)
    if resume != "auto" and not folder.is_dir():
        checkpoint = checkpoints.load(resume, {name: options[name] for name in options.given})
    else:
        order = (checkpoints.LAST, checkpoints.BEST)
        found = checkpoints.find(folder, order[::-1] if options["evaluate"] else order)
        if not found and (options["evaluate"] or resume != "auto"):
            raise UserError(f"--resume {resume}: no checkpoint in {folder}")
        if not found:
            Run(folder).check_record()
            print(f"--resume auto: no checkpoint in {folder}, a new run begins", flush=True)
            return None
        options.values["resume"], checkpoint = str(found[0]), found[1]
    _adopt(options, checkpoint["params"])
    return checkpoint


def _adopt(options: Options, params: dict[str, Any]) -> None:
    """Take what is not given from the checkpoint, and see that what is given can be meant."""
    options.adopt(params, RECORDED)
    if options["evaluate"]:
        must_agree = [option for option in MODEL if option is not SEQUENCE_LENGTH]
    else:
        must_agree = [*MODEL, next(option for option in DATA if option.name == "dataset_seed")]
        fixed = [option for option in RECORDED if option.name in ("seed", "start_epoch")]
        if differing := options.differences(params, fixed):
            raise UsageError(f"{options['resume']}: a run begins once: {', '.join(differing)}; leave that out to continue it")
    differing = options.differences(params, must_agree)
    if differing and options["check_params"]:
        raise UsageError(f"{options['resume']}: options differ: {', '.join(differing)}; --check_params 0 overrides")
