"""What a training shows: a bar on a terminal, a line now and then in a log, one line per epoch."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tqdm import tqdm

from utils import distributed
from utils.distributed import print_rank0
from utils.options import RECORDED, Options


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

    def epoch(self, line: str) -> None:
        """One epoch is done."""
        self._print(line)

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


def epoch_line(metrics: dict[str, Any], epochs: int) -> str:
    """The numbers of an epoch, as people read them."""
    return (
        f"epoch {metrics['epoch'] + 1:3d}/{epochs}  "
        f"loss {metrics['train_loss']:.4f}  accuracy {metrics['train_accuracy']:6.2f} %  "
        f"validation loss {metrics['validation_loss']:.4f}  accuracy {metrics['validation_accuracy']:6.2f} %  "
        f"learning rate {metrics['learning_rate']:.3g}"
    )


def report_start(options: Options, state, model: torch.nn.Module, checkpoint: dict | None, samples: int) -> str:
    """Print what is trained, on what, and what a resume changes. Returns the line that is recorded."""
    length, classes, batch = options["sequence_length"], options["num_classes"], options.step_size
    parameters = sum(weight.numel() for weight in model.parameters())
    processes = f", {distributed.world_size()} processes on {options.nodes} nodes" if distributed.world_size() > 1 else ""
    print_rank0(f"{parameters:,} parameters learn {length} pairs of {classes} classes: epochs {state.epoch + 1} to "
                f"{options['epochs']} of {samples:,} samples, {batch:,} in a step{processes}, seed "
                f"{options['seed']}, in {options['output_dir']}")  # fmt: skip
    where = f"in epoch {state.epoch + 1} after {state.sample} samples"
    changed = []
    if checkpoint:
        before = {name: value for name, value in checkpoint["params"].items() if value != "auto"}
        changed = options.differences(before, RECORDED)
        print_rank0(f"resuming {options['resume']} {where}{''.join(f'; from here on {change}' for change in changed)}")
        earlier = state.history[-1].get("batch_size", batch) if state.history else batch
        if earlier != batch:
            print_rank0(f"warning: a step takes {batch:,} samples, not {earlier:,} as before; --batch_size counts per node")
    where += f": {options['backend']} on {options['device']}, {batch} samples in a step{processes}"
    return where + "".join(f", {change}" for change in changed)


def report_silence(history: list[dict[str, Any]], options: Options, silent_below: float) -> None:
    """Say when a population falls silent, and when it fires again."""
    now, before = history[-1]["rates"], history[-2]["rates"] if len(history) > 1 else {}
    for name, rate in now.items():
        silent, was_silent = rate < silent_below, before.get(name, math.inf) < silent_below
        if silent and not was_silent:
            short = options["sequence_length"] <= 2 or options["curriculum_start"]
            remedy = "" if short else "; --curriculum_start 2 avoids it"
            print_rank0(f"warning: {name} fell silent (mean rate {rate:.2g} Hz), so nothing is learned through it{remedy}")
        if was_silent and not silent:
            print_rank0(f"{name} fires again ({rate:.2g} Hz)")
