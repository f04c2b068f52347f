#!/usr/bin/env python3
"""Train, resume and evaluate a spiking network that memorizes associations with Hebbian plasticity (arXiv:2205.11276).

python memorizing_associations_task.py --config configs/quickstart.yaml --output_dir runs/quickstart
python memorizing_associations_task.py --resume runs/quickstart/model_best.pth.tar --evaluate
"""

import csv
import io
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import data
import models
from data.loader import ahead
from models import POPULATIONS, BackendError
from utils import checkpoints, distributed, launch, rendezvous
from utils.distributed import print_rank0
from utils.errors import UserError, out_of_memory_in_one_line, outlive_output, warn_in_one_line
from utils.interruption import Interruption
from utils.options import CURRICULUM, MODEL, SEQUENCE_LENGTH, TASK_GROUPS, TRAINING, Options, Parser
from utils.progress import Progress, epoch_line
from utils.run import Run


def main(argv=None) -> int:
    parser = Parser(__doc__.splitlines()[0], TASK_GROUPS)
    options = parser.parse(argv)
    warn_in_one_line()
    outlive_output()
    try:
        ranks = rendezvous.find_ranks(options)
        leads = ranks is None or ranks.leads  # other nodes get the options and the checkpoint from the first
        checkpoint = find_checkpoint(options) if leads else None
        if checkpoint:
            adopt_checkpoint(options, checkpoint, parser)
        if error := options.combination_error():
            parser.error(error)
        if options["print_options"]:
            print(options.to_yaml(), end="")
            return 0
        if not options["evaluate"]:
            options.values["output_dir"] = run_folder(options, checkpoint)
        return launch.run(evaluate_checkpoint if options["evaluate"] else train, ranks, options, checkpoint)
    except rendezvous.RanksError as error:
        parser.error(str(error))
    except (UserError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def find_checkpoint(options: Options) -> dict | None:
    """The checkpoint that --resume names, or None for a new run."""
    resume = options["resume"]
    if options["evaluate"] and not resume:
        raise UserError("--evaluate needs a checkpoint: --resume PATH")
    if not resume:
        return None
    if resume != "auto":
        return checkpoints.load(resume, {name: options[name] for name in options.given})
    if not options["output_dir"]:
        raise UserError("--resume auto needs to know the run: --output_dir FOLDER")
    found = checkpoints.find(Path(options["output_dir"]))
    if found:
        options.values["resume"] = str(found[0])
        return found[1]
    if options["evaluate"]:
        raise UserError(f"--resume auto: no checkpoint in --output_dir {options['output_dir']}")
    return None


def adopt_checkpoint(options: Options, checkpoint: dict, parser: Parser) -> None:
    """Take what is not given from the checkpoint; model options that are given must be the checkpoint's."""
    params = checkpoint["params"]
    options.adopt(params, (*MODEL, *data_and_training(options)))
    must_agree = [o for o in MODEL if not (options["evaluate"] and o is SEQUENCE_LENGTH)]
    differing = options.differences(params, must_agree)
    if differing and options["check_params"]:
        parser.error(f"{options['resume']}: model options differ: {', '.join(differing)}; --check_params 0 overrides")


def data_and_training(options: Options):
    return [o for o in (*options.groups["data"], *TRAINING, *CURRICULUM) if o.name != "start_epoch"]


def prepare(options: Options, checkpoint: dict | None) -> tuple[models.MemorizingAssociations, torch.device]:
    """The network, with initial weights or the checkpoint's, on its device."""
    device = choose_device(options)
    with torch.device("meta"):
        sketch = models.build_model(options.values, options["backend"])
    backend, why_not = sketch.prepare_backend(device.type)
    faster = "".join(f" ({name}: {reason})" for name, reason in why_not.items())
    print_rank0(f"backend {backend} on {device}{faster}")
    if options["seed"] is None:
        options.values["seed"] = distributed.broadcast_object(random.SystemRandom().randrange(2**31))
        print_rank0(f"seed {options['seed']}")
    torch.manual_seed(options["seed"])
    with out_of_memory_in_one_line(batch_size=0):
        model = models.build_model(options.values, backend)
    if checkpoint:
        checkpoints.load_weights(model, checkpoint["state_dict"], options["resume"])
    return model.to(device), device


def choose_device(options: Options) -> torch.device:
    name = f"cuda:{options['gpu']}" if options["gpu"] is not None else options["device"]
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here; use --device cpu")
    return device


# Training


def train(options: Options, checkpoint: dict | None) -> int:
    """Train to the last epoch, or until a signal comes. Returns the exit status."""
    run = open_run(options, checkpoint)
    model, device = prepare(options, checkpoint)
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])
    position = {"epoch": options["start_epoch"], "sample": 0, "running": {}, "history": [], "best_acc": torch.tensor(0.0)}
    if checkpoint:
        if checkpoint["optimizer"]:
            optimizer.load_state_dict(checkpoint["optimizer"])
        else:
            print_rank0(f"{options['resume']} holds no state of Adam for this network: Adam starts afresh")
        position = {key: checkpoint[key] for key in position}
        print_rank0(f"resuming {options['resume']} in epoch {position['epoch'] + 1} after {position['sample']} samples")
    if distributed.is_main():
        run.create(options)
        run.write_metrics(position["history"])

    def save(is_best: bool = False) -> None:
        state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "params": options.values}
        if distributed.is_main():
            run.save(position | state | {"time_stamp": checkpoints.time_stamp(), "log_dir": str(run.folder)}, is_best)

    network = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    validation = evaluation_set("validation", options, options["sequence_length"])
    epochs, samples = options["epochs"], data.TRAINING_SAMPLES
    progress = Progress(epochs * samples, position["epoch"] * samples + position["sample"], options["print_freq"])
    log = tensorboard(run, options)
    if not checkpoint:
        save()  # tells at once whether the folder can be written to, and keeps the initial weights
    with Interruption(patient=distributed.world_size() > 1) as interruption:
        while position["epoch"] < epochs:
            metrics = train_epoch(network, optimizer, position, options, device, progress, interruption)
            if metrics is not None:
                loss, accuracy = evaluate(model, validation, options["batch_size"], device)
                if not math.isfinite(loss):
                    raise not_finite(f"epoch {position['epoch'] + 1}", "validation loss")
                metrics |= {"validation_loss": loss, "validation_accuracy": accuracy}
                is_best = not position["history"] or accuracy > position["best_acc"].item()
                position["best_acc"] = torch.tensor(accuracy, dtype=torch.float64) if is_best else position["best_acc"]
                position |= {"epoch": position["epoch"] + 1, "sample": 0, "running": {}}
                position["history"] = [*position["history"], metrics]
                report_epoch(metrics, options, progress, log)
            else:
                is_best = False
            save(is_best)
            status = distributed.all_reduce_max(interruption.status)
            if status and position["epoch"] < epochs:
                progress.close()
                where = f"in epoch {position['epoch'] + 1} after {position['sample']} of {samples} samples"
                print_rank0(f"interrupted {where}; --resume {run.folder / checkpoints.LAST} goes on")
                return status
    progress.close()
    print_rank0(
        f"best validation accuracy {position['best_acc']:.3f} %; --resume {run.folder / checkpoints.BEST} --evaluate tests it"
    )
    return 0


