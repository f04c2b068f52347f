"""An `argparse.ArgumentParser` that also reads YAML files and reports errors in one line, and types for its options."""

import argparse
import difflib
import importlib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from reprlib import repr as short
from typing import Any, NoReturn

import yaml

from models.constants import out_of_bounds
from utils.errors import UsageError, UserError, reason, shown

# Removed options, each with the value that had no effect; run folders and checkpoints of v0.3 hold some of them.
REMOVED = {"network": "hebbian_snn", "rectified": "true", "positions": "false"}
REMOVED |= {"adaptation": "", "tau_adaptation": "", "mixed_lengths": "0"}
_ABSENT = object()  # the value of an option that is not given


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """With the default of every option; an empty one is called none, which is also how it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = super()._get_help_string(action)
        return text.replace("%(default)s", "none") if text and action.default in ("", None, ()) else text


class Parser(argparse.ArgumentParser):
    """Options in both spellings (`--dist-url`, `--dist_url`), from the command line and from the YAML files of --config.

    A file is read as the words `--name=value`, so that files and the command line are checked alike.

    Args:
        doc: the docstring of the script, whose first line becomes the description; None with `python -OO`.
    """

    def __init__(self, doc: str | None):
        super().__init__(
            usage="%(prog)s [--config FILE.yaml] [--OPTION VALUE ...]",
            description=(doc or "").partition("\n")[0],
            epilog="Names may also be written with hyphens. A switch takes true or false.",
            formatter_class=_Help,
            allow_abbrev=False,
        )
        self._negative_number_matcher = re.compile(r"-[.\d]|-inf|-nan")  # values, not options; argparse alone misses -1e-3
        text = "read options from a YAML file; later files override earlier ones, and the command line overrides all"
        self.add_argument("--config", action="append", default=argparse.SUPPRESS, metavar="FILE.yaml", help=text)
        hidden: dict[str, Any] = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        for name, harmless in REMOVED.items():
            self.add_argument(f"--{name}", type=removed(harmless), nargs="?", const="true", **hidden)

    def given(self, words: Sequence[str] | None = None) -> dict[str, Any]:
        """The options, by name, that these words (default: the command line) set, also through YAML files.

        Raises:
            UsageError: an option or a file is wrong. The message is one line that names it.
        """
        own = self._parse(sys.argv[1:] if words is None else words)
        found: dict[str, Any] = {}
        for path in own.pop("config", ()):
            try:
                values = self._parse(words_of_yaml(Path(os.path.expanduser(path))))
                if "config" in values:
                    raise UsageError("config: a file cannot name another file")
                found |= values
            except UsageError as wrong:
                raise UsageError(f"--config {shown(path)}: {wrong}") from None
        return found | own

    def complete(self, *values: Mapping[str, Any]) -> argparse.Namespace:
        """All options: the defaults, overridden by each of these mappings in turn."""
        found = {action.dest: action.default for action in self._actions if action.default != argparse.SUPPRESS}
        for more in values:
            found |= {name: value for name, value in more.items() if name in found}
        return argparse.Namespace(**found)

    def _parse(self, words: Sequence[str]) -> dict[str, Any]:
        words = [re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
        for word in words:
            if re.fullmatch("--[^=]+=--", word):  # argparse drops the value
                self.error(f"{word.removesuffix('=--')[:80]}: must have a value other than --")
        absent = argparse.Namespace(**{action.dest: _ABSENT for action in self._actions if action.dest != "config"})
        parsed, unknown = self.parse_known_args(words, absent)
        if unknown:
            self._refuse(unknown[0])
        found = {name: value for name, value in vars(parsed).items() if value is not _ABSENT and name not in REMOVED}
        # The word none gives an empty path; in a list of paths it is no path.
        return {
            name: [one for one in value if one != ""] if isinstance(value, list) else value for name, value in found.items()
        }

    def _refuse(self, word: str) -> NoReturn:
        name = word.partition("=")[0][:80]
        if not name.startswith("--"):
            self.error(f"{short(word)}: not an option")
        known = [action.dest for action in self._actions if action.help != argparse.SUPPRESS]
        initials = {"".join(part[0] for part in option.split("_")): option for option in known}  # lr: learning_rate
        close = initials.get(name[2:]) or next(iter(difflib.get_close_matches(name[2:], known, n=1)), None)
        self.error(f"{name}: no such option" + (f", did you mean --{close}?" if close else ""))

    def error(self, message: str) -> NoReturn:
        raise UsageError(shown(message.removeprefix("argument ")))


def read_words(path: Path) -> Any:
    """The content of a YAML file, with scalars as the words in the file. Raises UsageError."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Words)
    except OSError as failure:
        raise UsageError(reason(failure, path)) from failure
    except (yaml.YAMLError, ValueError, RecursionError, RuntimeError) as failure:
        raise UsageError(f"not a YAML file of options ({shown(failure)})") from failure


def words_of_yaml(path: Path) -> list[str]:
    """A YAML file of options as words of a command line. Raises UsageError."""
    found = read_words(path)
    if not isinstance(found, dict | None):
        raise UsageError("must hold lines like 'memory_size: 100'")
    for name, value in (found or {}).items():
        if not all(isinstance(one, str) for one in (value if isinstance(value, list) else [value])):
            raise UsageError(f"{short(name)}: must have one value, or a list of values")
    return words_of(found or {})


