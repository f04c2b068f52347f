#!/usr/bin/env python3
"""Draw one sample's life in a trained network, its training curves, and its accuracy against sequence length.

python plot_memorizing_associations_task.py --checkpoint_path runs/quickstart/model_best.pth.tar
python plot_memorizing_associations_task.py --metrics runs/*/metrics.jsonl --output training.pdf
"""

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

import data
import models
from models import POPULATIONS, BackendError
from utils import checkpoints, figures, metrics
from utils.errors import UserError, outlive_output, warn_in_one_line
from utils.options import CURRICULUM, DATA, EXECUTION, MODEL, RUN, SEQUENCE_LENGTH, TRAINING, Option, Options, Parser
from utils.run import OPTIONS

# Figure -> the option that names what it is drawn from.
SOURCE = {
    "overview": "checkpoint_path",
    "memory": "checkpoint_path",
    "membranes": "checkpoint_path",
    "training": "metrics",
    "lengths": "csv",
}

# The rows of the figures: title, population while storing, population while recalling.
ROWS = (
    ("Encoding population: vectors, query", "features_encoded", "query_encoded"),
    ("Encoding population: labels", "labels_encoded", None),
    ("Key neurons", "write_key", "read_key"),
    ("Value neurons", "write_value", "read_value"),
)


def several_files(value: Any) -> tuple[str, ...]:
    """One file name or several."""
    return (value,) if isinstance(value, str) else tuple(map(str, value))


def neuron_range(value: Any) -> tuple[int, int]:
    """First and last neuron."""
    return _two_numbers(value, int, "two neurons, the first and the last: 0 19")


def time_range(value: Any) -> tuple[float, float]:
    """Start and end, ms."""
    return _two_numbers(value, float, "two times in ms, the start and the end: 0 500")


def _two_numbers(value: Any, kind: type, wanted: str) -> tuple:
    try:
        first, last = map(kind, value)
    except (TypeError, ValueError):
        raise ValueError(f"must be {wanted}") from None
    return first, last


def _published(name: str) -> Option:
    return next(option for option in (*DATA, *EXECUTION, *RUN) if option.name == name)


GROUPS = {
    "network (default: as in the checkpoint)": MODEL,
    "what to draw": (
        Option("checkpoint_path", "", str, "checkpoint of the network to draw; published ones, too"),
        _published("check_params"),
        _published("dataset_seed"),
        Option("example", 0, int, "sample of the published test set to draw", low=0, high=data.EVALUATION_SAMPLES["test"] - 1),
        Option("seed", None, int, "choose the sample at random with this seed (--example goes first)", low=0, optional=True),
        Option("neurons", None, neuron_range, "draw these neurons only, FIRST LAST", low=0, optional=True, words="N"),
        Option("time_range", None, time_range, "draw this time only, START END in ms", low=0, optional=True, words="MS"),
        Option("metrics", (), several_files, "metrics files of runs: training curves", words="FILE"),
        Option("csv", (), several_files, "tables of evaluations: accuracy against sequence length", words="FILE"),
        Option("figure", "all", str, "which one; all: all into a folder, the first into a file", choices=("all", *SOURCE)),
        _published("backend"),
    ),
    "where to": (
        Option("output", "", str, "folder, or PNG, PDF or SVG file for one figure; empty: figures/ beside the input"),
        Option("format", "png", str, "format of the files in a folder", choices=tuple(figures.FORMATS)),
        Option("show", False, bool, "show the figures in windows, too"),
        Option("save_data", "", str, "NumPy file (.npz) for all numbers that the figures are drawn from"),
    ),
}  # fmt: skip


