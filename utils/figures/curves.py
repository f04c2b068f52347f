"""Figures of training and of evaluation over sequence lengths, of one run or of several.

Runs of the same label are repetitions of each other (other seeds): each is a thin line, over them their mean and range.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.figures.style import BLACK, DASHED, DOTTED, GREY, ONE_COLUMN, SERIES, TWO_COLUMNS, heading, new_figure, styled

LINE_STYLES = ("-", DASHED, DOTTED)

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


@styled
def training_curves(runs: Sequence[Curves], samples_per_epoch: int) -> Figure:
    """Loss, accuracy, learning rate and firing rates (of networks that have any) over the training samples seen."""
    groups, chance = by_label(runs), chance_levels(runs)
    handles = legend_lines(groups, chance)
    panels = [panel for panel in TRAINING_PANELS if any(panel[2].keys() & run.columns.keys() for run in runs)]
    rows = math.ceil(len(panels) / 3)
    figure = new_figure(TWO_COLUMNS, 44 * rows + 3.5 * len(handles))
    axes = figure.subplots(rows, 3, sharex=True).flat
    for ax, letter, (title, unit, series) in zip(axes, "abcdef", panels, strict=False):
        heading(ax, letter, title)
        legend = []
        for place, (column, words) in enumerate(series.items()):
            for colour, (label, members) in zip(SERIES * len(groups), groups.items(), strict=False):
                look = {"color": colour, "ls": LINE_STYLES[place]} if len(groups) > 1 else {"color": SERIES[place], "ls": "-"}
                having = [run.columns for run in members if column in run.columns]
                lines = [((c["epoch"] - c["epoch"][0] + 1) * samples_per_epoch / 1000, c[column]) for c in having]
                draw_repetitions(ax, lines, f"{label} {column}", steps=column == "learning_rate", **look)
            look = {"color": BLACK, "ls": LINE_STYLES[place]} if len(groups) > 1 else {"color": SERIES[place]}
            legend.append(Line2D([], [], label=words, **look))
        for level, look in chance.items() if title == "Accuracy" else ():
            ax.axhline(level, zorder=1, gid=look["label"], **look)
        ax.set(xlabel="Training samples (thousands)", ylabel=unit, ylim=(0, 103 if title == "Accuracy" else None))
        ax.tick_params(labelbottom=True)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if len(series) > 1:
            look = {"ncols": 3, "columnspacing": 0.6, "handlelength": 1, "handletextpad": 0.3}
            ax.legend(handles=legend, loc="lower right", bbox_to_anchor=(1.02, 1.0), **look)
    for ax in axes:
        ax.set_axis_off()
    figure.legend(handles=handles, loc="outside lower left", labelspacing=0.35)
    return figure


@styled
def accuracy_by_length(runs: Sequence[Curves]) -> Figure:
    """Accuracy against the length of the tested sequences, with the trained length and two levels of chance."""
    groups, chance = by_label(runs), chance_levels(runs)
    handles = legend_lines(groups, chance)
    trained, guessing = {"color": BLACK, "lw": 0.8, "ls": DOTTED}, {"color": GREY, "lw": 0.6, "ls": DOTTED}
    handles.append(Line2D([], [], label="length trained on", **trained))
    handles.append(Line2D([], [], label="guessing among the labels that were shown", **guessing))
    figure = new_figure(ONE_COLUMN, 62 + 3.5 * len(handles))
    ax = figure.subplots()
    for colour, (label, members) in zip(SERIES * len(groups), groups.items(), strict=False):
        lines = [(run.columns["sequence_length"], run.columns["accuracy"]) for run in members]
        draw_repetitions(ax, lines, f"{label} accuracy", color=colour, marker=".", ms=3)
    for length in {run.trained_length for run in runs} - {None}:
        ax.axvline(length, zorder=1, gid=f"trained length {length}", **trained)
    for level, look in chance.items():
        ax.axhline(level, zorder=1, gid=look["label"], **look)
    lengths = np.concatenate([run.columns["sequence_length"] for run in runs])
    dense = np.linspace(lengths.min(), lengths.max(), 200)
    ax.plot(dense, 100 / dense, **guessing)
    ax.set(xlabel="Sequence length at test (pairs)", ylabel="Accuracy (%)", ylim=(0, 103))
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    figure.legend(handles=handles, loc="outside lower left", labelspacing=0.35)
    return figure


def by_label(runs: Sequence[Curves]) -> dict[str, list[Curves]]:
    return {label: [run for run in runs if run.label == label] for label in dict.fromkeys(run.label for run in runs)}


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


def legend_lines(groups: Mapping[str, list[Curves]], chance: Mapping[float, dict]) -> list[Line2D]:
    """The legend of the groups and of the levels of chance."""
    lines = []
    for colour, (label, members) in zip(SERIES * len(groups), groups.items(), strict=False):
        words = f"{label} ({len(members)} runs; thick: mean, shaded: range)" if len(members) > 1 else label
        lines.append(Line2D([], [], color=colour if len(groups) > 1 else "none", label=words))
    return lines + [Line2D([], [], **look) for look in chance.values()]


def chance_levels(runs: Sequence[Curves]) -> dict[float, dict]:
    """Accuracy of guessing among all classes, percent -> look and label of its line."""
    classes = sorted({run.num_classes for run in runs} - {None, 1})  # of one class there is nothing to guess
    dashes = (DASHED, (0, (7, 1.5)), (0, (3, 1, 1, 1)))
    look = {"color": GREY, "lw": 0.6}
    return {100 / count: look | {"ls": dashes[n % 3], "label": f"chance, {count} classes"} for n, count in enumerate(classes)}
