"""An animation of one sample in a trained network: inputs, spikes, memory and output over time."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import MaxNLocator
from PIL import Image

from utils.figures import activity
from utils.figures.activity import ALL, ROWS, Trial, Zoom
from utils.figures.style import BLACK, GREEN, GREY, LIGHT_GREY, TWO_COLUMNS, new_figure, styled

FRAMES, FRAME_MS, LAST_FRAME_MS = 110, 100, 3000  # number of frames, and how long each is shown
DOTS_PER_INCH = 120


def frame_times(duration_ms: int) -> np.ndarray:
    """The times of the frames, in finished time steps (ms)."""
    return np.unique(np.linspace(0, duration_ms, FRAMES).round().astype(int))


def memory_in_time(rule, trial: Trial) -> np.ndarray:
    """The memory at the times of the frames, frames x M x M, computed by a network's rule from its recorded spikes.

    Args:
        rule: a `models.plasticity.HebbianRule`, or an object with its methods.
    """
    spikes = (torch.from_numpy(trial.spikes[name]).to(torch.float32) for name in ("write_key", "write_value"))
    keys, values = (population.unsqueeze(1) for population in spikes)  # time x 1 x M
    key_trace, value_trace = torch.zeros_like(keys[0]), torch.zeros_like(values[0])
    memory = value_trace.unsqueeze(-1) * key_trace.unsqueeze(-2)
    times, memories = frame_times(trial.duration_ms), [memory[0].numpy()]
    for step, (key, value) in enumerate(zip(keys, values, strict=True), start=1):
        key_trace, value_trace = rule.update_trace(key_trace, key), rule.update_trace(value_trace, value)
        memory = rule.update(memory, value_trace, key_trace)
        if step in times:
            memories.append(memory[0].numpy())
    return np.stack(memories + [memory[0].numpy()] * (len(times) - len(memories)))  # recall does not change the memory


def logits_in_time(trial: Trial, times: np.ndarray) -> np.ndarray:
    """The logits from the spikes of the readout window so far, times x C."""
    read = trial.spikes["read_value"][trial.readout_ms - trial.store_ms :]
    return np.stack([trial.readout_weights @ read[: max(0, t - trial.readout_ms)].sum(axis=0) for t in times])


@styled
def animate(trial: Trial, memories: np.ndarray, zoom: Zoom = ALL) -> list[Image.Image]:
    """Frames at `frame_times(trial.duration_ms)`.

    Args:
        memories: the memory at these times, frames x M x M.
    """
    times, phases = frame_times(trial.duration_ms), activity.visible_phases(trial, ALL)
    figure = new_figure(TWO_COLUMNS, 96)
    figure.set_dpi(DOTS_PER_INCH)
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1.8, 1))

    axes = activity.time_grid(left, trial, phases, [14] + [16] * len(ROWS))
    activity.draw_inputs(axes[0], trial, phases)
    for line, row in zip(axes[1:], ROWS, strict=True):
        line[0].set_title(row[0], size=6)
        for phase, ax in zip(phases, line, strict=True):
            if name := row[phase.column]:
                activity.draw_raster(ax, name, trial.spikes[name], zoom.indices(trial.spikes[name].shape[1]), phase)
            else:
                activity.leave_out(ax, "no label\nis shown")
    columns = zip(phases, axes.T, strict=True)
    future = [(phase, ax.axvspan(0, 0, color=phase.tint, lw=0)) for phase, column in columns for ax in column if ax.axison]

    left.supxlabel(f"Orange: recall, and {activity.ASKED}.", size=6, color=GREY)

    matrix, output = right.subplots(2, 1, height_ratios=(1.8, 1))
    neurons = zoom.indices(memories.shape[-1])
    memories = memories[:, neurons[:, None], neurons]
    extent = (neurons[0] - 0.5, neurons[-1] + 0.5) * 2
    look = {"vmin": 0, "vmax": memories.max() or 1, "origin": "lower", "interpolation": "nearest"}
    image = matrix.imshow(memories[-1], extent=extent, **look)
    matrix.set(xlabel="Key neuron", ylabel="Value neuron")
    for axis, most in ((matrix.xaxis, 6), (matrix.yaxis, 6), (output.xaxis, 11)):
        axis.set_major_locator(MaxNLocator(most, integer=True))
    logits = logits_in_time(trial, times)
    bars = output.bar(range(logits.shape[1]), logits[-1], lw=0)
    output.set(xlabel="Class", ylabel="Logit", ylim=(logits.min() * 1.1, logits.max() * 1.1 or 1))
    output.axhline(0, color=BLACK, lw=0.5)
    matrix.set_title("Memory", loc="center")
    output.set_title("Output", loc="center")

    # Moving artists are redrawn on a background that is drawn once.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    moving = [*(cover for _, cover in future), image, *bars, matrix.title, output.title]
    for artist in moving:
        artist.set_animated(True)
    canvas.draw()
    background = canvas.copy_from_bbox(figure.bbox)
    frames = []
    for t, memory, logit in zip(times, memories, logits, strict=True):
        for phase, cover in future:
            start = np.clip(t, phase.low, phase.high)
            cover.set(x=start, width=phase.high - start)
        image.set_data(memory)
        matrix.title.set_text(f"Memory at {t} ms")
        decided = t > trial.readout_ms
        output.title.set_text(f"Output: {logit.argmax()}, answer {trial.answer}" if decided else "Output")
        for n, bar in enumerate(bars):
            bar.set(height=logit[n], color=GREEN if n == trial.answer else LIGHT_GREY)
        canvas.restore_region(background)
        for artist in moving:
            figure.draw_artist(artist)
        frames.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy()))
    return frames


def save_animation(frames: list[Image.Image], path: Path) -> None:
    """Write frames as GIF. Raises OSError where the file cannot be written."""
    palette = frames[-1].quantize(128, Image.Quantize.MAXCOVERAGE)  # one for all frames: unchanged pixels then cost nothing
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, append_images=others, save_all=True, loop=0, duration=[*[FRAME_MS] * len(others), LAST_FRAME_MS])
