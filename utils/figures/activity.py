"""Figures of one sample in a trained network: `record` makes the arrays that they are drawn from.

Artists that show data carry the data's name (`get_gid`), also as an identifier inside SVG files.
Shapes: L pairs in a sequence, F features, C classes, M memory size. A time step is 1 ms.
"""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from utils.figures import style
from utils.figures.style import heading, new_figure, styled

HZ = 1e3  # one spike per time step

# The rows of the figures: title, population while storing, population while recalling.
ROWS = (
    ("Encoding population: vectors, query", "features_encoded", "query_encoded"),
    ("Encoding population: labels", "labels_encoded", None),
    ("Key neurons", "write_key", "read_key"),
    ("Value neurons", "write_value", "read_value"),
)


class Trial(NamedTuple):
    """One sample and what the network did with it."""

    features: np.ndarray  # L x F
    labels: np.ndarray  # L
    query: np.ndarray  # F
    answer: int
    logits: np.ndarray  # C
    readout_weights: np.ndarray  # C x M
    spikes: Mapping[str, np.ndarray]  # population -> time x neurons, 0 or 1
    membranes: Mapping[str, np.ndarray]  # population -> time x neurons
    memories: np.ndarray  # L x M x M, after each pair; row value neuron, column key neuron
    threshold: float
    num_time_steps: int  # ms for which each input is held
    readout_steps: int  # ms at the end of recall: their spikes are summed for the logits

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
        """Spikes of each value neuron in the readout window, M."""
        return self.spikes["read_value"][-self.readout_steps :].sum(axis=0, dtype=int)


@torch.no_grad()
def record(model, features: torch.Tensor, labels: torch.Tensor, query: torch.Tensor, answer: int) -> Trial:
    """Run a network on any one sample, by the plain function: kernels keep no membrane potentials.

    Args:
        model: a `models.MemorizingAssociations`, which is not changed.
        features: the vectors, L x F.
        labels: their labels, L, int64.
        query: F; it need not be one of the vectors.
        answer: the right label.
    """
    plain = copy.copy(model)  # the copy shares all layers
    if isinstance(model.backend, str):
        plain.backend = "reference"
    output = plain(features[None], labels[None], query[None], record=True)
    membranes = output.activity["membranes"]

    def array(tensor: torch.Tensor) -> np.ndarray:
        return tensor.cpu().numpy()

    return Trial(
        features=array(features),
        labels=array(labels),
        query=array(query),
        answer=int(answer),
        logits=array(output.logits[0]),
        readout_weights=array(model.output_layer.weight),
        spikes={name: array(output.activity[name][0].bool()) for name in membranes},
        membranes={name: array(potential[0]) for name, potential in membranes.items()},
        memories=array(output.activity["memories"][0]),
        threshold=model.dynamics.neuron.thr,
        num_time_steps=model.dynamics.num_time_steps,
        readout_steps=model.dynamics.readout_steps,
    )


class Zoom(NamedTuple):
    """The part of a trial to show; None: all of it."""

    neurons: tuple[int, int] | None = None  # first and last
    time_range: tuple[float, float] | None = None  # start and end, ms

    def indices(self, size: int) -> np.ndarray:
        """The neurons to show of a population of `size`."""
        first, last = self.neurons or (0, size - 1)
        return np.arange(first, min(last, size - 1) + 1)


ALL = Zoom()
ASKED = "the pair that is asked for"  # orange in storing


class Phase(NamedTuple):
    """The visible part of storing or of recall."""

    name: str
    column: int  # of ROWS
    start: int  # ms, of the whole phase
    low: float  # ms, of its visible part
    high: float
    colour: str
    tint: str


def visible_phases(trial: Trial, zoom: Zoom) -> list[Phase]:
    start, end = zoom.time_range or (0, trial.duration_ms)
    store = Phase("Store", 1, 0, start, min(end, trial.store_ms), style.BLUE, "#E9F1F8")
    start, end = max(start, trial.store_ms), min(end, trial.duration_ms)
    recall = Phase("Recall", 2, trial.store_ms, start, end, style.VERMILION, "#FCEFE6")
    return [phase for phase in (store, recall) if phase.low < phase.high]


