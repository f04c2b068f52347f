#!/usr/bin/env python3
"""Train, resume and evaluate a spiking network that memorizes associations with Hebbian plasticity (arXiv:2205.11276).

python memorizing_associations_task.py --config configs/quickstart.yaml --output_dir runs/quickstart
python memorizing_associations_task.py --resume runs/quickstart/model_best.pth.tar --evaluate
"""

import argparse
import functools
import math
import random
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import data
import models
from data.loader import prefetch
from models import Dynamics, Sizes
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule
from utils import checkpoints, device, distributed, launch, run
from utils.distributed import print_rank0
from utils.errors import UsageError, UserError, in_one_line, not_finite, out_of_memory_in_one_line
from utils.interruption import Interruption
from utils.metrics import EpochMetrics, TensorBoard, write_table
from utils.options import (
    OWN,
    REMOVED,
    SWITCH,
    Parser,
    constants_of_objects,
    differences,
    dump,
    imported,
    lengths,
    module_and_name,
    number,
    of,
    optional,
    path,
    words_of,
)
from utils.progress import Progress, report_silence

EVALUATION_BATCH = 125  # eight processes get one batch each of the 1,000 validation samples

# fmt: off


def add_model_options(parser: Parser) -> list[str]:
    """Add the options that define the network, to either script. Returns their names.

    The dataclasses that `of` is called with define the defaults and bounds of the constants.
    """
    add = (group := parser.add_argument_group("model")).add_argument
    add("--sequence_length", type=lengths, default=10, help="pairs in a sequence; --evaluate also takes 2,5,10 or 2-10")
    add("--num_classes", **of(Sizes, "num_classes"), help="number of labels to draw from")
    add("--feature_size", **of(Sizes, "feature_size"), help="size of the random vectors")
    add("--embedding_size", **of(Sizes, "embedding_size"), help="neurons in the encoding population")
    add("--memory_size", **of(Sizes, "memory_size"), help="number of key neurons and number of value neurons")
    add("--w_max", **of(HebbianRule, "w_max"), help="soft upper bound of a Hebbian weight")
    add("--gamma_pos", **of(HebbianRule, "gamma_pos"), help="strength of Hebbian potentiation")
    add("--gamma_neg", **of(HebbianRule, "gamma_neg"), help="strength of Hebbian depression")
    add("--tau_trace", **of(HebbianRule, "tau_trace"), help="time constant of the spike traces, ms")
    add("--num_time_steps", **of(Dynamics, "num_time_steps"), help="time steps (ms) for which each input is held")
    add("--readout_delay", **of(Dynamics, "readout_delay"), help="delay of the feedback from values to keys in recall, ms")
    add("--memory_feedback", **of(Dynamics, "memory_feedback"), help="strength of the memory's input to values while storing")
    add("--readout_steps", **of(Dynamics, "readout_steps"), help="number of final time steps whose value spikes are summed")
    add("--thr", **of(LIFNeuron, "thr"), help="firing threshold")
    add("--perfect_reset", **of(LIFNeuron, "perfect_reset"), help="reset the membrane to 0; else subtract the threshold")
    add("--refractory_time_steps", **of(LIFNeuron, "refractory_time_steps"), help="refractory time after a spike, ms")
    add("--tau_mem", **of(LIFNeuron, "tau_mem"), help="time constant of the membrane, ms")
    add("--dampening_factor", **of(LIFNeuron, "dampening_factor"), help="height of the surrogate derivative")
    add("--neuron", type=module_and_name, default="", metavar="MODULE:NAME", help="your own neuron: a class, or an object")
    add("--rule", type=module_and_name, default="", metavar="MODULE:NAME", help="your own Hebbian rule: a class, or an object")
    return [action.dest for action in group._group_actions]


