#!/usr/bin/env python3
"""Train, resume and evaluate a spiking network that memorizes associations with Hebbian plasticity (arXiv:2205.11276).

python memorizing_associations_task.py --config configs/quickstart.yaml --output_dir runs/quickstart
python memorizing_associations_task.py --resume runs/quickstart/model_best.pth.tar --evaluate
"""

import math
import random
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import data
import models
from data.loader import prefetch
from utils import checkpoints, distributed, launch
from utils.device import choose_backend, choose_device
from utils.distributed import print_rank0
from utils.errors import in_one_line, not_finite, out_of_memory_in_one_line
from utils.interruption import Interruption
from utils.metrics import EpochMetrics, TensorBoard
from utils.options import CURRICULUM, RECORDED, TASK_GROUPS, Options, Parser
from utils.progress import Progress, epoch_line, report_silence, report_start
from utils.run import Run, find_checkpoint, find_folder, save_table


@in_one_line
def main(argv=None) -> int:
    options = Parser(__doc__.splitlines()[0], TASK_GROUPS).parse(argv)
    ranks = launch.find_ranks(options)
    leads = ranks is None or ranks.leads  # other nodes get the options and the checkpoint from the first
    checkpoint = find_checkpoint(options) if leads else None
    options.check_combination()
    if options["print_options"]:
        print(options.to_yaml(), end="")
        return 0
    if options["evaluate"]:
        return launch.run(evaluate_checkpoint, ranks, options, checkpoint)
    with find_folder(options, checkpoint, leads) as folder:
        options.values["output_dir"] = str(folder)
        return launch.run(train, ranks, options, checkpoint)


def prepare(options: Options, checkpoint: dict | None) -> tuple[torch.nn.Module, torch.device]:
    """The network, with initial weights or the checkpoint's, on its device. `options` get what really runs."""
    device = choose_device(options)
    if checkpoint is None:
        if options["seed"] is None:
            options.values["seed"] = distributed.broadcast_object(random.SystemRandom().randrange(2**31))
        torch.manual_seed(options["seed"])
    with out_of_memory_in_one_line(batch_size=0):
        model = models.build_model(options.values, options["backend"])
    options.values |= {"backend": choose_backend(model, device, options), "device": device.type}
    if checkpoint:
        checkpoints.load_weights(model, checkpoint["state_dict"], options["resume"])
    return model.to(device), device


# Training


@dataclass
class TrainState:
    """Where a training stands, beside its weights and the moments of Adam."""

    epoch: int = 0  # the epoch to train next, counted from 0
    sample: int = 0  # training samples of it that are done
    running: dict[str, float] = field(default_factory=dict)  # sums over those
    history: list[dict[str, Any]] = field(default_factory=list)  # the metrics of the epochs before it
    best_acc: float = 0.0  # highest validation accuracy, percent

    def state_dict(self) -> dict[str, Any]:
        return asdict(self) | {"best_acc": torch.tensor(self.best_acc, dtype=torch.float64)}

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        self.epoch, self.sample, self.running = checkpoint["epoch"], checkpoint["sample"], checkpoint["running"]
        self.history, self.best_acc = list(checkpoint["history"]), checkpoint["best_acc"].item()

    def finish_epoch(self, metrics: dict[str, Any]) -> bool:
        """Go to the next epoch. Returns whether this one is the best so far."""
        is_best = metrics["validation_accuracy"] > self.best_acc or (not self.history and self.best_acc == 0)
        self.best_acc = metrics["validation_accuracy"] if is_best else self.best_acc
        self.history.append(metrics)
        self.epoch, self.sample, self.running = self.epoch + 1, 0, {}
        return is_best


