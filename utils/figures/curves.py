"""Figures of several runs: training, and accuracy against the length of the tested sequences or against an option.

Runs of the same label are repetitions of each other (other seeds): each is a thin line, over them their mean and range. Those
that learned and those that did not are drawn apart, for the mean of both is the accuracy of neither.
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
NOT_LEARNED = "not learned: never over halfway from guessing one of the labels shown to 100 %"

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
        """Once over halfway from guessing one of the labels shown to 100 %."""
        accuracy = self.columns.get("accuracy", self.columns.get("validation_accuracy"))
        shown = self.columns.get("sequence_length", self.trained_length or self.num_classes or 1)
        return accuracy is None or bool((accuracy >= 50 + 50 / shown).any())


@styled
def training_curves(runs: Sequence[Curves], samples_per_epoch: int) -> Figure:
    """Loss, accuracy, learning rate and firing rates (of networks that have any) over the training samples seen.

    Ticks on the accuracy stand where a curriculum goes on to longer sequences (column `training_length`).
    """
    groups, chance = by_label(runs), chance_levels(runs)
    panels = [panel for panel in TRAINING_PANELS if any(panel[2].keys() & run.columns.keys() for run in runs)]
    rows = math.ceil(len(panels) / 3)
    figure = new_figure(TWO_COLUMNS, 44 * rows)
    axes = figure.subplots(rows, 3, sharex=True).flat
    handles = legend_lines(groups, chance)
    for ax, letter, (title, unit, series) in zip(axes, "abcdef", panels, strict=False):
        heading(ax, letter, title)
        legend = []
        for place, (column, words) in enumerate(series.items()):
            for colour, (label, members) in zip(SERIES * len(groups), groups.items(), strict=False):
                look = {"color": colour, "ls": LINE_STYLES[place]} if len(groups) > 1 else {"color": SERIES[place], "ls": "-"}
                having = [run.columns for run in members if column in run.columns]
                lines = [(samples_seen(c, samples_per_epoch), c[column]) for c in having]
                draw_repetitions(ax, lines, f"{label} {column}", steps=column == "learning_rate", **look)
            look = {"color": BLACK, "ls": LINE_STYLES[place]} if len(groups) > 1 else {"color": SERIES[place]}
            legend.append(Line2D([], [], label=words, **look))
        if title == "Accuracy":
            draw_chance(ax, chance)
            handles += draw_curriculum(ax, groups, samples_per_epoch)
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
    """Thousands of them, after each epoch."""
    return (columns["epoch"] - columns["epoch"][0] + 1) * samples_per_epoch / 1000


def draw_curriculum(ax: Axes, groups: Mapping[str, list[Curves]], samples_per_epoch: int) -> list[Line2D]:
    """Ticks on the curves of validation accuracy where the training sequences get longer. Returns their legend."""
    look, found = {"ls": "none", "marker": "|", "ms": 4, "mew": 0.5}, False
    for colour, members in zip(SERIES * len(groups), groups.values(), strict=False):
        for run in members:
            longer = np.flatnonzero(np.diff(run.columns.get("training_length", [])) > 0)
            x, y = samples_seen(run.columns, samples_per_epoch)[longer], run.columns["validation_accuracy"][longer]
            ax.plot(x, y, color=colour, gid=f"{run.label} longer sequences", **look)
            found |= len(longer) > 0
    words = "on accuracy: longer training sequences from here on (curriculum)"
    return [Line2D([], [], color=BLACK, label=words, **look)] if found else []


@styled
def accuracy_by_length(runs: Sequence[Curves]) -> Figure:
    """Accuracy against the length of the tested sequences, with the trained length and two levels of chance."""
    groups, chance = by_label(runs), chance_levels(runs)
    figure = new_figure(ONE_COLUMN, 62)
    ax = figure.subplots()
    for colour, (label, members) in zip(SERIES * len(groups), groups.items(), strict=False):
        lines = [(run.columns["sequence_length"], run.columns["accuracy"]) for run in members]
        draw_repetitions(ax, lines, f"{label} accuracy", color=colour, marker=".", ms=3)
    trained, guessing = {"color": BLACK, "lw": 0.8, "ls": DOTTED}, {"color": GREY, "lw": 0.6, "ls": DOTTED}
    for length in {run.trained_length for run in runs} - {None}:
        ax.axvline(length, zorder=1, gid=f"trained length {length}", **trained)
    draw_chance(ax, chance)
    lengths = np.concatenate([run.columns["sequence_length"] for run in runs])
    dense = np.linspace(lengths.min(), lengths.max(), 200)
    ax.plot(dense, 100 / dense, gid="guessing", **guessing)
    ax.set(xlabel="Sequence length at test (pairs)", ylabel="Accuracy (%)", ylim=(0, 103))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    handles = [Line2D([], [], label="length trained on", **trained)]
    handles.append(Line2D([], [], label="guessing among the labels that were shown", **guessing))
    add_legend(figure, [*legend_lines(groups, chance), *handles], ONE_COLUMN)
    return figure


@styled
def accuracy_by_option(runs: Sequence[Curves], name: str) -> Figure:
    """Best validation accuracy against the option of a sweep: every run, and mean and standard deviation of those that learned.

    The values stand side by side, in order, whatever their distances.
    """
    values, chance, groups = option_values(runs), chance_levels(runs), list(dict.fromkeys(run.label for run in runs))
    figure = new_figure(ONE_COLUMN, 58)
    ax = figure.subplots()
    for colour, label in zip(SERIES * len(groups), groups, strict=False):
        members = [run for run in runs if run.label == label]
        learned = [[best(run) for run in members if run.option == value and run.has_learned()] for value in values]
        known = [place for place, accuracies in enumerate(learned) if accuracies]
        means, deviations = (np.array([of(learned[place]) for place in known]) for of in (np.mean, deviation))
        ax.errorbar(known, means, deviations, color=colour, capsize=2, elinewidth=0.8)[0].set_gid(f"mean {label}")
        for marker, did in ((".", True), ("x", False)):
            points = [(values.index(run.option), best(run)) for run in members if run.has_learned() == did]
            look = {"color": colour, "ls": "none", "marker": marker, "ms": 3, "mew": 0.6, "gid": f"{label} {marker}"}
            ax.plot(*np.array(points).reshape(-1, 2).T, **look)
    draw_chance(ax, chance)
    ax.set_xticks(range(len(values)), map(str, values))
    ax.set(xlabel=name, ylabel="Best validation accuracy (%)", ylim=(0, 103))
    colours = zip(SERIES * len(groups), groups, strict=False) if len(groups) > 1 else ()
    handles = [Line2D([], [], color=colour, label=label) for colour, label in colours]
    dots = {"color": BLACK, "ls": "none", "ms": 3, "mew": 0.6}
    handles.append(Line2D([], [], marker=".", label="a run; line: mean ± standard deviation of those that learned", **dots))
    if not all(run.has_learned() for run in runs):
        handles.append(Line2D([], [], marker="x", label=NOT_LEARNED, **dots))
    add_legend(figure, [*handles, *chance_lines(chance)], ONE_COLUMN)
    return figure


def option_values(runs: Sequence[Curves]) -> list:
    """In order: numbers by size, words by the alphabet."""
    numbers, words = [], []
    for value in dict.fromkeys(run.option for run in runs):
        (numbers if isinstance(value, int | float) else words).append(value)
    return sorted(numbers) + sorted(words, key=str)


def best(run: Curves) -> float:
    """Best validation accuracy, percent."""
    return float(run.columns["validation_accuracy"].max())


def deviation(values: Sequence[float]) -> float:
    """Of a sample; of one value it is 0."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def by_label(runs: Sequence[Curves]) -> dict[str, list[Curves]]:
    """Runs that are repetitions of each other; where only some of these learned, the others are a group of their own."""
    groups: dict[str, list[Curves]] = {}
    for run in sorted(runs, key=lambda run: not run.has_learned()):
        mixed = len({other.has_learned() for other in runs if other.label == run.label}) > 1
        groups.setdefault(run.label + SPLIT * (mixed and not run.has_learned()), []).append(run)
    order = list(dict.fromkeys(run.label for run in runs))
    return dict(sorted(groups.items(), key=lambda group: order.index(group[1][0].label)))


