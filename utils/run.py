"""The folder of a run: its options, its checkpoints, its metrics."""

import errno
import fcntl
import json
from pathlib import Path
from typing import Any

from utils import checkpoints
from utils.errors import UserError
from utils.options import Options

OPTIONS = "options.yaml"
METRICS = "metrics.jsonl"
LOCK = ".lock"


class Run:
    """One folder a run:

    options.yaml         the resolved options, which --config reads
    checkpoint.pth.tar   all that an exact continuation needs (see utils/checkpoints.py)
    model_best.pth.tar   the same, of the epoch of highest validation accuracy
    metrics.jsonl        one JSON object an epoch: nothing but what a repetition of the run gives again, bit for bit
    tensorboard/         with --logging
    .lock                held by the process that writes into the folder
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def lock(self) -> None:
        """Make the folder and keep other trainings out of it, for as long as this object and its process live.

        The system releases the lock when the process ends, however it ends.

        Raises:
            UserError: the folder cannot be made or written to, or another training holds it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / LOCK, "a")  # noqa: SIM115, to be closed with this object
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output_dir {self.folder}: another training is writing into it; wait for its end or choose another folder"
            ) from None
        except OSError as failure:
            if failure.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                reason = failure.strerror
                raise UserError(f"--output_dir {self.folder}: cannot be used ({reason}); choose another folder") from failure
            print(f"warning: --output_dir {self.folder}: no locks there; see that no other training uses it", flush=True)
        for name in (OPTIONS, METRICS, checkpoints.LAST, checkpoints.BEST):
            checkpoints.remove_left_behind(self.folder / name)

    def create(self, options: Options) -> None:
        """Write the options into the folder. Raises UserError where that fails."""
        checkpoints.write_atomically(self.folder / OPTIONS, lambda file: file.write(options.to_yaml().encode()))

    def holds_checkpoint(self) -> bool:
        return any((self.folder / name).exists() for name in (checkpoints.LAST, checkpoints.BEST))

    def check_may_write(self, resumed: Path | None, position: tuple[int, int]) -> None:
        """See that no checkpoint is lost by training on from `resumed`, or anew (None).

        Args:
            position: epoch and sample from which the training goes on.

        Raises:
            UserError: the folder holds another run, or a later checkpoint of this one.
        """
        last = self.folder / checkpoints.LAST
        here = resumed is not None and resumed.resolve().parent == self.folder.resolve()
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
                f"--output_dir {self.folder}: holds a run already; --resume auto goes on with it, or choose another folder"
            )
        if there and (there["epoch"], there["sample"]) > position:
            raise UserError(
                f"--resume {resumed}: {last} is later (epoch {there['epoch']}); resume that, or choose another --output_dir"
            )

    def save(self, checkpoint: dict[str, Any], is_best: bool = False) -> Path:
        """Write the checkpoint, then the metrics file from its history, so that a checkpoint brings the metrics back."""
        if is_best:
            checkpoints.save(self.folder / checkpoints.BEST, checkpoint)
        last = self.folder / checkpoints.LAST
        checkpoints.save(last, checkpoint)
        self.write_metrics(checkpoint["history"])
        return last

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in history)
        checkpoints.write_atomically(self.folder / METRICS, lambda file: file.write(text.encode()))
