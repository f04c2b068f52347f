#!/usr/bin/env python3
"""Draw one sample in a trained network (figures or an animation), training curves, and accuracy against sequence length.

python plot_memorizing_associations_task.py --checkpoint_path runs/quickstart/model_best.pth.tar
python plot_memorizing_associations_task.py --metrics runs/*/metrics.jsonl --output training.pdf
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.pop("MPLBACKEND", None)  # a notebook's names a module that need not be installed here; no window is needed

import numpy as np
import torch

import data
import models
from utils import checkpoints, figures, results
from utils.errors import UsageError, UserError, in_one_line
from utils.options import CURRICULUM, DATA, MODEL, RUN, SEQUENCE_LENGTH, TRAINING, Option, Options, Parser

# Figure -> the option that names what it is drawn from. The animation takes its time: it is drawn when asked for by name.
SOURCE = {
    "overview": "checkpoint_path",
    "memory": "checkpoint_path",
    "membranes": "checkpoint_path",
    "animation": "checkpoint_path",
    "training": "metrics",
    "lengths": "csv",
}

METRICS = ("epoch", "learning_rate", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy")


def several(value: Any) -> tuple[str, ...]:
    """One path or several."""
    return tuple(os.path.expanduser(path) for path in ([value] if isinstance(value, str) else value))


def two(kind: type, wanted: str) -> Callable[[Any], tuple]:
    """A converter of two numbers."""

    def convert(value: Any) -> tuple:
        try:
            first, last = map(kind, value)
        except (TypeError, ValueError):
            raise ValueError(f"must be {wanted}") from None
        return first, last

    return convert


neuron_range = two(int, "two neurons, the first and the last: 0 19")
time_range = two(float, "two times in ms, the start and the end: 0 500")
SHARED = {option.name: option for option in (*DATA, *RUN)}

GROUPS = {
    "network (default: as in the checkpoint)": MODEL,
    "what to draw": (
        Option("checkpoint_path", "", str, "checkpoint of the network to draw (published ones, too), or run folder"),
        SHARED["check_params"],
        SHARED["dataset_seed"],
        Option("example", 0, int, "sample of the published test set to draw", low=0, high=data.EVALUATION_SAMPLES["test"] - 1),
        Option("seed", None, int, "choose the sample at random with this seed (--example wins)", low=0, optional=True),
        Option("neurons", None, neuron_range, "draw these neurons only, FIRST LAST", low=0, optional=True, words="N"),
        Option("time_range", None, time_range, "draw this time only, START END in ms", low=0, optional=True, words="MS"),
        Option("metrics", (), several, "training curves of these metrics files or folders of runs", words="PATH"),
        Option("csv", (), several, "accuracy against length, of these tables or folders of runs", words="PATH"),
        Option("figure", "all", str, "which one; all: all but the animation", choices=("all", *SOURCE)),
    ),
    "where to": (
        Option("output", "", str, "folder, or file for one figure; empty: beside the input, under its name"),
        Option("format", "png", str, "format of the figures in a folder", choices=tuple(figures.FORMATS)),
        Option("show", False, bool, "show the figures in windows, too"),
        Option("save_data", "", str, "NumPy file (.npz) for all numbers that the figures are drawn from"),
    ),
}  # fmt: skip


@in_one_line
def main(argv=None) -> None:
    """Everything that happens, in order. What is wrong with the input is reported before anything is computed."""
    options = Parser(__doc__.splitlines()[0], GROUPS).parse(argv)
    if options["checkpoint_path"] and (best := Path(options["checkpoint_path"], checkpoints.BEST)).exists():  # a run's folder
        options.values["checkpoint_path"] = str(best)
    available = [name for name, option in SOURCE.items() if options[option]]
    if not available:
        raise UsageError("nothing to draw: give --checkpoint_path, --metrics or --csv")
    chosen = [name for name in available if name != "animation"] if options["figure"] == "all" else [options["figure"]]
    if chosen[0] not in available:
        raise UsageError(f"--figure {chosen[0]} needs --{SOURCE[chosen[0]]}")
    sources = {name: several(options[SOURCE[name]]) for name in chosen}
    files = figures.choose_files(sources, options["output"], options["format"])
    data_file = Path(options["save_data"])

    training = read_curves(options["metrics"], lambda run: run.metrics, METRICS)
    lengths = read_curves(options["csv"], lambda run: run.tests, ("sequence_length", "accuracy"))
    numbers = {}
    for n, run in enumerate((*training, *lengths), start=1):
        numbers |= {f"run {n}: {run.label}/{name}": column for name, column in run.columns.items()}
    if options["checkpoint_path"]:
        checkpoint = checkpoints.load(options["checkpoint_path"], {name: options[name] for name in options.given})
        adopt_checkpoint(options, checkpoint)
        zoom = choose_zoom(options)
    for path in (*files, *([data_file] if options["save_data"] else [])):
        figures.check_writable(path)

    if options["checkpoint_path"]:
        model, output, trial = record(options, checkpoint["state_dict"])
        print_table(options, checkpoint, trial, output.rates)
        numbers |= numbers_of(trial, output.rates)
    draw = {
        "overview": lambda: figures.overview(trial, zoom),
        "memory": lambda: figures.memory(trial, zoom),
        "membranes": lambda: figures.membranes(trial, zoom),
        "animation": lambda: figures.animate(trial, memory_in_time(model, output.activity, trial), zoom),
        "training": lambda: figures.training_curves(training, data.TRAINING_SAMPLES),
        "lengths": lambda: figures.accuracy_by_length(lengths),
    }
    drawn = {name: draw[name]() for name in chosen}
    for path, name in files.items():
        figures.save(drawn[name], path)
        print(f"written           {path}")
    if options["save_data"]:
        checkpoints.write_atomically(data_file, lambda file: np.savez_compressed(file, **numbers))
        print(f"written           {data_file}")
    if options["show"]:
        figures.show([drawing for name, drawing in drawn.items() if name != "animation"])


# One sample


def adopt_checkpoint(options: Options, checkpoint: Mapping[str, Any]) -> None:
    """Take what is not given from the checkpoint; model options that are given must be the checkpoint's, but for the length."""
    params = checkpoint["params"]
    options.adopt(params, (*MODEL, SHARED["dataset_seed"]))
    differing = options.differences(params, [option for option in MODEL if option is not SEQUENCE_LENGTH])
    if differing and options["check_params"]:
        raise UsageError(
            f"{options['checkpoint_path']}: model options differ: {', '.join(differing)}; --check_params 0 overrides"
        )
    if len(options.all_lengths) > 1:
        raise UsageError("--sequence_length: one length can be drawn at a time")
    options.check_combination()
    if options["seed"] is not None and "example" not in options.given:
        options.values["example"] = int(np.random.default_rng(options["seed"]).integers(data.EVALUATION_SAMPLES["test"]))