class _Words(yaml.BaseLoader):
    """YAML whose scalars stay words (null is none), so that `010` and `1:30` mean the same as on the command line."""

    def construct_mapping(self, node, deep=False):
        found: dict[str, Any] = {}
        for pair in node.value:
            name, value = (self.construct_object(part, deep=True) for part in pair)
            if not isinstance(name, str):
                raise yaml.YAMLError(f"{short(name)} is not an option")
            if (name := name.replace("-", "_")) in found:
                raise yaml.YAMLError(f"{name} is given twice")
            found[name] = value
        merged = found.pop("<<", {})
        if not isinstance(merged, dict):
            raise yaml.YAMLError("<< must be a mapping")
        return merged | found


_Words.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Words.add_constructor("tag:yaml.org,2002:null", lambda loader, node: "none")


def words_of(values: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""

    def word(value: Any) -> str:
        if isinstance(value, tuple | list):
            return ",".join(map(word, value))
        return "none" if value is None else str(value)

    return [f"--{name}={word(value)}" for name, value in values.items()]


def dump(values: Mapping[str, Any]) -> str:
    """Options as YAML, which --config reads again."""
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return yaml.safe_dump(plain, sort_keys=False)


def differences(values: Mapping[str, Any], record: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """A phrase for each of these options whose value differs from the checkpoint's."""
    both = [name for name in names if name in values and name in record and values[name] != record[name]]
    return [f"{name} {values[name]} (checkpoint: {record[name]})" for name in both]


# Own neurons and rules

OWN = ("neuron", "rule")


def imported(option: str, text: str) -> Any:
    """The class or object that a text MODULE:NAME names; None for an empty text.

    Raises:
        UserError: the class or object cannot be imported here.
    """
    if not text:
        return None
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as failure:  # the module is the user's, and may raise anything
        raise UserError(f"--{option} {text}: cannot be imported here ({type(failure).__name__}: {shown(failure)})") from failure


def constants_of_objects(given: Mapping[str, Any]) -> dict[str, Any]:
    """The constants of an own neuron and rule that are given as objects, not as classes."""
    parts = [imported(option, given.get(option, "")) for option in OWN]
    objects = [part for part in parts if part is not None and not isinstance(part, type)]
    return {field: getattr(part, field) for part in objects for field in getattr(part, "__dataclass_fields__", ())}


# Types: functions of a word, which raise an ArgumentTypeError that says what is expected.


def number(
    kind: type, low: float | None = None, high: float | None = None, above: float | None = None
) -> Callable[[str], int | float]:
    """A 64-bit int or a finite float, from `low` to `high` and greater than `above`."""

    def convert(word: str) -> int | float:
        try:
            value = kind(word)
        except ValueError:
            what = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {what}, not {short(word)}") from None
        if kind is int and abs(value) >= 2**63:
            raise argparse.ArgumentTypeError(f"must be a 64-bit number, not {short(word)}")
        if wrong := out_of_bounds(value, low=low, above=above, high=high):
            raise argparse.ArgumentTypeError(wrong)
        return value

    return convert


def of(constants: type, name: str) -> dict[str, Any]:
    """Type, bounds and default of an option for a constant of the model."""
    (field,) = (field for field in fields(constants) if field.name == name)
    if isinstance(field.default, bool):
        return SWITCH | {"default": field.default}
    return {"type": number(type(field.default), **field.metadata), "default": field.default}


def optional(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """The same type, which also takes none."""
    return lambda word: None if word == "none" else convert(word)


def switch(word: str) -> bool:
    if word.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"must be true or false, not {short(word)}")
    return word.lower() == "true"


SWITCH: dict[str, Any] = {"type": switch, "nargs": "?", "const": True, "default": False, "metavar": "BOOL"}


def path(word: str) -> str:
    """Printable text, in which ~ is the home folder; none means an empty text."""
    if not word.isprintable():
        raise argparse.ArgumentTypeError(f"must be printable text, not {short(word)}")
    return "" if word == "none" else os.path.expanduser(word)


def module_and_name(word: str) -> str:
    """MODULE:NAME of a class or an object; `none`, and v0.3's word `hebbian` for the paper's rule, mean an empty text."""
    if word in ("", "none", "hebbian"):
        return ""
    if not re.fullmatch(r"[\w.]+:\w+", word):
        raise argparse.ArgumentTypeError(f"must be MODULE:NAME, like examples.another_rule:OjaRule, not {short(word)}")
    return word


def lengths(word: str) -> int | tuple[int, ...]:
    """A sequence length, or several: 10, 2,5,10 or 2-10."""
    found: list[int] = []
    for part in word.split(","):
        ends = re.fullmatch(r"\s*(\d{1,9})\s*(?:-\s*(\d{1,9})\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (1, 0)
        if not 1 <= first <= last <= first + 10_000:
            raise argparse.ArgumentTypeError(f"must be one length (10) or several (2,5,10 or 2-10), not {short(word)}")
        found += range(first, last + 1)
    return tuple(found) if len(found) > 1 else found[0]


def removed(harmless: str) -> Callable[[str], str]:
    """The type of a removed option, which refuses any value but the one that had no effect."""

    def convert(word: str) -> str:
        if word.lower() != harmless:
            raise argparse.ArgumentTypeError("removed after v0.3; see CHANGELOG.md")
        return word

    return convert
