"""What a training shows: a bar on a terminal, a line now and then in a log, one line per epoch."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from models import POPULATIONS, SILENT_BELOW
from utils import distributed
from utils.distributed import print_rank0


class Progress:
    """Progress over the samples of a whole training, so that speed and time left are those of the run."""

    QUIET = 60.0  # seconds after which a log gets a line, and which a first epoch may take without an estimate

    def __init__(self, total: int, done: int, print_freq: int):
        self._print_freq, self._steps = print_freq, 0
        show = distributed.is_main() and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=" samples", unit_scale=True, disable=not show, dynamic_ncols=True)
        self._total, self._done, self._first = total, done, done
        self._start = self._last_line = time.perf_counter()

    def step(self, samples: int, title: str, left: int, values: Callable[[], Mapping[str, float]]) -> None:
        """One training step is done.

        Args:
            left: samples left in the epoch.
            values: what to show; called only where something is shown.
        """
        self._done += samples
        self._steps += 1
        self._bar.update(samples)
        if self._steps == 1:  # it allocates and compiles
            self._first, self._start = self._done, time.perf_counter()
        elif self._steps == 4 and left > self.QUIET * self._speed():
            print_rank0(
                f"about {self._speed():,.0f} samples/s with sequences of this length, {self._time_left()} for all epochs"
            )
        if self._steps % self._print_freq:
            return
        if not self._bar.disable:
            self._bar.set_description(title, refresh=False)
            self._bar.set_postfix(values(), refresh=False)
        elif distributed.is_main() and time.perf_counter() - self._last_line >= self.QUIET:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values().items())
            self._print(f"{title}, {left:,} samples left in it  {shown}")

    def epoch(self, metrics: Mapping[str, Any], epochs: int) -> None:
        """One epoch is done."""
        self._print(
            f"epoch {metrics['epoch']:3d}/{epochs}  "
            f"loss {metrics['train_loss']:.4f}  accuracy {metrics['train_accuracy']:6.2f} %  "
            f"validation loss {metrics['validation_loss']:.4f}  accuracy {metrics['validation_accuracy']:6.2f} %  "
            f"learning rate {metrics['learning_rate']:.3g}"
        )

    def close(self) -> None:
        self._bar.close()

    def _print(self, line: str) -> None:
        print_rank0(f"{line}  {self._speed():,.0f} samples/s  {self._time_left()} left")
        self._last_line = time.perf_counter()

    def _speed(self) -> float:
        """Samples in a second, without the first step."""
        return (self._done - self._first) / (time.perf_counter() - self._start)

    def _time_left(self) -> str:
        speed = self._speed()
        return tqdm.format_interval((self._total - self._done) / speed) if speed else "?"


def report_silence(history: list[dict[str, Any]], short: bool) -> None:
    """Say when a population falls silent, and when it fires again. `short`: training begins with few pairs already."""
    now, before = history[-1], history[-2] if len(history) > 1 else {}
    for name in POPULATIONS:
        silent, was_silent = now[name] < SILENT_BELOW, before.get(name, math.inf) < SILENT_BELOW
        if silent and not was_silent:
            remedy = "" if short else "; --curriculum_start 2 avoids it"
            print_rank0(f"warning: {name} fell silent (mean rate {now[name]:.2g} Hz), so nothing is learned through it{remedy}")
        if was_silent and not silent:
            print_rank0(f"{name} fires again ({now[name]:.2g} Hz)")