def add_options(parser: Parser) -> list[str]:
    """Add all options. Returns the names of the options that a run records in its folder and its checkpoints."""
    recorded = add_model_options(parser)

    add = (group := parser.add_argument_group("data")).add_argument
    add("--dataset_seed", type=number(int, 0), default=42, help="seed of the training, validation and test samples")
    add("--inf_data", type=int, choices=(0, 1), default=1, help="1: fresh training samples every epoch; 0: one fixed set")
    add("--workers", type=number(int, 0, 256), default=4, help="threads that generate training batches in advance; 0: none")
    add("--prefetch_factor", type=number(int, 1, 1024), default=2, help="batches prefetched per thread")
    recorded += [action.dest for action in group._group_actions]

    add = (group := parser.add_argument_group("training")).add_argument
    add("--epochs", type=number(int, 1), default=250, help="total number of epochs")
    add("--batch_size", type=number(int, 1), default=512, help="samples per step and node, divided among its processes")
    add("--learning_rate", type=number(float, above=0, high=1e6), default=0.003, help="learning rate of Adam")
    add("--learning_rate_decay", type=number(float, above=0, high=1), default=0.85, help="decay factor of the learning rate")
    add("--decay_learning_rate_every", type=number(int, 1), default=20, help="decay the learning rate every N epochs")
    add("--max_grad_norm", type=number(float), default=40.0, help="clip the norm of the gradient; 0 or less: off")
    add("--l2", type=number(float, 0), default=1e-5, help="strength of the rate regularization (off in epoch 1)")
    add("--l2_decay", type=number(float, above=0, high=1), default=1.0, help="factor by which l2 decays with the learning rate")
    add("--target_rate", type=number(float, 0), default=0.0, help="target firing rate of the rate regularization, Hz")
    add("--seed", type=optional(number(int, 0, 2**63 - 1)), help="seed of the initial weights; none: random, and printed")
    add("--start_epoch", type=number(int, 0), default=0, help="number of epochs that a new run skips")
    add("--curriculum_start", type=number(int, 0), default=0, help="pairs in the first epoch; 0: always --sequence_length")
    add("--curriculum_step", type=number(int, 1), default=1, help="pairs that the curriculum adds in each later epoch")
    recorded += [action.dest for action in group._group_actions]

    add = (group := parser.add_argument_group("execution")).add_argument
    add("--device", type=path, default="auto", help="auto, cpu, cuda or cuda:N")
    add("--backend", choices=models.BACKENDS, default="auto", help="kernels; auto: fastest available; triton: experimental")
    add("--print_freq", type=number(int, 1), default=1, help="update the display every N steps")
    add("--logging", **SWITCH, help="also write TensorBoard logs (needs the package tensorboard)")
    recorded += [action.dest for action in group._group_actions]

    add = parser.add_argument_group("run").add_argument
    add("--resume", type=path, default="", help="checkpoint or run folder to resume or evaluate; auto: take --output_dir")
    add("--check_params", type=int, choices=(0, 1), default=1, help="0: accept model options that differ from the checkpoint's")
    add("--evaluate", **SWITCH, help="test the --resume checkpoint on the original test set")
    add("--print_options", **SWITCH, help="print the options as YAML for --config, and stop")
    add("--output_dir", type=path, default="", help="folder of the run; none: the folder of --resume, or a new one in runs/")
    add("--gpu", type=optional(number(int, 0)), help="number N of the GPU: the same as --device cuda:N")

    add = parser.add_argument_group("distributed training").add_argument
    add("--multiprocessing_distributed", **SWITCH, help="train on all GPUs of this node, one process per GPU")
    add("--processes_per_node", type=optional(number(int, 1)), help="processes on each node, instead of one per GPU")
    add("--world_size", type=number(int, -1), default=-1, help="number of nodes")
    add("--rank", type=number(int, -1), default=-1, help="number of this node, from 0")
    add("--dist_url", type=path, default="tcp://127.0.0.1:23456", help="address of the node of rank 0; or env:// (torchrun)")
    add("--dist_backend", choices=("nccl", "mpi", "gloo"), default="nccl", help="nccl for GPUs, gloo for CPUs")
    add("--dist_timeout", type=number(float, above=0), default=120.0, help="give up after this many seconds without an answer")
    return recorded


# fmt: on


@in_one_line
def main(argv=None) -> int:
    parser = Parser(__doc__)
    recorded = add_options(parser)
    given = parser.given(argv)
    given = constants_of_objects(given) | given
    args = parser.complete(given)
    ranks = launch.find_ranks(args)
    launch.check(ranks, args)
    resume, checkpoint = None, None
    if ranks is None or ranks.leads:  # this process sends its options and checkpoint to all others
        resume, checkpoint = run.find_checkpoint(args.resume, args.output_dir, args.evaluate)
        if resume and checkpoint:
            strict = {"evaluate": args.evaluate, "check_params": args.check_params}
            args = parser.complete(options_of_run(parser, recorded, given, resume, checkpoint["params"], **strict), given)
        check_lengths(args.sequence_length, args.num_classes, evaluate=args.evaluate, curriculum_start=args.curriculum_start)
    if args.print_options:
        print(dump({name: getattr(args, name) for name in recorded}), end="")
        return 0
    nodes = ranks.nodes if ranks else 1
    if args.evaluate or (ranks and not ranks.leads):
        return launch.run(work, ranks, args, recorded, nodes, None, resume, checkpoint)
    with run.folder(args.output_dir, resume) as folder:
        again = f"--output_dir {shlex.quote(str(folder))} --resume auto"
        remedy = f"; the same command with {again} resumes from the last checkpoint"
        return launch.run(work, ranks, args, recorded, nodes, folder, resume, checkpoint, remedy=remedy)


