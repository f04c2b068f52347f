"""Why networks fall silent: follow the first training steps, as the task script takes them, and what each does to the reading.

python -m experiments.silence --seed 2 --output runs/silence/published-seed2.csv
python -m experiments.silence --seed 2 --curriculum_start 2 --output runs/silence/curriculum-seed2.csv
python -m experiments.silence --draw runs/silence/*.csv --output silence.png
python -m experiments.silence --decode --seed 2 --output runs/silence/decoded-seed2.csv

The table has a row a step, from before that step: loss (cross entropy), accuracy (%), `gain` (see `loss_by_gain`), mean firing
rates (Hz), shares of neurons that fire at all, norms of the weights; and, for each weight matrix W, `pull/W`: by how much the
step that the optimizer takes along W changes the mean firing rate of the reading values, to first order (Hz).
"""

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import data
import memorizing_associations_task as task
import models
from utils.errors import in_one_line
from utils.figures import save
from utils.figures.style import GREY, SERIES, TWO_COLUMNS, heading, new_figure, styled
from utils.options import CURRICULUM, TASK_GROUPS, Options, Parser

READING = ("read_key", "read_value")


@in_one_line
def main(argv=None) -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    arguments.add_argument("--output", type=Path, required=True, help="table to write, or figure with --draw")
    arguments.add_argument("--draw", type=Path, nargs="+", metavar="TABLE.csv", help="draw these tables and train nothing")
    arguments.epilog = "All other options are those of memorizing_associations_task.py; --epochs is 2 by default."
    arguments.add_argument("--decode", action="store_true", help="train nothing; decode the answer from the initial readout")
    args, others = arguments.parse_known_args(argv)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.draw:
        save(draw(args.draw), args.output)
        return 0
    options = Parser(arguments.description, TASK_GROUPS).parse(["--epochs", "2", "--seed", "1", *others])
    rows = list(decode(options) if args.decode else follow(options))
    with open(args.output, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return 0


def follow(options: Options) -> Iterator[dict[str, float]]:
    """Train by the steps of the task script, and describe the network before each."""
    torch.manual_seed(options["seed"])
    model = models.build_model(options.values, options["backend"])
    optimizer = torch.optim.Adam(model.parameters(), lr=options["learning_rate"])
    starts = [(e, n) for e in range(options["epochs"]) for n in range(0, data.TRAINING_SAMPLES, options["batch_size"])]
    for step, (epoch, start) in enumerate(tqdm(starts, unit=" steps", disable=not sys.stderr.isatty())):
        length = data.training_length(start, epoch, **options.of(CURRICULUM, "sequence_length", "dataset_seed"))
        stop = min(start + options["batch_size"], data.TRAINING_SAMPLES)
        batch = data.training_samples(start, stop, epoch, **data.sizes(options, sequence_length=length))
        output = model(batch.features, batch.labels, batch.query)
        loss = cross_entropy(output.logits, batch.answer)
        row = {"step": step, "epoch": epoch, "length": length} | describe(model, output, batch.answer, loss)

        inner = list(model.parameters())[: names(model).index("output")]  # the output layer does not act on the rates
        rate_gradient = torch.autograd.grad(output.rates["read_value"].mean(), inner)
        before = [weight.detach().clone() for weight in inner]
        l2 = options["l2"] if epoch else 0.0
        task.train_step(model, optimizer, batch, batch_size=stop - start, l2=l2, options=options, where=f"step {step}")
        moves = [weight.detach() - old for weight, old in zip(inner, before, strict=True)]
        pulls = [(gradient * move).sum().item() for gradient, move in zip(rate_gradient, moves, strict=True)]
        yield row | {f"pull/{name}": pull for name, pull in zip(names(model), pulls, strict=False)}


@torch.no_grad()
def describe(model: models.MemorizingAssociations, output: models.Output, answer: Tensor, loss: Tensor) -> dict[str, float]:
    accuracy = 100 * (output.logits.argmax(1) == answer).double().mean()
    row = {"loss": loss.item(), "accuracy": accuracy.item(), "gain": loss_by_gain(output.logits, answer).item()}
    row |= {f"rate/{name}": rate.mean().item() for name, rate in output.rates.items()}
    row |= {f"active/{name}": (output.rates[name] > 0).any(0).double().mean().item() for name in READING}
    return row | {f"norm/{n}": w.norm().item() for n, w in zip(names(model), model.parameters(), strict=True)}


def loss_by_gain(logits: Tensor, answer: Tensor) -> Tensor:
    """Derivative of the cross entropy by the logarithm of a factor common to all logits (B x C).

    Positive: the loss falls when the readout, whatever it says, becomes weaker.
    """
    by_logits = logits.softmax(1)
    by_logits[torch.arange(len(answer)), answer] -= 1
    return (by_logits * logits).sum(1).mean()


def names(model: models.MemorizingAssociations) -> list[str]:
    return [name.split("_")[0] for name, _ in model.named_parameters()]


@torch.no_grad()
def decode(options: Options, lengths=(1, 2, 3, 5, 10), samples: int = 3000, batch_size: int = 500):
    """How well linear regression, fitted to two thirds of the samples, tells the answer from the initial network's readout."""
    torch.manual_seed(options["seed"])
    model = models.build_model(options.values, options["backend"])
    model.output_layer.weight = torch.nn.Parameter(torch.eye(options["memory_size"]))  # logits are the readout itself
    fitted = 2 * samples // 3
    for length in lengths:
        drawn = data.training_samples(0, samples, 0, **data.sizes(options, sequence_length=length))
        batches = [drawn[first : first + batch_size] for first in range(0, samples, batch_size)]
        readout = torch.cat([model(batch.features, batch.labels, batch.query).logits for batch in batches]).double()
        inputs = torch.cat([readout, torch.ones(samples, 1, dtype=torch.float64)], dim=1)
        ridge = torch.eye(inputs.shape[1], dtype=torch.float64)
        targets = torch.nn.functional.one_hot(drawn.answer, options["num_classes"]).double()
        fit = inputs[:fitted]
        weights = torch.linalg.solve(fit.T @ fit + ridge, fit.T @ targets[:fitted])
        correct = (inputs[fitted:] @ weights).argmax(1) == drawn.answer[fitted:]
        yield {"sequence_length": length, "accuracy": 100 * correct.double().mean().item(), "labels_shown": 100 / length}


PANELS = (
    ("Loss", "Cross entropy (nats)", "loss"),
    ("Loss by gain of the readout", "Derivative (nats)", "gain"),
    ("Keys, storing", "Mean rate (Hz)", "rate/write_key"),
    ("Keys, recall", "Mean rate (Hz)", "rate/read_key"),
    ("Values, recall", "Mean rate (Hz)", "rate/read_value"),
)


@styled
def draw(tables: list[Path]) -> Figure:
    """The first steps of some trainings, a line each; and for the first, which weights take the reading values their spikes."""
    trainings = {path.stem: read(path) for path in tables}
    figure = new_figure(TWO_COLUMNS, 88)
    axes = figure.subplots(2, 3).flatten()
    for ax, letter, (title, unit, column) in zip(axes, "abcde", PANELS, strict=False):
        heading(ax, letter, title)
        ax.set(xlabel="Training step", ylabel=unit)
        for colour, (name, columns) in zip(SERIES, trainings.items(), strict=False):
            ax.plot(columns["step"], columns[column], color=colour, label=name)
        if column.startswith("rate"):
            ax.set_yscale("symlog", linthresh=0.1, linscale=0.3)
            ax.set_ylim(0)
        else:
            ax.axhline(0, color=GREY, lw=0.5)
        if letter == "a":
            ax.legend(loc="upper right")
    name, columns = next(iter(trainings.items()))
    ax = axes[-1]
    heading(ax, "f", f"Values, recall: {name}")
    ax.set(xlabel="Training step", ylabel="Change of rate by step (Hz)")
    for colour, matrix in zip(SERIES, (column for column in columns if column.startswith("pull/")), strict=False):
        ax.plot(columns["step"], columns[matrix], ".-", ms=2, color=colour, label=f"by {matrix.removeprefix('pull/')} weights")
    ax.set_xlim(-0.5, 12)
    ax.axhline(0, color=GREY, lw=0.5)
    ax.legend(loc="lower right")
    return figure


def read(path: Path) -> dict[str, np.ndarray]:
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


if __name__ == "__main__":
    sys.exit(main())
