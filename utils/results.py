"""The results of runs, in their folders or in an archive with three files per group of runs, instead of four per run.

GROUP/runs.yaml     options that all runs of the group share; for each run its other options and its commands
GROUP/metrics.csv   a row per epoch of each run, every number as in the run's metrics.jsonl
GROUP/tests.csv     a row per tested length of each run, as in its accuracy_by_length.csv
"""

import contextlib
import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from utils import checkpoints
from utils.errors import UserError, reason
from utils.metrics import read_metrics, to_csv
from utils.run import METRICS, OPTIONS, TABLE

COMMANDS = "command.txt"  # in the run folders of a sweep
GROUP, GROUP_METRICS, GROUP_TESTS = "runs.yaml", "metrics.csv", "tests.csv"
INDECISIVE = "workers prefetch_factor device backend print_freq logging".split()  # options that do not define the experiment
OF_REPETITIONS = ["seed", "epochs", *INDECISIVE]  # options in which repetitions of a run may differ


class Result(NamedTuple):
    """A run. Accuracies in percent, firing rates in Hz, epochs counted from 1."""

    name: str  # group/run
    options: dict[str, Any]
    commands: list[str]  # "commit: command"
    metrics: list[dict[str, Any]]  # one per epoch
    tests: list[dict[str, str]]  # one per tested length


def read_results(*roots: Path) -> list[Result]:
    """The runs in folders and archives below these roots, sorted by group, length, seed and classes; or the run of a file.

    Args:
        roots: each a folder, or a metrics file, or a table of --evaluate (options {} if no options.yaml is beside the file).

    Raises:
        UserError: there are no runs, a run is there twice, or a file is damaged or cannot be read.
    """
    found: list[Result] = []
    for root in roots:
        if root.is_dir():
            found += sorted(_below(root), key=_order)
            continue
        with _named_in_errors(root):
            found.append(read_file(root))
    _refuse_copies(found)
    return found


def _below(root: Path) -> list[Result]:
    found: list[Result] = []
    for folder in _folders(root):
        with _named_in_errors(folder):
            found += read_group(folder, root) if (folder / GROUP).exists() else []
            found += [read_run(folder, root)] if (folder / METRICS).exists() or (folder / OPTIONS).exists() else []
    if not found:
        raise UserError(f"{root}: holds no run ({OPTIONS} and {METRICS}, or {GROUP}); name the --output_dir of a sweep")
    return found


def _refuse_copies(results: Sequence[Result]) -> None:
    """Refuse a run that is there twice: it would count as two seeds. A copy may be longer, so only the first epoch counts."""
    known: dict[str, str] = {}
    for result in results:
        options = {name: value for name, value in result.options.items() if name == "seed" or name not in OF_REPETITIONS}
        first = [{name: value for name, value in line.items() if name != "seconds"} for line in result.metrics[:1]]
        numbers = json.dumps([options, first or result.tests], sort_keys=True, default=str)
        if numbers in known and (first or result.tests):
            raise UserError(f"{known[numbers]}, {result.name}: these are the same run; leave one out")
        known[numbers] = result.name


def _folders(root: Path) -> list[Path]:
    """A folder and all folders below it, each once, also behind symbolic links (by a path without links, if there is one)."""
    found: dict[Path, Path] = {}
    waiting = [root]
    while waiting:
        folder = waiting.pop(0)
        if folder.resolve() in found:
            continue
        found[folder.resolve()] = folder
        with _named_in_errors(folder):
            paths = sorted(folder.iterdir())
        if gone := [path for path in paths if path.is_symlink() and not path.exists()]:
            raise UserError(f"{gone[0]}: is a broken link; mend or remove it")
        below = [path for path in paths if path.is_dir()]
        waiting = [path for path in below if not path.is_symlink()] + waiting + [path for path in below if path.is_symlink()]
    return list(found.values())


def _order(result: Result) -> tuple:
    group, _, run = result.name.rpartition("/")
    parts = re.split(r"(\d+(?:\.\d+)?)", run)  # numbers by their size: 3 before 10
    run_order = [float(part) if n % 2 else part for n, part in enumerate(parts)]
    return group, *(result.options[name] for name in ("sequence_length", "seed", "num_classes")), run_order


@contextlib.contextmanager
def _named_in_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as failure:
        raise UserError(f"{path}: {reason(failure, path)}") from failure
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as damage:
        raise UserError(f"{path}: damaged ({' '.join(str(damage).split())}); leave it out") from damage


def read_run(folder: Path, root: Path) -> Result:
    text = _text(folder / OPTIONS)
    # A run outside a sweep has its commands and their commits at the top of its options.
    by_hand = [": ".join(words) for words in re.findall(r"^# .* commit (\w+).*\n#   (.*)", text, re.MULTILINE)]
    tables = [folder / TABLE, folder / f"model_best.{TABLE}"]  # of --evaluate with --output_dir, and without
    return Result(
        name=folder.relative_to(root).as_posix() if folder != root else folder.resolve().name,
        options=_options(yaml.safe_load(text)),
        commands=_text(folder / COMMANDS).splitlines() or by_hand,
        metrics=read_metrics(folder / METRICS) if (folder / METRICS).exists() else [],  # none during the first epoch
        tests=next(filter(None, map(_rows, tables)), []),
    )


