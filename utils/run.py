"""The folder of a run: its options, its checkpoints, its metrics."""

import json
from pathlib import Path
from typing import Any

from utils import checkpoints
from utils.errors import UserError
from utils.options import Options

OPTIONS = "options.yaml"
METRICS = "metrics.jsonl"


class Run:
    """One folder a run:

    options.yaml         the resolved options, which --config reads
    checkpoint.pth.tar   all that an exact continuation needs (see utils/checkpoints.py)
    model_best.pth.tar   the same, of the epoch of highest validation accuracy
    metrics.jsonl        one JSON object an epoch: nothing but what a repetition of the run gives again, bit for bit
    tensorboard/         with --logging
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def create(self, options: Options) -> None:
        """Make the folder and write the options into it.

        Raises:
            UserError: the folder cannot be made or written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as failure:
            raise UserError(f"--output_dir {self.folder}: cannot be made ({failure.strerror})") from failure
        checkpoints.write_atomically(self.folder / OPTIONS, lambda file: file.write(options.to_yaml().encode()))

    def holds_checkpoint(self) -> bool:
        return any((self.folder / name).exists() for name in (checkpoints.LAST, checkpoints.BEST))

    def save(self, checkpoint: dict[str, Any], is_best: bool = False) -> Path:
        """Write the checkpoint, then the metrics file from its history: after a crash, the checkpoint brings the metrics back."""
        if is_best:
            checkpoints.save(self.folder / checkpoints.BEST, checkpoint)
        last = self.folder / checkpoints.LAST
        checkpoints.save(last, checkpoint)
        self.write_metrics(checkpoint["history"])
        return last

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        text = "".join(json.dumps(line) + "\n" for line in history)
        checkpoints.write_atomically(self.folder / METRICS, lambda file: file.write(text.encode()))