def choose_zoom(options: Options) -> figures.Zoom:
    """The part to draw, which must hold a neuron of every population and some time."""
    if options["neurons"]:
        first, last = options["neurons"]
        smallest = min(options["embedding_size"], options["memory_size"])
        if not first <= last or first >= smallest:
            raise UsageError(f"--neurons {first} {last}: must be FIRST LAST with FIRST <= LAST and FIRST < {smallest}")
    if options["time_range"]:
        start, end = options["time_range"]
        duration = (options["sequence_length"] + 1) * options["num_time_steps"]
        if not start < end or start >= duration:
            raise UsageError(f"--time_range {start:g} {end:g}: must be START END in ms with START < END and START < {duration}")
    return figures.Zoom(options["neurons"], options["time_range"])


@torch.no_grad()
def record(options: Options, state_dict: Mapping[str, torch.Tensor]):
    """The network, what it does with one sample of the published test set, and both as arrays."""
    model = models.build_model(options.values, "reference")  # the plain model alone records membranes
    checkpoints.load_weights(model, state_dict, options["checkpoint_path"])
    sizes = (options["sequence_length"], options["num_classes"], options["feature_size"], options["dataset_seed"])
    sample = data.evaluation_set("test", *sizes)[options["example"] : options["example"] + 1]
    output = model(sample.features, sample.labels, sample.query, record=True)
    activity = output.activity
    trial = figures.Trial(
        features=sample.features[0].numpy(),
        labels=sample.labels[0].numpy(),
        query=sample.query[0].numpy(),
        answer=int(sample.answer[0]),
        logits=output.logits[0].numpy(),
        readout_weights=model.output_layer.weight.numpy(),
        spikes={name: activity[name][0].bool().numpy() for name in models.POPULATIONS},
        membranes={name: activity["membranes"][name][0].numpy() for name in models.POPULATIONS},
        memories=activity["memories"][0].numpy(),
        threshold=model.dynamics.neuron.thr,
        num_time_steps=model.dynamics.num_time_steps,
        readout_steps=model.dynamics.readout_steps,
    )
    return model, output, trial


