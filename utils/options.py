"""The options: one table of names, defaults, types and bounds, for the command line and for YAML files."""

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, NoReturn

import yaml

from models import BACKENDS, Dynamics, Sizes
from models.constants import out_of_bounds
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule
from utils.errors import UsageError


@dataclass(frozen=True)
class Option:
    """One option of the command line and of YAML files."""

    name: str
    default: Any
    kind: type | Callable[[Any], Any]  # int, float, str, bool (a switch), or a converter that raises ValueError
    help: str
    low: float | None = None  # least value
    above: float | None = None  # the value must be greater than this
    high: float | None = None  # greatest value
    choices: tuple | None = None
    optional: bool = False  # may be none
    words: str = ""  # where it takes several words on the command line: their name in the help

    def convert(self, value: Any) -> Any:
        """The value from a word of the command line, or from a value of a YAML file or a checkpoint.

        Raises:
            ValueError: wrong type or impossible value; the message says what is expected.
        """
        if value is None or (self.optional and value == "none"):
            if self.optional:
                return None
            raise ValueError("needs a value")
        converted = _CONVERTERS.get(self.kind, self.kind)(value)
        if self.choices and converted not in self.choices:
            raise ValueError(f"must be one of {', '.join(map(str, self.choices))}, not {short(value)}")
        for number in converted if isinstance(converted, tuple) else (converted,):
            if isinstance(number, (int, float)) and (wrong := out_of_bounds(number, self.low, self.above, self.high)):
                raise ValueError(wrong)
        return converted


def _to_number(kind: type, name: str, value: Any) -> int | float:
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(f"must be a {name}, not {short(value)}") from None


def _to_bool(value: Any) -> bool:
    try:
        return {"true": True, "false": False}[str(value).lower()]
    except KeyError:
        raise ValueError(f"must be true or false, not {short(value)}") from None


def _to_str(value: Any) -> str:
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"must be printable text, not {short(value)}")
    return os.path.expanduser(value)  # of a path such as ~/runs, which no shell has expanded


_CONVERTERS = {
    int: functools.partial(_to_number, int, "whole number"),
    float: functools.partial(_to_number, float, "number"),
    bool: _to_bool,
    str: _to_str,
}


def lengths(value: Any) -> int | tuple[int, ...]:
    """A sequence length, or several: 10, "2,5,10", "2-10", "2-5,10" or a list of these."""
    found: list[int] = []
    for part in ",".join(map(str, value)).split(",") if isinstance(value, (list, tuple)) else str(value).split(","):
        ends = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not first <= last <= first + 10_000:
            raise ValueError(f"must be one length or several, like 10, 2,5,10 or 2-10, not {short(value)}")
        found += range(first, last + 1)
    return tuple(found) if len(found) > 1 else found[0]


def _options_of(constants: type) -> list[Option]:
    """An option for each constant of a dataclass of `models`, with its default, meaning and bounds."""
    return [Option(f.name, f.default, type(f.default), **f.metadata) for f in fields(constants) if f.metadata]


SEQUENCE_LENGTH = Option(
    "sequence_length", 10, lengths, "pairs in a sequence; with --evaluate several: 2,5,10 or 2-10", low=1, words="N"
)

# fmt: off

# What a network is. A checkpoint's must be the same to resume, evaluate or plot it.
MODEL = (
    SEQUENCE_LENGTH,
    *(option for part in (Sizes, HebbianRule, Dynamics, LIFNeuron) for option in _options_of(part)),
)

DATA = (
    Option("dataset_seed", 42, int, "seed of the training, validation and test samples", low=0),
    Option("inf_data", 1, int, "1: fresh training samples every epoch; 0: one fixed set", choices=(0, 1)),
    Option("workers", 4, int, "threads that generate training batches in advance; 0: none", low=0, high=256),
    Option("prefetch_factor", 2, int, "batches that each of them keeps ready", low=1, high=1024),
)

TRAINING = (
    Option("epochs", 250, int, "epochs to train in all", low=1),
    Option("batch_size", 512, int, "samples in a batch, over all processes of a node", low=1),
    Option("learning_rate", 0.003, float, "learning rate of Adam", above=0, high=1e6),
    Option("learning_rate_decay", 0.85, float, "factor by which the learning rate falls", above=0, high=1),
    Option("decay_learning_rate_every", 20, int, "after every this many epochs", low=1),
    Option("max_grad_norm", 40.0, float, "clip the norm of the gradient; 0 or less: off"),
    Option("l2", 1e-5, float, "strength of the activity regularization, from the second epoch on", low=0),
    Option("l2_decay", 1.0, float, "factor by which that falls whenever the learning rate does", above=0, high=1),
    Option("target_rate", 0.0, float, "its target firing rate, Hz", low=0),
    Option("seed", None, int, "seed of the initial weights; none: draw and report one", low=0, high=2**63 - 1, optional=True),
    Option("start_epoch", 0, int, "number of the first epoch of a new run", low=0),
)