def work(args, recorded, nodes, folder, resume, checkpoint) -> int:
    """Train or evaluate, in each process, with the options and the checkpoint of rank 0. Returns the exit status."""
    if args.evaluate:
        return evaluate_checkpoint(args, resume, checkpoint)
    return train(args, recorded, nodes, folder, resume, checkpoint)


def options_of_run(
    parser: Parser,
    recorded: Sequence[str],
    given: Mapping[str, Any],
    resume: str | Path,
    params: Mapping[str, Any],
    *,
    evaluate: bool,
    check_params: int,
) -> dict[str, Any]:
    """The options of a checkpoint, as the defaults of a resumed run. Raises UsageError if `given` contradicts them."""
    try:
        record = parser.given(words_of({name: params[name] for name in params if name in recorded or name in REMOVED}))
    except UsageError as wrong:
        raise UserError(f"{resume}: params: {wrong}") from wrong
    record = dict.fromkeys(OWN, "") | device.available(record)  # another machine may lack the device or the backend
    if missing := [f"--{name} {record[name]}" for name in OWN if record[name] and name not in given]:
        raise UsageError(f"{resume}: give {' '.join(missing)} again; a module that a checkpoint names is never imported")
    of_network = add_model_options(Parser(""))
    fixed = [name for name in of_network if name != "sequence_length"] if evaluate else [*of_network, "dataset_seed"]
    if check_params and (differing := differences(given, record, fixed)):
        raise UsageError(f"{resume}: options differ: {', '.join(differing)}; --check_params 0 overrides")
    if not evaluate and (differing := differences(given, record, ["seed", "start_epoch"])):
        raise UsageError(f"{resume}: an existing run cannot change {', '.join(differing)}; leave these options out")
    return record


def check_lengths(lengths: int | tuple[int, ...], num_classes: int, *, evaluate: bool, curriculum_start: int = 0) -> None:
    """Raises UsageError, with the remedy, if the other options do not allow these sequence lengths."""
    longest = max(lengths) if isinstance(lengths, tuple) else lengths
    if longest > num_classes:
        few = f"this network knows {num_classes} labels: test at most {num_classes} pairs, or train with more --num_classes"
        raise UsageError(f"--sequence_length {longest} is more than --num_classes {num_classes}: no label is shown twice; "
                         + (few if evaluate else "raise --num_classes or shorten the sequence"))  # fmt: skip
    if evaluate:
        return
    if isinstance(lengths, tuple):
        raise UsageError("--sequence_length: several lengths are for --evaluate; training takes one length")
    if curriculum_start > longest:
        raise UsageError(f"--curriculum_start {curriculum_start} is more than --sequence_length {longest}")


# Training


