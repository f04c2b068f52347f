"""Update the parts of the READMEs that come from the kept runs: their tables and some sentences.

python -m experiments.readme

The text between <!-- NAME --> and <!-- end --> is replaced by the result of the function NAME in FROM_RUNS.
"""

import argparse
import csv
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

import data
import models
from experiments import compare
from experiments.analyze import FRESH, in_words
from experiments.summarize import accuracy_at, summary
from utils.errors import UserError, in_one_line
from utils.results import Result, read_results

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / name for name in ("README.md", "experiments/README.md", "pretrained/README.md")]
BLOCK = re.compile(r"<!-- (\w+) -->.*?<!-- end -->", re.DOTALL)
LENGTHS = (2, 5, 10, 20, 30, 40, 55)
PUBLISHED = ("published", "published_0.3")  # a seed gives other initial weights in each
SHORT = ("published_0.3_short", "ood_published")
TESTED = 2000  # samples
# The populations that fire while a pair is stored and while one is recalled, with their numbers of neurons.
STORING = {"features_encoded": 80, "labels_encoded": 80, "write_key": 100, "write_value": 100}
RECALLING = {"query_encoded": 80, "read_key": 100, "read_value": 100}
SECONDS_OF_A_PAIR = 0.1


@in_one_line
def main(argv=None) -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args(argv)
    kept = Kept(ROOT / "experiments")
    for path in FILES:
        path.write_text(fill(path.read_text(encoding="utf-8"), kept), encoding="utf-8")
    return 0


class Kept:
    """The kept runs, and their rows of table.csv, by group; the comparison; the tables of the analysis."""

    def __init__(self, folder: Path):
        self.runs: dict[str, list[Result]] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        for run in read_results(folder / "results"):
            group = run.name.rpartition("/")[0]
            self.runs.setdefault(group, []).append(run)
            self.rows.setdefault(group, []).append(summary(run))
        self.networks = compare.table(compare.read_groups(folder / "comparison", folder / "results"))
        self.analysis = {path.stem: read_csv(path) for path in (folder / "results" / "analysis").glob("*.csv")}

    def both(self, *groups: str) -> list[tuple[Result, dict[str, Any]]]:
        """The runs of these groups, each with its row."""
        return [pair for group in groups if group in self.runs for pair in zip(self.runs[group], self.rows[group], strict=True)]

    def tests(self, group: str, length: int) -> list[float]:
        """Test accuracy in percent of the seeds that learned, trained and tested at a length."""
        found = [row for row in self.rows[group] if row["sequence_length"] == length and row["outcome"] == "learned"]
        return [row["test_accuracy"] for row in found]

    def of_network(self, table: str, network: str) -> list[dict[str, str]]:
        return [row for row in self.analysis[table] if row["network"] == network]

    def networks_in(self, table: str) -> list[str]:
        """The networks of a table, shortest sequences first, the tuned rule last."""
        names = {row["network"] for row in self.analysis[table]}
        return sorted(names, key=lambda name: ("tuned" in name, int(re.split("[ ,]", in_words(name))[0]), name))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def fill(text: str, kept: Kept) -> str:
    """The text with its generated parts updated. Raises UserError for an unknown name."""

    def made_anew(block: re.Match) -> str:
        if block[1] not in FROM_RUNS:
            raise UserError(f"no {block[1]!r}: there are {', '.join(FROM_RUNS)}")
        found = FROM_RUNS[block[1]](kept)
        return f"<!-- {block[1]} -->{found if isinstance(found, str) else markdown(found)}<!-- end -->"

    return BLOCK.sub(made_anew, text)


def markdown(rows: list[list]) -> str:
    """The first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n" + "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


# Words for numbers


def several(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation (number of values); a single value with two digits."""
    if len(values) < 2:
        return "".join(f"{value:.2f} (1)" for value in values)
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f} ({len(values)})"


def difference(before: list[float], after: list[float]) -> str:
    """The difference of the means over seeds, with its standard error."""
    if min(len(before), len(after)) < 2:
        return "one seed"
    return gain(mean(after) - mean(before), *(stdev(values) / len(values) ** 0.5 for values in (before, after)))


