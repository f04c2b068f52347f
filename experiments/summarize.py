"""Turn run folders into a table (CSV and Markdown) and figures of accuracy.

python -m experiments.summarize runs/sweep --output_dir runs/sweep/summary
python -m experiments.summarize runs/sweep --output_dir experiments/results --copy
python -m experiments.summarize experiments/results --output_dir experiments/results

Runs are read from their folders, or from where --copy kept them (see utils/results.py). The table states what is not finished.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import models
from experiments.sweep import DECISIVE, DEFAULTS
from utils.errors import in_one_line
from utils.figures import curves, save
from utils.figures.style import DASHED, GREY, ONE_COLUMN, SERIES, new_figure, styled
from utils.metrics import to_csv
from utils.results import GROUP, Result, columns, read_results, write_groups

SHOWN_RATES = ("write_key", "write_value", "read_key", "read_value")
# The groups in the figures of accuracy, and their labels; where there are none of them: all groups.
LINES = {
    "recipe_tuned": "recipe, rule tuned",
    "recipe": "recipe",
    "published": "published options, 30 to 250 epochs",
    "ood_recipe_tuned": "recipe, rule tuned",
    "ood_recipe": "recipe",
    "ood_curriculum": "published options, curriculum, 12 epochs",
    "ood_published": "published options, 15 epochs",
}
# What a run may differ in without being trained in another way, and what is put in other words.
_NOT_SHOWN = ("sequence_length", "num_classes", "seed", "epochs", "start_epoch", "curriculum_start", "curriculum_step")
NOTE = (
    "Mean ± standard deviation over the seeds. Validation: the best epoch. Test: published test set, the network of that "
    "epoch. Learned: validation accuracy over halfway from guessing one of the labels shown to 100 %. Silent: the reading "
    f"values fire at less than {models.SILENT_BELOW} Hz in the last epoch. Minutes: training and validation, mean over the "
    "seeds, on shared machines of different speed; the first runs did not record them. Each run: table.csv."
)


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, metavar="FOLDER", help="folder with runs, at any depth")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="where to write table and figures")
    parser.add_argument("--copy", action="store_true", help=f"keep the runs themselves there, too, compactly: see {GROUP}")
    args = parser.parse_args(argv)
    results = read_results(args.runs)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.copy:
        write_groups(results, args.output_dir)
    rows = [summary(result) for result in results]
    (args.output_dir / "table.csv").write_text(to_csv(rows), encoding="utf-8")
    (args.output_dir / "table.md").write_text(to_markdown(rows), encoding="utf-8")
    for name, figure in figures(results, rows):
        save(figure, args.output_dir / f"{name}.png")
    print(to_markdown(rows), end="")
    return 0


# The table


def summary(result: Result) -> dict[str, Any]:
    """The row of a run. Accuracies in percent, firing rates in Hz, epochs counted from 1."""
    options, metrics = result.options, result.metrics
    validation = [line["validation_accuracy"] for line in metrics]
    best = int(np.argmax(validation)) if metrics else None
    threshold = (100 / options["sequence_length"] + 100) / 2  # halfway from guessing one of the labels shown to 100 %
    learned = next((epoch for epoch, accuracy in enumerate(validation, start=1) if accuracy > threshold), None)
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
        "test_accuracy": accuracy_at(result, options["sequence_length"]),
        "minutes": round(sum(line.get("seconds", 0) for line in metrics) / 60, 1) or None,
    } | {f"{name}_rate": round(metrics[-1][name], 2) if metrics and name in metrics[-1] else None for name in SHOWN_RATES}


def accuracy_at(result: Result, length: int) -> float | None:
    """Percent, where the run was tested at that length."""
    return next((float(test["accuracy"]) for test in result.tests if int(test["sequence_length"]) == length), None)


def outcome(result: Result, learned: int | None) -> str:
    if not result.metrics:
        return "not begun"
    if result.metrics[-1].get("read_value", np.inf) < models.SILENT_BELOW:
        return "silent"
    return "learned" if learned or result.options["num_classes"] == 1 else "not learned so far"


def way_of_training(options: dict[str, Any]) -> str:
    """How a run's options differ from the published ones, in words."""
    words = []
    if options["curriculum_start"]:
        words.append(f"curriculum from {options['curriculum_start']}, {options['curriculum_step']} more each epoch")
    others = {name: options.get(name, DEFAULTS[name]) for name in DECISIVE if name not in _NOT_SHOWN}
    words += [f"{name} {value}" for name, value in others.items() if value != DEFAULTS[name]]
    return ", ".join(words) or "published options"


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A line for the seeds of a group that are trained alike; table.csv has each."""
    head = "group", "pairs", "classes", "training", "epochs", "seeds", "learned"
    head += "validation %", "test %", "each seed's test %", "minutes"
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        group = row["run"].rpartition("/")[0]
        alike.setdefault((group, row["sequence_length"], row["num_classes"], row["training"], row["of_epochs"]), []).append(row)
    for (group, length, classes, training, of_epochs), seeds in alike.items():
        unfinished = [f"seed {row['seed']}: {row['epochs']}, unfinished" for row in seeds if row["state"] == "unfinished"]
        epochs = f"{of_epochs}" + (f" ({', '.join(unfinished)})" if unfinished else "")
        outcomes = [row["outcome"] for row in seeds]
        learned = f"{outcomes.count('learned')} of {len(seeds)}"
        learned += f", {outcomes.count('silent')} silent" * ("silent" in outcomes)
        tests = [row["test_accuracy"] for row in seeds]
        each = ", ".join("not tested" if test is None else f"{test:.2f}" for test in tests)
        minutes = [row["minutes"] for row in seeds if row["minutes"]]
        cells = group, length, classes, training, epochs, ", ".join(str(row["seed"]) for row in seeds), learned
        cells += mean_and_deviation([row["best_validation_accuracy"] for row in seeds]), mean_and_deviation(tests), each
        cells += (f"{np.mean(minutes):.0f}" if minutes else "",)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", NOTE]) + "\n"


def mean_and_deviation(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{np.mean(known):.1f}" + (f" ± {np.std(known, ddof=1):.1f}" if len(known) > 1 else "")


# The figures


def figures(results: list[Result], rows: list[dict[str, Any]]):
    """Names and figures, those for which there are runs."""
    full = [row for row in rows if row["sequence_length"] == row["num_classes"] > 1 and row["epochs"]]
    if full:
        yield "accuracy_against_length", accuracy_against_length(full)
    # Out of distribution: with as many classes as pairs, longer sequences than those trained on do not exist.
    apart = [r for r in results if len(r.tests) > 1 and r.options["num_classes"] > r.options["sequence_length"]]
    if apart:
        labels = line_labels(result.name.rpartition("/")[0] for result in apart)
        runs = [(run, label) for group, label in labels.items() for run in apart if run.name.rpartition("/")[0] == group]
        named = [(label or way_of_training(run.options), run) for run, label in runs]  # a run may be without a group
        drawn = [curves.Curves(n, columns(r.tests), r.options["num_classes"], r.options["sequence_length"]) for n, r in named]
        yield "accuracy_by_tested_length", curves.accuracy_by_length(drawn)


def line_labels(groups: Iterable[str]) -> dict[str, str]:
    """Labels of those in LINES; where there are none of them, every group is its own label."""
    groups = dict.fromkeys(groups)
    return {group: label for group, label in LINES.items() if group in groups} or {group: group for group in groups}


@styled
def accuracy_against_length(rows: list[dict[str, Any]]) -> Figure:
    """Test accuracy by length, a line for each group of LINES (where there are none of them: for each group): the mean over the
    seeds, and every seed a point (hollow: unfinished)."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["test_accuracy"] is not None:
            groups.setdefault(row["run"].rpartition("/")[0], []).append(row)
    labels = line_labels(groups)
    figure = new_figure(ONE_COLUMN, 70)
    ax = figure.subplots()
    for (group, label), colour in zip(labels.items(), SERIES * len(labels), strict=False):
        points = [(row["sequence_length"], row["test_accuracy"], row["state"] == "finished") for row in groups[group]]
        lengths = sorted({length for length, *_ in points})
        means = [np.mean([accuracy for length, accuracy, _ in points if length == n]) for n in lengths]
        ax.plot(lengths, means, color=colour, label=label)
        for finished, look in ((True, {"color": colour}), (False, {"mec": colour, "mfc": "none"})):
            chosen = [(length, accuracy) for length, accuracy, state in points if state == finished]
            ax.plot(*np.array(chosen).reshape(-1, 2).T, "o", ms=2.5, mew=0.5, **look)
    longest = max(row["sequence_length"] for row in rows)
    dense = np.linspace(2, max(longest, 3), 100)
    ax.plot(dense, 100 / dense, color=GREY, lw=0.6, ls=DASHED, label="chance: one of the labels shown")
    ax.set(xlabel="Sequence length (pairs)", ylabel="Accuracy on the test set (%)", ylim=(0, 103), xlim=(0, longest + 1))
    figure.legend(loc="outside lower left", ncols=2)
    return figure


if __name__ == "__main__":
    sys.exit(main())
