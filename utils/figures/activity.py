"""Figures of one sample's life in the network, from recorded arrays.

Artists that show data carry its name (`get_gid`), also as an identifier inside SVG files.
Shapes: L pairs in a sequence, F features, C classes, M memory size. A time step is 1 ms.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from utils.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    LIGHT_GREY,
    ORANGE,
    POINTS_PER_MM,
    PURPLE,
    TWO_COLUMNS,
    VERMILION,
    add_axes,
    add_heading,
    add_text,
    new_figure,
    styled,
)

HZ = 1e3  # one spike a time step


class Activity(NamedTuple):
    """A population in one phase."""

    name: str
    spikes: np.ndarray  # time x neurons, 0 or 1
    membrane: np.ndarray  # time x neurons


class Population(NamedTuple):
    """A row of the figures: a population in both phases, where it takes part in both."""

    title: str
    store: Activity
    recall: Activity | None


class Trial(NamedTuple):
    """One sample and what the network did with it."""

    features: np.ndarray  # L x F
    labels: np.ndarray  # L
    query: np.ndarray  # F
    answer: int
    logits: np.ndarray  # C
    memories: np.ndarray  # L x M x M, after each pair; row value neuron, column key neuron
    populations: Sequence[Population]  # the last one is read out
    threshold: float
    num_time_steps: int  # ms for which each input is held
    readout_steps: int  # ms at the end of recall of which the spikes are summed for the logits

    @property
    def store_ms(self) -> int:
        return len(self.labels) * self.num_time_steps

    @property
    def duration_ms(self) -> int:
        return self.store_ms + self.num_time_steps

    @property
    def readout_ms(self) -> int:
        """Start of the readout window."""
        return max(self.store_ms, self.duration_ms - self.readout_steps)

    @property
    def readout(self) -> np.ndarray:
        """Spikes of each neuron in the readout window."""
        return self.populations[-1].recall.spikes[-self.readout_steps :].sum(axis=0, dtype=int)


class Zoom(NamedTuple):
    """What part of a trial to show; None: all."""

    neurons: tuple[int, int] | None = None  # first and last
    time_range: tuple[float, float] | None = None  # start and end, ms

    def indices(self, size: int) -> np.ndarray:
        """The neurons to show of a population of `size`."""
        first, last = self.neurons or (0, size - 1)
        return np.arange(first, min(last, size - 1) + 1)


ALL = Zoom()


def rates(spikes: np.ndarray) -> np.ndarray:
    """Firing rate of each neuron, Hz, from spikes, time x neurons."""
    return spikes.mean(axis=0, dtype=float) * HZ


# --- Overview -----------------------------------------------------------------------------------------------------------------


@styled
def overview(trial: Trial, zoom: Zoom = ALL) -> Figure:
    """On one time axis: inputs, and the spikes of every population over its rate; rates of the neurons; readout and logits."""
    left, width, raster, strip, pitch = 15.0, 134.0, 17.0, 5.0, 30.0
    phases = _phases(trial, zoom, left, width)
    populations = _taking_part(trial, phases)
    levels = _label_levels(trial, phases)
    inputs_top = 5.0 + 2.6 * levels
    rasters_top = inputs_top + 12.0 + 6.5
    bottom = rasters_top + pitch * len(populations) + 10.0
    figure = new_figure(TWO_COLUMNS, bottom + 32.0)
    letters = iter("abcdefghij")

    add_heading(figure, 2, 3.2, next(letters), "")
    image = _draw_inputs(figure, trial, phases, inputs_top, 12.0, levels)
    bar = figure.colorbar(image, cax=add_axes(figure, left + width + 5, inputs_top + 3, 25, 2), orientation="horizontal")
    bar.set_label("Input value")
    bar.outline.set_linewidth(0.5)

    for row, population in enumerate(populations):
        top, last = rasters_top + pitch * row, row == len(populations) - 1
        add_heading(figure, 2, top - 1.2, next(letters), population.title, left - 2)
        neurons = zoom.indices(population.store.spikes.shape[1])
        rasters = _phase_axes(figure, phases, trial, top, raster)
        strips = _phase_axes(figure, phases, trial, top + raster + 1.0, strip, time_labels=last)
        for phase, ax, below in zip(phases, rasters, strips, strict=True):
            if activity := getattr(population, phase.name):
                _draw_raster(ax, activity, neurons, phase, raster)
                _draw_population_rate(below, activity, neurons, phase, trial.num_time_steps)
            else:
                _note(ax, "no label\nis shown")
                _note(below, "")
            if last and phase.name == "recall":
                _mark_readout(ax, trial)
        _share_scale(strips)
        _side_label(figure, left, top + raster / 2, "Neuron")
        _label_ends(rasters[0], neurons[0], neurons[-1])
        _side_label(figure, left, top + raster + 1 + strip / 2, "Hz", distance=8.5)
        _label_ends(strips[0], 0, strips[0].get_ylim()[1])
        _draw_rates(add_axes(figure, left + width + 5, top, 25, raster), population, neurons, last)

    classes_width = float(np.clip(4.0 * len(trial.logits), 55, 90))
    neurons_width = TWO_COLUMNS - left - classes_width - 23
    add_heading(
        figure, 2, bottom - 2, next(letters), f"Readout: spikes in the last {trial.duration_ms - trial.readout_ms} ms", left - 2
    )
    _draw_readout(add_axes(figure, left, bottom, neurons_width, 22), trial, zoom)
    add_heading(figure, left + neurons_width + 8, bottom - 2, next(letters), "Output", 12)
    _draw_logits(add_axes(figure, left + neurons_width + 20, bottom, classes_width, 22), trial, classes_width)
    return figure


def _draw_inputs(figure: Figure, trial: Trial, phases: "list[_Phase]", top: float, height: float, levels: int) -> AxesImage:
    """Vectors and query as columns of an image, each pair's label over its window; returns an image for the colour bar."""
    steps, size = trial.num_time_steps, trial.features.shape[1]
    axes = _phase_axes(figure, phases, trial, top, height)
    for phase, ax in zip(phases, axes, strict=True):
        _head(figure, phase)
        name, vectors = ("features", trial.features) if phase.name == "store" else ("query", trial.query[None])
        extent = (phase.start, phase.end, -0.5, size - 0.5)
        image = ax.imshow(vectors.T, "Greys", vmin=0, vmax=1, aspect="auto", origin="lower", extent=extent, zorder=0.5)
        image.set_gid(name)
        ax.set_xlim(phase.low, phase.high)
        for n in range(len(vectors)):
            start, end = max(phase.start + n * steps, phase.low), min(phase.start + (n + 1) * steps, phase.high)
            if start < end:
                word, asked = ("query", True) if name == "query" else (str(trial.labels[n]), trial.labels[n] == trial.answer)
                look = {"color": VERMILION, "weight": "bold"} if asked else {}
                add_text(figure, phase.at((start + end) / 2), top - 0.8 - 2.6 * (n % levels), word, ha="center", size=6, **look)
    if phases[0].name == "store":
        add_text(figure, phases[0].left - 1.2, top - 0.8, "label", ha="right", size=6)
    _side_label(figure, phases[0].left, top + height / 2, "Feature")
    _label_ends(axes[0], 0, size - 1)
    return image