def gain(points: float, *errors: float) -> str:
    """A difference with its standard error, from the errors of both sides; "none" within one error."""
    error = math.hypot(*errors)
    return "none" if abs(points) <= error else f"{points:+.2f} ± {error:.2f}"


def error_of_share(percent: float, samples: int) -> float:
    """The standard error of a share, in percentage points."""
    return math.sqrt(percent * (100 - percent) / samples)


def span(values: Iterable[int]) -> str:
    """Smallest to largest."""
    ordered = sorted(values)
    return f"{ordered[0]:,}" if ordered[0] == ordered[-1] else f"{ordered[0]:,} to {ordered[-1]:,}"


def listed(seeds: list[int]) -> str:
    return span(seeds) if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1 else ", ".join(map(str, seeds))


def tested(row: dict[str, Any]) -> str:
    return f"{row['test_accuracy']:.2f}" + " (silent)" * (row["outcome"] == "silent")


# Measurements


def to_the_end(kept: Kept) -> list[dict[str, Any]]:
    """Rows of the runs with the published options that had 250 epochs, or were silent in epoch 100 and ended."""
    return [row for _, row in kept.both(*PUBLISHED) if row["of_epochs"] >= 100]


def silent_epochs(run: Result) -> list[int]:
    return [line["epoch"] for line in run.metrics if line["read_value"] < models.SILENT_BELOW]


def half_right(run: Result) -> int | None:
    return next((line["epoch"] for line in run.metrics if line["validation_accuracy"] >= 50), None)


def spikes(run: Result) -> float:
    """Spikes of all populations per sample, mean over the training samples of the last epoch."""
    line, pairs = run.metrics[-1], run.options["sequence_length"]
    storing, recalling = (sum(line[name] * size for name, size in part.items()) for part in (STORING, RECALLING))
    return SECONDS_OF_A_PAIR * (pairs * storing + recalling)


def later_by_chance(kept: Kept, network: str) -> float:
    """Percent of the other pairs that come later than the asked one, mean over the errors of a network."""
    places, later = kept.of_network("position", network), []
    for row in places:
        share = 100 * (len(places) - int(row["position"])) / (len(places) - 1)
        later += [share] * (int(row["samples"]) - right(row))
    return mean(later)


def right(row: dict[str, str]) -> int:
    """The number of right answers in a row of the position table."""
    return round(int(row["samples"]) * float(row["accuracy"]) / 100)


# Sentences


def waking(kept: Kept) -> str:
    runs = [run for run, row in kept.both(*PUBLISHED) if row["sequence_length"] == row["num_classes"] == 10]
    short = [run.options["epochs"] for run in runs if run.options["epochs"] < 100]
    silent = [(run, epochs) for run in runs if (epochs := silent_epochs(run))]
    woke = [len(epochs) for run, epochs in silent if epochs[-1] < len(run.metrics)]
    never = len(silent) - len(woke)
    fell = f"{len(silent)} of {len(runs)} seeds fall silent at 10 pairs, in epoch {span(epochs[0] for _, epochs in silent)}"
    fell += f" ({len(short)} seeds were trained for only {span(short)} epochs)"
    return f"{fell}; {len(woke)} of them wake after {span(woke)} epochs, {never} never {'does' if never == 1 else 'do'}"


def to_their_end(kept: Kept) -> str:
    """Test accuracy of the seeds that learned: with the published options, and with the recipe."""
    words = []
    for length in (5, 10):
        found = [row for row in to_the_end(kept) if row["sequence_length"] == length and row["outcome"] == "learned"]
        ours = several([row["test_accuracy"] for row in found], 2)
        words.append(f"{ours} against {several(kept.tests('recipe', length), 2)} at {length} pairs")
    return ", ".join(words)


def hours(kept: Kept) -> str:
    spiking = sum(row["seconds"] or 0 for _, row in kept.both(*kept.runs))
    runs = compare.read_runs(ROOT / "experiments" / "comparison").values()
    others = sum(line["seconds"] for run in runs for line in run.metrics)
    return f"{(spiking + others) / 3600:.0f} core-hours"