def read_file(path: Path) -> Result:
    path.stat()  # a file that is asked for by name must be there
    described = path.with_name(OPTIONS)
    options = _options(yaml.safe_load(_text(described))) if described.exists() else {}
    metrics, tests = ([], _rows(path)) if path.suffix == ".csv" else (read_metrics(path), [])
    return Result(path.as_posix(), options, [], metrics, tests)


def read_group(folder: Path, root: Path) -> list[Result]:
    group, found = yaml.safe_load(_text(folder / GROUP)), []
    rows: dict[str, dict[str, list]] = {name: {} for name in (GROUP_METRICS, GROUP_TESTS)}  # file -> run -> rows
    for name, by_run in rows.items():
        for row in _rows(folder / name):
            by_run.setdefault(row.pop("run"), []).append({column: value for column, value in row.items() if value})
    for run, own in group["runs"].items():
        name = (folder.relative_to(root) / run).as_posix()
        metrics = [{n: json.loads(v) for n, v in row.items()} for row in rows[GROUP_METRICS].get(run, [])]
        options = _options(group["options"] | own["options"])
        found.append(Result(name, options, own["commands"], metrics, rows[GROUP_TESTS].get(run, [])))
    return found


def _options(found: Any) -> dict[str, Any]:
    """Raises ValueError if these are not the options of a run."""
    needed = ("sequence_length", "num_classes", "seed")
    if not isinstance(found, dict) or not all(isinstance(found.get(name), int) for name in needed):
        raise ValueError(f"its {OPTIONS} must hold the options of a run, including {', '.join(needed)}")
    return found


def _rows(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_text(table).splitlines()))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig") if path.exists() else ""  # Excel starts a file with a mark of UTF-8


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The columns of `metrics` or `tests` that hold a number in every row."""
    found = {}
    for name in rows[0] if rows else ():
        try:
            found[name] = np.array([row[name] for row in rows], dtype=float)
        except (ValueError, TypeError, KeyError):
            continue  # words, or numbers that only some rows have
    return found


def labels(results: Sequence[Result], defaults: dict[str, Any], against: str = "") -> list[str]:
    """For each run, the options that differ between the runs; repetitions with other seeds have the same label.

    A run without recorded options is labelled by its path. If two runs have the same label and the same seed, the name of
    their group is added.

    Args:
        defaults: the values of options that earlier releases did not record.
        against: an option to leave out, with all options that always change with it.
    """
    described = [defaults | result.options for result in results if result.options]

    def changes(name: str) -> list[int]:
        """For each run, the number of the first run with the same value."""
        values = [str(options[name]) for options in described]
        return [values.index(value) for value in values]

    differing = [name for name in defaults if name not in OF_REPETITIONS and any(changes(name))]
    if against:
        differing = [name for name in differing if changes(name) != changes(against)]
    elif not differing:
        differing = ["sequence_length"]
    runs = []
    for result in results:
        options = defaults | result.options
        label = ", ".join(f"{name} {options[name]}" for name in differing) if result.options else result.name
        runs.append((label, options["seed"], options.get(against)))
    several = {run[0] for run in runs if runs.count(run) > 1}
    groups = [result.name.rpartition("/")[0] or result.name for result in results]
    named = zip((label for label, *_ in runs), groups, strict=True)
    return [f"{label}, {group}".removeprefix(", ") if label in several else label for label, group in named]


def write_groups(results: Iterable[Result], root: Path) -> None:
    """Write runs as an archive into a folder, from which `read_results` reads the same runs."""
    groups: dict[str, dict[str, Result]] = {}
    for result in results:
        group, _, run = result.name.rpartition("/")
        groups.setdefault(group, {})[run] = result
    for group, members in groups.items():
        first, *others = (result.options for result in members.values())
        shared = {n: v for n, v in first.items() if all(n in other and other[n] == v for other in others)}
        runs, metrics, tests = {}, [], []
        for run, result in members.items():
            own = {n: v for n, v in result.options.items() if n not in shared}
            runs[run] = {"options": own, "commands": result.commands}
            metrics += [{"run": run} | {n: json.dumps(v) for n, v in line.items()} for line in result.metrics]
            tests += [{"run": run} | line for line in result.tests]
        text = yaml.safe_dump({"options": shared, "runs": runs}, sort_keys=False, width=1000, allow_unicode=True)
        (root / group).mkdir(parents=True, exist_ok=True)
        # The list of runs comes last: a run is there when all of it is there.
        for name, content in ((GROUP_METRICS, to_csv(metrics)), (GROUP_TESTS, to_csv(tests)), (GROUP, text)):
            checkpoints.write_atomically(root / group / name, methodcaller("write", content.encode()))
