"""Turn run folders into a table (CSV and Markdown) and figures of accuracy.

python -m experiments.summarize runs/sweep --output_dir runs/sweep/summary
python -m experiments.summarize runs/published --output_dir experiments/results --copy published_0.3
python -m experiments.summarize experiments/results --output_dir experiments/results

Runs are read from their folders, or from files that --copy kept (see utils/results.py). The table names unfinished runs.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import data
import models
from experiments.sweep import DECISIVE, DEFAULTS
from utils.errors import in_one_line
from utils.figures import curves, save
from utils.figures.style import DASHED, GREY, ONE_COLUMN, SERIES, TWO_COLUMNS, heading, new_figure, styled
from utils.metrics import to_csv
from utils.results import GROUP, Result, columns, read_results, write_groups

SHOWN_RATES = ("write_key", "write_value", "read_key", "read_value")
# The groups in the accuracy figures, and their labels. Without any of these, all groups are drawn.
LINES = {
    "published": "",  # a panel of its own names them
    "published_0.3": "",
    "published_0.3_short": "",
    "recipe_tuned": "recipe, rule tuned",
    "recipe": "recipe",
    "ood_recipe_tuned": "recipe, rule tuned",
    "ood_recipe": "recipe",
    "ood_curriculum": "curriculum, 12 epochs",
    "ood_published": "published, 15 epochs",
}
CIRCLE, CROSS = {"marker": "o", "ms": 3, "mew": 0.6, "mfc": "none"}, {"marker": "x", "ms": 4, "mew": 1}
# Options that do not change the way of training, and options that are described in other words.
_NOT_SHOWN = ("sequence_length", "num_classes", "seed", "epochs", "start_epoch", "curriculum_start", "curriculum_step")
NOTE = (
    "Mean ± standard deviation over the seeds that learned (where none did, over all). Validation: the best epoch. Test: "
    "original test set, the network of that epoch. Learned: validation accuracy over halfway from guessing one of the labels "
    f"shown to 100 %. Silent: the reading values fire at less than {models.SILENT_BELOW} Hz in the last epoch. "
    "Minutes: training and validation, mean over the seeds, on shared machines of different speed; the first runs did not "
    "record them. Each run: table.csv."
)


@in_one_line
def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", type=Path, metavar="FOLDER", help="folder with runs, at any depth")
    parser.add_argument("--output_dir", "--output-dir", type=Path, required=True, help="where to write table and figures")
    words = f"also keep the tested runs there, as this group (see {GROUP}), and summarize all kept runs"
    parser.add_argument("--copy", metavar="GROUP", nargs="?", const="", help=words)
    args = parser.parse_args(argv)
    results = read_results(args.runs)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.copy is not None:
        keep([result for result in results if result.tests], args.output_dir, args.copy)
        results = read_results(args.output_dir)
    rows = [summary(result) for result in results]
    (args.output_dir / "table.csv").write_text(to_csv(rows), encoding="utf-8")
    (args.output_dir / "table.md").write_text(to_markdown(rows), encoding="utf-8")
    for name, figure in figures(results, rows):
        save(figure, args.output_dir / f"{name}.png")
    print(to_markdown(rows), end="")
    return 0


def keep(results: list[Result], folder: Path, group: str) -> None:
    """Add runs to those kept in a folder. A kept run is replaced only by a run with more epochs."""
    kept = {result.name: result for result in read_results(folder)} if any(folder.rglob(GROUP)) else {}
    for result in results:
        name = f"{group}/{result.name}" if group else result.name
        if name not in kept or len(kept[name].metrics) < len(result.metrics):
            kept[name] = result._replace(name=name)
    write_groups(kept.values(), folder)


# The table


def summary(result: Result) -> dict[str, Any]:
    """The row of a run. Accuracies in percent, firing rates in Hz, epochs counted from 1."""
    options, metrics = result.options, result.metrics
    validation = [line["validation_accuracy"] for line in metrics]
    best = int(np.argmax(validation)) if metrics else None
    threshold = curves.halfway(options["sequence_length"])
    learned = next((epoch for epoch, accuracy in enumerate(validation, start=1) if accuracy > threshold), None)
    seconds = sum(line.get("seconds", 0) for line in metrics)
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
        "minutes": round(seconds / 60, 1) or None,
        "seconds": round(seconds) or None,
        "updates": sum(-(-data.TRAINING_SAMPLES // line.get("batch_size", options["batch_size"])) for line in metrics),
    } | {f"{name}_rate": round(metrics[-1][name], 2) if metrics and name in metrics[-1] else None for name in SHOWN_RATES}


def accuracy_at(result: Result, length: int) -> float | None:
    """Accuracy in percent, or None if the run was not tested at this length."""
    return next((float(test["accuracy"]) for test in result.tests if int(test["sequence_length"]) == length), None)


def outcome(result: Result, learned: int | None) -> str:
    if not result.metrics:
        return "not begun"
    if result.metrics[-1].get("read_value", np.inf) < models.SILENT_BELOW:
        return "silent"
    return "learned" if learned or result.options["num_classes"] == 1 else "not learned so far"


def way_of_training(options: dict[str, Any]) -> str:
    """How a run's options differ from the defaults, in words."""
    words = []
    if options["curriculum_start"]:
        words.append(f"curriculum from {options['curriculum_start']}, {options['curriculum_step']} more each epoch")
    others = {name: options.get(name, DEFAULTS[name]) for name in DECISIVE if name not in _NOT_SHOWN}
    words += [f"{name} {value}" for name, value in others.items() if value != DEFAULTS[name]]
    return ", ".join(words) or "published options"


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """One line for the seeds of a group with the same options; table.csv has a row for each run."""
    head = "group", "pairs", "classes", "training", "epochs", "seeds", "learned"
    head += "validation %", "test %", "each seed's test %", "minutes"
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        key = group_of(row["run"]), row["sequence_length"], row["num_classes"], row["training"], row["of_epochs"]
        alike.setdefault(key, []).append(row)
    for (group, length, classes, training, of_epochs), seeds in alike.items():
        unfinished = [f"seed {row['seed']}: {row['epochs']}, unfinished" for row in seeds if row["state"] == "unfinished"]
        epochs = f"{of_epochs}" + (f" ({', '.join(unfinished)})" if unfinished else "")
        outcomes = [row["outcome"] for row in seeds]
        learned = f"{outcomes.count('learned')} of {len(seeds)}"
        learned += f", {outcomes.count('silent')} silent" * ("silent" in outcomes)
        each = ", ".join("not tested" if row["test_accuracy"] is None else f"{row['test_accuracy']:.2f}" for row in seeds)
        minutes = [row["minutes"] for row in seeds if row["minutes"]]
        cells = group, length, classes, training, epochs, ", ".join(str(row["seed"]) for row in seeds), learned
        like = [row for row in seeds if row["outcome"] == "learned"] or seeds  # no mean over both kinds of seeds
        validation, test = ([row[name] for row in like] for name in ("best_validation_accuracy", "test_accuracy"))
        cells += mean_and_deviation(validation), mean_and_deviation(test), each
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
    """Names and figures, if there are runs to draw."""
    full = [row for row in rows if row["sequence_length"] == row["num_classes"] > 1 and row["test_accuracy"] is not None]
    if full:
        yield "accuracy_against_length", accuracy_against_length(full)
    # Out of distribution: with as many classes as pairs, longer sequences than those trained on do not exist.
    outcomes = {row["run"]: row["outcome"] for row in rows}
    apart = [run for run in results if len(run.tests) > 1 and run.options["num_classes"] > run.options["sequence_length"]]
    drawn = []
    for group, label in line_labels(map(group_of, (run.name for run in apart))).items():
        for run in (run for run in apart if group_of(run.name) == group):
            words = (label or way_of_training(run.options)) + ", silent" * (outcomes[run.name] == "silent")
            drawn.append(curves.Curves(words, columns(run.tests), run.options["num_classes"], run.options["sequence_length"]))
    if drawn:
        yield "accuracy_by_tested_length", curves.accuracy_by_length(drawn)


