"""Turn run folders into a table (CSV and Markdown) and figures.

python -m experiments.summarize runs/sweep --output_dir runs/sweep/summary
python -m experiments.summarize runs/sweep --output_dir experiments/results --copy
python -m experiments.summarize experiments/results --output_dir experiments/results

Runs are read from their folders, or from where --copy kept them (see runs.py). The table states what is not finished.
"""

import argparse
import collections
import sys
from pathlib import Path
from typing import Any

import numpy as np

import models
from experiments.runs import GROUP, Result, read_results, to_csv, write_groups
from utils.errors import UserError
from utils.figures import curves
from utils.figures.style import GREY, SERIES, TWO_COLUMNS, add_axes, add_heading, new_figure, save, styled
from utils.options import CURRICULUM, DATA, MODEL, TRAINING

SHOWN_RATES = ("write_key", "write_value", "read_key", "read_value")
# What a run may differ in without being trained in another way.
_NOT_A_WAY_OF_TRAINING = {"sequence_length", "num_classes", "seed", "epochs", "workers", "prefetch_factor", "start_epoch"}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, metavar="FOLDER", help="folder with runs, at any depth")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="where to write table and figures")
    parser.add_argument("--copy", action="store_true", help=f"keep the runs themselves there, too, compactly: see {GROUP}")
    args = parser.parse_args(argv)
    try:
        results = read_results(args.runs)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.copy:
            write_groups(results, args.output_dir)
        rows = [summary(result) for result in results]
        (args.output_dir / "table.csv").write_text(to_csv(rows), encoding="utf-8")
        (args.output_dir / "table.md").write_text(to_markdown(rows), encoding="utf-8")
        for name, figure in figures(results, rows):
            save(figure, args.output_dir / f"{name}.png")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as failure:
        print(f"error: {failure.filename}: {failure.strerror}", file=sys.stderr)
        return 1
    print(to_markdown(rows), end="")
    return 0


# The table


def summary(result: Result) -> dict[str, Any]:
    """The row of a run. Accuracies in percent, firing rates in Hz, epochs counted from 1."""
    options, metrics = result.options, result.metrics
    validation = [line["validation_accuracy"] for line in metrics]
    best = int(np.argmax(validation)) if metrics else None
    threshold = learned_above(options["sequence_length"])
    learned = next((epoch for epoch, accuracy in enumerate(validation, start=1) if accuracy > threshold), None)
    tested = [float(test["accuracy"]) for test in result.tests if int(test["sequence_length"]) == options["sequence_length"]]
    return {
        "run": result.name,
        "sequence_length": options["sequence_length"],
        "num_classes": options["num_classes"],
        "training": way_of_training(options),
        "seed": options["seed"],
        "epochs": len(metrics),
        "of_epochs": options["epochs"],
        "state": "finished" if len(metrics) >= options["epochs"] else "unfinished",
        "outcome": outcome(result, learned),
        "learned_in_epoch": learned,
        "best_validation_accuracy": validation[best] if metrics else None,
        "best_epoch": best + 1 if metrics else None,
        "test_accuracy": tested[0] if tested else None,
    } | {f"{name}_rate": round(metrics[-1][name], 2) if metrics else None for name in SHOWN_RATES}


def learned_above(length: int) -> float:
    """A network has learned when its validation accuracy is over halfway from guessing one of the labels shown to 100 %."""
    return (100 / length + 100) / 2


def outcome(result: Result, learned: int | None) -> str:
    options = result.options
    if not result.metrics:
        return "not begun"
    if result.metrics[-1]["read_value"] < models.SILENT_BELOW:
        return "silent"
    if learned or options["num_classes"] == 1:
        return "learned"
    return "not learned so far"


def way_of_training(options: dict[str, Any]) -> str:
    """How a run's options differ from the published ones, in words."""
    words = []
    if options["curriculum_start"]:
        words.append(f"curriculum from {options['curriculum_start']}, {options['curriculum_step']} more each epoch")
    if options["mixed_lengths"]:
        words.append(f"mixed lengths from {options['mixed_lengths']}")
    told = _NOT_A_WAY_OF_TRAINING | {option.name for option in CURRICULUM}
    for option in (*MODEL, *DATA, *TRAINING):
        if option.name not in told and options.get(option.name, option.default) != option.default:
            words.append(f"{option.name} {options[option.name]}")
    return ", ".join(words) or "published options"


def to_markdown(rows: list[dict[str, Any]]) -> str:
    head = (
        "pairs",
        "classes",
        "training",
        "seed",
        "epochs",
        "outcome",
        "learned in epoch",
        "validation %",
        "test %",
        "reading",
    )
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in rows:
        epochs = f"{row['epochs']}" + (f" of {row['of_epochs']}, unfinished" if row["state"] == "unfinished" else "")
        validation = "" if row["best_epoch"] is None else f"{row['best_validation_accuracy']:.1f} (epoch {row['best_epoch']})"
        test = "" if row["test_accuracy"] is None else f"{row['test_accuracy']:.2f}"
        rate = "" if row["read_value_rate"] is None else f"{row['read_value_rate']:.1f} Hz"
        sizes = (row["sequence_length"], row["num_classes"], row["training"], row["seed"])
        cells = (*sizes, epochs, row["outcome"], row["learned_in_epoch"] or "", validation, test, rate)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Learned: validation accuracy over halfway from guessing one of the labels shown to 100 %. Silent: the reading values "
        f"fire at less than {models.SILENT_BELOW} Hz. Test: published test set, the network of highest validation accuracy. "
        "Reading: mean firing rate of the reading values in the last epoch.",
    ]
    return "\n".join(lines) + "\n"