def train(
    args: argparse.Namespace, recorded: list[str], nodes: int, folder: Path, resume: Path | None, checkpoint: dict | None
) -> int:
    """Train to the last epoch, or until a signal comes. Returns the exit status."""
    start = checkpoint or {"epoch": args.start_epoch, "sample": 0, "running": {}, "history": [], "best_acc": 0.0}
    epoch, sample, running, history = start["epoch"], start["sample"], start["running"], list(start["history"])
    best_acc = float(start["best_acc"])  # highest validation accuracy, percent
    if epoch >= args.epochs:
        print_rank0(f"{resume or '--start_epoch'}: already trained for {epoch} epochs; increase --epochs to continue, or use "
                    "--evaluate to test")  # fmt: skip
        return 0
    samples, step_size = data.TRAINING_SAMPLES, args.batch_size * nodes
    if sample >= samples:
        raise UserError(f"{resume}: {sample} samples of an epoch are done, but an epoch has {samples}; use another checkpoint")

    where = device.choose(args.device, args.gpu)
    seed = distributed.broadcast_object(random.SystemRandom().randrange(2**31)) if args.seed is None else args.seed
    torch.manual_seed(seed)
    model, backend = build(vars(args), args.backend, where, resume, checkpoint)
    network = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    params = {name: getattr(args, name) for name in recorded} | {"seed": seed, "backend": backend, "device": where.type}
    optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate)
    if checkpoint and checkpoint["optimizer"]:
        optimizer.load_state_dict(checkpoint["optimizer"])
    elif checkpoint:
        print_rank0(f"{resume} contains no optimizer state; Adam starts from scratch")
    task = {"num_classes": args.num_classes, "feature_size": args.feature_size, "dataset_seed": args.dataset_seed}
    validation = data.evaluation_set("validation", args.sequence_length, **task)
    tensorboard = TensorBoard(folder / "tensorboard" if args.logging and distributed.is_main() else None, epoch)

    def save(is_best: bool = False) -> None:
        content = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "params": params}
        content |= {"epoch": epoch, "sample": sample, "running": running, "history": history}
        content |= {"best_acc": torch.tensor(best_acc, dtype=torch.float64), "parts": checkpoints.described(model.dynamics)}
        if distributed.is_main():
            run.save(folder, content, is_best)

    save()  # from here on --resume auto works, and a folder that cannot be written to is noticed at once
    if distributed.is_main():
        changed = differences(params, checkpoint["params"], recorded) if checkpoint else []
        words = f"in epoch {epoch + 1} after {sample} samples: {backend} on {where.type}, {step_size} samples in a step"
        run.record(folder, dump(params | {"batch_size": step_size}), resume, ", ".join([words, *changed]))
        parameters = sum(weight.numel() for weight in model.parameters())
        processes = f", {distributed.world_size()} processes on {nodes} nodes" if distributed.world_size() > 1 else ""
        print_rank0(f"training {parameters:,} parameters on {args.sequence_length} pairs of {args.num_classes} classes: "
                    f"epochs {epoch + 1} to {args.epochs} of {samples:,} samples, {step_size:,} in a step{processes}, "
                    f"seed {seed}, in {folder}")  # fmt: skip
        if checkpoint:
            print_rank0(f"resuming {resume} in epoch {epoch + 1} after {sample} samples"
                        + "".join(f"; now {change}" for change in changed))  # fmt: skip
            if history and history[-1].get("batch_size", step_size) != step_size:
                print_rank0(f"warning: a step takes {step_size:,} samples, not {history[-1]['batch_size']:,} as before; "
                            "--batch_size counts per node")  # fmt: skip

    progress = Progress(args.epochs * samples, epoch * samples + sample, args.print_freq)
    with Interruption(patient=distributed.world_size() > 1) as interruption:
        while epoch < args.epochs and not (status := distributed.all_reduce_max(interruption.status)):
            decays = epoch // args.decay_learning_rate_every
            learning_rate = args.learning_rate * args.learning_rate_decay**decays
            l2 = args.l2 * args.l2_decay**decays if epoch > 0 else 0.0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate

            length = data.training_length(epoch, args.sequence_length, args.curriculum_start, args.curriculum_step)
            draw = data.training_samples if args.inf_data else data.fixed_training_samples
            make = functools.partial(shard_of, draw, epoch=epoch, sequence_length=length, **task)
            ranges = [(first, min(first + step_size, samples)) for first in range(sample, samples, step_size)]
            metrics = EpochMetrics(where, running)
            for (first, end), batch in zip(ranges, prefetch(make, ranges, args.workers, args.prefetch_factor), strict=True):
                step = f"epoch {epoch + 1}, step {first // step_size + 1}"
                strengths = {"l2": l2, "target_rate": args.target_rate, "max_grad_norm": args.max_grad_norm}
                with out_of_memory_in_one_line(args.batch_size):
                    sums = train_step(network, optimizer, batch.to(where), batch_size=end - first, at=step, **strengths)
                metrics.add(len(batch), sums)
                progress.step(end - first, f"epoch {epoch + 1}", samples - end, metrics.shown)
                if end < samples and distributed.all_reduce_max(interruption.status):
                    break
            if end < samples:  # a signal came
                sample, running = end, metrics.totals()
                save()
                continue

            tested = evaluate(model, validation, min(args.batch_size, EVALUATION_BATCH), where)
            line = {"epoch": epoch + 1, "learning_rate": learning_rate, "batch_size": step_size} | metrics.means()
            line |= {"validation_loss": tested["loss"], "validation_accuracy": tested["accuracy"]}
            is_best = tested["accuracy"] > best_acc or (not history and best_acc == 0)  # the first epoch is always best
            best_acc = max(tested["accuracy"], best_acc)
            history.append(line)
            epoch, sample, running = epoch + 1, 0, {}
            save(is_best)
            tensorboard.write(line)
            progress.epoch(line, args.epochs)
            begins_short = args.sequence_length <= 2 or args.curriculum_start > 0
            remedy = "" if begins_short else "; --curriculum_start 2 avoids it"
            report_silence(history, models.POPULATIONS, below=models.SILENT_BELOW, remedy=remedy)
    progress.close()
    if epoch < args.epochs:
        print_rank0(f"interrupted in epoch {epoch + 1} after {sample} of {samples} samples; "
                    f"--resume {shlex.quote(str(folder / checkpoints.LAST))} continues")  # fmt: skip
        return status
    best = folder / checkpoints.BEST
    known = (
        f"; --resume {shlex.quote(str(best))} --evaluate tests this network"
        if best.exists()
        else "; its checkpoint is not in this folder"
    )
    print_rank0(f"best validation accuracy {best_acc:.3f} %{known}")
    return 0


