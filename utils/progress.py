"""What a training shows: a bar on a terminal, one line an epoch."""

import sys
import time
from typing import Any

from tqdm import tqdm

from utils import distributed


class Progress:
    """Progress over the samples of a whole training, so that speed and time left are those of the run."""

    def __init__(self, total: int, done: int, print_freq: int):
        self._print_freq, self._steps = print_freq, 0
        show = distributed.is_main() and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, unit=" samples", unit_scale=True, disable=not show, dynamic_ncols=True)
        self._total, self._done, self._seen, self._start = total, done, 0, time.perf_counter()

    def step(self, samples: int, title: str, values) -> None:
        """One training step is done. `values()` gives what to show; it is called only where something is shown."""
        self._done += samples
        self._seen += samples
        self._steps += 1
        if not self._bar.disable and self._steps % self._print_freq == 0:
            self._bar.set_description(title, refresh=False)
            self._bar.set_postfix(values(), refresh=False)
        self._bar.update(samples)

    def epoch(self, line: str) -> None:
        """One epoch is done."""
        if not distributed.is_main():
            return
        speed = self._seen / (time.perf_counter() - self._start)
        left = (self._total - self._done) / speed if speed else 0
        tqdm.write(f"{line}  {speed:,.0f} samples/s  {tqdm.format_interval(left)} left", file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self._bar.close()


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """The numbers of an epoch, as people read them."""
    return (
        f"epoch {metrics['epoch'] + 1:3d}/{epochs}  "
        f"loss {metrics['train_loss']:.4f}  accuracy {metrics['train_accuracy']:6.2f} %  "
        f"validation loss {metrics['validation_loss']:.4f}  accuracy {metrics['validation_accuracy']:6.2f} %  "
        f"learning rate {metrics['learning_rate']:.3g}"
    )