def draw_repetitions(ax: Axes, lines: list[tuple[np.ndarray, np.ndarray]], name: str, steps: bool = False, **look) -> None:
    """Each run as a line; of several, the mean and range where all of them have values.

    Args:
        steps: each value has held since the x before.
    """
    drawn = {"drawstyle": "steps-pre"} if steps else {}
    lines = [(x[order], y[order]) for x, y in lines for order in [np.argsort(x, kind="stable")]]
    if steps:
        lines = [(np.append(0, x), np.append(y[0], y)) for x, y in lines]
    for x, y in lines:
        single = look | drawn | ({"marker": "."} if len(x) == 1 else {})
        ax.plot(x, y, gid=name, **single, **({"lw": 0.3, "alpha": 0.6} if len(lines) > 1 else {}))
    if len(lines) > 1 and (common := sorted(set.intersection(*(set(x.tolist()) for x, _ in lines)))):
        values = np.stack([y[np.isin(x, common)] for x, y in lines])
        step = {"step": "pre"} if steps else {}
        ax.fill_between(common, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, lw=0, **step)
        drawn |= {"color": look["color"], "ls": look.get("ls", "-"), "lw": 1.1, "gid": f"mean {name}"}
        ax.plot(common, values.mean(axis=0), **drawn)


# Legends