# The figures


def figures(results: list[Result], rows: list[dict[str, Any]]):
    """Names and figures, those for which there are runs."""
    begun = [result for result in results if result.metrics]
    full = [row for row in rows if row["sequence_length"] == row["num_classes"] > 1 and row["epochs"]]
    if full:
        yield "accuracy_against_length", accuracy_against_length(full)
    for group in dict.fromkeys(result.name.split("/")[0] for result in begun):
        members = [training_curves(result) for result in begun if result.name.split("/")[0] == group]
        yield f"training_{group}", curves.training_curves(members)
    # Out of distribution: with as many classes as pairs, longer sequences than those trained on do not exist.
    apart = [r for r in results if len(r.tests) > 1 and r.options["num_classes"] > r.options["sequence_length"]]
    if apart:
        yield "accuracy_by_tested_length", curves.accuracy_by_length([tested_lengths(result) for result in apart])


def training_curves(result: Result) -> curves.Curves:
    columns = {name: np.array([epoch[name] for epoch in result.metrics]) for name in result.metrics[0]}
    columns["epoch"] = columns["epoch"] + 1
    length = result.options["sequence_length"]
    label = f"{length} pair{'s' * (length > 1)}, {way_of_training(result.options)}"
    return curves.Curves(label, columns, result.options["num_classes"])


def tested_lengths(result: Result) -> curves.Curves:
    columns = {name: np.array([float(test[name]) for test in result.tests]) for name in ("sequence_length", "accuracy")}
    options = result.options
    return curves.Curves(way_of_training(options), columns, options["num_classes"], options["sequence_length"])


@styled
def accuracy_against_length(rows: list[dict[str, Any]]):
    """Best validation accuracy by length: every seed a point (hollow: unfinished), the mean and share of those that learned."""
    figure = new_figure(TWO_COLUMNS, 66)
    add_heading(figure, 2, 5, "a", "Accuracy", 12)
    add_heading(figure, 95, 5, "b", "Share of seeds that have learned so far", 12)
    accuracy, share = add_axes(figure, 14, 8, 74, 44), add_axes(figure, 107, 8, 74, 44)
    trainings = list(dict.fromkeys(row["training"] for row in rows))
    labels = collections.Counter()  # of points in one place, one over the other
    for place, training in enumerate(trainings):
        colour, shift = SERIES[place % len(SERIES)], 0.15 * (place - (len(trainings) - 1) / 2)
        members = [row for row in rows if row["training"] == training]
        lengths = sorted({row["sequence_length"] for row in members})
        for finished, look in (("finished", {"color": colour}), ("unfinished", {"mec": colour, "mfc": "none"})):
            chosen = [row for row in members if row["state"] == finished]
            points = [(row["sequence_length"] + shift, row["best_validation_accuracy"]) for row in chosen]
            accuracy.plot(*np.array(points).reshape(-1, 2).T, "o", ms=2.5, mew=0.5, **look)
        by_length = {n: [row for row in members if row["sequence_length"] == n] for n in lengths}
        learned = {n: [r["best_validation_accuracy"] for r in by_length[n] if r["outcome"] == "learned"] for n in lengths}
        means = [(n + shift, np.mean(learned[n])) for n in lengths if learned[n]]
        accuracy.plot(*np.array(means).reshape(-1, 2).T, color=colour, label=training)
        shares = [100 * len(learned[n]) / len(by_length[n]) for n in lengths]
        share.plot(np.array(lengths) + shift, shares, "o-", ms=2.5, color=colour, label=training)
        for n, percent in zip(lengths, shares, strict=True):
            words = f"{len(learned[n])}/{len(by_length[n])}"
            away = (5 + 6 * labels[n, percent]) * (-1 if percent > 50 else 1)
            style = {"textcoords": "offset points", "ha": "center", "va": "center", "color": colour, "size": 5}
            share.annotate(words, (n + shift, percent), (0, away), **style)
            labels[n, percent] += 1
    longest = max(row["sequence_length"] for row in rows)
    dense = np.linspace(2, longest, 100)
    accuracy.plot(dense, 100 / dense, color=GREY, lw=0.6, ls=(0, (3, 1.5)), label="guessing among the labels shown")
    for ax, unit in ((accuracy, "Best validation accuracy (%)"), (share, "Share (%)")):
        ax.set(xlabel="Sequence length (pairs)", ylabel=unit, ylim=(0, 105), xlim=(1, longest + 1))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(14 / TWO_COLUMNS, 0), ncols=4)
    return figure


if __name__ == "__main__":
    sys.exit(main())