def _draw_raster(ax: Axes, activity: Activity, neurons: np.ndarray, phase: "_Phase", height: float) -> None:
    time, neuron = np.nonzero(activity.spikes[:, neurons])
    (line,) = ax.plot(
        phase.start + time,
        neurons[neuron],
        linestyle="none",
        marker="|",
        color=BLACK,
        markersize=min(height / len(neurons) * POINTS_PER_MM, 6.0),
        markeredgewidth=float(np.clip(phase.mm_per_ms * POINTS_PER_MM, 0.25, 0.8)),
        rasterized=True,
    )
    line.set_gid(f"{activity.name} spikes")
    ax.set_ylim(neurons[0] - 0.5, neurons[-1] + 0.5)


def _draw_population_rate(ax: Axes, activity: Activity, neurons: np.ndarray, phase: "_Phase", num_time_steps: int) -> None:
    """Mean rate of the neurons shown, in five bins for each input."""
    edges = np.append(np.arange(0, len(activity.spikes), max(1, num_time_steps // 5)), len(activity.spikes))
    spikes = np.add.reduceat(activity.spikes[:, neurons].mean(axis=1, dtype=float), edges[:-1])
    area = ax.stairs(spikes / np.diff(edges) * HZ, phase.start + edges, fill=True, color=phase.colour, lw=0)
    area.set_gid(f"{activity.name} population rate")


def _mark_readout(ax: Axes, trial: Trial) -> None:
    ax.axvspan(trial.readout_ms, trial.duration_ms, color=ORANGE, alpha=0.35, lw=0, zorder=0)
    ax.set_title("readout window", loc="right", size=6, weight="normal", color=VERMILION, pad=2)


def _draw_rates(ax: Axes, population: Population, neurons: np.ndarray, last: bool) -> None:
    """Mean rate of every neuron in each phase, at the height of its row in the raster; the population's mean above."""
    highest, means = 0.0, []
    for phase, activity, colour in (("store", population.store, BLUE), ("recall", population.recall, VERMILION)):
        if activity is not None:
            values = rates(activity.spikes)
            (dots,) = ax.plot(values[neurons], neurons, ".", color=colour, ms=2.2, mew=0, clip_on=False)
            dots.set_gid(f"{activity.name} rates")
            highest = max(highest, values[neurons].max())
            means.append((f"{phase} {values.mean():.1f} Hz", colour))
    for line, (words, colour) in enumerate(reversed(means)):
        ax.text(1, 1.03 + 0.14 * line, words, transform=ax.transAxes, ha="right", va="bottom", size=6, color=colour)
    ax.set_xlim(0, 1.02 * highest or 1)
    ax.set_ylim(neurons[0] - 0.5, neurons[-1] + 0.5)
    ax.set_yticks([])
    ax.xaxis.set_major_locator(MaxNLocator(3))
    if last:
        ax.set_xlabel("Mean rate (Hz)")


def _draw_readout(ax: Axes, trial: Trial, zoom: Zoom) -> None:
    neurons, spikes = zoom.indices(len(trial.readout)), trial.readout
    bars = ax.stairs(spikes[neurons], np.append(neurons - 0.5, neurons[-1] + 0.5), fill=True, color=ORANGE, lw=0)
    bars.set_gid("readout")
    ax.set_xlim(neurons[0] - 0.5, neurons[-1] + 0.5)
    ax.set_ylim(0, max(1, spikes[neurons].max()))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlabel("Value neuron")
    ax.set_ylabel("Spikes")


def _draw_logits(ax: Axes, trial: Trial, width: float) -> None:
    classes, prediction = np.arange(len(trial.logits)), int(trial.logits.argmax())
    low, high = min(0.0, trial.logits.min()), max(0.0, trial.logits.max())
    margin = 0.12 * (high - low or 1)
    for chosen, colour, label in (
        (classes != trial.answer, LIGHT_GREY, None),
        (classes == trial.answer, GREEN, f"answer {trial.answer}"),
    ):
        bars = ax.bar(classes[chosen], trial.logits[chosen], width=0.8, color=colour, lw=0, label=label)
        for n, bar in zip(classes[chosen], bars, strict=True):
            bar.set_gid(f"logit {n}")
    above = max(trial.logits[prediction], 0) + 0.6 * margin
    ax.plot(prediction, above, "v", color=BLACK, ms=3.5, label=f"prediction {prediction}")
    ax.axhline(0, color=BLACK, lw=0.5)
    ax.legend(ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0), borderpad=0, columnspacing=1, handletextpad=0.3)
    ax.set_ylim(low - margin, high + 1.5 * margin)
    ax.set_xlim(-0.7, len(classes) - 0.3)
    ax.set_xticks(classes[:: int(np.ceil(3.2 * len(classes) / width))])  # a number needs 3.2 mm
    ax.set_xlabel("Class")
    ax.set_ylabel("Logit")


# --- Memory -------------------------------------------------------------------------------------------------------------------


@styled
def memory(trial: Trial, zoom: Zoom = ALL, most: int = 10) -> Figure:
    """The Hebbian memory after the last pair, its weights' distribution, and the memory after each pair (at most `most` pairs).

    All matrices share one linear colour scale from 0 to the largest weight of them all.
    """
    neurons = zoom.indices(trial.memories.shape[-1])
    memories = trial.memories[:, neurons[:, None], neurons]
    pairs = len(memories)
    chosen = np.unique(np.linspace(0, pairs - 1, min(most, pairs)).round().astype(int))
    side, left, right, gap = 60.0, 15.0, TWO_COLUMNS - 3, 1.5
    small = min((right - left + gap) / len(chosen) - gap, 26.0)
    figure = new_figure(TWO_COLUMNS, side + small + 29)
    edges = (neurons[0] - 0.5, neurons[-1] + 0.5)
    look = {"vmin": min(0.0, memories.min()), "vmax": memories.max() or 1.0, "origin": "lower", "extent": edges * 2}

    add_heading(
        figure, 2, 4, "a", f"Memory after the last of {pairs} pairs" if pairs > 1 else "Memory after the pair", left - 2
    )
    ax = add_axes(figure, left, 6, side, side)
    image = ax.imshow(memories[-1], interpolation="nearest", **look)
    image.set_gid("memory")
    ax.set(xlabel="Key neuron", ylabel="Value neuron")
    bar = figure.colorbar(image, cax=add_axes(figure, left + side + 3, 6, 3, side))
    bar.set_label("Weight (dimensionless)")
    bar.outline.set_linewidth(0.5)

    add_heading(figure, left + side + 24, 4, "b", "Distribution of its weights", 12)
    _draw_weights(add_axes(figure, left + side + 36, 6, right - left - side - 36, side), memories[-1])

    top = side + 26
    which = "each pair" if len(chosen) == pairs else f"{len(chosen)} of the {pairs} pairs"
    add_heading(figure, 2, top - 7, "c", f"Memory after {which}, on the colour scale of a", left - 2)
    for column, n in enumerate(chosen):
        ax = add_axes(figure, left + column * (small + gap), top, small, small)
        ax.imshow(memories[n], **look).set_gid(f"memory after pair {n + 1}")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        colour = VERMILION if trial.labels[n] == trial.answer else BLACK
        ax.set_title(f"pair {n + 1}\nlabel {trial.labels[n]}", loc="center", size=6, weight="normal", color=colour)
    return figure


def _draw_weights(ax: Axes, weights: np.ndarray) -> None:
    counts, edges = np.histogram(weights, bins=50, range=(min(0.0, weights.min()), weights.max() or 1.0))
    ax.stairs(counts, edges, fill=True, color=PURPLE, lw=0).set_gid("weights")
    ax.set_yscale("log")
    ax.set_ylim(0.7, max(10, 2 * counts.max()))
    ax.set_xlim(edges[0], edges[-1])
    ax.set(xlabel="Weight (dimensionless)", ylabel="Number of weights")
    words = f"{weights.size} weights\nmean {weights.mean():.3g}, largest {weights.max():.3g}\n{(weights == 0).mean():.0%} are 0"
    ax.text(0.98, 0.98, words, transform=ax.transAxes, ha="right", va="top", linespacing=1.5)


# --- Membranes ----------------------------------------------------------------------------------------------------------------


@styled
def membranes(trial: Trial, zoom: Zoom = ALL, count: int = 3) -> Figure:
    """Membrane potentials of `count` neurons of each population, from its most to its least active one."""
    left, height, gap, title = 22.0, 9.0, 2.2, 5.5
    phases = _phases(trial, zoom, left, TWO_COLUMNS - left - 4)
    chosen = [(population, representative(population, zoom, count)) for population in _taking_part(trial, phases)]
    bottom = 4 + sum(title + len(neurons) * (height + gap) for _, neurons in chosen)
    figure = new_figure(TWO_COLUMNS, bottom + 10)
    for phase in phases:
        _head(figure, phase)
    y = 4.0
    for (population, neurons), letter in zip(chosen, "abcdefgh", strict=False):
        add_heading(figure, 2, y + 3, letter, population.title, left - 2)
        y += title
        _side_label(figure, left, y + (len(neurons) * (height + gap) - gap) / 2, "v (θ)", distance=19.5)
        for place, neuron in enumerate(neurons):
            axes = _phase_axes(figure, phases, trial, y, height, time_labels=y + height + gap > bottom - 0.1)
            for phase, ax in zip(phases, axes, strict=True):
                activity = getattr(population, phase.name)
                if activity is None:
                    _note(ax, "no label is shown" if place == (len(neurons) - 1) // 2 else "")
                else:
                    _draw_membrane(ax, activity, neuron, phase, trial.threshold)
            _share_scale(axes)
            axes[0].yaxis.set_major_locator(MaxNLocator(3))
            add_text(figure, left - 9, y + height / 2, f"neuron\n{neuron}", ha="right", va="center", size=6)
            y += height + gap
    words = "v: membrane potential. θ: threshold (dashed). Ticks above: spikes."
    add_text(figure, TWO_COLUMNS - 4, bottom + 8, words, ha="right", size=6, color=GREY)
    return figure


def representative(population: Population, zoom: Zoom, count: int) -> np.ndarray:
    """Neurons from the most to the least active one of those that spike; silent ones only where too few do."""
    neurons = zoom.indices(population.store.spikes.shape[1])
    phases = [activity for activity in (population.store, population.recall) if activity is not None]
    spikes = sum(activity.spikes[:, neurons].sum(axis=0, dtype=int) for activity in phases)
    among = min(max(np.count_nonzero(spikes), count), len(neurons))
    places = np.linspace(0, among - 1, min(count, among)).round().astype(int)
    return neurons[np.argsort(-spikes, kind="stable")[places]]


def _draw_membrane(ax: Axes, activity: Activity, neuron: int, phase: "_Phase", threshold: float) -> None:
    """Membrane potential in units of the threshold, the threshold as a line, spikes as ticks above."""
    time = phase.start + np.arange(len(activity.membrane))
    shown = (time >= phase.low) & (time <= phase.high)
    (line,) = ax.plot(time[shown], activity.membrane[shown, neuron] / threshold, color=phase.colour, lw=0.5)
    line.set_gid(f"{activity.name} membrane of neuron {neuron}")
    ax.axhline(1, color=GREY, lw=0.5, ls=(0, (4, 2)))
    spikes = time[shown & (activity.spikes[:, neuron] > 0)]
    above = {"transform": ax.get_xaxis_transform(), "clip_on": False}
    (ticks,) = ax.plot(spikes, np.full(len(spikes), 1.07), "|", color=BLACK, ms=2.5, mew=0.5, **above)
    ticks.set_gid(f"{activity.name} spikes of neuron {neuron}")


# --- The time axis: storing and recall side by side ---------------------------------------------------------------------------


class _Phase(NamedTuple):
    """What is visible of a phase, and where in the figure."""

    name: str
    start: int  # ms, of the whole phase
    end: int
    colour: str
    tint: str
    low: float  # ms, of the visible part
    high: float
    left: float = 0.0  # mm
    width: float = 0.0

    @property
    def mm_per_ms(self) -> float:
        return self.width / (self.high - self.low)

    def at(self, time: float) -> float:
        """Where in the figure a time lies, mm."""
        return self.left + (time - self.low) * self.mm_per_ms


def _phases(trial: Trial, zoom: Zoom, left: float, width: float) -> list[_Phase]:
    """The visible phases. Recall, which lasts for one input only, gets at least a sixth of the width beside storing."""
    start, end = zoom.time_range or (0, trial.duration_ms)
    both = (("store", 0, trial.store_ms, BLUE, "#E9F1F8"), ("recall", trial.store_ms, trial.duration_ms, VERMILION, "#FCEFE6"))
    phases = [_Phase(*phase, max(start, phase[1]), min(end, phase[2])) for phase in both]
    phases = [phase for phase in phases if phase.low < phase.high]
    if len(phases) == 1:
        return [phases[0]._replace(left=left, width=width)]
    store, recall = phases
    gap = 2.0
    share = max((recall.high - recall.low) / (recall.high - store.low), 1 / 6)
    recall_width = share * (width - gap)
    return [
        store._replace(left=left, width=width - gap - recall_width),
        recall._replace(left=left + width - recall_width, width=recall_width),
    ]


def _taking_part(trial: Trial, phases: list[_Phase]) -> list[Population]:
    """The populations that are active in a visible phase."""
    names = [phase.name for phase in phases]
    return [population for population in trial.populations if any(getattr(population, name) for name in names)]


def _phase_axes(
    figure: Figure, phases: list[_Phase], trial: Trial, top: float, height: float, time_labels: bool = False
) -> list[Axes]:
    """Axes for each phase, side by side and shaded; the window of the pair that is asked for has the shade of recall."""
    axes = []
    for phase in phases:
        ax = add_axes(figure, phase.left, top, phase.width, height)
        axes.append(ax)
        ax.set_facecolor(phase.tint)
        ax.set_xlim(phase.low, phase.high)
        ticks = MaxNLocator(max(1, int(phase.width / 12)), integer=True, steps=[1, 2, 5, 10]).tick_values(phase.low, phase.high)
        last = phase.high if phase is phases[-1] else phase.high - 6 / phase.mm_per_ms  # its number would meet the next phase's
        ax.set_xticks([tick for tick in ticks if phase.low <= tick <= last])
        if phase.name == "store":
            for n, label in enumerate(trial.labels):
                ax.axvline(n * trial.num_time_steps, color="white", lw=0.4, zorder=0.2)
                if label == trial.answer:
                    window = n * trial.num_time_steps, (n + 1) * trial.num_time_steps
                    ax.axvspan(*window, color="#FCEFE6", lw=0, zorder=0.1)
        if phase is not phases[0]:
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
        if not time_labels:
            ax.tick_params(axis="x", length=0, labelbottom=False)
    if time_labels:
        middle = (phases[0].left + phases[-1].left + phases[-1].width) / 2
        wider = phases[-1].mm_per_ms / phases[0].mm_per_ms
        scale = f"; recall drawn {wider:.2g}× wider" if wider > 1.05 else ""
        add_text(figure, middle, top + height + 6.0, f"Time (ms{scale})", ha="center")
    return axes


def _head(figure: Figure, phase: _Phase) -> None:
    add_text(figure, phase.left + phase.width / 2, 3.2, phase.name.capitalize(), ha="center", weight="bold", color=phase.colour)


def _label_levels(trial: Trial, phases: list[_Phase]) -> int:
    """Lines over which the labels of the pairs are staggered, so that they do not overlap."""
    if phases[0].name != "store":
        return 1
    label_mm = 1.4 * len(str(trial.labels.max())) + 0.6
    return int(np.ceil(label_mm / (phases[0].mm_per_ms * trial.num_time_steps)))


def _share_scale(axes: Iterable[Axes]) -> None:
    """The same vertical scale for the phases of a row."""
    axes = [ax for ax in axes if ax.has_data()]
    limits = np.array([ax.get_ylim() for ax in axes])
    for ax in axes:
        ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())


def _label_ends(ax: Axes, low: float, high: float) -> None:
    """Ticks at both ends of a short vertical axis, their numbers inside its height."""
    ax.set_yticks([low, high] if high > low else [low], [f"{end:.0f}" for end in ((low, high) if high > low else (low,))])
    for label, alignment in zip(ax.get_yticklabels(), ("bottom", "top"), strict=False):
        label.set_va(alignment)


def _side_label(figure: Figure, left: float, middle: float, words: str, distance: float = 7.5) -> None:
    """A vertical axis label, at the same distance from the axes in every row."""
    add_text(figure, left - distance, middle, words, rotation=90, ha="center", va="center")


def _note(ax: Axes, words: str) -> None:
    """Says why a panel is empty."""
    ax.patch.set_visible(False)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", size=6, color=GREY)