def main(argv=None) -> int:
    warn_in_one_line()
    outlive_output()
    parser = Parser(__doc__.splitlines()[0], GROUPS)
    options = parser.parse(argv)
    paths = choose_paths(options, parser)
    try:
        numbers: dict[str, np.ndarray] = {}
        drawings = one_sample(options, parser, numbers) | curves(options, numbers)
        if options["save_data"]:
            write(Path(options["save_data"]), lambda path: save_numbers(path, numbers))
        drawn = {name: drawings[name]() for name in paths}
        for name, path in paths.items():
            write(path, lambda path, figure=drawn[name]: figures.save(figure, path))
        if options["show"]:
            show(list(drawn.values()))
        return 0
    except (UserError, BackendError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


# One sample


def one_sample(options: Options, parser: Parser, numbers: dict[str, np.ndarray]) -> dict[str, Callable[[], Figure]]:
    """The figures of --checkpoint_path by name, to be drawn when called; adds to `numbers` and prints a table."""
    if not options["checkpoint_path"]:
        return {}
    checkpoint = checkpoints.load(options["checkpoint_path"], {name: options[name] for name in options.given})
    adopt_checkpoint(options, checkpoint, parser)
    zoom = choose_zoom(options, parser)
    trial, rates = record(options, checkpoint["state_dict"])
    print_table(options, checkpoint, trial, rates)
    numbers |= numbers_of(trial, rates)
    return {
        "overview": lambda: figures.overview(trial, zoom),
        "memory": lambda: figures.memory(trial, zoom),
        "membranes": lambda: figures.membranes(trial, zoom),
    }


def adopt_checkpoint(options: Options, checkpoint: Mapping[str, Any], parser: Parser) -> None:
    """Take what is not given from the checkpoint; model options that are given must be the checkpoint's, but for the length."""
    params = checkpoint["params"]
    options.adopt(params, (*MODEL, _published("dataset_seed")))
    differing = options.differences(params, [option for option in MODEL if option is not SEQUENCE_LENGTH])
    if differing and options["check_params"]:
        parser.error(f"{options['checkpoint_path']}: model options differ: {', '.join(differing)}; --check_params 0 overrides")
    if len(options.all_lengths) > 1:
        parser.error("--sequence_length: one length can be drawn at a time")
    if error := options.combination_error():
        parser.error(error)
    if options["seed"] is not None and "example" not in options.given:
        options.values["example"] = int(np.random.default_rng(options["seed"]).integers(data.EVALUATION_SAMPLES["test"]))


def choose_zoom(options: Options, parser: Parser) -> figures.Zoom:
    """The part to draw, which must hold a neuron of every population and some time."""
    if options["neurons"]:
        first, last = options["neurons"]
        smallest = min(options["embedding_size"], options["memory_size"])
        if not first <= last or first >= smallest:
            parser.error(f"--neurons {first} {last}: must be FIRST LAST with FIRST <= LAST and FIRST < {smallest}")
    if options["time_range"]:
        start, end = options["time_range"]
        duration = (options["sequence_length"] + 1) * options["num_time_steps"]
        if not start < end or start >= duration:
            parser.error(f"--time_range {start:g} {end:g}: must be START END in ms with START < END and START < {duration}")
    return figures.Zoom(options["neurons"], options["time_range"])


@torch.no_grad()
def record(options: Options, state_dict: Mapping[str, torch.Tensor]) -> tuple[figures.Trial, dict[str, np.ndarray]]:
    """One sample of the published test set and what the network did with it; firing rates of each population, Hz."""
    model = models.build_model(options.values, "reference")  # the plain model alone records membranes
    checkpoints.load_weights(model, state_dict, options["checkpoint_path"])

    sizes = (options["sequence_length"], options["num_classes"], options["feature_size"], options["dataset_seed"])
    example = options["example"]
    sample = data.evaluation_set("test", *sizes)[example : example + 1]
    inputs = (sample.features, sample.labels, sample.query)
    output = model(*inputs, record=True)
    recorded = output.activity

    def activity(name: str | None) -> figures.Activity | None:
        if name is None:
            return None
        return figures.Activity(name, recorded[name][0].bool().numpy(), recorded["membranes"][name][0].numpy())

    trial = figures.Trial(
        features=sample.features[0].numpy(),
        labels=sample.labels[0].numpy(),
        query=sample.query[0].numpy(),
        answer=int(sample.answer[0]),
        logits=output.logits[0].numpy(),
        memories=recorded["memories"][0].numpy(),
        populations=[figures.Population(title, activity(store), activity(recall)) for title, store, recall in ROWS],
        threshold=model.dynamics.neuron.thr,
        num_time_steps=model.dynamics.num_time_steps,
        readout_steps=model.dynamics.readout_steps,
    )
    return trial, {name: rate[0].numpy() for name, rate in output.rates.items()}


def print_table(options: Options, checkpoint: Mapping[str, Any], trial: figures.Trial, rates: Mapping[str, np.ndarray]) -> None:
    """What the published plot script prints, and which sample it is."""
    print(f"checkpoint        {options['checkpoint_path']}, after {checkpoint['epoch']} epochs")
    print(f"best accuracy     {float(checkpoint['best_acc']):.3f} % (validation)")
    print(f"sample            {options['example']} of the test set, {len(trial.labels)} pairs")
    print(f"answer            {trial.answer}, predicted {int(trial.logits.argmax())}")
    print("mean rate in this sample, Hz")
    for name in POPULATIONS:
        print(f"  {name:<16s}{rates[name].mean():9.3f}")


def numbers_of(trial: figures.Trial, rates: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All numbers of a trial by name."""
    numbers = {name: np.asarray(value) for name, value in trial._asdict().items() if name != "populations"}
    for population in trial.populations:
        for activity in (population.store, population.recall):
            if activity is not None:
                numbers[f"{activity.name}/spikes"] = activity.spikes
                numbers[f"{activity.name}/membrane"] = activity.membrane
                numbers[f"{activity.name}/rates"] = rates[activity.name]
    return numbers | {"readout": trial.readout}


# Training and evaluation


def curves(options: Options, numbers: dict[str, np.ndarray]) -> dict[str, Callable[[], Figure]]:
    """The figures of --metrics and --csv by name, to be drawn when called; adds to `numbers`."""
    drawings = {}
    for name, files, read, draw in (
        ("training", options["metrics"], read_metrics, figures.training_curves),
        ("lengths", options["csv"], read_table, figures.accuracy_by_length),
    ):
        if files:
            paths = [Path(file) for file in files]
            records = [read_record(path) for path in paths]
            runs = [read(*each) for each in zip(paths, labels(paths, records), records, strict=True)]
            for file, run in zip(files, runs, strict=True):
                numbers |= {f"{file}/{column}": values for column, values in run.columns.items()}
            drawings[name] = lambda draw=draw, runs=runs: draw(runs)
    return drawings


def read_record(path: Path) -> dict[str, Any] | None:
    """The options of the run whose folder a file is in, or None where they are not there."""
    beside = path.with_name(OPTIONS)
    if not beside.exists():
        return None
    try:
        record = yaml.safe_load(beside.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as failure:
        raise UserError(f"{beside}: cannot be read ({' '.join(str(failure).split())})") from failure
    if not isinstance(record, dict):
        raise UserError(f"{beside}: not the options of a run")
    return record


def labels(paths: Sequence[Path], records: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """The options in which the runs differ, but for the seed; runs that differ in nothing else share a label."""
    if None in records:
        return [path.resolve().parent.name for path in paths]
    told = [option.name for option in (*MODEL, *TRAINING, *CURRICULUM) if option.name not in ("seed", "epochs", "start_epoch")]
    differing = [name for name in told if len({str(record.get(name)) for record in records}) > 1]
    return [", ".join(f"{name} {record.get(name)}" for name in differing or ("sequence_length",)) for record in records]


def read_metrics(path: Path, label: str, record: Mapping[str, Any] | None) -> figures.Curves:
    """A metrics file: one JSON object an epoch."""
    try:
        lines = metrics.read_metrics(path)
        columns = {name: np.array([line[name] for line in lines], dtype=float) for name in lines[0]}
    except (ValueError, LookupError, TypeError, AttributeError) as failure:
        raise UserError(f"{path}: not the metrics file of a run that has finished an epoch") from failure
    if missing := {name for _, _, series in figures.TRAINING_PANELS for name in series} - columns.keys():
        raise UserError(f"{path}: not the metrics file of a run, it lacks {', '.join(sorted(missing))}")
    return figures.Curves(label, columns, num_classes=(record or {}).get("num_classes"))


def read_table(path: Path, label: str, record: Mapping[str, Any] | None) -> figures.Curves:
    """The table of an evaluation over sequence lengths."""
    try:
        rows = sorted(csv.DictReader(read_text(path).splitlines()), key=lambda row: int(row["sequence_length"]))
        columns = {name: np.array([row[name] for row in rows], dtype=float) for name in ("sequence_length", "accuracy", "loss")}
        num_classes, trained_length = int(rows[0]["num_classes"]), int(rows[0]["trained_length"])
    except (ValueError, LookupError, TypeError, csv.Error) as failure:
        raise UserError(f"{path}: not a table that --evaluate writes") from failure
    return figures.Curves(label, columns, num_classes, trained_length)


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}") from failure


# Where to


def choose_paths(options: Options, parser: Parser) -> dict[str, Path]:
    """The file of each figure to draw."""
    available = [name for name in SOURCE if options[SOURCE[name]]]
    if not available:
        parser.error("nothing to draw: give --checkpoint_path, --metrics or --csv")
    chosen = available if options["figure"] == "all" else [options["figure"]]
    if chosen[0] not in available:
        parser.error(f"--figure {chosen[0]} needs --{SOURCE[chosen[0]]}")
    beside = Path(options["checkpoint_path"] or [*options["metrics"], *options["csv"]][0]).parent
    output = Path(options["output"] or beside / "figures")
    kind = output.suffix[1:].lower()
    if kind in figures.FORMATS and not output.is_dir():
        return {chosen[0]: output}
    if kind in Figure().canvas.get_supported_filetypes() and not output.is_dir():
        parser.error(f"--output {output}: must be a folder or end in {', '.join(f'.{name}' for name in figures.FORMATS)}")
    return {name: output / f"{name}.{options['format']}" for name in chosen}


def write(path: Path, save: Callable[[Path], None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path)
    except OSError as failure:
        raise UserError(f"{path}: cannot be written ({failure.strerror or failure}); choose another place") from failure
    print(f"written           {path}")


def save_numbers(path: Path, numbers: Mapping[str, np.ndarray]) -> None:
    with open(path, "wb") as file:  # a name would get the ending .npz, whatever it is
        np.savez_compressed(file, **numbers)


def show(drawn: Sequence[Figure]) -> None:
    """Open a window for each figure and wait until they are closed."""
    import matplotlib
    import matplotlib.pyplot as plt

    for figure in drawn:
        canvas = plt.figure(figsize=figure.get_size_inches()).canvas
        canvas.figure = figure
        figure.set_canvas(canvas)
    if matplotlib.get_backend().lower() == "agg":
        raise UserError("--show: there is no display here; look at the files")
    plt.show()


if __name__ == "__main__":
    sys.exit(main())