# The tables. Each returns its rows, the head first.


def results(kept: Kept) -> list[list]:
    """The table of the front page."""
    rows = [["pairs of as many classes", "updates", *LENGTHS]]
    whole = [row for row in to_the_end(kept) if row["num_classes"] > 1]
    each = [", ".join(tested(row) for row in whole if row["sequence_length"] == length) or "not run" for length in LENGTHS]
    rows.append(
        ["published options, 250 epochs (silent ones: 100 or 250), each seed", span(row["updates"] for row in whole), *each]
    )
    for group in ("recipe", "recipe_tuned"):
        updates = span(row["updates"] for row in kept.rows[group])
        rows.append([f"`configs/{group}.yaml`, 40 epochs", updates])
        rows[-1] += [several(kept.tests(group, length)) for length in LENGTHS]
    return rows


def published(kept: Kept) -> list[list]:
    """Every run with the published options: when the reading values are silent, and the accuracy."""
    head = ["pairs", "classes", "initial weights", "epochs", "seeds", "fall silent in epoch", "silent for epochs", "never wake"]
    rows = [[*head, "50 % in validation in epoch", "test %, each seed"]]
    found: dict[tuple, list[tuple[Result, dict]]] = {}
    for run, row in kept.both(*PUBLISHED, *SHORT):
        weights = "since v0.3" if run.name.startswith("published_0.3") else "before v0.3"
        if row["num_classes"] > 1:
            found.setdefault((row["sequence_length"], row["num_classes"], weights, row["of_epochs"]), []).append((run, row))
    for key, members in sorted(found.items(), key=lambda item: (item[0][1] != item[0][0], *item[0][:3], -item[0][3])):
        fell = [(run, epochs) for run, _ in members if (epochs := silent_epochs(run))]
        woke = [epochs for run, epochs in fell if epochs[-1] < len(run.metrics)]
        half = [epoch for run, _ in members if key[0] > 2 and (epoch := half_right(run))]
        rows.append([*key, listed([row["seed"] for _, row in members])])
        rows[-1] += [f"{span(epochs[0] for _, epochs in fell)} ({len(fell)} of {len(members)})" if fell else "none"]
        rows[-1] += [span(map(len, woke)) if woke else "", f"{len(fell) - len(woke)} of {len(members)}"]
        rows[-1] += [span(half) if half else "", ", ".join(tested(row) for _, row in members)]
    return rows


def two_pairs(kept: Kept) -> list[list]:
    """The published options at 2 pairs: the share of ties, and the accuracy if a tie counts as half."""
    rows = [["epochs", "seed", "loss at the end", "validation % at the end", "test %", "ties %", "test %, ties shared"]]
    for run, row in kept.both(*PUBLISHED, *SHORT):
        if row["sequence_length"] == row["num_classes"] == 2 and "ties" in run.tests[0]:
            last, (test,) = run.metrics[-1], run.tests
            rows.append([row["epochs"], row["seed"], f"{last['validation_loss']:.2f}", f"{last['validation_accuracy']:.1f}"])
            rows[-1] += [tested(row), *(f"{float(test[column]):.1f}" for column in ("ties", "accuracy_ties_shared"))]
    return rows