def memory_in_time(model, activity: Mapping[str, Any], trial: figures.Trial) -> np.ndarray:
    """The memory at the times of the animation's frames, frames x M x M: the network's rule on its recorded spikes."""
    rule, keys, values = model.dynamics.rule, activity["write_key"], activity["write_value"]
    memory, key_trace, value_trace = (torch.zeros_like(like) for like in (activity["memory"], keys[:, 0], values[:, 0]))
    times, frames = figures.frame_times(trial.duration_ms), []
    for step in range(trial.duration_ms + 1):
        if step in times:
            frames.append(memory[0].numpy())
        if step < trial.store_ms:
            key_trace = rule.update_trace(key_trace, keys[:, step])
            value_trace = rule.update_trace(value_trace, values[:, step])
            memory = rule.update(memory, value_trace, key_trace)
    return np.stack(frames)


def print_table(options: Options, checkpoint: Mapping[str, Any], trial: figures.Trial, rates: dict[str, torch.Tensor]) -> None:
    """What the published plot script prints, and which sample it is."""
    if checkpoint["epoch"]:
        print(f"checkpoint        {options['checkpoint_path']}, after {checkpoint['epoch']} epochs")
        print(f"best accuracy     {float(checkpoint['best_acc']):.3f} % (validation)")
    else:
        print(f"checkpoint        {options['checkpoint_path']}")
    print(f"sample            {options['example']} of the test set, {len(trial.labels)} pairs")
    print(f"answer            {trial.answer}, predicted {int(trial.logits.argmax())}")
    print("mean rate in this sample, Hz")
    for name in models.POPULATIONS:
        print(f"  {name:<16s}{rates[name].mean():9.3f}")


def numbers_of(trial: figures.Trial, rates: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """All numbers of a trial by name."""
    numbers = {name: np.asarray(value) for name, value in trial._asdict().items() if not isinstance(value, dict)}
    for name in models.POPULATIONS:
        numbers[f"{name}/spikes"], numbers[f"{name}/membrane"] = trial.spikes[name], trial.membranes[name]
        numbers[f"{name}/rates"] = rates[name][0].numpy()
    return numbers | {"readout": trial.readout}


# Training and evaluation


def read_curves(places: tuple[str, ...], read: Callable, needed: tuple[str, ...]) -> list[figures.Curves]:
    """The numbers of runs, labelled by the options in which the runs differ (but for the seed).

    Args:
        places: files, or folders of runs.
        read: which table of a run to take.
    """
    runs = [run for place in places for run in results.read_results(Path(place)) if read(run)]
    if places and not runs:
        raise UserError(f"{' '.join(places)}: no {needed[0]} in it yet")
    named = [o.name for o in (*MODEL, *TRAINING, *CURRICULUM) if o.name not in ("seed", "epochs", "start_epoch")]
    differing = [name for name in named if len({str(run.options.get(name)) for run in runs}) > 1] or ["sequence_length"]
    curves = []
    for run in runs:
        columns = results.columns(read(run))
        if missing := [name for name in needed if name not in columns]:
            raise UserError(f"{' '.join(places)}: no numbers for {', '.join(missing)}")
        label = ", ".join(f"{name} {run.options.get(name)}" for name in differing) if run.options else run.name
        constants = {n: columns[n][0] if n in columns else run.options.get(n) for n in ("num_classes", "trained_length")}
        curves.append(figures.Curves(label, columns, **{n: v and int(v) for n, v in constants.items()}))
    return curves


if __name__ == "__main__":
    sys.exit(main())
