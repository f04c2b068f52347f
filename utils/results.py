"""What runs leave to read, in their folders or kept compactly: three files per group, in place of four per run.

GROUP/runs.yaml     options that all runs of the group share; for each run what differs, and the commands that made it
GROUP/metrics.csv   a row per epoch of each run, every number as in the run's metrics.jsonl
GROUP/tests.csv     a row per tested length of each run, as in its accuracy_by_length.csv
"""

import csv
import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from utils.errors import UserError
from utils.metrics import read_metrics, to_csv
from utils.run import METRICS, OPTIONS, TABLE

COMMANDS = "command.txt"  # of a run of a sweep, beside what the task script keeps there
GROUP, GROUP_METRICS, GROUP_TESTS = "runs.yaml", "metrics.csv", "tests.csv"
# Options in which runs that are repetitions of each other may differ: how long, where, and which repetition.
UNNAMED = "seed epochs workers prefetch_factor device backend print_freq logging".split()


class Result(NamedTuple):
    """A run. Accuracies in percent, firing rates in Hz, epochs counted from 1."""

    name: str  # group/run
    options: dict[str, Any]
    commands: list[str]  # "commit: command"
    metrics: list[dict[str, Any]]  # one per epoch
    tests: list[dict[str, str]]  # one per tested length


def read_results(root: Path) -> list[Result]:
    """All runs below a folder, kept either way, by group, then by length, seed and classes; or what one file of a run holds.

    Args:
        root: a folder, or a metrics file, or a table of --evaluate (options {} where none are beside it).

    Raises:
        UserError: there are none, one is there twice, or something below the folder is damaged or cannot be read.
    """
    if not root.is_dir():
        return _checked(root, read_file)
    found = [result for folder in _folders(root) for result in _checked(folder, lambda folder: _of_folder(folder, root))]
    if not found:
        raise UserError(f"{root}: holds no run ({OPTIONS} and {METRICS}, or {GROUP}); name the --output_dir of a sweep")
    refuse_copies(found)
    return sorted(found, key=_order)


def _folders(root: Path) -> Iterator[Path]:
    """This folder and all below it, each once: one that symbolic links lead to goes by its own name where it has one here."""
    waiting, seen = deque([root]), set()
    while waiting:
        folder = waiting.popleft()
        if (own := folder.resolve()) in seen:
            continue
        seen.add(own)
        yield folder
        for path in _checked(folder, lambda folder: sorted(folder.iterdir())):
            if path.is_symlink() and not path.exists():
                raise UserError(f"{path}: is a link to what is not there; mend or remove it")
            if path.is_dir():
                (waiting.append if path.is_symlink() else waiting.appendleft)(path)


def _of_folder(folder: Path, root: Path) -> list[Result]:
    groups = list(read_group(folder, root)) if (folder / GROUP).exists() else []
    return groups + ([read_run(folder, root)] if (folder / METRICS).exists() or (folder / OPTIONS).exists() else [])


def _order(result: Result) -> tuple:
    group, _, run = result.name.rpartition("/")
    parts = re.split(r"(\d+(?:\.\d+)?)", run)  # numbers by their size: 3 before 10
    run_order = [float(part) if n % 2 else part for n, part in enumerate(parts)]
    return group, *(result.options[name] for name in ("sequence_length", "seed", "num_classes")), run_order


def refuse_copies(results: Sequence[Result]) -> None:
    """Raises UserError where a run is there twice, which would count as two seeds: a copied folder, or the same one again."""
    known: dict[str, str] = {}
    for result in results:
        start = [{n: v for n, v in line.items() if n != "seconds"} for line in result.metrics[:1]]  # one may have gone on
        trained = {n: v for n, v in result.options.items() if n == "seed" or n not in UNNAMED}
        numbers = json.dumps([trained, start or result.tests], sort_keys=True, default=str)
        if not start and not result.tests:
            continue  # it has just begun
        if numbers in known:
            raise UserError(f"{known[numbers]}, {result.name}: are the same run; leave one of them out")
        known[numbers] = result.name


def _checked(path: Path, read) -> list:
    try:
        return read(path)
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}") from failure
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as damage:
        raise UserError(f"{path}: damaged ({' '.join(str(damage).split())}); leave it out") from damage


