"""The display of a run: a bar on a terminal, a line now and then in a log, one line per epoch."""

import math
import sys
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from tqdm import tqdm

from utils import distributed
from utils.distributed import print_rank0


class Progress:
    """Progress over all samples of a run, with the speed and the time left."""

    QUIET = 60.0  # seconds after which a log gets a line

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
            values: returns the numbers to show; called only if they are shown.
        """
        self._done += samples
        self._steps += 1
        self._bar.update(samples)
        if self._steps == 1:  # the first step allocates and compiles
            self._first, self._start = self._done, time.perf_counter()
        if self._steps % self._print_freq:
            return
        if not self._bar.disable:
            self._bar.set_description(title, refresh=False)
            self._bar.set_postfix(values(), refresh=False)
        elif distributed.is_main() and time.perf_counter() - self._last_line >= self.QUIET:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values().items())
            self._print(f"{title}, {left:,} samples left in this epoch  {shown}")

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
        speed = (self._done - self._first) / (time.perf_counter() - self._start)  # samples in a second
        left = tqdm.format_interval((self._total - self._done) / speed) if speed else "?"
        print_rank0(f"{line}  {speed:,.0f} samples/s  {left} left")
        self._last_line = time.perf_counter()


def report_silence(history: list[dict[str, Any]], names: Collection[str], *, below: float, remedy: str) -> None:
    """Print which of these rates (Hz) fell below a bound in the last epoch, and which rose above it again."""
    now, before = history[-1], history[-2] if len(history) > 1 else {}
    for name in names:
        silent, was_silent = now[name] < below, before.get(name, math.inf) < below
        if silent and not was_silent:
            print_rank0(f"warning: {name} fell silent ({now[name]:.2g} Hz); hardly any gradient flows through it{remedy}")
        if was_silent and not silent:
            print_rank0(f"{name} fires again ({now[name]:.2g} Hz)")
