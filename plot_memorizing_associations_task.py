#!/usr/bin/env python3
"""Draw one sample in a trained network (figures or an animation), training curves, and accuracy against sequence length.

python plot_memorizing_associations_task.py --checkpoint_path runs/quickstart/model_best.pth.tar
python plot_memorizing_associations_task.py --metrics runs/*/metrics.jsonl --output training.pdf
python plot_memorizing_associations_task.py --metrics runs/sweep --against gamma_neg
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.pop("MPLBACKEND", None)  # a notebook's backend may not be installed here, and no window is needed

import numpy as np

import data
import memorizing_associations_task as task
import models
from utils import checkpoints, results
from utils.errors import UsageError, UserError, in_one_line
from utils.figures import activity, animation, curves, files
from utils.options import Parser, constants_of_objects, number, optional, path

# Figure -> the option that names its input. The animation is slow, so only --figure animation draws it.
SOURCE = dict.fromkeys(("overview", "memory", "membranes", "animation"), "checkpoint_path")
SOURCE |= {"training": "metrics", "option": "against", "lengths": "csv"}
METRICS = "epoch learning_rate train_loss train_accuracy validation_loss validation_accuracy".split()  # required
TESTS = ["sequence_length", "accuracy"]


def add_options(parser: Parser) -> list[str]:
    """Add all options of this script. Returns the names of the options that a checkpoint also has."""
    model = task.add_model_options(parser)
    add = parser.add_argument_group("what to draw").add_argument
    add("--checkpoint_path", type=path, default="", help="network to draw; its model options and dataset_seed are the defaults")
    add("--check_params", type=int, choices=(0, 1), default=1, help="0: accept model options that differ from the checkpoint's")
    add("--dataset_seed", type=number(int, 0), default=42, help="seed of the test samples")
    add("--example", type=number(int, 0, data.EVALUATION_SAMPLES["test"] - 1), default=0, help="test sample to draw, from 0")
    add("--seed", type=optional(number(int, 0)), help="seed of a random choice of the sample (--example overrides it)")
    add("--neurons", type=number(int, 0), nargs=2, metavar=("FIRST", "LAST"), help="draw only these neurons")
    add("--time_range", type=number(float, 0), nargs=2, metavar=("START", "END"), help="draw only this time range, ms")
    add("--metrics", type=path, nargs="+", default=(), metavar="PATH", help="training curves of these files or run folders")
    add("--against", type=path, default="", metavar="OPTION", help="best validation accuracy of --metrics against this option")
    add("--csv", type=path, nargs="+", default=(), metavar="PATH", help="accuracy against length, from tables or run folders")
    add("--figure", choices=("all", *SOURCE), default="all", help="figure to draw; all: every figure but the animation")

    add = parser.add_argument_group("output").add_argument
    add("--output", type=path, default="", help="folder, or file of one figure; none: beside the input, named after the input")
    add("--format", choices=tuple(files.FORMATS), default="png", help="format of the figures in a folder")
    add("--save_data", type=path, default="", help="also write all numbers in the figures to this NumPy file (.npz)")
    return [*model, "dataset_seed"]


@in_one_line
def main(argv=None) -> None:
    """Check all input, then draw and save the figures."""
    parser = Parser(__doc__)
    recorded = add_options(parser)
    given = parser.given(argv)
    given = constants_of_objects(given) | given
    args = parser.complete(given)
    possible = [name for name, source in SOURCE.items() if any(getattr(args, source))]
    if not possible:
        raise UsageError("nothing to draw: give --checkpoint_path, --metrics or --csv")
    if args.against and not args.metrics:
        raise UsageError(f"--against {args.against} needs --metrics, the folder of a sweep")
    if args.figure not in ("all", *possible):
        raise UsageError(f"--figure {args.figure} needs --{SOURCE[args.figure]}")
    chosen = [name for name in possible if name != "animation"] if args.figure == "all" else [args.figure]
    source = Path(args.checkpoint_path)
    source = source / checkpoints.BEST if source.is_dir() else source
    paths = {"checkpoint_path": [source], "metrics": args.metrics, "against": args.metrics, "csv": args.csv}
    targets = {name: files.choose_file(name, args.output, args.format, paths[SOURCE[name]]) for name in chosen}
    if len(set(targets.values())) < len(targets):
        raise UsageError(f"--output {args.output}: a file holds one figure; choose one of --figure {', '.join(chosen)}")

    if args.checkpoint_path:
        checkpoint = checkpoints.load(source)
        strict = {"evaluate": True, "check_params": args.check_params}
        of_checkpoint = task.options_of_run(parser, recorded, given, source, checkpoint["params"], **strict)
        at_random = {"example": int(np.random.default_rng(args.seed).integers(data.EVALUATION_SAMPLES["test"]))}
        args = parser.complete(of_checkpoint, {} if args.seed is None else at_random, given)
        check_sample(args)
    training, lengths = read_curves(args.metrics, "metrics", METRICS), read_curves(args.csv, "tests", TESTS)
    swept = read_curves(args.metrics, "metrics", METRICS, args.against) if "option" in targets else []
    for file in (*targets.values(), *([Path(args.save_data)] if args.save_data else [])):
        files.check_writable(file)

    drawn: dict = {}
    numbers: dict = {}
    if args.checkpoint_path:
        model = task.model_of(vars(args), "reference")
        checkpoints.load_weights(model, checkpoint, source)
        samples = data.evaluation_set("test", args.sequence_length, args.num_classes, args.feature_size, args.dataset_seed)
        trial = activity.record(model, *samples[args.example].tensors())
        numbers |= {n: v for n, v in trial._asdict().items() if not isinstance(v, dict)} | {"readout": trial.readout}
        print(f"checkpoint        {source}" + (f", after {checkpoint['epoch']} epochs" if checkpoint["epoch"] else ""))
        if note := task.note_on_data(checkpoint["params"]):
            print(note)
        if checkpoint["epoch"]:
            print(f"best accuracy     {checkpoint['best_acc']:.3f} % (validation)")
        print(f"sample            {args.example} of the test set, {len(trial.labels)} pairs")
        print(f"answer            {trial.answer}, predicted {trial.logits.argmax()}")
        print("mean rate in this sample, Hz")
        for name in models.POPULATIONS:
            rates = activity.HZ * trial.spikes[name].mean(axis=0)
            print(f"  {name:<16s}{rates.mean():9.3f}")
            numbers |= {f"{name}/spikes": trial.spikes[name], f"{name}/membrane": trial.membranes[name], f"{name}/rates": rates}
        zoom = activity.Zoom(args.neurons, args.time_range)
        for name, draw in {"overview": activity.overview, "memory": activity.memory, "membranes": activity.membranes}.items():
            if name in targets:
                drawn[name] = draw(trial, zoom)
        if "animation" in targets:
            drawn["animation"] = animation.animate(trial, animation.memory_in_time(model.dynamics.rule, trial), zoom)
    if "training" in targets:
        drawn["training"] = curves.training_curves(training, data.TRAINING_SAMPLES)
    if "option" in targets:
        drawn["option"] = curves.accuracy_by_option(swept, args.against)
        print_by_option(swept, args.against)
    if "lengths" in targets:
        drawn["lengths"] = curves.accuracy_by_length(lengths)
    for n, run in enumerate((*training, *lengths), start=1):
        numbers |= {f"run {n}: {run.label}/{name}": column for name, column in run.columns.items()}

    for name, file in targets.items():
        files.save(drawn[name], file)
        print(f"written           {file}")
    if args.save_data:
        checkpoints.write_atomically(Path(args.save_data), lambda file: np.savez_compressed(file, **numbers))
        print(f"written           {args.save_data}")


def check_sample(args: argparse.Namespace) -> None:
    """Raises UsageError if the sample does not exist, or if --neurons or --time_range leave nothing to draw."""
    if isinstance(args.sequence_length, tuple):
        raise UsageError("--sequence_length: give one length, for one sample")
    task.check_lengths(args.sequence_length, args.num_classes, evaluate=True)
    first, last = args.neurons or (0, 0)
    smallest = min(args.embedding_size, args.memory_size)
    if not first <= last or first >= smallest:
        raise UsageError(f"--neurons {first} {last}: must be FIRST LAST with FIRST <= LAST and FIRST < {smallest}")
    duration = (args.sequence_length + 1) * args.num_time_steps
    start, end = args.time_range or (0, duration)
    if not start < end or start >= duration:
        raise UsageError(f"--time_range {start:g} {end:g}: must be START END in ms with START < END and START < {duration}")


def read_curves(places: Sequence[str], table: str, needed: Sequence[str], against: str = "") -> list[curves.Curves]:
    """Read the `metrics` or `tests` of the runs in these files and folders, labelled by the options that differ.

    Args:
        against: the option of a sweep, which the labels leave out.
    """
    runs = [run for run in results.read_results(*map(Path, places)) if getattr(run, table)]
    if places and not runs:
        raise UserError(f"{' '.join(places)}: no {needed[0]} recorded yet")
    parser = Parser("")
    defaults = {name: parser.get_default(name) for name in task.add_options(parser)}
    if against and against not in defaults:
        raise UsageError(f"--against {against}: not an option of the task script")
    found = []
    for run, label in zip(runs, results.labels(runs, defaults, against), strict=True):
        columns, options = results.columns(getattr(run, table)), (defaults | run.options if run.options else {})
        if missing := [name for name in needed if name not in columns]:
            raise UserError(f"{run.name}: no numbers for {', '.join(missing)}")
        if options.get("curriculum_start") and table == "metrics":
            curriculum = [options[name] for name in ("sequence_length", "curriculum_start", "curriculum_step")]
            lengths = [data.training_length(int(epoch) - 1, *curriculum) for epoch in columns["epoch"]]
            columns["training_length"] = np.array(lengths)
        classes = columns["num_classes"][0] if "num_classes" in columns else options.get("num_classes")
        trained = columns["trained_length"][0] if "trained_length" in columns else options.get("sequence_length")
        found.append(curves.Curves(label, columns, classes and int(classes), trained and int(trained), options.get(against)))
    return found


def print_by_option(runs: Sequence[curves.Curves], option: str) -> None:
    """Print one line per value of the option, in order. The mean is over the runs that learned."""
    print(f"{option:<16s}  learned    best validation accuracy, %")
    for label, values in curves.by_option(runs).items():
        for value, (learned, others) in values.items():
            mean = f"{np.mean(learned):.2f}" if learned else "-"
            each = ", ".join(f"{accuracy:.2f}" for accuracy in learned + others)
            print(f"{value!s:<16s}  {len(learned)} of {len(learned + others)}     {mean:>6s}  ({each})  {label}")


if __name__ == "__main__":
    sys.exit(main())