def build(options: Mapping[str, Any], backend: str, where: torch.device, resume, checkpoint: dict | None):
    """The network on its device, with initial weights or the checkpoint's, and the name of its backend."""
    with out_of_memory_in_one_line(batch_size=0):
        model = model_of(options, backend)
    if checkpoint:
        checkpoints.load_weights(model, checkpoint, resume)
    name = models.backends.choose(backend, str(where), model.dynamics, models.store_and_recall)
    print_rank0(f"backend {name} on {where.type}" + device.unused_gpu(where))
    return model.to(where), name


def model_of(options: Mapping[str, Any], backend: str):
    """The network of the options, with the neuron and the rule that they name. Raises UsageError if options contradict."""
    parts = {name: imported(name, options[name]) for name in OWN}
    try:
        for name, part in parts.items():
            if isinstance(part, type):  # a class takes the constants that are options from there
                parts[name] = part(**{f: options[f] for f in getattr(part, "__dataclass_fields__", ()) if f in options})
        return models.build_model(options, backend, **parts)
    except (TypeError, ValueError) as wrong:
        raise UsageError(str(wrong)) from wrong


def shard_of(draw, first: int, end: int, **sizes: int) -> data.Samples:
    """This process's part of the samples `first` to `end - 1`."""
    return draw(*distributed.shard(first, end), **sizes)


def train_step(
    network, optimizer, batch: data.Samples, *, batch_size: int, l2: float, target_rate: float, max_grad_norm: float, at: str
) -> dict[str, Tensor]:
    """One step on this process's shard `batch` of a batch of `batch_size` samples. Returns sums over the shard's samples.

    The loss is the mean cross entropy plus l2 * R; R sums mean_neurons((mean_batch(rate) - target_rate)^2) over populations.

    Args:
        l2, target_rate: strength (1/Hz^2) and target (Hz) of the rate regularization.
        max_grad_norm: clip the gradient's norm at this value; 0 or less: do not clip.
        at: epoch and step, for the error.

    Raises:
        UserError: the gradient is not finite. Every process raises it, and the step is not applied.
    """
    output = network(batch.features, batch.labels, batch.query)
    cross_entropy_sum = cross_entropy(output.logits, batch.answer, reduction="sum")
    regularization = models.rate_regularization(distributed.batch_mean(output.rates, batch_size), target_rate)
    loss = cross_entropy_sum / batch_size
    if l2:
        loss = loss + l2 * regularization

    optimizer.zero_grad()
    (loss * distributed.world_size()).backward()  # DistributedDataParallel takes the mean over the processes
    try:  # clipping waits for the device
        norm = max_grad_norm if max_grad_norm > 0 else math.inf
        torch.nn.utils.clip_grad_norm_(network.parameters(), norm, error_if_nonfinite=True)
    except RuntimeError as failure:
        if "non-finite" not in str(failure):
            raise
        gradients = {f"gradient of {name.removeprefix('module.')}": weight.grad for name, weight in network.named_parameters()}
        broken = [name for name, tensor in ({"loss": loss} | gradients).items() if not torch.isfinite(tensor).all()]
        dynamics = getattr(network, "module", network).dynamics
        raise not_finite(at, ", ".join(broken) or "norm of the gradient", dynamics) from failure
    optimizer.step()

    correct = (output.logits.argmax(1) == batch.answer).sum()
    sums = {
        "train_loss": cross_entropy_sum,
        "train_accuracy": 100 * correct,
        "rate_regularization": regularization * len(batch),
    }
    return sums | {name: rates.mean(1).sum() for name, rates in output.rates.items()}


