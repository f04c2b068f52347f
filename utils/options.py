"""The options: one table of names, defaults, types and bounds, for the command line and for YAML files."""

import argparse
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from models import BACKENDS, Dynamics
from models.memorizing_associations import Sizes
from models.neurons import LIFNeuron
from models.plasticity import HebbianRule


@dataclass(frozen=True)
class Option:
    """One option, on the command line (in both spellings, with underscores and with hyphens) and in YAML files."""

    name: str
    default: Any
    kind: type | Callable[[Any], Any]  # int, float, str, bool (a switch), or a converter that raises ValueError
    help: str
    low: float | None = None  # least value
    above: float | None = None  # the value must be greater than this
    high: float | None = None  # greatest value
    choices: tuple | None = None
    optional: bool = False  # may be none
    words: str = ""  # where it takes several words on the command line: what to call one of them in the help

    def convert(self, value: Any) -> Any:
        """The value from a word of the command line or from YAML.

        Raises:
            ValueError: wrong type or impossible value; the message says what is wanted.
        """
        if value is None or (self.optional and value == "none"):
            if self.optional:
                return None
            raise ValueError("needs a value")
        converted = _CONVERTERS.get(self.kind, self.kind)(value)
        if self.choices and converted not in self.choices:
            raise ValueError(f"must be one of {', '.join(map(str, self.choices))}, not {value}")
        for number in converted if isinstance(converted, tuple) else (converted,):
            if self.low is not None and number < self.low:
                raise ValueError(f"must be at least {self.low:g}, not {number}")
            if self.above is not None and number <= self.above:
                raise ValueError(f"must be greater than {self.above:g}, not {number}")
            if self.high is not None and number > self.high:
                raise ValueError(f"must be at most {self.high:g}, not {number}")
        return converted


def _to_int(value: Any) -> int:
    if isinstance(value, (bool, float)):
        raise ValueError(f"must be a whole number, not {value}")
    try:
        return int(value)
    except (TypeError, ValueError):
        raise ValueError(f"must be a whole number, not {value!r}") from None


def _to_float(value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)  # YAML reads 1e-5 as a word
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"must be a number, not {value!r}") from None
    if not math.isfinite(number):
        raise ValueError(f"must be finite, not {value}")
    return number


def _to_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, not {value!r}")
    return value