def time_grid(figure: FigureBase, trial: Trial, phases: list[Phase], heights: list[float], right: float = 0) -> np.ndarray:
    """Axes (rows x phases) on one time axis in ms, with shaded phases; `right` adds a column of this relative width.

    A short phase, such as recall, gets at least a fifth of the width of the other phase.
    """
    durations = np.array([phase.high - phase.low for phase in phases])
    widths = np.maximum(durations, 0.2 * durations.max())
    ratios = [*widths, *([right * sum(widths)] if right else [])]
    grid = {"width_ratios": ratios, "height_ratios": heights}
    axes = figure.subplots(len(heights), len(ratios), sharex="col", sharey="row", squeeze=False, gridspec_kw=grid)
    for ax in axes[:-1].flat:
        ax.tick_params(axis="x", length=0)
    for column, phase, wider in zip(axes.T, phases, widths / durations, strict=False):
        for ax in column:
            ax.set_facecolor(phase.tint)
            if phase.name == "Store":
                asked = int(np.flatnonzero(trial.labels == trial.answer)[0]) * trial.num_time_steps
                ax.axvspan(asked, asked + trial.num_time_steps, color="#FCEFE6", lw=0, zorder=0.1)
                for edge in range(0, trial.store_ms, trial.num_time_steps):
                    ax.axvline(edge, color="white", lw=0.4, zorder=0.2)
            if phase is not phases[0]:
                ax.spines["left"].set_visible(False)
                ax.tick_params(axis="y", length=0)
        column[-1].set_xlabel(f"ms, {wider:.2g}× wider" if wider > 1.05 else "Time (ms)")
        first, last = phase is phases[0], phase is phases[-1]
        nbins, prune = (8, None if last else "upper") if first else (2, None)
        column[-1].xaxis.set_major_locator(MaxNLocator(nbins, integer=True, steps=[1, 2, 5, 10], prune=prune))
        column[-1].set_xlim(phase.low, phase.high)
    return axes


