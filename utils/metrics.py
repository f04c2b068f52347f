"""The measurements of a run: means over an epoch, and the files that hold them."""

import contextlib
import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import checkpoints, distributed
from utils.distributed import print_rank0
from utils.errors import UserError, reason


class EpochMetrics:
    """Means over the samples of an epoch. The sums stay on the device, so that no step waits for them.

    Args:
        running: `totals()` at the interruption of the epoch, or empty.
    """

    def __init__(self, device: torch.device, running: Mapping[str, float]):
        running = dict(running)
        self._start = time.perf_counter() - running.pop("seconds", 0.0)
        # Only rank 0 continues the sums: `totals` adds the sums of all processes.
        own = running if distributed.is_main() else dict.fromkeys(running, 0.0)
        self._sums = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in own.items()}

    def add(self, samples: int, sums: Mapping[str, Tensor]) -> None:
        """Add sums over `samples` samples of this process (scalars, detached here), the same names at every step."""
        for name, total in {**sums, "samples": sums["train_loss"].new_tensor(samples)}.items():
            self._sums[name] = self._sums.get(name, 0) + total.detach().double()

    def totals(self) -> dict[str, float]:
        """Sums over the samples of all processes, and the seconds that they took."""
        sums = distributed.all_reduce(torch.stack(list(self._sums.values()))).tolist()
        return dict(zip(self._sums, sums, strict=True)) | {"seconds": time.perf_counter() - self._start}

    def means(self) -> dict[str, float]:
        """Means over the samples of all processes, and the seconds that they took."""
        totals = self.totals()
        samples, seconds = totals.pop("samples"), totals.pop("seconds")
        return {name: total / samples for name, total in totals.items()} | {"seconds": seconds}

    def shown(self) -> dict[str, float]:
        """This process's loss and accuracy so far."""
        samples = max(float(self._sums["samples"]), 1.0)  # its shard of the first batch may be empty
        return {name: float(self._sums[f"train_{name}"]) / samples for name in ("loss", "accuracy")}


# Files


def write_metrics(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write a metrics file: one JSON object per epoch, counted from 1."""
    text = "".join(json.dumps(line) + "\n" for line in history)
    checkpoints.write_atomically(path, lambda file: file.write(text.encode()))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, also of an earlier release.

    Raises:
        UserError: the file cannot be read, or is not a metrics file.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        return [checkpoints.metrics_line(line) for line in lines]
    except OSError as failure:
        raise UserError(f"{path}: {reason(failure, path)}") from failure
    except (ValueError, TypeError, LookupError, AttributeError) as failure:
        raise UserError(f"{path}: damaged, or not the metrics file of a run") from failure


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a CSV file and print its path. Raises UserError if it cannot be written."""
    with contextlib.suppress(OSError):  # writing the file reports an error of the folder
        path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.write_atomically(path, lambda file: file.write(to_csv(rows).encode()))
    print_rank0(f"table written to {path}")


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with the columns of all rows."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class TensorBoard:
    """Scalars of every epoch for TensorBoard; without a folder it does nothing.

    Args:
        epoch: number of finished epochs; scalars of later epochs in the folder become void.

    Raises:
        UserError: the package is not installed.
    """

    def __init__(self, folder: Path | None, epoch: int):
        self._writer = None
        if folder:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UserError("--logging needs the package tensorboard: pip install tensorboard") from None
            self._writer = SummaryWriter(folder, purge_step=epoch + 1)

    def write(self, metrics: Mapping[str, Any]) -> None:
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, metrics["epoch"])
            self._writer.flush()