# Evaluation


@torch.no_grad()
def evaluate(model, samples: data.Samples, batch_size: int, where: torch.device) -> dict[str, float]:
    """Test a network, each process on its part of the samples.

    The batches do not depend on the number of processes: the batch size changes the rounding, and rounding can flip a spike.

    Returns:
        Means over the samples: `loss`, the cross entropy; `accuracy` in percent, where the first of tied greatest logits is
        the prediction; `accuracy_ties_shared` in percent, where each of k tied logits counts 1/k; `ties`, the percentage of
        samples with tied greatest logits. (A network without an output spike gives all labels the same logit.)

    Raises:
        UserError: the loss or the memory is not finite.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=where)
    for first in range(0, len(samples), batch_size)[distributed.rank() :: distributed.world_size()]:
        batch = samples[first : first + batch_size].to(where)
        with out_of_memory_in_one_line(batch_size):
            logits = model(batch.features, batch.labels, batch.query).logits
        greatest = logits == logits.amax(1, keepdim=True)
        of_answer = greatest.gather(1, batch.answer[:, None])[:, 0]
        correct, ties = logits.argmax(1) == batch.answer, greatest.sum(1)
        loss = cross_entropy(logits, batch.answer, reduction="sum")
        sums += torch.stack([x.double().sum() for x in (loss, 100 * correct, 100 * of_answer / ties, 100 * (ties > 1))])
    sums = distributed.all_reduce(sums)
    few = samples[:4].to(where)  # a diverged memory silences the neurons that read it, so the loss can stay finite
    memory = model(few.features, few.labels, few.query, record=True).activity["memory"]
    if not (torch.isfinite(sums).all() and torch.isfinite(memory).all()):
        raise not_finite("evaluation", "the loss" if torch.isfinite(memory).all() else "the memory", model.dynamics)
    return dict(zip(("loss", "accuracy", "accuracy_ties_shared", "ties"), (sums / len(samples)).tolist(), strict=True))


def evaluate_checkpoint(args: argparse.Namespace, resume: Path, checkpoint: dict) -> int:
    """Test on the original test set, at one sequence length or several. Write a table to --output_dir or beside --resume."""
    where = device.choose(args.device, args.gpu)
    model, _ = build(vars(args), args.backend, where, resume, checkpoint)
    print_rank0(str(resume) + (f", after {checkpoint['epoch']} epochs" if checkpoint["epoch"] else ""))
    if note := note_on_data(checkpoint["params"]):
        print_rank0(note)
    task = {"num_classes": args.num_classes, "feature_size": args.feature_size, "dataset_seed": args.dataset_seed}
    rows = []
    for length in args.sequence_length if isinstance(args.sequence_length, tuple) else (args.sequence_length,):
        samples = data.evaluation_set("test", length, **task)
        tested = evaluate(model, samples, min(args.batch_size, EVALUATION_BATCH), where)
        rows.append({"sequence_length": length, "accuracy": tested["accuracy"], "loss": tested["loss"]}
                    | {"trained_length": checkpoint["params"].get("sequence_length"), "samples": len(samples)}
                    | {"num_classes": args.num_classes, "dataset_seed": args.dataset_seed, "checkpoint": str(resume)}
                    | {"accuracy_ties_shared": tested["accuracy_ties_shared"], "ties": tested["ties"]})  # fmt: skip
        print_rank0(f"sequence_length {length:3d}  loss {tested['loss']:.4f}  accuracy {tested['accuracy']:7.3f} %"
                    + (f"  ties {tested['ties']:.2f} %, with ties shared {tested['accuracy_ties_shared']:.3f} %"
                       if tested["ties"] else ""))  # fmt: skip
    try:
        if distributed.is_main() and (len(rows) > 1 or args.output_dir):
            beside = Path(f"{str(resume).removesuffix('.pth.tar')}.{run.TABLE}")
            write_table(Path(args.output_dir) / run.TABLE if args.output_dir else beside, rows)
    finally:  # print the result even if the table cannot be written
        print_rank0(f" * Acc {sum(row['accuracy'] for row in rows) / len(rows):.3f}")
    return 0


def note_on_data(params: Mapping[str, Any]) -> str:
    """A note on a network that was trained on other data; empty for all other networks."""
    if "dataset_seed" in params:
        return ""
    return "note: no dataset_seed is recorded, so the network learned other data; the test set holds uniform vectors in [0, 1)"


if __name__ == "__main__":
    sys.exit(main())
