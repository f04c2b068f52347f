"""Figures of several runs: training curves, and accuracy against the tested sequence length or against an option.

Runs with the same label are repetitions with other seeds: thin lines, over which their mean and range are drawn. Runs that
learned and runs that did not have separate means, because a common mean would describe neither.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.figures.style import BLACK, DASHED, DOTTED, GREY, ONE_COLUMN, SERIES, TWO_COLUMNS, heading, new_figure, styled

LINE_STYLES = ("-", DASHED, DOTTED)
SPLIT = ", not learned"
NOT_LEARNED = "not learned: accuracy stays below halfway from guessing to 100 %"

# Title, vertical axis, and the columns with their words in the legend.
TRAINING_PANELS = (
    ("Loss", "Cross entropy (nats)", {"validation_loss": "validation", "train_loss": "training"}),
    ("Accuracy", "Accuracy (%)", {"validation_accuracy": "validation", "train_accuracy": "training"}),
    ("Learning rate", "Learning rate", {"learning_rate": ""}),
    ("Encoding", "Rate (Hz)", {"features_encoded": "vectors", "labels_encoded": "labels", "query_encoded": "query"}),
    ("Keys", "Rate (Hz)", {"write_key": "store", "read_key": "recall"}),
    ("Values", "Rate (Hz)", {"write_value": "store", "read_value": "recall"}),
)


class Curves(NamedTuple):
    """Columns of numbers that belong to one run."""

    label: str
    columns: Mapping[str, np.ndarray]  # all of the same length; ordered by `epoch` or by `sequence_length`
    num_classes: int | None = None  # for the level of chance
    trained_length: int | None = None
    option: Any = None  # the value of the option that a sweep varies

    def has_learned(self) -> bool:
        accuracy = self.columns.get("accuracy", self.columns.get("validation_accuracy"))
        shown = self.columns.get("sequence_length", self.trained_length or self.num_classes or 1)
        return accuracy is None or bool((accuracy > halfway(shown)).any())


def halfway(shown):
    """The accuracy (percent) halfway from guessing one of `shown` labels to 100 %."""
    return 50 + 50 / shown


class Group(NamedTuple):
    """Runs that are repetitions of each other."""

    colour: str
    label: str
    runs: list[Curves]


def grouped(runs: Sequence[Curves]) -> list[Group]:
    """Runs by their label; if only some runs of a label learned, the others are a group of their own."""
    groups: dict[str, list[Curves]] = {}
    for label in dict.fromkeys(run.label for run in runs):
        alike = [run for run in runs if run.label == label]
        learned, others = ([run for run in alike if run.has_learned() == kind] for kind in (True, False))
        groups[label] = learned or others
        if learned and others:
            groups[label + SPLIT] = others
    return [Group(SERIES[n % len(SERIES)], *group) for n, group in enumerate(groups.items())]


@styled
def training_curves(runs: Sequence[Curves], samples_per_epoch: int) -> Figure:
    """Loss, accuracy, learning rate and firing rates (if recorded) over the training samples seen.

    Triangles on the accuracy mark where a curriculum goes on to longer sequences (column `training_length`).
    """
    groups = grouped(runs)
    panels = [panel for panel in TRAINING_PANELS if any(panel[2].keys() & run.columns.keys() for run in runs)]
    rows = math.ceil(len(panels) / 3)
    figure = new_figure(TWO_COLUMNS, 44 * rows)
    axes = figure.subplots(rows, 3, sharex=True).flat
    handles = legend_lines(groups) if len(groups) > 1 else []  # with one group, colours tell the columns apart
    for ax, letter, (title, unit, series) in zip(axes, "abcdef", panels, strict=False):
        heading(ax, letter, title)
        legend = []
        for place, (column, words) in enumerate(series.items()):
            look = {"ls": LINE_STYLES[place]} if len(groups) > 1 else {"color": SERIES[place]}
            for group in groups:
                having = [run.columns for run in group.runs if column in run.columns]
                lines = [(samples_seen(found, samples_per_epoch), found[column]) for found in having]
                draw_repetitions(ax, lines, f"{group.label} {column}", **{"color": group.colour} | look)
            legend.append(Line2D([], [], label=words, **{"color": BLACK} | look))
        if title == "Accuracy":
            handles += draw_chance(ax, runs) + draw_curriculum(ax, groups, samples_per_epoch)
        ax.set(xlabel="Training samples (thousands)", ylabel=unit, ylim=(0, 103 if title == "Accuracy" else None))
        ax.tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if len(series) > 1:
            look = {"ncols": 3, "columnspacing": 0.6, "handlelength": 1, "handletextpad": 0.3}
            ax.legend(handles=legend, loc="lower right", bbox_to_anchor=(1.02, 1.0), **look)
    for ax in axes:
        ax.set_axis_off()
    add_legend(figure, handles, TWO_COLUMNS)
    return figure


def samples_seen(columns: Mapping[str, np.ndarray], samples_per_epoch: int) -> np.ndarray:
    """Thousands of training samples seen after each epoch."""
    return (columns["epoch"] - columns["epoch"][0] + 1) * samples_per_epoch / 1000


def draw_curriculum(ax: Axes, groups: Sequence[Group], samples_per_epoch: int) -> list[Line2D]:
    """Triangles on the curves of validation accuracy where the training sequences get longer. Returns their legend."""
    look, found = {"ls": "none", "marker": "v", "ms": 2}, False
    for group in groups:
        for run in group.runs:
            longer = np.flatnonzero(np.diff(run.columns.get("training_length", [])) > 0)
            x, y = samples_seen(run.columns, samples_per_epoch)[longer], run.columns["validation_accuracy"][longer]
            ax.plot(x, y, color=group.colour, gid=f"{run.label} longer sequences", **look)
            found |= len(longer) > 0
    words = "on accuracy: longer training sequences from here on (curriculum)"
    return [Line2D([], [], color=BLACK, label=words, **look)] if found else []


@styled
def accuracy_by_length(runs: Sequence[Curves]) -> Figure:
    """Accuracy against the length of the tested sequences, with the trained length and two levels of chance."""
    groups = grouped(runs)
    figure = new_figure(ONE_COLUMN, 62)
    ax = figure.subplots()
    for group in groups:
        lines = [(run.columns["sequence_length"], run.columns["accuracy"]) for run in group.runs]
        draw_repetitions(ax, lines, f"{group.label} accuracy", color=group.colour, marker=".", ms=3)
    trained, guessing = {"color": BLACK, "lw": 0.8, "ls": DOTTED}, {"color": GREY, "lw": 0.6, "ls": DOTTED}
    for length in {run.trained_length for run in runs} - {None}:
        ax.axvline(length, zorder=1, gid=f"trained length {length}", **trained)
    lengths = np.concatenate([run.columns["sequence_length"] for run in runs])
    dense = np.linspace(lengths.min(), lengths.max(), 200)
    ax.plot(dense, 100 / dense, gid="guessing", **guessing)
    ax.set(xlabel="Sequence length at test (pairs)", ylabel="Accuracy (%)", ylim=(0, 103))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    handles = [*legend_lines(groups), *draw_chance(ax, runs), Line2D([], [], label="length trained on", **trained)]
    handles.append(Line2D([], [], label="guessing among the labels that were shown", **guessing))
    add_legend(figure, handles, ONE_COLUMN)
    return figure


def in_order(runs: Sequence[Curves]) -> list[Curves]:
    """Runs sorted by the option of a sweep: numbers by their size, then words."""
    return sorted(runs, key=lambda run: (run.option,) if isinstance(run.option, int | float) else (math.inf, str(run.option)))


def by_option(runs: Sequence[Curves]) -> dict[str, dict[Any, tuple[list[float], list[float]]]]:
    """Label -> value of the option -> best validation accuracies (percent) of the runs that learned, and of the others."""
    found: dict[str, dict[Any, tuple[list[float], list[float]]]] = {}
    for run in in_order(runs):
        learned, others = found.setdefault(run.label, {}).setdefault(run.option, ([], []))
        (learned if run.has_learned() else others).append(float(run.columns["validation_accuracy"].max()))
    return found


@styled
def accuracy_by_option(runs: Sequence[Curves], name: str) -> Figure:
    """Best validation accuracy against the option of a sweep: every run, and mean and standard deviation over learned ones.

    The values are in order and evenly spaced.
    """
    groups = by_option(runs)
    values = list(dict.fromkeys(run.option for run in in_order(runs)))
    figure, handles = new_figure(ONE_COLUMN, 58), []
    ax = figure.subplots()
    dots = {"ls": "none", "ms": 3, "mew": 0.6}
    for n, (label, accuracies) in enumerate(groups.items()):
        colour = SERIES[n % len(SERIES)]
        means = [(values.index(value), *mean_and_deviation(learned)) for value, (learned, _) in accuracies.items() if learned]
        ax.errorbar(*np.array(means).reshape(-1, 3).T, color=colour, capsize=2, elinewidth=0.8)[0].set_gid(f"mean {label}")
        for kind, marker in enumerate(".x"):
            points = [(values.index(value), y) for value, both in accuracies.items() for y in both[kind]]
            ax.plot(*np.array(points).reshape(-1, 2).T, color=colour, marker=marker, gid=f"{label} {marker}", **dots)
        if len(groups) > 1:
            handles.append(Line2D([], [], color=colour, label=label))
    ax.set_xticks(range(len(values)), map(str, values))
    ax.set(xlabel=name, ylabel="Best validation accuracy (%)", ylim=(0, 103))
    words = {".": "a run; line: mean ± standard deviation of runs that learned", "x": NOT_LEARNED}
    handles += [Line2D([], [], color=BLACK, marker=marker, label=label, **dots) for marker, label in words.items()]
    add_legend(figure, [*handles, *draw_chance(ax, runs)], ONE_COLUMN)
    return figure


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, which is 0 for one value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw_repetitions(ax: Axes, lines: list[tuple[np.ndarray, np.ndarray]], name: str, **look) -> None:
    """Each run as a line; for several runs, also their mean and range where all runs have values."""
    lines = [(x[order], y[order]) for x, y in lines for order in [np.argsort(x, kind="stable")]]
    thin = {"lw": 0.3, "alpha": 0.6} if len(lines) > 1 else {}
    for x, y in lines:
        ax.plot(x, y, gid=name, **look | thin | ({"marker": "."} if len(x) == 1 else {}))
    if len(lines) > 1 and (common := sorted(set.intersection(*(set(x.tolist()) for x, _ in lines)))):
        values = np.stack([y[np.isin(x, common)] for x, y in lines])
        ax.fill_between(common, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, lw=0)
        ax.plot(common, values.mean(axis=0), color=look["color"], ls=look.get("ls", "-"), lw=1.1, gid=f"mean {name}")


# Legends


def legend_lines(groups: Sequence[Group]) -> list[Line2D]:
    lines = []
    for colour, label, runs in groups:
        words = f"{label} ({len(runs)} runs)" if len(runs) > 1 else label
        lines.append(Line2D([], [], color=colour if len(groups) > 1 else "none", label=words))
    if any(len(group.runs) > 1 for group in groups):
        lines.append(Line2D([], [], color=BLACK, lw=1.1, label="of several runs: mean; shaded: range"))
    if any(group.label.endswith(SPLIT) for group in groups):
        lines.append(Line2D([], [], color="none", label=NOT_LEARNED))
    return lines


def draw_chance(ax: Axes, runs: Sequence[Curves]) -> list[Line2D]:
    """Chance levels for the runs' numbers of classes, except for one class. Returns their legend."""
    look = {"color": GREY, "lw": 0.6, "ls": DASHED}
    classes = sorted({run.num_classes for run in runs} - {None, 1})
    for count in classes:
        ax.axhline(100 / count, zorder=1, gid=f"chance, {count} classes", **look)
    words = f"chance, {', '.join(map(str, classes))} classes" + ", from above" * (len(classes) > 1)
    return [Line2D([], [], label=words, **look)] if classes else []


def add_legend(figure: Figure, handles: Sequence[Line2D], width: float) -> None:
    """Add a legend below a figure of this width (mm). The figure grows by its height. A label has at most three lines."""
    ncols = 1 if width == ONE_COLUMN else 2
    letters = int((width / ncols - 8) / 1.1)  # per line of text: 8 mm for the handle, 1.1 mm for a letter
    heights = []  # mm
    for handle in handles:
        text = textwrap.fill(str(handle.get_label()), letters, max_lines=3, placeholder=" …")
        handle.set_label(text.replace("$", r"\$"))  # or Matplotlib would read mathematics
        heights.append(0.8 + 2.6 * (text.count("\n") + 1))
    height = 2 + max(sum(column) for column in np.array_split(heights, ncols))
    figure.set_figheight(figure.get_figheight() + height / 25.4)
    figure.legend(handles=handles, loc="outside lower left", labelspacing=0.35, ncols=ncols, columnspacing=1)