def train_epoch(network, optimizer, position, options, device, progress, interruption) -> dict | None:
    """Train from `position` to the end of its epoch. Returns the means over the epoch, or None if a signal came before its end:
    then `position` says where."""
    epoch, samples = position["epoch"], data.TRAINING_SAMPLES
    learning_rate = options["learning_rate"] * options["learning_rate_decay"] ** (epoch // options["decay_learning_rate_every"])
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    sums = Sums(device, position["running"])
    batch_size = options["batch_size"] * max(options["world_size"], 1)
    starts = range(position["sample"], samples, batch_size)
    batches = [(start, min(start + batch_size, samples)) for start in starts]
    for (start, stop), batch in zip(batches, training_batches(batches, epoch, options), strict=True):
        where = f"epoch {epoch + 1}, step {start // batch_size + 1}"
        with out_of_memory_in_one_line(options["batch_size"]):
            train_step(network, optimizer, batch.to(device), stop - start, epoch, options, sums, where)
        progress.step(stop - start, f"epoch {epoch + 1}", lambda: sums.shown() | {"learning_rate": learning_rate})
        if stop < samples and distributed.all_reduce_max(interruption.status):
            position |= {"sample": stop, "running": sums.over_processes()}
            return None
    return {"epoch": epoch, "learning_rate": learning_rate, **sums.means()}


def train_step(
    network, optimizer, batch: data.Samples, batch_size: int, epoch: int, options: Options, sums: "Sums", where: str
) -> None:
    """One step on this process's part `batch` of a global batch of `batch_size` samples.

    Raises:
        UserError: on every process, the step not applied, where the loss or the gradient of one is not finite.
    """
    output = network(batch.features, batch.labels, batch.query)
    cross_entropy_sum = cross_entropy(output.logits, batch.answer, reduction="sum")
    mean_rates = distributed.batch_mean(output.rates, batch_size)
    regularization = models.rate_regularization(mean_rates, options["target_rate"])
    loss = cross_entropy_sum / batch_size
    if epoch > 0:
        loss = loss + options["l2"] * regularization
    optimizer.zero_grad()
    (loss * distributed.world_size()).backward()  # DistributedDataParallel takes the mean over the processes
    gradients = {name.removeprefix("module."): weight.grad for name, weight in network.named_parameters()}
    norm = torch.nn.utils.get_total_norm(list(gradients.values()))
    # The one point where a step waits for the device:
    if distributed.all_reduce_sum((~torch.isfinite(loss + norm)).float()) > 0:
        tensors = {"loss": loss} | {f"gradient of {name}": gradient for name, gradient in gradients.items()}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        raise not_finite(where, ", ".join(broken) or "norm of the gradient, or a tensor of another process")
    if options["max_grad_norm"] > 0:
        torch.nn.utils.clip_grads_with_norm_(network.parameters(), options["max_grad_norm"], norm)
    optimizer.step()
    sums.add(output, batch.answer, cross_entropy_sum, regularization)


def not_finite(where: str, what: str) -> UserError:
    return UserError(
        f"{where}: not finite: {what}; the step was not applied and the last checkpoint stays; --resume it with a lower "
        "--learning_rate or --max_grad_norm"
    )


class Sums:
    """Sums over the samples of an epoch, kept on the device so that no step waits for them."""

    NAMES = ("samples", "loss", "accuracy", "regularization", *POPULATIONS)

    def __init__(self, device: torch.device, start: dict[str, float] | None = None):
        if start and start.keys() != set(self.NAMES):
            raise UserError("the checkpoint's sums over its unfinished epoch are not those of this program; use another one")
        values = [start[name] if start and distributed.is_main() else 0.0 for name in self.NAMES]
        self.values = torch.tensor(values, dtype=torch.float64, device=device)

    def add(self, output: models.Output, answer: Tensor, cross_entropy_sum: Tensor, regularization: Tensor) -> None:
        size = len(answer)
        correct = (output.logits.argmax(1) == answer).sum()
        rates = [output.rates[name].mean(1).sum() for name in POPULATIONS]
        terms = [torch.tensor(size, device=answer.device), cross_entropy_sum, correct, regularization * size, *rates]
        self.values += torch.stack([term.detach().double() for term in terms])

    def over_processes(self) -> dict[str, float]:
        return dict(zip(self.NAMES, distributed.all_reduce_sum(self.values).tolist(), strict=True))

    def means(self) -> dict[str, Any]:
        """Means over the epoch: loss, accuracy in percent, R in Hz^2, firing rates in Hz."""
        sums = self.over_processes()
        mean = {name: sums[name] / sums["samples"] for name in self.NAMES}
        return {
            "train_loss": mean["loss"],
            "train_accuracy": 100 * mean["accuracy"],
            "rate_regularization": mean["regularization"],
            "rates": {name: mean[name] for name in POPULATIONS},
        }

    def shown(self) -> dict[str, float]:
        samples, loss, correct = self.values[:3].tolist()
        samples = max(samples, 1)  # this process's part of the first batch may be empty
        return {"loss": loss / samples, "accuracy": 100 * correct / samples}


def training_batches(batches: list[tuple[int, int]], epoch: int, options: Options) -> Iterator[data.Samples]:
    """This process's part of each batch, given as a range of the samples of the epoch."""
    order = None if options["inf_data"] else data.training_order(epoch, options["dataset_seed"])

    def make(start: int, stop: int) -> data.Samples:
        length = data.training_length(start, epoch, **options.of(CURRICULUM, "sequence_length", "dataset_seed"))
        sizes = (length, options["num_classes"], options["feature_size"], options["dataset_seed"])
        part = slice(*distributed.shard(start, stop))
        if order is None:
            return data.training_samples(part.start, part.stop, epoch, *sizes)
        return data.training_samples(0, data.TRAINING_SAMPLES, 0, *sizes)[order[part]]

    return ahead(make, batches, options["workers"], options["prefetch_factor"])


def report_epoch(metrics: dict, options: Options, progress: Progress, log) -> None:
    progress.epoch(epoch_line(metrics, options["epochs"]))
    for name, rate in metrics["rates"].items():
        if rate < models.SILENT_BELOW:
            print_rank0(
                f"warning: {name} is silent (mean rate {rate:.2g} Hz in epoch {metrics['epoch'] + 1}), so little is "
                "learned through it; if this lasts, start again with another --seed, or with short sequences first "
                "(--curriculum_start 2)"
            )
    if log:
        write_tensorboard(log, metrics)


def run_folder(options: Options, checkpoint: dict | None) -> str:
    """The folder of the run: --output_dir, or that of the checkpoint to go on with, or a new one."""
    folder = options["output_dir"]
    if not folder and checkpoint and Path(options["resume"]).with_name("options.yaml").exists():
        folder = str(Path(options["resume"]).parent)
    return folder or f"runs/{checkpoints.time_stamp()}"


def open_run(options: Options, checkpoint: dict | None) -> Run:
    run = Run(Path(options["output_dir"]))
    if distributed.is_main():
        run.lock()
        if checkpoint:
            run.check_may_write(Path(options["resume"]), (checkpoint["epoch"], checkpoint["sample"]))
        else:
            run.check_may_write(None, (0, 0))
    return run


def tensorboard(run: Run, options: Options):
    if not options["logging"] or not distributed.is_main():
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--logging needs the package tensorboard: pip install tensorboard") from None
    return SummaryWriter(run.folder / "tensorboard")


def write_tensorboard(log, metrics: dict) -> None:
    scalars = {name: value for name, value in metrics.items() if name not in ("epoch", "rates")}
    scalars |= {f"rate/{name}": rate for name, rate in metrics["rates"].items()}
    for name, value in scalars.items():
        log.add_scalar(name, value, metrics["epoch"])
    log.flush()


# Evaluation

EVALUATION_BATCH = 125  # small enough that there is one for each of 8 processes


def evaluation_set(split: str, options: Options, length: int) -> data.Samples:
    return data.evaluation_set(split, length, options["num_classes"], options["feature_size"], options["dataset_seed"])


@torch.no_grad()
def evaluate(model: models.MemorizingAssociations, samples: data.Samples, batch_size: int, device) -> tuple[float, float]:
    """Mean cross entropy and accuracy in percent, each process on its part.

    The parts are made of the batches that one process takes: the rounding of a matrix product depends on the size of the batch,
    and may flip a spike.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    size = min(batch_size, EVALUATION_BATCH)
    for first in range(0, len(samples), size)[distributed.rank() :: distributed.world_size()]:
        batch = samples[first : first + size].to(device)
        with out_of_memory_in_one_line(size):
            logits = model(batch.features, batch.labels, batch.query).logits
        correct = (logits.argmax(1) == batch.answer).sum()
        sums += torch.stack([cross_entropy(logits, batch.answer, reduction="sum").double(), correct.double()])
    loss, correct = distributed.all_reduce_sum(sums).tolist()
    return loss / len(samples), 100 * correct / len(samples)


def evaluate_checkpoint(options: Options, checkpoint: dict) -> int:
    """Test on the published test set, at one sequence length or several."""
    model, device = prepare(options, checkpoint)
    lengths, trained_length = options.all_lengths, checkpoint["params"]["sequence_length"]
    rows = []
    for length in lengths:
        samples = evaluation_set("test", options, length)
        loss, accuracy = evaluate(model, samples, options["batch_size"], device)
        rows.append({"sequence_length": length, "accuracy": accuracy, "loss": loss})
        print_rank0(f"sequence_length {length:3d}  loss {loss:.4f}  accuracy {accuracy:7.3f} %")
    if len(lengths) > 1 or options["output_dir"]:
        constants = {"trained_length": trained_length, "num_classes": options["num_classes"], "samples": len(samples)}
        constants |= {"dataset_seed": options["dataset_seed"], "checkpoint": options["resume"]}
        write_csv(Path(options["output_dir"] or Path(options["resume"]).parent), [row | constants for row in rows])
    print_rank0(f" * Acc {sum(row['accuracy'] for row in rows) / len(rows):.3f}")
    return 0


def write_csv(folder: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    path = folder / "accuracy_by_length.csv"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write_atomically(path, lambda file: file.write(text.getvalue().encode()))
    print_rank0(f"table written to {path}")


if __name__ == "__main__":
    sys.exit(main())