def group_of(run: str) -> str:
    return run.rpartition("/")[0]


def line_labels(groups: Iterable[str]) -> dict[str, str]:
    """The labels of the groups in LINES; if none is in LINES, every group is its own label."""
    groups = dict.fromkeys(groups)
    return {group: label for group, label in LINES.items() if group in groups} or {group: group for group in groups}


@styled
def accuracy_against_length(rows: list[dict[str, Any]]) -> Figure:
    """Test accuracy by length: one panel for the published options, and one for other options."""
    published = [row for row in rows if row["training"] == "published options"]
    others = [row for row in rows if row["training"] != "published options"]
    panels = [panel for panel in (("Published options", published), ("Other options", others)) if panel[1]]
    figure = new_figure(TWO_COLUMNS if len(panels) > 1 else ONE_COLUMN, 82)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    longest = max(3, *(row["sequence_length"] for row in rows))
    for ax, letter, (title, found) in zip(axes, "ab", panels, strict=False):
        draw_lines(ax, found, means=found is others)
        lengths = np.linspace(2, longest, 100)
        ax.plot(lengths, 100 / lengths, color=GREY, lw=0.6, ls=DASHED, label="chance: one of the labels shown")
        if len(panels) > 1:
            heading(ax, letter, title)
        ax.set(xlabel="Sequence length (pairs)", ylabel="Accuracy on the test set (%)", ylim=(0, 103), xlim=(0, longest + 2))
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.2))
    return figure


def draw_lines(ax: Axes, rows: list[dict[str, Any]], means: bool) -> None:
    """Draw a circle for each seed that learned and a cross for each other one; each group and number of epochs has a colour.

    Args:
        means: draw lines through the means of the seeds that learned.
    """
    labels = line_labels(group_of(row["run"]) for row in rows)
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        if (group := group_of(row["run"])) in labels:
            lines.setdefault((labels[group], row["of_epochs"]), []).append(row)
    order = list(labels.values())
    for n, (label, epochs) in enumerate(sorted(lines, key=lambda line: (order.index(line[0]), -line[1]))):
        words, points = f"{label}, {epochs} epochs".removeprefix(", "), {True: [], False: []}
        for row in lines[label, epochs]:
            points[row["outcome"] == "learned"].append((row["sequence_length"], row["test_accuracy"]))
        colour = SERIES[n % len(SERIES)]
        for learned, name, look in ((True, words, CIRCLE), (False, f"{words}: silent, or accuracy at chance", CROSS)):
            if points[learned]:
                ax.plot(*zip(*points[learned], strict=True), ls="", color=colour, label=name, zorder=9 - n, **look)
        if means:
            lengths = sorted({length for length, _ in points[True]})
            mean = [np.mean([accuracy for at, accuracy in points[True] if at == length]) for length in lengths]
            ax.plot(lengths, mean, color=colour)


if __name__ == "__main__":
    sys.exit(main())