def read_run(folder: Path, root: Path) -> Result:
    options = _options(yaml.safe_load(_text(folder / OPTIONS)))
    commands = _text(folder / COMMANDS).splitlines()
    tables = [folder / TABLE, folder / f"model_best.{TABLE}"]  # of --evaluate with --output_dir, and without
    metrics = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []  # in its first epoch it has none
    tests = next(filter(None, map(_read_tests, tables)), [])
    name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    return Result(name, options, commands, metrics, tests)


def read_file(path: Path) -> list[Result]:
    path.stat()  # a file that is asked for by name must be there
    described = path.with_name(OPTIONS)
    options = _options(yaml.safe_load(_text(described))) if described.exists() else {}
    metrics, tests = ([], _read_tests(path)) if path.suffix == ".csv" else (read_metrics(path), [])
    return [Result(path.as_posix(), options, [], metrics, tests)]


def _options(found: Any) -> dict[str, Any]:
    """Raises ValueError where this is not what a run records."""
    numbers = [found.get(n) for n in ("sequence_length", "num_classes", "seed")] if isinstance(found, dict) else [None]
    if not all(isinstance(number, int) for number in numbers):
        raise ValueError(f"its {OPTIONS} must hold the options of a run, sequence_length, num_classes and seed among them")
    return found


def _read_tests(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_text(path).splitlines()))


def read_group(folder: Path, root: Path) -> Iterator[Result]:
    group = yaml.safe_load(_text(folder / GROUP))
    rows: dict[str, dict[str, list]] = {name: {} for name in (GROUP_METRICS, GROUP_TESTS)}  # file -> run -> rows
    for name, by_run in rows.items():
        for row in csv.DictReader(_text(folder / name).splitlines()):
            by_run.setdefault(row.pop("run"), []).append({column: value for column, value in row.items() if value})
    for run, own in group["runs"].items():
        name = (folder.relative_to(root) / run).as_posix()
        metrics = [{n: json.loads(v) for n, v in row.items()} for row in rows[GROUP_METRICS].get(run, [])]
        options = _options(group["options"] | own["options"])
        yield Result(name, options, own["commands"], metrics, rows[GROUP_TESTS].get(run, []))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig") if path.exists() else ""  # Excel marks its files as UTF-8


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
    """What tells each run from the others, but for repetitions of it with other seeds, which have the same label.

    Options that differ between the same runs are named by the first two of them, where they are more than three.

    Args:
        defaults: the values of options that a record of an earlier release does not have.
        against: an option to leave out, with those that always have its value.
    """

    def values(name: str) -> list[str]:
        return [str((defaults | result.options)[name]) if result.options else "" for result in results]

    alike: dict[tuple, list[str]] = {}  # which runs have the same value as which -> options
    for name in defaults:
        described = [value for value in values(name) if value]
        if name not in UNNAMED and len(set(described)) > 1 and (not against or values(name) != values(against)):
            alike.setdefault(tuple(map(described.index, described)), []).append(name)
    names = [(n, "") if len(n) < 4 else (n[:2], f" and {len(n) - 2} more") for n in alike.values()]
    found = []
    for result in results:
        options = defaults | result.options
        words = [", ".join(f"{name} {options[name]}" for name in first) + more for first, more in names]
        alone = [] if against else [f"sequence_length {options['sequence_length']}"]
        found.append(", ".join(words or alone) if result.options else result.name)
    place = values(against) if against else [""] * len(results)
    runs = [(label, at, result.options.get("seed")) for label, at, result in zip(found, place, results, strict=True)]
    again = {label for (label, *_), result in zip(runs, results, strict=True) if result.options}
    again &= {label for (label, _, _), count in Counter(runs).items() if count > 1}
    groups = [result.name.rpartition("/")[0] or result.name for result in results]
    return [", ".join([label] * bool(label) + [group] * (label in again)) for label, group in zip(found, groups, strict=True)]


def write_groups(results: Iterable[Result], root: Path) -> None:
    """Keep runs compactly below a folder, beside those that it keeps; `read_results` gives the same runs again."""
    groups: dict[str, dict[str, Result]] = {}
    for result in results:
        group, _, run = result.name.rpartition("/")
        if group not in groups:
            kept = read_group(root / group, root) if (root / group / GROUP).exists() else ()
            groups[group] = {old.name.rpartition("/")[2]: old for old in kept}
        groups[group][run] = result
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
        for name, content in ((GROUP, text), (GROUP_METRICS, to_csv(metrics)), (GROUP_TESTS, to_csv(tests))):
            (root / group / name).write_text(content, encoding="utf-8")