def train(options: Options, checkpoint: dict | None) -> int:
    """Train to the last epoch, or until a signal comes. Returns the exit status."""
    state = TrainState(epoch=options["start_epoch"])
    epochs, samples = options["epochs"], data.TRAINING_SAMPLES
    if checkpoint:
        state.load_state_dict(checkpoint)
        if state.epoch >= epochs:
            done = f"{state.epoch} epochs are done, and --epochs is {epochs}"
            print_rank0(f"{options['resume']}: {done}; a larger one trains on, --evaluate tests the network")
            return 0
    model, device = prepare(options, checkpoint)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])
    if checkpoint:
        if checkpoint["optimizer"]:
            optimizer.load_state_dict(checkpoint["optimizer"])
        else:
            print_rank0(f"{options['resume']} holds no state of Adam for this network: Adam starts afresh")
    tensorboard = TensorBoard(options["logging"])
    run = Run(Path(options["output_dir"]))

    def save(is_best: bool = False) -> None:
        content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "params": options.of(RECORDED)}
        content |= state.state_dict() | {"time_stamp": checkpoints.time_stamp(), "log_dir": str(run.folder)}
        if distributed.is_main():
            run.save(content, is_best)

    if distributed.is_main():
        resumed = Path(options["resume"]) if checkpoint else None
        run.lock()
        run.check_may_write(resumed, (state.epoch, state.sample))
        save()  # from here on --resume auto continues; and this shows at once whether the folder can be written to
        run.record(options, resumed, report_start(options, state, model, checkpoint, samples))
        tensorboard.start(run.folder / "tensorboard", state.history)

    network = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    validation = data.evaluation_set("validation", **data.sizes(options))
    progress = Progress(epochs * samples, state.epoch * samples + state.sample, options["print_freq"])
    with Interruption(patient=distributed.world_size() > 1) as interruption:
        while state.epoch < epochs:
            metrics, is_best = train_epoch(network, optimizer, state, options, device, progress, interruption), False
            if metrics:  # the epoch is complete
                start = time.perf_counter()
                loss, accuracy = evaluate(model, validation, options, device)
                seconds = metrics["seconds"] + time.perf_counter() - start
                metrics |= {"validation_loss": loss, "validation_accuracy": accuracy, "seconds": seconds}
                is_best = state.finish_epoch(metrics)
                progress.epoch(epoch_line(metrics, epochs))
                report_silence(state.history, options, models.SILENT_BELOW)
                tensorboard.write(metrics)
            save(is_best)
            status = distributed.all_reduce_max(interruption.status)
            if status and state.epoch < epochs:
                progress.close()
                where = f"in epoch {state.epoch + 1} after {state.sample} of {samples} samples"
                print_rank0(f"interrupted {where}; --resume {shlex.quote(str(run.folder / checkpoints.LAST))} continues")
                return status
    progress.close()
    best = run.folder / checkpoints.BEST
    known = f"; --resume {shlex.quote(str(best))} --evaluate tests it" if best.exists() else ", reached before this run's start"
    print_rank0(f"best validation accuracy {state.best_acc:.3f} %{known}")
    return 0


def train_epoch(network, optimizer, state: TrainState, options, device, progress, interruption) -> dict[str, Any] | None:
    """Train from `state` to the end of its epoch. Returns the means over the epoch, or None if a signal came before its end:
    then `state` says where."""
    epoch, samples = state.epoch, data.TRAINING_SAMPLES
    falls = epoch // options["decay_learning_rate_every"]
    learning_rate = options["learning_rate"] * options["learning_rate_decay"] ** falls
    l2 = options["l2"] * options["l2_decay"] ** falls if epoch > 0 else 0.0
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    metrics = EpochMetrics(device, state.running)
    batch_size = options.step_size
    ranges = [(start, min(start + batch_size, samples)) for start in range(state.sample, samples, batch_size)]
    for (start, stop), batch in zip(ranges, training_batches(ranges, epoch, options), strict=True):
        where = f"epoch {epoch + 1}, step {start // batch_size + 1}"
        with out_of_memory_in_one_line(options["batch_size"]):
            shard = batch.to(device)
            sums = train_step(network, optimizer, shard, batch_size=stop - start, l2=l2, options=options, where=where)
        metrics.add(len(batch), sums)
        progress.step(stop - start, f"epoch {epoch + 1}", samples - stop, metrics.shown)
        if stop < samples and distributed.all_reduce_max(interruption.status):
            state.sample, state.running = stop, metrics.totals()
            return None
    rates = metrics.means()
    loss, accuracy, regularization, seconds = (rates.pop(name) for name in ("loss", "accuracy", "regularization", "seconds"))
    return {
        "epoch": epoch,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "train_loss": loss,
        "train_accuracy": 100 * accuracy,
        "rate_regularization": regularization,  # Hz^2
        "rates": rates,  # Hz
        "seconds": seconds,
    }


def training_batches(ranges: list[tuple[int, int]], epoch: int, options: Options) -> Iterator[data.Samples]:
    """This process's shard of each batch, which is given as a range of the samples of the epoch."""
    draw = data.training_samples if options["inf_data"] else data.fixed_training_samples

    def make(start: int, stop: int) -> data.Samples:
        length = data.training_length(epoch, **options.of(CURRICULUM, "sequence_length"))
        return draw(*distributed.shard(start, stop), epoch, **data.sizes(options, sequence_length=length))

    return prefetch(make, ranges, options["workers"], options["prefetch_factor"])


