"""What runs leave to read, in their folders or kept compactly: three files per group, in place of four per run.

GROUP/runs.yaml     options that all runs of the group share; for each run what differs, and the commands that made it
GROUP/metrics.csv   a row per epoch of each run, every number as in the run's metrics.jsonl
GROUP/tests.csv     a row per tested length of each run, as in its accuracy_by_length.csv
"""

import csv
import json
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
        UserError: there are none, or a file is damaged.
    """
    if not root.is_dir():
        return _checked(root, read_file)
    folders = [path.parent for path in root.rglob(METRICS) if (path.parent / OPTIONS).exists()]
    found = [_checked(folder, lambda folder: [read_run(folder, root)]) for folder in folders]
    found += [_checked(path.parent, lambda group: list(read_group(group, root))) for path in root.rglob(GROUP)]
    if not found:
        raise UserError(f"{root}: holds no run ({OPTIONS} and {METRICS}, or {GROUP}); name the --output_dir of a sweep")
    return sorted((result for results in found for result in results), key=_order)


def _order(result: Result) -> tuple:
    group, _, run = result.name.rpartition("/")
    return group, *(result.options[name] for name in ("sequence_length", "seed", "num_classes")), run


def _checked(path: Path, read) -> list[Result]:
    try:
        return read(path)
    except OSError as failure:
        raise UserError(f"{path}: {failure.strerror}") from failure
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error, yaml.YAMLError) as damage:
        raise UserError(f"{path}: damaged ({' '.join(str(damage).split())}); leave it out") from damage


def read_run(folder: Path, root: Path) -> Result:
    options = yaml.safe_load(_text(folder / OPTIONS))
    commands = _text(folder / COMMANDS).splitlines()
    tables = [folder / TABLE, folder / f"model_best.{TABLE}"]  # of --evaluate with --output_dir, and without
    metrics, tests = read_metrics(folder / METRICS), next(filter(None, map(_read_tests, tables)), [])
    name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
    return Result(name, options, commands, metrics, tests)


def read_file(path: Path) -> list[Result]:
    path.stat()  # a file that is asked for by name must be there
    options = yaml.safe_load(_text(path.with_name(OPTIONS))) or {}
    metrics, tests = ([], _read_tests(path)) if path.suffix == ".csv" else (read_metrics(path), [])
    return [Result(path.resolve().parent.name, options, [], metrics, tests)]


def _read_tests(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(_text(path).splitlines()))


def read_group(folder: Path, root: Path) -> Iterator[Result]:
    group = yaml.safe_load(_text(folder / GROUP))
    rows: dict[str, dict[str, list]] = {name: {} for name in (GROUP_METRICS, GROUP_TESTS)}  # file -> run -> rows
    for name, by_run in rows.items():
        for row in csv.DictReader(_text(folder / name).splitlines()):
            by_run.setdefault(row.pop("run"), []).append({column: value for column, value in row.items() if value})
    for run, own in group["runs"].items():
        name = f"{folder.relative_to(root).as_posix()}/{run}"
        metrics = [{n: json.loads(v) for n, v in row.items()} for row in rows[GROUP_METRICS].get(run, [])]
        yield Result(name, group["options"] | own["options"], own["commands"], metrics, rows[GROUP_TESTS].get(run, []))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The columns of `metrics` or `tests` that hold a number in every row."""
    found = {}
    for name in rows[0] if rows else ():
        try:
            found[name] = np.array([row[name] for row in rows], dtype=float)
        except (ValueError, TypeError, KeyError):
            continue  # words, or numbers that only some rows have
    return found


def write_groups(results: Iterable[Result], root: Path) -> None:
    """Keep runs compactly below a folder; `read_results` gives the same runs again."""
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
        for name, content in ((GROUP, text), (GROUP_METRICS, to_csv(metrics)), (GROUP_TESTS, to_csv(tests))):
            (root / group / name).write_text(content, encoding="utf-8")