def _to_str(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {value!r}")
    if not value.isprintable():
        raise ValueError(f"must be printable text, not {value!r}")
    return value


_CONVERTERS = {int: _to_int, float: _to_float, bool: _to_bool, str: _to_str}


def lengths(value: Any) -> int | tuple[int, ...]:
    """A sequence length, or several: 10, "2,5,10", "2-10", "2-5,10" or a list of these."""
    if isinstance(value, (list, tuple)):
        found = tuple(n for item in value for n in _as_tuple(lengths(item)))
    elif isinstance(value, str) and not re.fullmatch(r"[+-]?\d+", value.strip()):
        found = ()
        for part in value.split(","):
            ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if not ends:
                raise ValueError(f"must be lengths like 10, 2,5,10 or 2-10, not {value!r}")
            first, last = int(ends[1]), int(ends[2] or ends[1])
            if last < first or last - first > 10_000:
                raise ValueError(f"must be ranges from a smaller to a larger length, not {part!r}")
            found += tuple(range(first, last + 1))
    else:
        return _to_int(value)
    if not found:
        raise ValueError("must name at least one length")
    return found if len(found) > 1 else found[0]


def _as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


_sizes, _dynamics, _lif, _hebbian = Sizes(), Dynamics(), LIFNeuron(), HebbianRule()

SEQUENCE_LENGTH = Option(
    "sequence_length", 10, lengths, "pairs in a sequence; with --evaluate several: 2,5,10 or 2-10", low=1, words="N"
)

# What a network is. A checkpoint's must be the same to resume, evaluate or plot it.
MODEL = (
    SEQUENCE_LENGTH,
    Option("num_classes", _sizes.num_classes, int, "labels to draw from", low=1),
    Option("feature_size", _sizes.feature_size, int, "size of the random vectors", low=1),
    Option("num_time_steps", _dynamics.num_time_steps, int, "time steps (ms) for which each input is held", low=1),
    Option("embedding_size", _sizes.embedding_size, int, "neurons of an encoding population", low=1),
    Option("memory_size", _sizes.memory_size, int, "key neurons, and value neurons, of the memory", low=1),
    Option("w_max", _hebbian.w_max, float, "soft upper bound of a Hebbian weight", above=0),
    Option("gamma_pos", _hebbian.gamma_pos, float, "strength of Hebbian potentiation", low=0),
    Option("gamma_neg", _hebbian.gamma_neg, float, "strength of Hebbian depression", low=0),
    Option("tau_trace", _hebbian.tau_trace, float, "time constant of the spike traces, ms", above=0),
    Option("readout_delay", _dynamics.readout_delay, int, "delay of the feedback from values to keys while reading, ms", low=1),
    Option("thr", _lif.thr, float, "firing threshold", above=0),
    Option("perfect_reset", _lif.perfect_reset, bool, "reset the membrane to 0 instead of subtracting the threshold"),
    Option("refractory_time_steps", _lif.refractory_time_steps, int, "refractory time steps (ms) after a spike", low=0),
    Option("tau_mem", _lif.tau_mem, float, "time constant of the membrane, ms", above=0),
    Option("dampening_factor", _lif.dampening_factor, float, "height of the surrogate derivative", low=0),
)

DATA = (
    Option("dataset_seed", 42, int, "seed of the training, validation and test samples", low=0),
    Option("inf_data", 1, int, "1: fresh training samples every epoch; 0: one fixed set", choices=(0, 1)),
    Option(
        "workers", 4, int, "threads that generate training batches ahead; 0: generate each when it is needed", low=0, high=256
    ),
    Option("prefetch_factor", 2, int, "batches each of them keeps ready", low=1, high=1024),
)

TRAINING = (
    Option("epochs", 250, int, "epochs to train in all", low=1),
    Option("batch_size", 512, int, "samples in a batch, over all processes of a node", low=1),
    Option("learning_rate", 0.003, float, "learning rate of Adam", above=0, high=1e6),
    Option("learning_rate_decay", 0.85, float, "factor on the learning rate", above=0, high=1),
    Option("decay_learning_rate_every", 20, int, "epochs between two of its decays", low=1),
    Option("max_grad_norm", 40.0, float, "clip the norm of the gradient; 0 or less: off"),
    Option("l2", 1e-5, float, "strength of the activity regularization, from the second epoch on", low=0),
    Option("target_rate", 0.0, float, "its target firing rate, Hz", low=0),
    Option(
        "seed",
        None,
        int,
        "seed of the initial weights; none: a new one, which is reported",
        low=0,
        high=2**63 - 1,
        optional=True,
    ),
    Option("start_epoch", 0, int, "number of the first epoch of a new run", low=0),
)

# Not in the published program, and off by default.
CURRICULUM = (
    Option("curriculum_start", 0, int, "pairs in a sequence in the first epoch, to grow to --sequence_length; 0: off", low=0),
    Option("curriculum_step", 1, int, "pairs more in each epoch after it", low=1),
    Option("mixed_lengths", 0, int, "train each batch at a random length from this one up; 0: off", low=0),
)

RUN = (
    Option("resume", "", str, "checkpoint to continue or evaluate; auto: the newest whole one in --output_dir"),
    Option("check_params", 1, int, "0: accept model options that differ from the checkpoint's", choices=(0, 1)),
    Option("evaluate", False, bool, "test the --resume checkpoint on the published test set"),
    Option("print_options", False, bool, "print the resolved options, which --config reads, and stop"),
    Option("output_dir", "", str, "folder of the run: checkpoints, metrics, options (default: a new one in runs/)"),
    Option("device", "auto", str, "auto, cpu, cuda or cuda:N"),
    Option("gpu", None, int, "the same as --device cuda:N", low=0, optional=True),
    Option("backend", "auto", str, "who runs the time loops; auto: the fastest that runs here", choices=BACKENDS),
    Option("print_freq", 1, int, "training steps between two updates of the progress bar", low=1),
    Option("logging", False, bool, "write TensorBoard logs, too (needs the package tensorboard)"),
)

DISTRIBUTED = (
    Option("multiprocessing_distributed", False, bool, "train on all GPUs of this node, one process each"),
    Option("processes_per_node", None, int, "so many processes, on GPUs or CPUs; none: one a GPU", low=1, optional=True),
    Option("world_size", -1, int, "number of nodes", low=-1),
    Option("rank", -1, int, "number of this node, from 0", low=-1),
    Option("dist_url", "tcp://127.0.0.1:23456", str, "where the nodes meet, at rank 0; or env:// (torchrun)"),
    Option("dist_backend", "nccl", str, "nccl for GPUs, gloo for CPUs", choices=("nccl", "mpi", "gloo")),
    Option("dist_timeout", 120.0, float, "give up after so many seconds without an answer from another process", above=0),
)

TASK_GROUPS = {
    "model": MODEL,
    "data": DATA,
    "training": TRAINING,
    "curriculum": CURRICULUM,
    "run": RUN,
    "distributed training": DISTRIBUTED,
}

# What does not belong into the record of a run: where it is, and what was asked of it this once.
_NOT_RECORDED = {"resume", "evaluate", "output_dir", "check_params", "print_options"}


@dataclass
class Options:
    """Resolved options: `options["thr"]`."""

    values: dict[str, Any]
    given: frozenset[str]  # the names set on the command line or in the YAML file
    groups: Mapping[str, Sequence[Option]]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def of(self, options: Iterable[Option], *more: str) -> dict[str, Any]:
        """The values of some options."""
        return {name: self.values[name] for name in (*(o.name for o in options), *more)}

    @property
    def all_lengths(self) -> tuple[int, ...]:
        """The sequence lengths, one or several."""
        return _as_tuple(self["sequence_length"])

    def combination_error(self) -> str | None:
        """What is impossible about the options together, with the remedy."""
        longest, classes = max(self.all_lengths), self["num_classes"]
        if longest > classes:
            return (
                f"--sequence_length {longest} is more than --num_classes {classes}: labels are drawn without replacement; "
                "raise --num_classes or shorten the sequence"
            )
        if self.values.get("evaluate", True):  # plotting does not train either
            return None
        for name in ("curriculum_start", "mixed_lengths"):
            if self[name] > longest:
                return f"--{name} {self[name]} is more than --sequence_length {longest}"
        if len(self.all_lengths) > 1:
            return "--sequence_length: several lengths are for --evaluate; training takes one"
        return None

    def to_yaml(self) -> str:
        """The record of a run, which --config reads again."""
        lines = []
        for title, options in self.groups.items():
            record = {o.name: self.values[o.name] for o in options if o.name not in _NOT_RECORDED}
            plain = {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}
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


class _Loader(yaml.SafeLoader):
    """Plain YAML, in which no key may stand twice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
            raise yaml.YAMLError(f"{twice[0]} stands there twice")
        return super().construct_mapping(node, deep)


class Parser(argparse.ArgumentParser):
    """An argument parser that tells an error in one line, and whose options stand in a table, with `--config` beside them."""

    def __init__(self, description: str, groups: Mapping[str, Sequence[Option]]):
        super().__init__(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        self.groups = groups
        self.add_argument("--config", metavar="FILE.yaml", help="read options from a YAML file; the command line overrides it")
        for title, options in groups.items():
            group = self.add_argument_group(title)
            for option in options:
                self._add(group, option)

    def _add(self, group, option: Option) -> None:
        spellings = dict.fromkeys((f"--{option.name}", f"--{option.name.replace('_', '-')}"))
        default = {None: "none", (): "none", "": "empty"}.get(option.default, option.default)
        text = f"{option.help} (default: {default})".replace("%", "%%")
        if option.kind is bool:
            group.add_argument(*spellings, action=argparse.BooleanOptionalAction, dest=option.name, help=text)
        elif option.words:
            group.add_argument(*spellings, nargs="+", dest=option.name, metavar=option.words, help=text)
        else:
            metavar = "{" + ",".join(map(str, option.choices)) + "}" if option.choices else option.name.upper()
            group.add_argument(*spellings, dest=option.name, metavar=metavar, help=text)

    def error(self, message: str) -> NoReturn:
        in_one_line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {in_one_line} (--help lists the options)\n")

    def parse(self, argv: Sequence[str] | None = None) -> Options:
        """Options from defaults, then `--config`, then the command line. Exits with 2 and one line for what is wrong."""
        arguments = vars(self.parse_args(argv))
        config = arguments.pop("config", None)
        table = {o.name: o for options in self.groups.values() for o in options}
        values = {name: option.default for name, option in table.items()}
        given = self._read(config) if config is not None else {}
        sources = [(f"{config}: {{}}", given), ("--{}", arguments)]
        for source, found in sources:
            for name, value in found.items():
                if name not in table:
                    close = difflib.get_close_matches(str(name), table, n=1)
                    hint = f", did you mean {close[0]}?" if close else ""
                    self.error(f"{source.format(name)}: no such option{hint}")
                try:
                    values[name] = table[name].convert(value)
                except ValueError as wrong:
                    self.error(f"{source.format(name)}: {wrong}")
        return Options(values, frozenset(given) | frozenset(arguments), self.groups)

    def _read(self, path: str) -> dict[str, Any]:
        try:
            found = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
        except OSError as failure:
            self.error(f"--config {path}: {failure.strerror}")
        except (yaml.YAMLError, ValueError, RecursionError) as failure:
            self.error(f"--config {path}: not a YAML file ({' '.join(str(failure).split())})")
        if found is None:
            return {}
        if not isinstance(found, dict):
            self.error(f"--config {path}: must hold lines like 'memory_size: 100'")
        return {name.replace("-", "_") if isinstance(name, str) else name: value for name, value in found.items()}