def train_step(
    network, optimizer, batch: data.Samples, *, batch_size: int, l2: float, options: Options, where: str
) -> dict[str, Tensor]:
    """One step on this process's shard `batch` of a batch of `batch_size` samples, `l2` times the rate regularization added to
    the loss. Returns sums over the shard's samples.

    Raises:
        UserError: on every process, the step not applied, where the loss or the gradient of one is not finite.
    """
    output = network(batch.features, batch.labels, batch.query)
    cross_entropy_sum = cross_entropy(output.logits, batch.answer, reduction="sum")
    loss = cross_entropy_sum / batch_size
    mean_rates = distributed.batch_mean(output.rates, batch_size)
    regularization = models.rate_regularization(mean_rates, options["target_rate"])
    if l2:
        loss = loss + l2 * regularization

    optimizer.zero_grad()
    (loss * distributed.world_size()).backward()  # DistributedDataParallel takes the mean over the processes
    gradients = {name.removeprefix("module."): weight.grad for name, weight in network.named_parameters()}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    # The one point where a step waits for the device:
    if distributed.all_reduce((~torch.isfinite(loss + norm)).float()) > 0:
        tensors = {"loss": loss} | {f"gradient of {name}": gradient for name, gradient in gradients.items()}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        raise not_finite(where, ", ".join(broken) or "norm of the gradient, or a tensor of another process", options)
    if options["max_grad_norm"] > 0:
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), options["max_grad_norm"], norm)
    optimizer.step()

    correct = (output.logits.argmax(1) == batch.answer).sum()
    sums = {"loss": cross_entropy_sum, "accuracy": correct, "regularization": regularization * len(batch)}
    return sums | {name: rates.mean(1).sum() for name, rates in output.rates.items()}


# Evaluation

EVALUATION_BATCH = 125  # small enough that there is one for each of 8 processes


@torch.no_grad()
def evaluate(model, samples: data.Samples, options: Options, device: torch.device) -> tuple[float, float]:
    """Mean cross entropy and accuracy in percent, each process on its part.

    The parts are made of the batches that one process takes: the rounding of a matrix product depends on the size of the batch,
    and may flip a spike.

    Raises:
        UserError: the loss or the memory is not finite.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    size = min(options["batch_size"], EVALUATION_BATCH)
    for first in range(0, len(samples), size)[distributed.rank() :: distributed.world_size()]:
        batch = samples[first : first + size].to(device)
        with out_of_memory_in_one_line(size):
            logits = model(batch.features, batch.labels, batch.query).logits
        correct = (logits.argmax(1) == batch.answer).sum()
        sums += torch.stack([cross_entropy(logits, batch.answer, reduction="sum").double(), correct.double()])
    loss, correct = distributed.all_reduce(sums).tolist()
    few = samples[:4].to(device)  # a memory that diverges silences the neurons that read it, and the loss stays finite
    memory = model(few.features, few.labels, few.query, record=True).activity["memory"]
    if not (math.isfinite(loss) and torch.isfinite(memory).all()):
        raise not_finite("evaluation", "the memory" if math.isfinite(loss) else "the loss", options)
    return loss / len(samples), 100 * correct / len(samples)


def evaluate_checkpoint(options: Options, checkpoint: dict) -> int:
    """Test on the published test set, at one sequence length or several."""
    model, device = prepare(options, checkpoint)
    print_rank0(options["resume"] + (f", after {checkpoint['epoch']} epochs" if checkpoint["epoch"] else ""))
    rows = []
    for length in options.all_lengths:
        samples = data.evaluation_set("test", **data.sizes(options, sequence_length=length))
        loss, accuracy = evaluate(model, samples, options, device)
        rows.append({"sequence_length": length, "accuracy": accuracy, "loss": loss})
        print_rank0(f"sequence_length {length:3d}  loss {loss:.4f}  accuracy {accuracy:7.3f} %")
    try:
        if distributed.is_main() and (len(rows) > 1 or options["output_dir"]):
            save_table(options, rows, trained_length=checkpoint["params"]["sequence_length"], samples=len(samples))
    finally:  # the result is printed even where the table cannot be written
        print_rank0(f" * Acc {sum(row['accuracy'] for row in rows) / len(rows):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