def leave_out(ax: Axes, words: str = "") -> None:
    """An empty panel that states the reason."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center", size=6, color=style.GREY)


@styled
def overview(trial: Trial, zoom: Zoom = ALL) -> Figure:
    """Inputs, and spikes and rate of every population, on one time axis; rates of the neurons; readout and logits."""
    phases = visible_phases(trial, zoom)
    rows = [row for row in ROWS if any(row[phase.column] for phase in phases)]
    figure = new_figure(style.TWO_COLUMNS, 48 + 29 * len(rows))
    above, below = figure.subfigures(2, 1, height_ratios=(20 + 29 * len(rows), 28), hspace=0)
    axes = time_grid(above, trial, phases, [12] + [17, 5] * len(rows), right=0.2)

    letters = iter("abcdefg")
    image = draw_inputs(axes[0], trial, phases, next(letters))
    leave_out(axes[0, -1])
    scale = axes[0, -1].inset_axes((0, 0.4, 1, 0.2))
    bar = above.colorbar(image, cax=scale, orientation="horizontal", ticks=(0, 0.5, 1), label="Input value")
    bar.outline.set_linewidth(0.5)
    scale.set_title(f"Orange: recall, and\n{ASKED}", size=6, weight="normal", color=style.VERMILION)

    for (raster, strip), row in zip(axes[1:].reshape(len(rows), 2, -1), rows, strict=True):
        heading(raster[0], next(letters), row[0])
        raster[0].set_ylabel("Neuron")
        leave_out(strip[-1])
        raster[-1].spines["bottom"].set_visible(False)
        for phase, ax, under in zip(phases, raster, strip, strict=False):
            if name := row[phase.column]:
                spikes = trial.spikes[name]
                neurons = zoom.indices(spikes.shape[1])
                draw_raster(ax, name, spikes, neurons, phase)
                draw_population_rate(under, name, spikes[:, neurons], phase, trial.num_time_steps)
                draw_rates(raster[-1], name, spikes, neurons, phase)
            else:
                leave_out(ax, "no label\nis shown")
                leave_out(under)
            if name == "read_value":
                ax.axvspan(trial.readout_ms, trial.duration_ms, color=style.ORANGE, alpha=0.35, lw=0, zorder=0.3)
                ax.set_title("readout window", loc="right", size=6, weight="normal", color=style.VERMILION)
        raster[0].set_yticks([neurons[0], neurons[-1]] if len(neurons) > 1 else neurons)
        strip[0].set(ylabel="Hz", ylim=(0, None))
        strip[0].yaxis.set_major_locator(MaxNLocator(2))
    strip[-1].set_axis_on()
    strip[-1].spines["left"].set_visible(False)
    strip[-1].tick_params(axis="y", length=0)
    strip[-1].set(xlabel="Mean rate (Hz)", xlim=(0, None))
    above.align_ylabels(axes[:, 0])

    readout, logits = below.subplots(1, 2, width_ratios=(1.4, np.clip(0.07 * len(trial.logits), 0.7, 2)))
    heading(readout, next(letters), f"Readout: spikes in the last {trial.duration_ms - trial.readout_ms} ms")
    draw_readout(readout, trial, zoom)
    heading(logits, next(letters), "Output")
    draw_logits(logits, trial)
    return figure


def draw_inputs(axes: np.ndarray, trial: Trial, phases: list[Phase], letter: str = "") -> AxesImage:
    """Vectors and query as columns of an image, each pair's label above it; returns an image for the colour bar."""
    steps, size = trial.num_time_steps, trial.features.shape[1]
    axes[0].set_ylabel("Feature")
    for phase, ax in zip(phases, axes, strict=False):
        store = phase.name == "Store"
        vectors, words = (trial.features, trial.labels) if store else (trial.query[None], ["query"])
        edges = phase.start + steps * np.arange(len(vectors) + 1)
        look = {"cmap": "Greys", "vmin": 0, "vmax": 1, "aspect": "auto", "origin": "lower", "zorder": 0.5}
        look["interpolation"] = "nearest"  # others blur, also in time, if there are more features than pixels
        image = ax.imshow(vectors.T, extent=(edges[0], edges[-1], -0.5, size - 0.5), **look)
        image.set_gid("features" if store else "query")
        ax.set_xlim(phase.low, phase.high)
        parts = zip(pairwise(np.clip(edges, phase.low, phase.high)), words, strict=True)
        shown = [((start + end) / 2, word) for (start, end), word in parts if start < end]
        levels = int(np.ceil(len(shown) / 36))  # 36 labels fit side by side
        above = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "size": 6, "annotation_clip": False}
        for n, (middle, word) in enumerate(shown):
            look = {"color": style.VERMILION, "weight": "bold"} if word in (trial.answer, "query") else {}
            ax.annotate(str(word), (middle, 1), (0, 2 + 7 * (n % levels)), ha="center", **above, **look)
        ax.set_title(phase.name, loc="right", color=phase.colour, pad=4 + 7 * levels)
        if phase is phases[0]:
            heading(ax, letter, "Inputs", pad=4 + 7 * levels)
            ax.annotate("label" if store else "", (phase.low, 1), (-4, 2), ha="right", **above)
    axes[0].set_yticks([0, size - 1] if size > 1 else [0])
    return image


def draw_raster(ax: Axes, name: str, spikes: np.ndarray, neurons: np.ndarray, phase: Phase) -> None:
    time, place = np.nonzero(spikes[:, neurons])
    gap = np.full(len(time), np.nan)  # one line with gaps draws much faster than one line per spike
    x = np.stack([time, time, gap], axis=1) + phase.start
    y = np.stack([neurons[place] - 0.45, neurons[place] + 0.45, gap], axis=1)
    look = {"color": style.BLACK, "lw": 0.5, "solid_capstyle": "butt", "rasterized": True, "snap": True, "in_layout": False}
    ax.plot(x.ravel(), y.ravel(), gid=f"{name} spikes", **look)
    ax.set_ylim(neurons[0] - 0.5, neurons[-1] + 0.5)