def budgets(kept: Kept) -> list[list]:
    """Updates and samples of every protocol."""
    rows = [["training", "groups of runs", "samples an update", "epochs", "updates", "thousand samples"]]
    protocols = {
        "published options": (*PUBLISHED, *SHORT),
        "published options, length curriculum": ("curriculum", "ood_curriculum"),
        "recipes": ("recipe", "recipe_tuned", *compare.SPIKING, "recipe_from_one_pair"),
        "their controls": ("first_recipe", "first_recipe_tuned"),
        "recipe, longer": ("recipe_longer",),
    }
    for words, named in protocols.items():
        groups = [group for group in named if group in kept.runs]
        runs = kept.both(*groups)
        epochs = {row["epochs"] for _, row in runs}
        rows.append([words, ", ".join(f"`{group}`" for group in groups)])
        rows[-1].append(span(run.options["batch_size"] for run, _ in runs))
        rows[-1] += [span(epochs), span(row["updates"] for _, row in runs)]
        rows[-1] += [span(count * data.TRAINING_SAMPLES // 1000 for count in epochs)]
    (row,) = [row for row in kept.networks if row["group"] == "lstm"]  # and each other network
    samples = row["epochs"] * data.TRAINING_SAMPLES // 1000
    common = compare.COMMON["batch_size"], row["epochs"], f"{row['updates']:,}", samples
    return [*rows, ["other networks", "`comparison/`", *common]]


def recipes(kept: Kept) -> list[list]:
    rows = [["pairs", "published rule (`recipe`)", "tuned rule (`recipe_tuned`)", "difference"]]
    for length in LENGTHS[1:]:
        published_rule, tuned_rule = (kept.tests(group, length) for group in ("recipe", "recipe_tuned"))
        rows.append([length, several(published_rule, 2), several(tuned_rule, 2) or "not run"])
        rows[-1].append(difference(published_rule, tuned_rule) if tuned_rule else "")
    return rows


def regularization(kept: Kept) -> list[list]:
    """The recipes and their controls."""
    head = ["rule", "pairs", "test %: `l2` 1e-5", "1e-4, falling", "difference", "spikes a sample: 1e-5", "1e-4, falling"]
    rows: list[list] = [head]
    for rule, words in (("", "published"), ("_tuned", "tuned")):
        for length in (5, 10, 20, 30):
            groups = f"first_recipe{rule}", f"recipe{rule}"
            tests = [kept.tests(group, length) for group in groups]
            fired = [[spikes(run) for run, row in kept.both(group) if row["sequence_length"] == length] for group in groups]
            if all(tests):
                rows.append([words, length, *(several(seeds, 2) for seeds in tests), difference(*tests)])
                rows[-1] += [f"{mean(seeds):,.0f} ({len(seeds)})" for seeds in fired]
    return rows


def errors(kept: Kept) -> list[list]:
    """The pairs that wrong answers name, and those that a guess among the other pairs would name."""
    rows = [["pairs", f"errors of {TESTED:,}", "% of the nearest vector", "chance", "% of a later pair", "chance"]]
    for name in kept.networks_in("errors"):
        (row,) = kept.of_network("errors", name)
        pairs, count = int(row["sequence_length"]), int(row["errors"])
        if pairs > 2:  # of two pairs, only one is left to name
            rows.append([in_words(name), count])
            for column, chance in (("of_nearest_vector", 100 / (pairs - 1)), ("of_later_pair", later_by_chance(kept, name))):
                share = float(row[column])
                rows[-1] += [f"{share:.0f} ± {error_of_share(share, count):.0f}", f"{chance:.0f}"]
    return rows


def depression(kept: Kept) -> list[list]:
    """The same weights, tested with other values of gamma_neg."""
    strengths = ("0.3", "0.1", "0.02", "0.0")
    head = ["pairs", "trained with", *(f"tested with {float(strength):g}" for strength in strengths)]
    rows = [[*head, f"{FRESH:,} fresh samples: as trained", "tested with 0", "gain of 0"]]
    for name in kept.networks_in("depression"):
        found = {row["gamma_neg"]: float(row["accuracy"]) for row in kept.of_network("depression", name)}
        trained = "0.02" if "tuned" in name else "0.3"
        fresh = {row["gamma_neg"]: float(row["accuracy"]) for row in kept.of_network("fresh", name)}
        both = fresh[trained], fresh["0.0"]
        rows.append([in_words(name), trained, *(f"{found[strength]:.2f}" for strength in strengths)])
        rows[-1] += [f"{accuracy:.2f}" for accuracy in both]
        rows[-1].append(gain(both[1] - both[0], *(error_of_share(accuracy, FRESH) for accuracy in both)))
    return rows


def pause(kept: Kept) -> list[list]:
    """Accuracy for the last and for the other pairs, without and with one pair's time without input before the query."""
    rows = [["pairs", "last pair (samples)", "with pause", "other pairs", "with pause", f"right answers of {TESTED:,}"]]
    for name in kept.networks_in("pause"):
        last = int(kept.of_network("position", name)[-1]["samples"])
        parts = {"last_pair": last, "other_pairs": TESTED - last}
        percent = {part: [float(row[part]) for row in kept.of_network("pause", name)] for part in parts}
        counts = [sum(round(percent[part][n] * samples / 100) for part, samples in parts.items()) for n in (0, 1)]
        without, paused = percent["last_pair"]
        rows.append([in_words(name), f"{without:.1f} ({last})", f"{paused:.1f}"])
        rows[-1] += [*(f"{value:.1f}" for value in percent["other_pairs"]), f"{counts[1] - counts[0]:+d}"]
    return rows


def longer(kept: Kept) -> list[list]:
    """Trained with 10 pairs of 30 classes, tested at other lengths."""
    lengths = (2, 5, 10, 15, 20, 25, 30)
    rows = [["training", "updates", *(f"{length} pairs" for length in lengths)]]
    trainings = {
        "ood_recipe_tuned": "recipe, rule tuned",
        "ood_recipe": "recipe",
        "ood_curriculum": "published options, length curriculum",
        "ood_published": "published options (two more are silent)",
    }
    for group, words in trainings.items():
        runs = kept.both(group)
        learned = [run for run, row in runs if row["outcome"] == "learned"]
        rows.append([words, span(row["updates"] for _, row in runs)])
        rows[-1] += [several([accuracy for run in learned if (accuracy := accuracy_at(run, length))]) for length in lengths]
    return rows


def networks(kept: Kept) -> list[list]:
    """Other networks and the spiking ones, the best at 30 pairs first."""
    shown = [f"{length} pairs" for length in compare.SHOWN]
    rows = [["network", "seeds", "learning rate", "curriculum", *shown]]
    for row in sorted(kept.networks, key=lambda row: -float(row["30 pairs"].split()[0])):
        curriculum = "from 2 pairs" if row["curriculum from"] else "none"
        rows.append([row["network"], row["seeds"], row["learning rate"], curriculum, *(row[length] for length in shown)])
    return rows


def costs(kept: Kept) -> list[list]:
    """Core-hours of 250 epochs, from the seconds per epoch of the fastest run of a recipe."""
    quiet, groups = [], ("recipe", "recipe_tuned", "first_recipe", "first_recipe_tuned")
    for length in LENGTHS[1:]:
        runs = [run for run, row in kept.both(*groups) if row["sequence_length"] == length]
        quiet.append(min(float(np.median([line["seconds"] for line in run.metrics[-10:]])) for run in runs))
    whole = [row["sequence_length"] for row in to_the_end(kept)]
    rows = [["pairs of as many classes", *LENGTHS[1:]]]
    rows.append(["core-hours of 250 epochs", *(f"{250 * seconds / 3600:.1f}" for seconds in quiet)])
    rows.append(["seeds so far", *(whole.count(length) for length in LENGTHS[1:])])
    return rows


def pretrained(kept: Kept) -> list[list]:
    """The networks in pretrained/."""
    rows = [["file", "GROUP/run", "pairs of classes", "epoch", "validation %", "test %"]]
    for _, row in kept.both(*kept.runs):
        file = f"{row['run'].replace('/', '-')}.pth.tar"
        if (ROOT / "pretrained" / file).exists():
            pairs, epochs = f"{row['sequence_length']} of {row['num_classes']}", f"{row['best_epoch']} of {row['of_epochs']}"
            validation = f"{row['best_validation_accuracy']:.1f}"
            rows.append([f"`{file}`", f"`{row['run']}`", pairs, epochs, validation, f"{row['test_accuracy']:.2f}"])
    return rows


_TABLES = (
    results,
    published,
    two_pairs,
    budgets,
    recipes,
    regularization,
    errors,
    depression,
    pause,
    longer,
    networks,
    costs,
    pretrained,
)
FROM_RUNS = {made.__name__: made for made in (*_TABLES, waking, to_their_end, hours)}


if __name__ == "__main__":
    sys.exit(main())