def legend_lines(groups: Mapping[str, list[Curves]], chance: Sequence[int]) -> list[Line2D]:
    """The legend of the groups and of the levels of chance."""
    lines = []
    for colour, (label, members) in zip(SERIES * len(groups), groups.items(), strict=False):
        words = f"{label} ({len(members)} runs)" if len(members) > 1 else label
        lines.append(Line2D([], [], color=colour if len(groups) > 1 else "none", label=words))
    if any(len(members) > 1 for members in groups.values()):
        lines.append(Line2D([], [], color=BLACK, lw=1.1, label="of several runs: mean; shaded: range"))
    if any(label.endswith(SPLIT) for label in groups):
        lines.append(Line2D([], [], color="none", label=NOT_LEARNED))
    return lines + chance_lines(chance)


def add_legend(figure: Figure, handles: Sequence[Line2D], width: float) -> None:
    """Below the figure of this width (mm), which grows by the least height that the legend needs, in one column or several."""
    texts = [str(handle.get_label()).replace("$", r"\$") for handle in handles]  # else Matplotlib reads mathematics
    layouts = []
    for ncols in (1, 2, 3):
        wrapped = [textwrap.fill(text, int((width / ncols - 8) / 1.1)) for text in texts]  # mm: line, and a letter
        lines = [column.tolist() for column in np.array_split([text.count("\n") + 1 for text in wrapped], ncols)]
        layouts.append((max(map(sum, lines)), ncols, wrapped))
    height, ncols, wrapped = min(layouts)
    for handle, text in zip(handles, wrapped, strict=True):
        handle.set_label(text)
    figure.set_figheight(figure.get_figheight() + (2 + 3.3 * height) / 25.4)
    figure.legend(handles=handles, loc="outside lower left", labelspacing=0.35, ncols=ncols, columnspacing=1)


def chance_levels(runs: Sequence[Curves]) -> list[int]:
    """The numbers of classes among which a run may guess; of one class there is nothing to guess."""
    return sorted({run.num_classes for run in runs} - {None, 1})


def draw_chance(ax: Axes, chance: Sequence[int]) -> None:
    for count in chance:
        ax.axhline(100 / count, zorder=1, gid=f"chance, {count} classes", color=GREY, lw=0.6, ls=DASHED)


def chance_lines(chance: Sequence[int]) -> list[Line2D]:
    words = f"chance, {', '.join(map(str, chance))} classes" + ", from above" * (len(chance) > 1)
    return [Line2D([], [], color=GREY, lw=0.6, ls=DASHED, label=words)] if chance else []