def draw_population_rate(ax: Axes, name: str, spikes: np.ndarray, phase: Phase, num_time_steps: int) -> None:
    """Mean rate of the neurons, in five bins per input."""
    edges = np.append(np.arange(0, len(spikes), max(1, num_time_steps // 5)), len(spikes))
    counts = np.add.reduceat(spikes.mean(axis=1, dtype=float), edges[:-1])
    look = {"fill": True, "color": phase.colour, "lw": 0, "gid": f"{name} population rate"}
    ax.stairs(counts / np.diff(edges) * HZ, phase.start + edges, **look)


def draw_rates(ax: Axes, name: str, spikes: np.ndarray, neurons: np.ndarray, phase: Phase) -> None:
    """Mean rate of every neuron at the height of its row in the raster; above, the mean of the whole population."""
    rates = spikes.mean(axis=0, dtype=float) * HZ
    ax.plot(rates[neurons], neurons, ".", color=phase.colour, ms=2.2, mew=0, clip_on=False, gid=f"{name} rates")
    where = {"Store": "left", "Recall": "right"}[phase.name]
    ax.set_title(f"{rates.mean():.1f} Hz", loc=where, size=6, weight="normal", color=phase.colour)


def draw_readout(ax: Axes, trial: Trial, zoom: Zoom) -> None:
    neurons = zoom.indices(len(trial.readout))
    spikes, edges = trial.readout[neurons], np.append(neurons - 0.5, neurons[-1] + 0.5)
    ax.stairs(spikes, edges, fill=True, color=style.ORANGE, lw=0, gid="readout")
    ax.set(xlabel="Value neuron", xlim=(edges[0], edges[-1]), ylabel="Spikes", ylim=(0, max(1, spikes.max())))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))


def draw_logits(ax: Axes, trial: Trial) -> None:
    classes, prediction = np.arange(len(trial.logits)), int(trial.logits.argmax())
    colours = np.where(classes == trial.answer, style.GREEN, style.LIGHT_GREY)
    for n, bar in enumerate(ax.bar(classes, trial.logits, width=0.8, color=colours, lw=0)):
        bar.set_gid(f"logit {n}")
    ax.axhline(0, color=style.BLACK, lw=0.5)
    ax.annotate("▾", (prediction, max(trial.logits[prediction], 0)), ha="center", va="bottom")
    ax.set_title(f"▾ prediction {prediction}", loc="center", size=6, weight="normal")
    ax.set_title(f"answer {trial.answer}", loc="right", size=6, weight="normal", color=style.GREEN)
    ax.margins(y=0.15)
    ax.set(xlabel="Class", ylabel="Logit", xlim=(-0.7, len(classes) - 0.3))
    ax.xaxis.set_major_locator(MaxNLocator(min(len(classes) + 1, 20), integer=True))


@styled
def memory(trial: Trial, zoom: Zoom = ALL) -> Figure:
    """The Hebbian memory after the last pair, its weights' distribution, and the memory after each pair (at most ten pairs).

    All matrices share one linear colour scale from 0 to the largest weight.
    """
    neurons = zoom.indices(trial.memories.shape[-1])
    memories = trial.memories[:, neurons[:, None], neurons]
    chosen = np.unique(np.linspace(0, len(memories) - 1, min(10, len(memories))).round().astype(int))
    extent = (neurons[0] - 0.5, neurons[-1] + 0.5) * 2
    look = {"vmin": min(0.0, memories.min()), "vmax": memories.max() or 1.0, "origin": "lower", "extent": extent}
    figure = new_figure(style.TWO_COLUMNS, 101)
    above, below = figure.subfigures(2, 1, height_ratios=(74, 27))

    matrix, weights = above.subplots(1, 2)
    heading(matrix, "a", f"Memory after the last of {len(memories)} pairs")
    image = matrix.imshow(memories[-1], interpolation="nearest", gid="memory", **look)
    matrix.set(xlabel="Key neuron", ylabel="Value neuron")
    for axis in (matrix.xaxis, matrix.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
    above.colorbar(image, ax=matrix, label="Weight (dimensionless)").outline.set_linewidth(0.5)
    heading(weights, "b", "Distribution of its weights")
    draw_weights(weights, memories[-1])

    which = "each pair" if len(chosen) == len(memories) else f"{len(chosen)} of the {len(memories)} pairs"
    words = f"c  Memory after {which}, on the colour scale of a (orange: {ASKED})"
    below.suptitle(words, x=0.01, ha="left", size=7, weight="bold")
    axes = below.subplots(1, max(len(chosen), 6))
    for ax in axes[len(chosen) :]:
        ax.set_axis_off()
    for ax, n in zip(axes, chosen, strict=False):
        ax.imshow(memories[n], gid=f"memory after pair {n + 1}", **look)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(True)
        colour = style.VERMILION if trial.labels[n] == trial.answer else style.BLACK
        ax.set_title(f"pair {n + 1}\nlabel {trial.labels[n]}", loc="center", size=6, weight="normal", color=colour)
    return figure


def draw_weights(ax: Axes, weights: np.ndarray) -> None:
    counts, edges = np.histogram(weights, bins=50, range=(min(0.0, weights.min()), weights.max() or 1.0))
    ax.stairs(counts, edges, fill=True, color=style.PURPLE, lw=0).set_gid("weights")
    ax.set(xlabel="Weight (dimensionless)", xlim=(edges[0], edges[-1]))
    ax.set(ylabel="Number of weights", yscale="log", ylim=(0.7, max(10, 2 * counts.max())))
    words = f"{weights.size} weights\nmean {weights.mean():.3g}, largest {weights.max():.3g}\n{(weights == 0).mean():.0%} are 0"
    ax.text(0.98, 0.98, words, transform=ax.transAxes, ha="right", va="top", linespacing=1.5)


@styled
def membranes(trial: Trial, zoom: Zoom = ALL) -> Figure:
    """Membrane potentials of three neurons of each population, from the most to the least active."""
    phases = visible_phases(trial, zoom)
    rows = [row for row in ROWS if any(row[phase.column] for phase in phases)]
    chosen = [(row, place, neuron) for row in rows for place, neuron in enumerate(representative(trial, row, zoom))]
    figure = new_figure(style.TWO_COLUMNS, 20 + 6 * len(rows) + 11 * len(chosen))
    axes = time_grid(figure, trial, phases, [1] * len(chosen))
    for phase, ax in zip(phases, axes[0], strict=True):
        above = {"xy": (1, 1), "xycoords": "axes fraction", "xytext": (0, 16), "textcoords": "offset points"}
        ax.annotate(phase.name, **above, ha="right", weight="bold", color=phase.colour)
    for (row, place, neuron), line in zip(chosen, axes, strict=True):
        if place == 0:
            heading(line[0], "abcd"[rows.index(row)], row[0], pad=6)
        line[0].set_ylabel(f"neuron\n{neuron}", size=6, rotation=0, ha="right", va="center")
        for phase, ax in zip(phases, line, strict=True):
            if name := row[phase.column]:
                draw_membrane(ax, name, trial, neuron, phase)
            else:
                leave_out(ax, "no label is shown" if place == 1 else "")
        line[0].yaxis.set_major_locator(MaxNLocator(3))
    figure.align_ylabels(axes[:, 0])
    figure.supylabel("Membrane potential (θ)", size=7)
    words = "Dashed: threshold, 1 θ (looks like 0 on a scale of hundreds of θ). Ticks above: spikes. "
    figure.supxlabel(f"{words}Orange: recall, and {ASKED}.", size=6, color=style.GREY)
    return figure


def representative(trial: Trial, row: tuple, zoom: Zoom) -> np.ndarray:
    """Three neurons, from the most to the least active that spike; silent neurons only if too few neurons spike."""
    neurons = zoom.indices(trial.spikes[row[1]].shape[1])
    spikes = sum(trial.spikes[name][:, neurons].sum(axis=0, dtype=int) for name in row[1:] if name)
    among = min(max(np.count_nonzero(spikes), 3), len(neurons))
    places = np.linspace(0, among - 1, min(3, among)).round().astype(int)
    return neurons[np.argsort(-spikes, kind="stable")[places]]


def draw_membrane(ax: Axes, name: str, trial: Trial, neuron: int, phase: Phase) -> None:
    """Membrane potential in units of the threshold, the threshold as a line, spikes as ticks above."""
    time = phase.start + np.arange(len(trial.membranes[name]))
    shown = (time >= phase.low) & (time <= phase.high)
    potential = trial.membranes[name][shown, neuron] / trial.threshold
    ax.plot(time[shown], potential, color=phase.colour, lw=0.5, gid=f"{name} membrane of neuron {neuron}")
    ax.axhline(1, color=style.GREY, lw=0.5, ls=style.DASHED)
    spikes = time[shown & (trial.spikes[name][:, neuron] > 0)]
    look = {"color": style.BLACK, "ms": 2.5, "mew": 0.5, "clip_on": False, "gid": f"{name} spikes of neuron {neuron}"}
    look["in_layout"] = len(spikes) > 0  # an empty line would take a place in the corner
    ax.plot(spikes, np.full(len(spikes), 1.07), "|", transform=ax.get_xaxis_transform(), **look)
