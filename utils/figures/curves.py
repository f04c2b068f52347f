"""Figures of training and of evaluation over sequence lengths, of one run or of several.

Runs of the same label are repetitions of each other (other seeds): each is a thin line, over them their mean and range.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from utils.figures.style import (
    BLACK,
    GREY,
    MM_PER_INCH,
    ONE_COLUMN,
    SERIES,
    TWO_COLUMNS,
    add_axes,
    add_heading,
    new_figure,
    styled,
)

LINE_STYLES = ("-", (0, (3, 1.5)), (0, (1, 1)))
LEGEND_LINE = 3.4  # mm

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
def training_curves(runs: Sequence[Curves]) -> Figure:
    """Loss, accuracy, learning rate and firing rates over the epochs."""
    groups = _by_label(runs)
    colours = dict(zip(groups, _cycle(len(groups)), strict=True))
    left, top, width, height, across, down = 14.0, 7.0, 45.0, 30.0, 60.5, 45.0
    grid = 2 * down + 3
    figure = new_figure(TWO_COLUMNS, grid + (LEGEND_LINE * len(groups) + 2 if len(groups) > 1 else 0))
    for panel, (title, unit, series) in enumerate(TRAINING_PANELS):
        x, y = left + across * (panel % 3), top + down * (panel // 3)
        add_heading(figure, x - 12, y - 2, "abcdef"[panel], title, 12)
        ax = add_axes(figure, x, y, width, height)
        for place, (column, words) in enumerate(series.items()):
            for label, members in groups.items():
                colour, line = (SERIES[place], "-") if len(groups) == 1 else (colours[label], LINE_STYLES[place])
                _draw_repetitions(ax, members, "epoch", column, color=colour, ls=line)
            if words:
                look = {"color": SERIES[place]} if len(groups) == 1 else {"color": BLACK, "ls": LINE_STYLES[place]}
                ax.plot([], [], label=words, **look)
        if title == "Accuracy":
            _draw_chance(ax, runs, "chance")
        ax.set_ylim(0, 103 if title == "Accuracy" else None)
        ax.set(xlabel="Epoch", ylabel=unit)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if len(series) > 1:
            ax.legend(
                loc="lower right",
                bbox_to_anchor=(1.02, 1.0),
                ncols=3,
                borderpad=0,
                columnspacing=0.6,
                handlelength=1,
                handletextpad=0.3,
            )
    if len(groups) > 1:
        _draw_labels(figure, groups, colours, left, grid)
    return figure


@styled
def accuracy_by_length(runs: Sequence[Curves]) -> Figure:
    """Accuracy against the length of the tested sequences, with the trained length and two levels of chance."""
    groups = _by_label(runs)
    colours = dict(zip(groups, _cycle(len(groups)), strict=True))
    left, top, height = 13.0, 4.0, 50.0
    figure = new_figure(ONE_COLUMN, top + height + 11 + LEGEND_LINE * (len(groups) + 3))
    ax = add_axes(figure, left, top, ONE_COLUMN - left - 4, height)
    trained = {run.trained_length for run in runs} - {None}
    for label, members in groups.items():
        _draw_repetitions(ax, members, "sequence_length", "accuracy", color=colours[label], ls="-", marker=".", ms=3)
        for length in sorted({run.trained_length for run in members} - {None}):
            colour = colours[label] if len(trained) > 1 else BLACK
            ax.axvline(length, color=colour, lw=0.8, ls=LINE_STYLES[2], zorder=1).set_gid(f"{label} trained length")
    _draw_chance(ax, runs)
    lengths = np.unique(np.concatenate([run.columns["sequence_length"] for run in runs]))
    dense = np.linspace(lengths.min(), lengths.max(), 200)
    ax.plot(dense, 100 / dense, color=GREY, lw=0.6, ls=LINE_STYLES[2])
    ax.set(xlabel="Sequence length at test (pairs)", ylabel="Accuracy (%)")
    ax.set_ylim(0, 103)
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    levels = [
        Line2D([], [], color=BLACK, lw=0.8, ls=LINE_STYLES[2], label="length trained on"),
        Line2D([], [], color=GREY, lw=0.6, ls=LINE_STYLES[1], label="chance: guessing among all classes"),
        Line2D([], [], color=GREY, lw=0.6, ls=LINE_STYLES[2], label="guessing among the labels that were shown"),
    ]
    _draw_labels(figure, groups, colours, left, top + height + 8, levels)
    return figure


def _by_label(runs: Sequence[Curves]) -> dict[str, list[Curves]]:
    groups: dict[str, list[Curves]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups


def _cycle(count: int) -> list[str]:
    return [SERIES[n % len(SERIES)] for n in range(count)]


def _draw_repetitions(ax: Axes, runs: Sequence[Curves], x: str, y: str, **look) -> None:
    """Each run as a line; of several, the mean and range where all of them have values."""
    several = len(runs) > 1
    for run in runs:
        single = look | ({"marker": "."} if len(run.columns[x]) == 1 else {})
        (line,) = ax.plot(run.columns[x], run.columns[y], **single, **({"lw": 0.3, "alpha": 0.6} if several else {}))
        line.set_gid(f"{run.label} {y}")
    if several:
        common = sorted(set.intersection(*(set(run.columns[x].tolist()) for run in runs)))
        if common:
            values = np.stack([run.columns[y][np.isin(run.columns[x], common)] for run in runs])
            ax.fill_between(common, values.min(axis=0), values.max(axis=0), color=look["color"], alpha=0.15, lw=0)
            (mean,) = ax.plot(common, values.mean(axis=0), **{key: look[key] for key in ("color", "ls")}, lw=1.1)
            mean.set_gid(f"{runs[0].label} mean {y}")


def _draw_chance(ax: Axes, runs: Sequence[Curves], words: str = "") -> None:
    for classes in sorted({run.num_classes for run in runs} - {None, 1}):  # of one class there is nothing to guess
        ax.text(1, 100 / classes + 1, words, transform=ax.get_yaxis_transform(), ha="right", va="bottom", size=6, color=GREY)
        ax.axhline(100 / classes, color=GREY, lw=0.6, ls=LINE_STYLES[1], zorder=1).set_gid(f"chance of {classes} classes")


def _draw_labels(
    figure: Figure, groups: Mapping[str, list[Curves]], colours: Mapping[str, str], left: float, top: float, more: Sequence = ()
) -> None:
    """A legend of the labels below the axes, one a line."""
    handles = []
    for label, members in groups.items():
        words = label + (f" (mean and range of {len(members)} runs)" if len(members) > 1 else "")
        handles.append(Line2D([], [], color=colours[label], label=words))
    width, height = figure.get_size_inches() * MM_PER_INCH
    place = {"loc": "upper left", "bbox_to_anchor": (left / width, 1 - top / height)}
    figure.legend(handles=[*handles, *more], **place, borderpad=0, labelspacing=0.35)