# Not in the published program, and off by default.
CURRICULUM = (
    Option("curriculum_start", 0, int, "pairs in a sequence in the first epoch, to grow to --sequence_length; 0: off", low=0),
    Option("curriculum_step", 1, int, "pairs added in each later epoch", low=1),
)

EXECUTION = (
    Option("device", "auto", str, "auto, cpu, cuda or cuda:N"),
    Option("backend", "auto", str, "kernel backend; auto: the fastest that runs here", choices=BACKENDS),
    Option("print_freq", 1, int, "training steps between two updates of the progress bar or lines in a log", low=1),
    Option("logging", False, bool, "write TensorBoard logs, too (needs the package tensorboard)"),
)

RUN = (
    Option("resume", "", str, "checkpoint or run folder to continue or evaluate (its best one); auto: that of --output_dir"),
    Option("check_params", 1, int, "0: accept model options that differ from the checkpoint's", choices=(0, 1)),
    Option("evaluate", False, bool, "test the --resume checkpoint on the published test set"),
    Option("print_options", False, bool, "print the resolved options, which --config reads, and stop"),
    Option("output_dir", "", str, "folder of the run: checkpoints, metrics, options; empty: a new one in runs/"),
    Option("gpu", None, int, "the same as --device cuda:N", low=0, optional=True),
)

DISTRIBUTED = (
    Option("multiprocessing_distributed", False, bool, "train on all GPUs of this node, one process per GPU"),
    Option("processes_per_node", None, int, "processes on each node, on GPUs or CPUs; none: one per GPU", low=1, optional=True),
    Option("world_size", -1, int, "number of nodes", low=-1),
    Option("rank", -1, int, "number of this node, from 0", low=-1),
    Option("dist_url", "tcp://127.0.0.1:23456", str, "where the nodes meet, at rank 0; or env:// (torchrun)"),
    Option("dist_backend", "nccl", str, "nccl for GPUs, gloo for CPUs", choices=("nccl", "mpi", "gloo")),
    Option("dist_timeout", 120.0, float, "give up after this many seconds without an answer from another process", above=0),
)

# fmt: on

# What makes a run what it is: recorded in its folder and in its checkpoints, and taken from there at a resume.
RECORDED = (*MODEL, *DATA, *TRAINING, *CURRICULUM, *EXECUTION)

TASK_GROUPS = {
    "model": MODEL,
    "data": DATA,
    "training": TRAINING,
    "curriculum": CURRICULUM,
    "execution": EXECUTION,
    "run": RUN,
    "distributed training": DISTRIBUTED,
}


# Options that are gone, each with the value at which it changed nothing; records and checkpoints of v0.3 hold some of them.
REMOVED = {
    "network": "hebbian_snn",
    "rule": "hebbian",
    "rectified": "true",
    "positions": "false",
    "adaptation": None,
    "tau_adaptation": None,
    "mixed_lengths": "0",
}


def check_removed(name: str, value: Any) -> None:
    """Raises ValueError for an option that is gone, unless its value changed nothing."""
    if str(value).lower() != REMOVED[name]:
        raise ValueError("removed after v0.3; see CHANGELOG.md")


@dataclass
class Options:
    """Resolved options: `options["thr"]`."""

    values: dict[str, Any]
    given: frozenset[str]  # the names set on the command line or in a YAML file
    groups: Mapping[str, Sequence[Option]]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def of(self, options: Iterable[Option], *more: str) -> dict[str, Any]:
        """The values of some options."""
        return {name: self.values[name] for name in (*(option.name for option in options), *more)}

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """The sequence lengths, one or several."""
        length = self["sequence_length"]
        return length if isinstance(length, tuple) else (length,)

    @property
    def nodes(self) -> int:
        return max(self["world_size"], 1)

    @property
    def step_size(self) -> int:
        """Samples of a training step: --batch_size counts per node."""
        return self["batch_size"] * self.nodes

    def check_combination(self) -> None:
        """Raises UsageError for what is impossible about the options together, with the remedy."""
        longest, classes = max(self.all_lengths), self["num_classes"]
        if longest > classes:
            raise UsageError(
                f"--sequence_length {longest} is more than --num_classes {classes}: labels are drawn without replacement; "
                "raise --num_classes or shorten the sequence"
            )
        if self.values.get("evaluate", True):  # plotting does not train either
            return
        if self["curriculum_start"] > longest:
            raise UsageError(f"--curriculum_start {self['curriculum_start']} is more than --sequence_length {longest}")
        if len(self.all_lengths) > 1:
            raise UsageError("--sequence_length: several lengths are for --evaluate; training takes one")

    def to_yaml(self) -> str:
        """What is recorded of them, in groups; --config reads it again."""
        lines = []
        for title, options in self.groups.items():
            if record := self.of(option for option in options if option in RECORDED):
                plain = {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
                if "batch_size" in plain:
                    plain["batch_size"] = self.step_size  # of one node that runs it again
                lines += [f"# {title}", yaml.safe_dump(plain, sort_keys=False).rstrip()]
        return "\n".join(lines) + "\n"

    def adopt(self, params: Mapping[str, Any], options: Iterable[Option]) -> None:
        """Take from a checkpoint's options those that are not given here."""
        for option in options:
            if option.name in params and option.name not in self.given:
                self.values[option.name] = params[option.name]

    def differences(self, params: Mapping[str, Any], options: Iterable[Option]) -> list[str]:
        """One phrase for each option that differs from the checkpoint's."""
        return [
            f"{o.name} {self[o.name]} (checkpoint: {params[o.name]})"
            for o in options
            if o.name in params and params[o.name] != self[o.name]
        ]


class _Loader(yaml.BaseLoader):
    """YAML whose scalars stay words (but for null), so that `010` and `1:30` are what they are on the command line."""

    def construct_mapping(self, node, deep=False):
        names = [str(self.construct_object(name, deep=True)).replace("-", "_") for name, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.YAMLError(f"{twice} is there twice")
        return {name: self.construct_object(value, deep=True) for name, (_, value) in zip(names, node.value, strict=True)}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


class Parser(argparse.ArgumentParser):
    """A parser of a table of options and `--config`. Raises UsageError, in one line, for what is wrong."""

    def __init__(self, description: str, groups: Mapping[str, Sequence[Option]]):
        super().__init__(
            usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]",
            description=description,
            epilog="Names may be written with hyphens, too. A switch takes true or false, or --no_SWITCH.",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        self._negative_number_matcher = re.compile(r"-[.\d]|-inf|-nan")  # values, not options; argparse's own misses -1e-3
        self.groups = groups
        self.table = {option.name: option for options in groups.values() for option in options}
        text = "read options from a YAML file; the command line overrides it, and a later file an earlier one"
        self.add_argument("--config", action="append", metavar="FILE.yaml", help=text)
        for title, options in groups.items():
            group = self.add_argument_group(title)
            for option in options:
                default = {None: "none", (): "none", "": "empty"}.get(option.default, option.default)
                text = f"{option.help} (default: {default})".replace("%", "%%")
                if option.kind is bool:
                    nargs, metavar = {"nargs": "?", "const": True}, "BOOL"
                else:
                    nargs, metavar = {"nargs": "+"} if option.words else {}, option.words or option.name.upper()
                if option.choices:
                    metavar = "{" + ",".join(map(str, option.choices)) + "}"
                group.add_argument(f"--{option.name}", **nargs, metavar=metavar, help=text)
                if option.kind is bool:
                    off = {"dest": option.name, "action": "store_const", "const": False, "help": argparse.SUPPRESS}
                    group.add_argument(f"--no_{option.name}", **off)
        for name in REMOVED:
            self.add_argument(f"--{name}", nargs="?", const="true", help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise UsageError(" ".join(message.split()))

    def parse(self, argv: Sequence[str] | None = None) -> Options:
        """Options from defaults, then `--config`, then the command line."""
        argv = sys.argv[1:] if argv is None else argv
        words = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
        parsed, unknown = self.parse_known_args(words)
        if unknown and not unknown[0].startswith("--"):
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        if unknown:
            self._refuse("", dict(zip(words, argv, strict=True))[unknown[0]].partition("=")[0])
        arguments = vars(parsed)
        sources = [(f"{path}: ", self._read(path)) for path in arguments.pop("config", ())] + [("--", arguments)]
        values, given = {name: option.default for name, option in self.table.items()}, set()
        for prefix, found in sources:
            for name, value in found.items():
                if name not in self.table.keys() | REMOVED:
                    self._refuse(prefix, name)
                try:
                    if name in REMOVED:
                        check_removed(name, value)
                        continue
                    values[name] = self.table[name].convert(value)
                except ValueError as wrong:
                    self.error(f"{prefix}{name}: {wrong}")
                given.add(name)
        return Options(values, frozenset(given), self.groups)

    def _refuse(self, prefix: str, spelled: str) -> NoReturn:
        name = spelled.lstrip("-").replace("-", "_")
        initials = {"".join(word[0] for word in option.split("_")): option for option in self.table}  # lr
        close = initials.get(name) or next(iter(difflib.get_close_matches(name, self.table, n=1)), None)
        hint = f", did you mean {close}?" if close else ""
        if name == "local_rank":
            hint = "; start the processes by torchrun, which passes it in the environment"
        self.error(f"{prefix}{spelled}: no such option{hint}")

    def _read(self, path: str) -> dict[str, Any]:
        try:
            found = yaml.load(Path(_to_str(path)).read_text(encoding="utf-8"), _Loader)
        except OSError as failure:
            self.error(f"--config {path}: {failure.strerror}")
        except (yaml.YAMLError, ValueError, RecursionError, RuntimeError) as failure:
            self.error(f"--config {path}: not a YAML file of options ({' '.join(str(failure).split())})")
        if not isinstance(found, dict | None):
            self.error(f"--config {path}: must hold lines like 'memory_size: 100'")
        return found or {}
